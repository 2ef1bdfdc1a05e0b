"""KTO: learning from single answers marked desirable or undesirable, without pairs.

An answer is better or worse than a reference point z0, an estimate of KL(policy || reference) over the whole batch, on
answers that belong to other prompts. The caller forms those mismatched pairs (each prompt with the answer of another
row of the batch), scores them under both models, and reduces them with `kto_baseline` over the whole batch before
splitting it: z0 is an input of `kto_loss`, so micro-batches and devices share it.
"""

import jax
import jax.numpy as jnp

from easyrl.core.masking import Mean, mean_of

Array = jax.Array


def kto_baseline(logprobs: Array, ref_logprobs: Array, mask: Array) -> Mean:
    """The reference point before it is held at 0: the mean log-ratio of mismatched prompts and answers, no gradient.

        z0 = max(0, mean_i [log policy(y_j | x_i) - log ref(y_j | x_i)]),  j != i

    logprobs, ref_logprobs: [B], summed over the tokens of the answer. mask: [B] bool. `kto_loss` takes the max, once
    the parts of a batch have been added up.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. TRL pairs each prompt with the previous row of
      its micro-batch and takes the mean over that; ours is meant for the whole optimizer batch.
    """
    log_ratios = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    return jax.lax.stop_gradient(mean_of(log_ratios, mask))


def kto_loss(
    logprobs: Array,
    ref_logprobs: Array,
    desirable: Array,
    mask: Array,
    baseline: Array | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Mean, dict[str, Mean]]:
    """KTO's loss, averaged over the True entries of `mask`.

        r = logprobs - ref_logprobs;   z0 = max(0, baseline), no gradient
        desirable_weight * (1 - sigmoid(beta (r - z0)))        where desirable
        undesirable_weight * (1 - sigmoid(beta (z0 - r)))      elsewhere

    Args:
      logprobs, ref_logprobs: [B], summed over the tokens of the answer. desirable, mask: [B] bool.
      baseline: scalar, `kto_baseline(...).value` over the whole batch; 0 gives unpaired APO-zero.
      beta: > 0, about 0.1.
      desirable_weight, undesirable_weight: lambda_D and lambda_U, >= 0. Eq. 8 of the paper wants (desirable_weight *
        number desirable) / (undesirable_weight * number undesirable) between 1 and 4/3.
    Returns:
      (loss, metrics): rewards/chosen and logps/chosen over the desirable answers, rewards/rejected and logps/rejected
      over the undesirable, each a mean over its own count; kl, the z0 that was used. TRL's rewards/margins is
      the difference of the first and the third, taken after parts have been added.
    Raises:
      ValueError: beta or a weight out of range.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7. As TRL's `kto`.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, found {beta}")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        found = f"found {desirable_weight} and {undesirable_weight}"
        raise ValueError(f"desirable_weight and undesirable_weight must not be negative, {found}")
    logprobs, ref_logprobs = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (logprobs, ref_logprobs))
    baseline = jnp.maximum(jax.lax.stop_gradient(jnp.asarray(baseline, jnp.float32)), 0.0)
    log_ratio = logprobs - ref_logprobs
    loss = jnp.where(
        desirable,
        desirable_weight * jax.nn.sigmoid(-beta * (log_ratio - baseline)),
        undesirable_weight * jax.nn.sigmoid(beta * (log_ratio - baseline)),
    )
    good, bad = mask & desirable, mask & ~desirable
    metrics = {
        "rewards/chosen": mean_of(beta * log_ratio, good),
        "rewards/rejected": mean_of(beta * log_ratio, bad),
        "logps/chosen": mean_of(logprobs, good),
        "logps/rejected": mean_of(logprobs, bad),
        "kl": mean_of(jnp.broadcast_to(baseline, mask.shape), mask),
    }
    return mean_of(loss, mask), jax.lax.stop_gradient(metrics)
