"""From scores to advantages: rewards per token, generalised advantage estimation, whitening, explained variance.

Index convention, here and in `easyrl.algos.ppo`: `values[:, t] = V(tokens[:, :t+1])`, and `rewards[:, t]`,
`advantages[:, t]`, `mask[:, t]` belong to the action of emitting `tokens[:, t+1]`. `mask` is boolean, True where that
token is part of a response. Masked entries are never read (a NaN there does no harm) and come back as exact zeros.
"""

import jax
import jax.numpy as jnp

from easyrl.core.masking import Mean, masked_sum

Array = jax.Array


def last_position(mask: Array) -> Array:
    """One-hot [B, T] boolean: the last True entry of each row of `mask`; all False for a row without one."""
    positions = jnp.arange(mask.shape[-1])
    last = jnp.max(jnp.where(mask, positions, -1), axis=-1, keepdims=True)
    return positions == last


def token_rewards(scores: Array, kl: Array, mask: Array, *, kl_coef: float | Array) -> Array:
    """Rewards per token: a KL penalty everywhere, and the score of the whole response on its last token.

        rewards[b, t] = -kl_coef * kl[b, t] + scores[b] * [t is the last True entry of mask[b]]

    Args:
      scores: [B], one per response, cast to float32 whatever comes in. (`zeros_like(token_ids)` is an integer array,
        and adding 0.7 to it adds 0: the peers' bug this function exists not to repeat.)
      kl: [B, T], a per-token estimate from `easyrl.algos.kl` (k1 is Ziegler's choice), computed once per rollout.
      mask: [B, T] bool. A row without a True entry gets no reward at all: its score would sit on no token.
      kl_coef: coefficient in units of score per nat; 0 when the KL is a term of the loss instead.
    Returns:
      [B, T] float32.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, split over tokens as in their code. EasyLM's fork appends an
      end-of-text token to every response; since transformers 4.37 keeps the one that was sampled, the score of a
      response that ended sits on a second one, which the policy never sampled. TRL puts it one slot after the end of a
      response that stopped early. Here it sits on the last token that was sampled.
    """
    penalty = jnp.where(mask, -kl_coef * kl.astype(jnp.float32), 0.0)
    return penalty + jnp.where(last_position(mask), scores.astype(jnp.float32)[:, None], 0.0)


def gae(rewards: Array, values: Array, mask: Array, gamma: float | Array, lam: float | Array) -> tuple[Array, Array]:
    """Generalised advantage estimation, as one reverse scan over time.

        delta[t] = rewards[t] + gamma * V[t+1] - values[t]
        advantages[t] = delta[t] + gamma * lam * advantages[t+1]
        returns[t] = advantages[t] + values[t]

    where V[t+1] = values[t+1] and advantages[t+1] count as 0 when t+1 is masked or past the end of the row: the episode
    ends at its last live position. So a row may hold several responses, as long as at least one masked position lies
    between them (in a packed row that is the next prompt), and each gets what it would get in a row of its own.

    Args:
      rewards, values: [B, T]. mask: [B, T] bool. See the module docstring for the index convention.
      gamma, lam: discount and trace decay in [0, 1]. lam=1 gives the Monte Carlo return minus the value, lam=0 the
        one-step TD error.
    Returns:
      (advantages, returns), [B, T] float32, exact zeros where masked. Gradients do flow; the caller stores them frozen.
    Source: Schulman et al. 2015 (arXiv:1506.02438), eqs. 10 and 16; PPO (arXiv:1707.06347), eqs. 11-12.
      A response cut by the length limit is not bootstrapped: as usual in RLHF, the cut text is scored as it stands and
      its end is terminal.
    """
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)

    def step(later: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_advantage, next_value = later
        reward, value, live = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        advantage = jnp.where(live, advantage, 0.0)
        return (advantage, value), advantage

    # `value` is already 0 where masked, so the carry resets itself at every masked position.
    start = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (start, start), (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    return advantages, advantages + values


def whiten(x: Array, mask: Array, *, shift_mean: bool = True) -> Array:
    """Scale the live entries of `x` to standard deviation 1, and to mean 0 if `shift_mean`.

        y = (x - mean) / sqrt(var + 1e-8)  [+ mean unless shift_mean]

    mean and var run over every True entry of `mask`: give the whole rollout batch, never a minibatch. Under jit with
    global arrays the statistics are global over devices and processes.

    Args:
      x: any shape. mask: bool, same shape.
      shift_mean: False keeps the mean where it was (used for rewards: shifting them would pay for every token).
    Returns:
      float32, exact zeros where masked.
    Source: Ziegler et al. 2019 code; Huang et al. 2022, "The 37 implementation details of PPO", detail 7 (per minibatch
      there). As in TRL the squared deviations are divided by n - 1, not by n. EasyLM's fork, in its last version,
      whitens over the minibatch too, which makes a sample's advantage depend on its neighbours there.
    """
    count = jnp.sum(mask, dtype=jnp.float32)
    mean = masked_sum(x, mask) / jnp.maximum(count, 1.0)
    centred = x.astype(jnp.float32) - mean
    # Two passes: E[x^2] - E[x]^2 loses every digit when the mean is large.
    variance = masked_sum(jnp.square(centred), mask) / jnp.maximum(count - 1.0, 1.0)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)  # so that constant input gives 0 (plus the mean), not NaN
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(values: Array, returns: Array, mask: Array) -> Mean:
    """Share of the variance of the returns that the values explain, as the pair (explained, total).

        1 - Var(returns - values) / Var(returns) = (S_r - S_e) / S_r

    with S_r and S_e the sums of squared deviations of returns and errors from their own means over the live entries.
    1 is a perfect critic, 0 no better than a constant, negative is worse; `.value` is 0 when returns do not vary.

    Like `whiten` this needs the whole batch: deviations are from the mean of what is passed, so pairs from parts of a
    batch add up to the variance explained within the parts. Shapes [B, T]; returns float32 scalars.
    Source: CleanRL's `losses/explained_variance` (Huang et al. 2022), restricted to live entries.
    """

    def scatter(x: Array) -> Array:
        x = jnp.where(mask, x.astype(jnp.float32), 0.0)
        mean = jnp.sum(x) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
        return masked_sum(jnp.square(x - mean), mask)

    total = scatter(returns)
    return Mean(total - scatter(returns - values), total)
