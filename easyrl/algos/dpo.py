"""The DPO family: losses on the log-probs of whole answers, one pure function per paper, in one table.

    loss, metrics = dpo_loss("sigmoid", pairs, mask, beta=0.1)

Notation: w is the chosen (winning) and l the rejected (losing) answer; p_w, p_l their log-probs under the policy and
ref_w, ref_l under the reference, each the sum over the |w| or |l| tokens of the answer, end of text included;
r_w = p_w - ref_w and r_l = p_l - ref_l are the log-ratios and s the logistic sigmoid. Every function maps `Pairs` to
losses [B], one per pair, to be averaged over pairs. They read everything in float32 and know nothing of masks;
`dpo_loss` puts harmless numbers where a batch has filler. Hyperparameters are Python numbers, checked when traced.

The unpaired relative, KTO, is in `easyrl.algos.kto`.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from easyrl.algos.preference import check_label_smoothing, logistic_loss
from easyrl.core.masking import Mean, mean_of

Array = jax.Array


class Pairs(NamedTuple):
    """Log-probs summed over the tokens of each answer, and the numbers (at least 1) of those tokens; all [B].

    The losses in `REFERENCE_FREE` do not read the two reference fields: zeros will do.
    """

    chosen: Array
    rejected: Array
    ref_chosen: Array
    ref_rejected: Array
    chosen_lengths: Array
    rejected_lengths: Array


def log_ratios(pairs: Pairs) -> tuple[Array, Array]:
    """(r_w, r_l): log-probs under the policy minus those under the reference, [B] each."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def average_logprobs(pairs: Pairs) -> tuple[Array, Array]:
    """(p_w / |w|, p_l / |l|): log-probs under the policy per token, [B] each."""
    return pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Array:
    """DPO, and conservative DPO with label smoothing.

        -(1 - e) log s(beta (r_w - r_l)) - e log s(-beta (r_w - r_l))

    beta: strength of the pull towards the reference, about 0.1. label_smoothing: e, the probability in [0, 0.5) that a
    label is the wrong way round; 0 is plain DPO.
    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; conservative: Mitchell 2023, "A note on DPO with noisy
      preferences & relationship to IPO", eq. 3. TRL 1's `sigmoid` has no smoothing.
    """
    chosen, rejected = log_ratios(pairs)
    return logistic_loss(beta * (chosen - rejected), label_smoothing)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Array:
    """rDPO: an unbiased estimate, from labels flipped with known probability, of the DPO loss on the true labels.

        [-(1 - e) log s(beta (r_w - r_l)) + e log s(-beta (r_w - r_l))] / (1 - 2 e)

    beta: as in `sigmoid`. label_smoothing: e, the flip rate, in [0, 0.5). Unbounded below for e > 0.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409), section 3.1. As TRL's `robust`.
    """
    check_label_smoothing(label_smoothing)
    chosen, rejected = log_ratios(pairs)
    logits = beta * (chosen - rejected)
    right, wrong = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return ((1.0 - label_smoothing) * right - label_smoothing * wrong) / (1.0 - 2.0 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float, ipo_average: bool = True) -> Array:
    """IPO: regress the difference of the log-ratios onto 1 / (2 beta), so that it stops growing there.

        (r_w / |w| - r_l / |l| - 1 / (2 beta))^2          or, with ipo_average=False,  (r_w - r_l - 1 / (2 beta))^2

    beta: tau of the paper. ipo_average: log-ratios per token, as the authors ran it; the formula reads as summed.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17. As TRL's `ipo`, which averages, on the authors' word.
    """
    chosen, rejected = log_ratios(pairs)
    if ipo_average:
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    return jnp.square(chosen - rejected - 1.0 / (2.0 * beta))


def hinge(pairs: Pairs, *, beta: float) -> Array:
    """Hinge loss on the DPO margin: no gradient once a pair is told apart by 1 / beta.

        max(0, 1 - beta (r_w - r_l))

    beta: inverse width of the margin.
    Source: Zhao et al. 2023, SLiC-HF (arXiv:2305.10425), section 2, with the log-ratios of Liu et al. 2023, RSO
      (arXiv:2309.06657), in place of log-probs, and without SLiC's NLL term (see `nll`). As TRL's `hinge`.
    """
    chosen, rejected = log_ratios(pairs)
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


