"""KL divergence from samples: three per-token estimators, and the adaptive coefficient.

All take log-probs of the same sampled tokens under the policy and the reference, `logprobs[:, t]` scoring
`tokens[:, t+1]`, and write d = logprobs - ref_logprobs. They estimate KL(policy || reference) =
E_{token ~ policy}[d], token by token; all three are exactly 0 where the two models agree.

  name  formula           value, tokens drawn from the policy     gradient when differentiated as a loss
  k1    d                 unbiased, can be negative               0 on average: it trains nothing
  k2    d^2 / 2           biased, by O(|d|^3); never negative     exactly that of KL(policy || reference)
  k3    exp(-d) - 1 + d   unbiased, never negative                that of KL(reference || policy)

So in the reward, where only the value counts, use k1 or k3; in the loss, use k2. (k3 in the loss, GRPO's choice, does
pull towards the reference, but along the gradient of the reversed divergence.) The statements about gradients hold for
tokens drawn from the policy being differentiated, that is in the first minibatch of a rollout.

Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); the gradients: Tang & Munos 2025
(arXiv:2506.09477) and Liu et al. 2025 (arXiv:2510.01555).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def k1(d: Array) -> Array:
    """d, elementwise, for log-ratios d = logprobs - ref_logprobs."""
    return d


def k2(d: Array) -> Array:
    """d^2 / 2, elementwise, for log-ratios d = logprobs - ref_logprobs."""
    return 0.5 * jnp.square(d)


def k3(d: Array) -> Array:
    """exp(-d) - 1 + d, elementwise, for log-ratios d = logprobs - ref_logprobs."""
    # expm1: for the |d| ~ 1e-3 of a normal run, exp(-d) - 1 in float32 would be mostly rounding error.
    return jnp.expm1(-d) + d


ESTIMATORS: dict[str, Callable[[Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(name: str, logprobs: Array, ref_logprobs: Array, mask: Array) -> Array:
    """Per-token estimate of KL(policy || reference): `ESTIMATORS[name](logprobs - ref_logprobs)` where `mask` is True.

    All arguments after the name have one shape, usually [B, T]; mask is bool. Returns float32, exact zeros (with zero
    gradient) where masked. Raises ValueError for an unknown name. In a reward, store the result once per rollout; in a
    loss, reduce it with `mean_of(kl, mask)`.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {name!r}, expected one of {', '.join(ESTIMATORS)}")
    d = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    # Every estimator of 0 is 0, and the inner `where` keeps a NaN in padding out of the gradient as well.
    return ESTIMATORS[name](jnp.where(mask, d, 0.0))


def adaptive_kl_coef(
    kl_coef: float | Array, observed_kl: float | Array, target: float, num_samples: float | Array, horizon: float
) -> Array:
    """The next KL coefficient of a proportional controller that steers the KL per response towards `target`.

        error = clip(observed_kl / target - 1, -0.2, 0.2)
        kl_coef' = kl_coef * (1 + error * num_samples / horizon)

    Args:
      kl_coef: the coefficient the batch was rewarded with.
      observed_kl: mean over the batch's responses of the KL summed over tokens, in nats.
      target: the same quantity, as wanted; > 0.
      num_samples: responses that `observed_kl` is a mean over, so that the speed does not depend on the batch size. 0:
        the coefficient stays.
      horizon: responses over which a saturated error changes the coefficient by about 20 %; > 0. It must exceed
        0.2 * num_samples, which is not checked here, for the coefficient to stay positive.
    Returns:
      a float32 scalar. A fixed coefficient is simply one that is never passed through here.
    Raises:
      ValueError: a target or horizon that is not positive.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2, with K_beta = num_samples / horizon as in their code
      (0.1 in the paper).
    """
    if target <= 0:
        raise ValueError(f"the target KL must be positive, found {target}")
    if horizon <= 0:
        raise ValueError(f"the KL horizon must be positive, found {horizon}")
    error = jnp.clip(jnp.asarray(observed_kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * (num_samples / horizon))
