"""The clipped losses of PPO: policy, value, entropy.

Everything "old" (log-probs, values) and everything derived from it (advantages, returns) is computed once per rollout
and only read here. Index convention as in `easyrl.algos.advantages`: entry [b, t] is about emitting `tokens[b, t+1]`.
All reductions are `Mean` pairs over the live tokens, so that micro-batches, packing and devices only add up. A gradient
is that of `.total`, divided by the count of the whole minibatch.

Metrics carry the names EasyLM's fork and TRL log, where they have one, without `ppo/policy/` or `ppo/val/` in front.
"""

import jax
import jax.numpy as jnp

from easyrl.algos.kl import k1, k3
from easyrl.core.masking import Mean, mean_of

Array = jax.Array

# exp(20) = 5e8 is far beyond any ratio that means something, and far below float32 overflow, after which the gradient
# of even a clipped token would be 0 * inf = NaN.
MAX_LOG_RATIO = 20.0


def policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    cliprange_low: float,
    cliprange_high: float,
    dual_clip: float = 0.0,
) -> tuple[Mean, dict[str, Mean]]:
    """PPO's clipped surrogate, to be minimised.

        ratio = exp(logprobs - old_logprobs)
        loss = max(-advantages * ratio, -advantages * clip(ratio, 1 - cliprange_low, 1 + cliprange_high))
        loss = min(loss, -advantages * dual_clip)   where advantages < 0, if dual_clip > 0

    averaged over the True entries of `mask`. On the first minibatch of a rollout the ratio is 1 and the loss is
    -mean(advantages).

    Args:
      logprobs, old_logprobs, advantages: [B, T]; gradients flow into `logprobs` only.
      mask: [B, T] bool. What lies outside is never read, in value or gradient.
      cliprange_low, cliprange_high: Python floats, 0 < low <= 1 and high > 0. Equal in the paper; "clip higher" is
        DAPO's (arXiv:2503.14476, eq. 10).
      dual_clip: Python float, 0 (off) or > 1: a bound on how much a very likely bad token can cost, typically 3.
    Returns:
      (loss, metrics), metrics over the same tokens: clipfrac (tokens whose gradient is cut, = clipfrac_low +
      clipfrac_high + clipfrac_dual), ratios_mean, approxkl (k3) and policykl (k1) estimates of
      KL(old policy || policy), advantages_mean.
    Raises:
      ValueError: a clip range outside the bounds above.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv:1912.09729), section 4.
      approxkl is k3 where TRL reports k2, and over padding. The log-ratio is bounded by +-20 before exp. The mean runs
      over the tokens of the whole minibatch; it is no mean of per-row or per-micro-batch means.
    """
    if not (0 < cliprange_low <= 1 and cliprange_high > 0):
        found = f"found {cliprange_low} and {cliprange_high}"
        raise ValueError(f"expected 0 < cliprange_low <= 1 and cliprange_high > 0, {found}")
    if dual_clip != 0 and not dual_clip > 1:
        raise ValueError(f"dual_clip must be 0 (off) or more than 1, found {dual_clip}")

    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages.astype(jnp.float32), 0.0))
    log_ratio = logprobs.astype(jnp.float32) - jax.lax.stop_gradient(old_logprobs.astype(jnp.float32))
    log_ratio = jnp.where(mask, log_ratio, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))

    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - cliprange_low, 1.0 + cliprange_high)
    loss = jnp.maximum(unclipped, clipped)
    # The clip acts where it makes the loss larger: below for bad tokens already less likely, above for good ones
    # already more likely. The dual clip acts on bad tokens become much more likely, so the three never meet.
    acts, good = clipped > unclipped, advantages > 0
    acts_dual = jnp.zeros_like(mask)
    if dual_clip:
        ceiling = -advantages * dual_clip
        acts_dual = (advantages < 0) & (loss > ceiling)
        loss = jnp.where(acts_dual, ceiling, loss)

    metrics = {
        "clipfrac": mean_of(acts | acts_dual, mask),
        "clipfrac_low": mean_of(acts & ~good, mask),
        "clipfrac_high": mean_of(acts & good, mask),
        "clipfrac_dual": mean_of(acts_dual, mask),
        "ratios_mean": mean_of(ratio, mask),
        "approxkl": mean_of(k3(-log_ratio), mask),
        "policykl": mean_of(k1(-log_ratio), mask),
        "advantages_mean": mean_of(advantages, mask),
    }
    return mean_of(loss, mask), jax.lax.stop_gradient(metrics)


def value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, *, cliprange_value: float
) -> tuple[Mean, dict[str, Mean]]:
    """Squared error of the values, pessimistic about moves of more than `cliprange_value` from the old ones.

        clipped = clip(values, old_values - cliprange_value, old_values + cliprange_value)
        loss = 0.5 * max((values - returns)^2, (clipped - returns)^2)

    averaged over the True entries of `mask`.

    Args:
      values, old_values, returns: [B, T]; gradients flow into `values` only. mask: [B, T] bool.
      cliprange_value: Python float > 0, in units of reward; `math.inf` turns the clip off.
    Returns:
      (loss, metrics), metrics over the same tokens: clipfrac (tokens whose gradient is cut), error (mean squared error
      without the clip), vpred (mean value).
    Raises:
      ValueError: cliprange_value not positive.
    Source: Dhariwal et al. 2017 (OpenAI Baselines, PPO2; not in the paper); Huang et al. 2022, detail 9. The factor 0.5
      is inside, as in EasyLM's fork and TRL: compare vf_coef with theirs, not with Baselines'.
    """
    if not cliprange_value > 0:
        raise ValueError(f"cliprange_value must be positive, found {cliprange_value}")
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    old_values = jax.lax.stop_gradient(jnp.where(mask, old_values.astype(jnp.float32), 0.0))
    returns = jax.lax.stop_gradient(jnp.where(mask, returns.astype(jnp.float32), 0.0))

    error = jnp.square(values - returns)
    clipped_error = jnp.square(jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value) - returns)
    metrics = {
        "clipfrac": mean_of(clipped_error > error, mask),
        "error": mean_of(error, mask),
        "vpred": mean_of(values, mask),
    }
    return mean_of(0.5 * jnp.maximum(error, clipped_error), mask), jax.lax.stop_gradient(metrics)


def entropy_bonus(entropy: Array, mask: Array) -> Mean:
    """Mean entropy per live token, in nats, of the distributions the response tokens were drawn from.

        H[b, t] = -sum_v p(v | tokens[b, :t+1]) log p(v | tokens[b, :t+1])

    The bonus is subtracted from the policy loss, times its coefficient. entropy: [B, T], from the function that gives
    the log-probs; mask: [B, T] bool.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 9.
    """
    return mean_of(entropy, mask)