def sigmoid_norm(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Array:
    """Length-normalised DPO: `sigmoid` on log-ratios per token.

        -(1 - e) log s(beta (r_w / |w| - r_l / |l|)) - e log s(-beta (r_w / |w| - r_l / |l|))

    beta: larger than for `sigmoid`, about 5, because averages are small. label_smoothing: e, as in `sigmoid`.
    Source: Lambert et al. 2024, Tulu 3 (arXiv:2411.15124), section 5. As TRL's `sigmoid_norm`, which has no smoothing.
    """
    chosen, rejected = log_ratios(pairs)
    margin = chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths
    return logistic_loss(beta * margin, label_smoothing)


def simpo(pairs: Pairs, *, beta: float, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Array:
    """SimPO: average log-probs as rewards, no reference, and a target margin.

        x = beta (p_w / |w| - p_l / |l|) - gamma;  -(1 - e) log s(x) - e log s(-x)

    beta: scale of the reward, 2 to 10. simpo_gamma: the margin gamma >= 0, in units of reward (the authors also quote
    it divided by beta). label_smoothing: e, as in `sigmoid`.
    Source: Meng et al. 2024 (arXiv:2405.14734), eq. 6. As TRL's CPO trainer with loss_type simpo and cpo_alpha 0.
    """
    if not simpo_gamma >= 0:
        raise ValueError(f"simpo_gamma must not be negative, found {simpo_gamma}")
    chosen, rejected = average_logprobs(pairs)
    return logistic_loss(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def orpo(pairs: Pairs, *, beta: float) -> Array:
    """ORPO's odds-ratio term; the paper's whole objective adds `nll` of the chosen answers with weight 1.

        -beta log s(log odds(p_w / |w|) - log odds(p_l / |l|)),   log odds(a) = a - log(1 - exp(a))

    beta: lambda of the paper, about 0.1.
    Source: Hong et al. 2024 (arXiv:2403.07691), eqs. 4, 6 and 7. As TRL's ORPO trainer (whose NLL runs over the prompt
      too), except that average log-probs above -1e-6, where float32 no longer knows 1 - p, count as -1e-6.
    """

    def log_odds(logprob: Array) -> Array:
        logprob = jnp.minimum(logprob, -1e-6)
        # log(1 - exp(a)): below -ln 2 through log1p, above through expm1, each where it keeps its digits.
        tail = jnp.where(logprob < -0.6931, jnp.log1p(-jnp.exp(logprob)), jnp.log(-jnp.expm1(logprob)))
        return logprob - tail

    chosen, rejected = average_logprobs(pairs)
    return -beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def apo_zero(pairs: Pairs, *, beta: float) -> Array:
    """APO-zero: raise the chosen and lower the rejected answer, each against the reference.

    For chosen answers that are better than the model's own.

        1 - s(beta r_w) + s(beta r_l)

    beta: as in `sigmoid`.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, plus a constant 1 as in TRL's `apo_zero`.
    """
    chosen, rejected = log_ratios(pairs)
    return 1.0 - jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, *, beta: float) -> Array:
    """APO-down: lower both answers, the rejected one more.

    For chosen answers that are worse than the model's own.

        s(beta r_w) + 1 - s(beta (r_w - r_l))

    beta: as in `sigmoid`. At the reference the two gradients in r_w cancel: the chosen answer falls only once the
    margin has opened.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8, plus a constant 1 as in TRL's `apo_down`.
    """
    chosen, rejected = log_ratios(pairs)
    return jax.nn.sigmoid(beta * chosen) + 1.0 - jax.nn.sigmoid(beta * (chosen - rejected))


def dpop(pairs: Pairs, *, beta: float, dpop_lambda: float = 50.0, label_smoothing: float = 0.0) -> Array:
    """DPO-Positive: DPO that charges a chosen answer for falling below its reference log-prob.

        x = beta (r_w - r_l - lambda max(0, -r_w));  -(1 - e) log s(x) - e log s(-x)

    beta: as in `sigmoid`, 0.3 in the paper. dpop_lambda: lambda >= 0, charged per nat below the reference; 0 is DPO.
    label_smoothing: e, as in `sigmoid`, 0 in the paper.
    Source: Pal et al. 2024, Smaug (arXiv:2402.13228), eq. 3. Not in TRL.
    """
    if not dpop_lambda >= 0:
        raise ValueError(f"dpop_lambda must not be negative, found {dpop_lambda}")
    chosen, rejected = log_ratios(pairs)
    return logistic_loss(beta * (chosen - rejected - dpop_lambda * jax.nn.relu(-chosen)), label_smoothing)


LOSSES: dict[str, Callable[..., Array]] = {
    loss.__name__: loss for loss in (sigmoid, robust, ipo, hinge, sigmoid_norm, simpo, orpo, apo_zero, apo_down, dpop)
}
REFERENCE_FREE = frozenset({"simpo", "orpo"})
# The weight a paper gives to `nll` of the chosen answers; 0 for the losses not named here.
NLL_COEF = {"orpo": 1.0}


def loss_options(name: str) -> frozenset[str]:
    """The keyword arguments the loss `name` reads, so that a flag it does not read can be refused."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}, expected one of {', '.join(LOSSES)}")
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def implicit_rewards(name: str, pairs: Pairs, *, beta: float) -> tuple[Array, Array]:
    """Rewards of (chosen, rejected) that a trained policy stands for, [B] each, without gradient.

        beta * (p - ref)          or, for the losses in REFERENCE_FREE,   beta * p / length

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 5 up to a constant; Meng et al. 2024 (arXiv:2405.14734), eq. 4.
      As TRL logs them: summed log-ratios for the length-normalised losses too.
    """
    chosen, rejected = average_logprobs(pairs) if name in REFERENCE_FREE else log_ratios(pairs)
    return jax.lax.stop_gradient(beta * chosen), jax.lax.stop_gradient(beta * rejected)


def dpo_loss(name: str, pairs: Pairs, mask: Array, *, beta: float, **options: float) -> tuple[Mean, dict[str, Mean]]:
    """The mean of the loss `name` over the True entries of `mask`, and the metrics of preference training.

    Args:
      name: a key of LOSSES. pairs: [B] each. mask: [B] bool; filler pairs are never read, in value or gradient.
      beta: > 0. options: keyword arguments of that loss, see `loss_options`.
    Returns:
      (loss, metrics), means over pairs, metrics as TRL names them: rewards/chosen, rewards/rejected, rewards/margins,
      rewards/accuracies (a tie counts as wrong, so a policy equal to its reference has accuracy 0), logps/chosen,
      logps/rejected (summed over tokens; averaged for the losses in REFERENCE_FREE).
    Raises:
      ValueError: unknown loss, option the loss does not read, or value out of range.
    """
    unread = options.keys() - loss_options(name)
    if unread:
        raise ValueError(f"loss {name} does not read {', '.join(sorted(unread))}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, found {beta}")
    # Filler pairs become pairs of one likely-enough token: finite in every loss, with finite gradients, then dropped.
    filler = (-1.0, -1.0, -1.0, -1.0, 1.0, 1.0)
    pairs = Pairs(*(jnp.where(mask, x.astype(jnp.float32), fill) for x, fill in zip(pairs, filler, strict=True)))
    chosen_rewards, rejected_rewards = implicit_rewards(name, pairs, beta=beta)
    chosen_logps, rejected_logps = average_logprobs(pairs) if name in REFERENCE_FREE else pairs[:2]
    metrics = {
        "rewards/chosen": mean_of(chosen_rewards, mask),
        "rewards/rejected": mean_of(rejected_rewards, mask),
        "rewards/margins": mean_of(chosen_rewards - rejected_rewards, mask),
        "rewards/accuracies": mean_of(chosen_rewards > rejected_rewards, mask),
        "logps/chosen": mean_of(chosen_logps, mask),
        "logps/rejected": mean_of(rejected_logps, mask),
    }
    return mean_of(LOSSES[name](pairs, beta=beta, **options), mask), jax.lax.stop_gradient(metrics)


def nll(logprobs: Array, lengths: Array, mask: Array, *, per_token: bool = True) -> Mean:
    """Negative log-likelihood of the chosen answers, a term added to a preference loss with a coefficient of its own.

        sum_b -p_b / sum_b length_b     (per_token: every token weighs the same, as in SFT)
        mean_b (-p_b / length_b)        (otherwise: every answer weighs the same)

    Args:
      logprobs: [B], summed over the tokens of each answer. lengths: [B], numbers of those tokens. mask: [B] bool.
    Returns:
      a Mean over tokens or over answers. Its count is not that of the preference loss: divide both before adding.
    Source: RPO, Pang et al. 2024 (arXiv:2404.19733), eq. 1, is the second form; TRL's `sft` loss type and ORPO are the
      first.
    """
    logprobs = jnp.where(mask, logprobs.astype(jnp.float32), 0.0)
    lengths = jnp.where(mask, lengths.astype(jnp.float32), 1.0)
    if per_token:
        return Mean(-jnp.sum(logprobs), mean_of(lengths, mask).total)
    return mean_of(-logprobs / lengths, mask)
