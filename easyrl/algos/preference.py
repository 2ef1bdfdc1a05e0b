"""Losses that train a reward model: pairs of scores, or single scores with a yes-or-no label.

A score is the reward model's output for a whole sequence. Entries are pairs or sequences, [B]; `mask` is boolean, False
for the filler entries of a packed batch, which are never read, in value or gradient. All reductions are `Mean` pairs.
"""

import jax
import jax.numpy as jnp

from easyrl.core.masking import Mean, mean_of

Array = jax.Array


def logistic_loss(logits: Array, label_smoothing: float = 0.0) -> Array:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x), elementwise: cross-entropy if the label is wrong with probability e.

    Least at x = log((1 - e) / e) instead of at infinity. Raises ValueError unless 0 <= e < 0.5.
    """
    check_label_smoothing(label_smoothing)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless `label_smoothing`, the share of labels taken to be wrong, is in [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and less than 0.5, found {label_smoothing}")


def pairwise_loss(
    chosen: Array,
    rejected: Array,
    mask: Array,
    *,
    margins: Array | None = None,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> tuple[Mean, dict[str, Mean]]:
    """The Bradley-Terry loss on the scores of chosen and rejected answers.

        x = chosen - rejected - margins
        loss = -(1 - label_smoothing) log sigmoid(x) - label_smoothing log sigmoid(-x)
               + center_coef * (chosen + rejected)^2

    averaged over the True entries of `mask`.

    Args:
      chosen, rejected: [B] scores. mask: [B] bool.
      margins: [B], how much better the chosen answer must score, in units of score; None for 0.
      label_smoothing: probability, in [0, 0.5), that a label is the wrong way round.
      center_coef: weight >= 0 of the centring term, which picks, among all scores that differ by a constant (the first
        term cannot tell them apart), those of mean zero. 0.01 in the source. TRL's `center_rewards_coefficient`.
    Returns:
      (loss, metrics) with metrics over the same pairs: accuracy, margin (chosen - rejected), rewards/chosen,
      rewards/rejected, mean_reward (over both). A tie counts as wrong, as in TRL: a reward model whose score does not
      depend on its input has accuracy 0.
    Raises:
      ValueError: label_smoothing or center_coef out of range.
    Source: Ouyang et al. 2022 (arXiv:2203.02155), eq. 1, with one pair per prompt; margin: Touvron et al. 2023
      (arXiv:2307.09288), eq. 2; centring: Eisenstein et al. 2023 (arXiv:2312.09244), eq. 2. Label smoothing is not in
      TRL; it is that of conservative DPO, around the margin.
    """
    if not center_coef >= 0:
        raise ValueError(f"center_coef must not be negative, found {center_coef}")
    chosen, rejected = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (chosen, rejected))
    margin = chosen - rejected
    target = 0.0 if margins is None else jnp.where(mask, margins.astype(jnp.float32), 0.0)
    loss = logistic_loss(margin - target, label_smoothing) + center_coef * jnp.square(chosen + rejected)
    metrics = {
        "accuracy": mean_of(margin > 0, mask),
        "margin": mean_of(margin, mask),
        "rewards/chosen": mean_of(chosen, mask),
        "rewards/rejected": mean_of(rejected, mask),
        "mean_reward": mean_of(0.5 * (chosen + rejected), mask),
    }
    return mean_of(loss, mask), jax.lax.stop_gradient(metrics)


def pointwise_loss(scores: Array, labels: Array, mask: Array) -> tuple[Mean, dict[str, Mean]]:
    """Binary cross-entropy with the score as the logit of "good".

        loss = -labels * log sigmoid(scores) - (1 - labels) * log sigmoid(-scores)

    averaged over the True entries of `mask`.

    Args:
      scores: [B]. mask: [B] bool.
      labels: [B], bool or numbers in [0, 1]; 1 is good. Above 0.5 counts as good in the metrics.
    Returns:
      (loss, metrics): accuracy (the score's sign agrees with the label; a score of exactly 0 says "bad"),
      rewards/chosen and rewards/rejected (mean score of the good and of the bad, each over its own count), mean_reward.
    Source: plain logistic regression; the Bradley-Terry loss against an opponent whose score is 0.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    labels = jnp.where(mask, labels.astype(jnp.float32), 0.0)
    loss = -labels * jax.nn.log_sigmoid(scores) - (1.0 - labels) * jax.nn.log_sigmoid(-scores)
    good = labels > 0.5
    metrics = {
        "accuracy": mean_of((scores > 0) == good, mask),
        "rewards/chosen": mean_of(scores, mask & good),
        "rewards/rejected": mean_of(scores, mask & ~good),
        "mean_reward": mean_of(scores, mask),
    }
    return mean_of(loss, mask), jax.lax.stop_gradient(metrics)
