"""PPO scores a batch of samples once, into the frozen record that its updates read.

    forward   packed passes of policy, reference and value model over the samples
    finish    rewards, advantages and returns: the `Rollout`, after which nothing "old" can change

Index convention, everywhere: `x[b, t]` belongs to the action that emits `tokens[b, t + 1]`. So `logprobs[b, t]` scores
that token, `values[b, t]` is the value of the text up to token t, and `mask[b, t]` is True where that token is part of
a response.

With --num_layers_unfrozen the three models are tops on one frozen bottom (`models/branch.py`). `forward` runs it once
for all of them, and its hidden states stay with the rollout, so that no update runs it again. Without, they are whole
models, the bottom is None and so are the hidden states.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.algos import advantages as adv
from easyrl.algos.kl import adaptive_kl_coef, kl_estimate
from easyrl.core.groups import PackPlan, Plans, gather, over_groups, scatter
from easyrl.core.masking import Mean, all_finite, constant_mean, mean_of
from easyrl.core.sharding import Shard, replicated, sharding_for, stand_in
from easyrl.models.branch import trained_layers, with_embeddings
from easyrl.models.config import ModelConfig
from easyrl.models.heads import scalar
from easyrl.models.trunk import run_layers, trunk
from easyrl.steps.logprobs import next_token_logprobs
from easyrl.steps.ppo_config import PPOConfig
from easyrl.steps.segments import packed_rows

Array = jax.Array

# Hidden states [R, S, D] are kept split by width, so that picking rows of them needs no other device. On their way
# between there and the batch's split by rows they pass through a form from which each is one exchange away.
KEPT, PICKED = (None, None, "kept_width"), (None, None, "picked_width")
HIDDEN = "hidden states that updates start from"


class Passes(flax.struct.PyTreeNode):
    """What the models say of the samples."""

    old_logprobs: Array  # float32 [B, T], 0 outside the mask, as are the next three
    ref_logprobs: Array
    values: Array
    entropies: Array
    hidden: Array | None = None  # [B, T, D] in the compute dtype: what comes out of the shared bottom


class Rollout(flax.struct.PyTreeNode):
    """A scored batch of samples. Frozen: computed once, and the update can only read it."""

    tokens: Array  # int32 [B, T], prompt then response, padded on the right
    mask: Array  # bool [B, T]
    old_logprobs: Array  # float32 [B, T], as are the rest
    ref_logprobs: Array
    values: Array
    penalties: Array  # the KL part of the token rewards
    rewards: Array  # penalties plus the score on the last token, before any whitening
    advantages: Array
    returns: Array
    scores: Array  # float32 [B]
    finite: Array  # bool scalar: no number that an update reads is NaN or infinite; otherwise none is made
    hidden: Array | None = None  # [B, T, D], as in `Passes`


def abstract_passes(policy_cfg: ModelConfig, ppo: PPOConfig, samples: int, width: int, mesh: Mesh) -> Passes:
    """Stand-ins for what `forward` returns of `samples` samples of up to `width` tokens."""
    numbers = stand_in(mesh, jnp.float32, samples, width)
    hidden = None
    if trained_layers(policy_cfg.num_layers, ppo.num_layers_unfrozen).start:
        shape = (samples, width, policy_cfg.width)
        hidden = jax.ShapeDtypeStruct(shape, policy_cfg.dtype, sharding=sharding_for(KEPT, shape, mesh, HIDDEN))
    return Passes(numbers, numbers, numbers, numbers, hidden)  # type: ignore[arg-type]  # abstract


def abstract_rollout(finish: Callable, arguments: tuple, mesh: Mesh) -> Rollout:
    """Stand-ins for the rollout that `finish` returns for these arguments."""
    return jax.tree.map(lambda x: stand_in(mesh, x.dtype, *x.shape), jax.eval_shape(finish, *arguments)[0])


def make_forward(
    policy_cfg: ModelConfig, ref_cfg: ModelConfig, value_cfg: ModelConfig, ppo: PPOConfig, mesh: Mesh
) -> Callable:
    """`forward(policy_params, ref_params, value_params, tokens, mask, plan, bottom=None, sampler=None)`, jitted, which
    returns `Passes`.

    One pass of each model over the packed rows of `plan`, and of the `bottom` that they share, if any; but none of the
    policy where `sampler` is given, the log-probs and entropies [B, T] of the samples as they were drawn. Policy and
    reference may differ in size where they share none. Raises UserError naming --mesh_dim when the hidden states to be
    kept do not divide over the devices.
    """
    shard, whole = Shard(mesh), replicated(mesh)
    policy_cfg, ref_cfg, value_cfg = (cfg.without_gradient for cfg in (policy_cfg, ref_cfg, value_cfg))
    logprobs_of = functools.partial(next_token_logprobs, temperature=ppo.logprob_temperature, shard=shard)
    shared = trained_layers(policy_cfg.num_layers, ppo.num_layers_unfrozen).start > 0
    D = policy_cfg.width
    kept = sharding_for(KEPT, (1, 1, D), mesh, HIDDEN) if shared else whole

    @functools.partial(jax.jit, out_shardings=Passes(whole, whole, whole, whole, kept))  # type: ignore[arg-type]
    def forward(
        policy_params, ref_params, value_params, tokens, mask, plan: Plans, bottom=None, sampler=None
    ) -> Passes:
        def body(group: PackPlan, passes: Passes) -> Passes:
            rows = packed_rows(group, tokens, shard)
            wanted = gather(mask, group.source_GRS, False)
            below = run_layers(bottom, policy_cfg, *rows, shard=shard)[0] if shared else None
            old_logprobs = entropies = jnp.zeros(wanted.shape, jnp.float32)
            if sampler is None:
                policy = with_embeddings(bottom, policy_params)
                old_logprobs, entropies = logprobs_of(policy, policy_cfg, *rows, wanted=wanted, below=below)
            reference = with_embeddings(bottom, ref_params)
            ref_logprobs, _ = logprobs_of(reference, ref_cfg, *rows, wanted=wanted, below=below)
            top, _ = trunk(value_params, value_cfg, *rows, below=below, shard=shard)
            values = scalar(value_params, value_cfg, top)
            hidden = None if below is None else shard(shard(below, *PICKED), *KEPT)
            new = Passes(old_logprobs, ref_logprobs, values, entropies, hidden)
            return jax.tree.map(lambda into, x: scatter(into, group.source_GRS, x), passes, new)

        zeros = jnp.zeros(tokens.shape, jnp.float32)
        hidden = shard(jnp.zeros((*tokens.shape, D), policy_cfg.dtype), *KEPT) if shared else None
        passes = over_groups(plan, Passes(zeros, zeros, zeros, zeros, hidden), body)
        if sampler is not None:
            passes = passes.replace(old_logprobs=sampler[0], entropies=sampler[1])
        return jax.tree.map(lambda x: jnp.where(mask, x, 0.0) if x.ndim == 2 else x, passes)

    return forward


def make_finish(ppo: PPOConfig, mesh: Mesh) -> Callable:
    """`finish(tokens, mask, passes, scores, kl_coef) -> (Rollout, next kl_coef, metrics)`, jitted.

    Token rewards are -kl_coef * KL estimate (with --kl_in=reward) plus the score on the response's last token. The next
    coefficient is the same one, or the adaptive controller's when --kl_target is set.
    """

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def finish(tokens, mask, passes: Passes, scores, kl_coef) -> tuple[Rollout, Array, dict[str, Mean]]:
        kl = kl_estimate(ppo.kl_estimator, passes.old_logprobs, passes.ref_logprobs, mask)
        reward_kl_coef = kl_coef if ppo.kl_in == "reward" else 0.0
        rewards = adv.token_rewards(scores, kl, mask, kl_coef=reward_kl_coef)
        scaled_rewards = adv.whiten(rewards, mask, shift_mean=False) if ppo.whiten_rewards else rewards
        raw_advantages, returns = adv.gae(scaled_rewards, passes.values, mask, ppo.gamma, ppo.lam)
        advantages = adv.whiten(raw_advantages, mask) if ppo.whiten_advantages else raw_advantages
        read = (passes.old_logprobs, passes.ref_logprobs, passes.values, rewards, advantages, returns)
        rollout = Rollout(
            tokens=tokens,
            mask=mask,
            old_logprobs=passes.old_logprobs,
            ref_logprobs=passes.ref_logprobs,
            values=passes.values,
            penalties=-reward_kl_coef * kl,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            scores=scores,
            finite=all_finite(mask, *read),
        )
        metrics = _rollout_metrics(rollout, passes.entropies, kl_coef)
        if ppo.kl_target:
            observed = metrics["objective/kl"]  # over the responses that are learnt from
            adapted = adaptive_kl_coef(kl_coef, observed.value, ppo.kl_target, observed.count, ppo.kl_horizon)
            kl_coef = jnp.where(rollout.finite, adapted, kl_coef)
        return rollout, kl_coef, metrics

    return finish


def _rollout_metrics(rollout: Rollout, entropies: Array, kl_coef: Array) -> dict[str, Mean]:
    """Statistics of the samples under the names of EasyLM's fork (docs/metrics.md)."""
    mask, scores, penalties = rollout.mask, rollout.scores, rollout.penalties
    each = jnp.any(mask, axis=1)  # a response that is not to be learnt from counts nowhere
    kl = kl_estimate("k1", rollout.old_logprobs, rollout.ref_logprobs, mask)
    by_row = lambda x: jnp.sum(jnp.where(mask, x, 0.0), axis=1)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    mean_score = mean_of(scores, each)
    shortest = jnp.min(lengths, where=each, initial=jnp.max(lengths))
    return {
        "objective/kl": mean_of(by_row(kl), each),
        "objective/kl_per_token": mean_of(kl, mask),
        "objective/kl_coef": constant_mean(kl_coef),
        "objective/entropy": mean_of(entropies, mask),
        "ppo/not_finite": constant_mean(~rollout.finite),
        "ppo/mean_scores": mean_score,
        "ppo/std_scores": constant_mean(jnp.sqrt(mean_of(jnp.square(scores - mean_score.value), each).value)),
        "ppo/mean_score_total": mean_of(by_row(rollout.rewards), each),
        "ppo/mean_non_score_reward": mean_of(penalties, mask),
        "ppo/mean_non_score_reward_sum": mean_of(by_row(penalties), each),
        "ppo/val/mean": mean_of(rollout.values, mask),
        "ppo/val/explained_variance": adv.explained_variance(rollout.values, rollout.returns, mask),
        "ppo/returns/mean": mean_of(rollout.returns, mask),
        "tokens/responses_len_mean": mean_of(lengths, each),
        "tokens/responses_len_min": constant_mean(shortest),
        "tokens/responses_len_max": constant_mean(jnp.max(lengths)),
    }
