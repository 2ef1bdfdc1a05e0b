"""PPO's device side: score a batch of samples once, then update from the frozen record.

    forward   packed passes of policy, reference and value model over the samples
    finish    rewards, advantages and returns: the `Rollout`, after which nothing "old" can change
    update    one optimizer step on a minibatch of the `Rollout`

Index convention, everywhere: `x[b, t]` belongs to the action that emits `tokens[b, t + 1]`. So `logprobs[b, t]` scores
that token, `values[b, t]` is the value of the text up to token t, and `mask[b, t]` is True where that token is part of
a response.

With --num_layers_unfrozen the three models are tops on one frozen bottom (`models/branch.py`). `forward` runs it once
for all of them, and its hidden states stay with the rollout, so that no update runs it again. Without, they are whole
models, the bottom is None and so are the hidden states.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyrl.algos import advantages as adv
from easyrl.algos.kl import adaptive_kl_coef, kl_estimate
from easyrl.algos.ppo import entropy_bonus, policy_loss, value_loss
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.groups import PackPlan, Plans, gather, over_groups, scatter
from easyrl.core.masking import Mean, all_finite, constant_mean, masked_sum, mean_of
from easyrl.core.sharding import Shard, replicated, sharding_for, stand_in
from easyrl.models.branch import trained_layers, with_embeddings
from easyrl.models.families import ModelConfig, param_specs
from easyrl.models.heads import scalar
from easyrl.models.trunk import run_layers, trunk
from easyrl.steps.logprobs import next_token_logprobs
from easyrl.steps.packed import count_planned, grads_over_groups
from easyrl.steps.segments import packed_rows
from easyrl.steps.state import TrainState, apply_gradients, state_shardings

Array = jax.Array

# Hidden states [R, S, D] are kept split by width, so that picking rows of them needs no other device. On their way
# between there and the batch's split by rows they pass through a form from which each is one exchange away.
KEPT, PICKED = (None, None, "kept_width"), (None, None, "picked_width")
HIDDEN = "hidden states that updates start from"


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The algorithm's own numbers. Inherited by the script's config, so the flags carry EasyLM's plain names."""

    temperature: float = flag(0.7, "Sampling temperature of the rollouts.", above=0)
    logprob_space: str = flag(
        "sampling",
        "Distribution whose log-probs enter ratio and KL: after the temperature, or the model's own at temperature 1.",
        choices=("sampling", "model"),
    )
    old_logprobs: str = flag(
        "trainer",
        "Who computes the log-probs before the update, which the ratio starts from: the trainer, in a pass of its own, "
        "or the sampler, which saves that pass; the first ratios are then 1 up to what the two round differently.",
        choices=("trainer", "sampler"),
    )
    kl_coef: float = flag(0.05, "Weight of the KL penalty; the starting weight when --kl_target is set.", least=0)
    kl_estimator: str = flag("k1", "Per-token KL estimator of the penalty.", choices=("k1", "k2", "k3"))
    kl_in: str = flag("reward", "Where the KL penalty goes.", choices=("reward", "loss"))
    kl_target: float = flag(
        0.0, "Sequence KL, in nats, that the adaptive controller aims for. 0: --kl_coef stays fixed.", least=0
    )
    kl_horizon: float = flag(10000.0, "Samples over which the adaptive controller acts.", above=0)
    gamma: float = flag(1.0, "Discount per token.", least=0, most=1)
    lam: float = flag(0.95, "Lambda of generalised advantage estimation.", least=0, most=1)
    cliprange: float = flag(0.2, "The ratio is clipped to [1 - cliprange, 1 + cliprange].", above=0, most=1)
    cliprange_high: float = flag(
        0.0, "Upper clip when it differs from the lower (clip-higher). 0: --cliprange.", least=0
    )
    dual_clip: float = flag(0.0, "Bound on the ratio for negative advantages (Ye et al. 2020), above 1. 0: off.")
    cliprange_value: float = flag(0.2, "Values are clipped to old value +- cliprange_value.", above=0)
    vf_coef: float = flag(0.1, "Weight of the value loss.", least=0)
    entropy_coef: float = flag(0.0, "Weight of the entropy bonus.")
    whiten_rewards: bool = flag(False, "Scale the token rewards to unit variance (their mean is kept).")
    whiten_advantages: bool = flag(True, "Whiten the advantages once over the whole batch of rollouts.")
    target_kl: float = flag(
        0.0, "Stop updating on a batch once its approximate KL from the sampler exceeds this. 0: never.", least=0
    )
    num_layers_unfrozen: int = flag(
        0, "Hydra: train this many top layers of policy and value model, over one frozen bottom that they share with "
        "the reference. 0 or -1: all layers of each model.", least=-1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.dual_clip != 0 and not self.dual_clip > 1:
            raise UserError(f"--dual_clip={self.dual_clip:g}: expected 0 (off) or more than 1")
        if self.kl_target and not self.kl_coef:
            raise UserError("--kl_coef=0: it is the starting weight of --kl_target, expected more than 0")

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which every log-prob of a run is taken."""
        return self.temperature if self.logprob_space == "sampling" else 1.0


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


def branch_specs(cfg: ModelConfig, head: str, ppo: PPOConfig) -> dict:
    """The parameters that policy (head `lm`), reference or value model (`value`) have for themselves."""
    return param_specs(cfg, head, trained_layers(cfg.num_layers, ppo.num_layers_unfrozen))


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


class PPOState(flax.struct.PyTreeNode):
    """Everything PPO changes."""

    policy: TrainState
    value: TrainState
    kl_coef: Array  # float32 scalar


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


def make_update(
    policy_cfg: ModelConfig,
    value_cfg: ModelConfig,
    ppo: PPOConfig,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    train_policy: bool = True,
) -> Callable:
    """`update(state, rollout, plan, stopped, bottom=None) -> (state, stopped, metrics)`, jitted, `state` donated.

    One optimizer step of policy and value model on the minibatch that `plan` picks from the rollout. Losses are means
    over all response tokens of the minibatch, however it is packed and split. `stopped` (bool scalar) carries
    --target_kl: once a minibatch exceeds it, this and the later updates of the batch change nothing; nor does a
    minibatch without a token to learn from, not even by momentum, nor one from a rollout that is not `finite`; and a
    model whose loss or gradient is not finite stays as it was. With `train_policy=False` (critic warm-up) only the
    value model runs and learns. Of the `bottom` that the models share, if any, only embeddings are read, and those only
    by a head that is tied to them: the rollout has its hidden states.
    """
    shard, whole = Shard(mesh), replicated(mesh)

    def shardings_of(cfg: ModelConfig, head: str, optimizer: optax.GradientTransformation) -> TrainState:
        return state_shardings(branch_specs(cfg, head, ppo), optimizer, mesh)

    policy_shardings = shardings_of(policy_cfg, "lm", policy_optimizer)
    value_shardings = shardings_of(value_cfg, "value", value_optimizer)

    def policy_objective(params, group: PackPlan, rollout: Rollout, bottom, kl_coef, num_tokens):
        batch = _packed_rollout(group, rollout, shard)
        logprobs, entropies = next_token_logprobs(
            with_embeddings(bottom, params), policy_cfg, *packed_rows(group, rollout.tokens, shard),
            wanted=batch.mask, temperature=ppo.logprob_temperature, below=batch.hidden, shard=shard,
        )  # fmt: skip
        loss, metrics = policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask,
            cliprange_low=ppo.cliprange, cliprange_high=ppo.cliprange_high or ppo.cliprange, dual_clip=ppo.dual_clip,
        )  # fmt: skip
        entropy = entropy_bonus(entropies, batch.mask)
        total = loss.total - ppo.entropy_coef * entropy.total
        if ppo.kl_in == "loss":
            kl = kl_estimate(ppo.kl_estimator, logprobs, batch.ref_logprobs, batch.mask)
            total += kl_coef * masked_sum(kl, batch.mask)
        named = {"ppo/loss/policy": loss, "ppo/policy/entropy": entropy}
        return total / jnp.maximum(num_tokens, 1.0), named | {
            f"ppo/policy/{name}": value for name, value in metrics.items()
        }

    def value_objective(params, group: PackPlan, rollout: Rollout, num_tokens):
        batch = _packed_rollout(group, rollout, shard)
        rows = packed_rows(group, rollout.tokens, shard)
        top, _ = trunk(params, value_cfg, *rows, below=batch.hidden, shard=shard)
        values = scalar(params, value_cfg, top)
        loss, metrics = value_loss(values, batch.values, batch.returns, batch.mask, cliprange_value=ppo.cliprange_value)
        named = {"ppo/loss/value": loss}
        named |= {f"ppo/val/{name}": value for name, value in metrics.items()}
        return ppo.vf_coef * loss.total / jnp.maximum(num_tokens, 1.0), named

    def policy_step(state: PPOState, rollout, plan, stopped, bottom, num_tokens):
        grads, metrics = grads_over_groups(
            plan, lambda p, g: policy_objective(p, g, rollout, bottom, state.kl_coef, num_tokens),
            state.policy.params, policy_shardings.params,
        )  # fmt: skip
        if ppo.target_kl:
            stopped |= metrics["ppo/policy/approxkl"].value > ppo.target_kl
        wanted, loss = ~stopped & (num_tokens > 0), metrics["ppo/loss/policy"].total
        policy, taken = apply_gradients(state.policy, grads, policy_optimizer, loss, wanted & rollout.finite)
        metrics["ppo/policy/grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["ppo/policy/skipped"] = constant_mean(1.0 - taken)
        metrics["ppo/policy/not_finite"] = constant_mean(wanted & ~taken)
        return policy, stopped, metrics

    def value_step(state: PPOState, rollout, plan, stopped, num_tokens):
        grads, metrics = grads_over_groups(
            plan, lambda p, g: value_objective(p, g, rollout, num_tokens), state.value.params, value_shardings.params
        )
        wanted, loss = ~stopped & (num_tokens > 0), metrics["ppo/loss/value"].total
        value, taken = apply_gradients(state.value, grads, value_optimizer, loss, wanted & rollout.finite)
        metrics["ppo/val/grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["ppo/val/skipped"] = constant_mean(1.0 - taken)
        metrics["ppo/val/not_finite"] = constant_mean(wanted & ~taken)
        return value, metrics

    def update(state: PPOState, rollout: Rollout, plan: Plans, stopped, bottom=None):
        num_tokens = count_planned(plan, rollout.mask)
        metrics: dict[str, Mean] = {}
        policy = state.policy
        if train_policy:
            policy, stopped, metrics = policy_step(state, rollout, plan, stopped, bottom, num_tokens)
        value, value_metrics = value_step(state, rollout, plan, stopped, num_tokens)
        metrics |= value_metrics
        loss_value = metrics["ppo/loss/value"]
        loss_policy = metrics.get("ppo/loss/policy", Mean(jnp.zeros(()), loss_value.count))
        metrics["ppo/loss/total"] = Mean(loss_policy.total + ppo.vf_coef * loss_value.total, loss_value.count)
        return PPOState(policy, value, state.kl_coef), stopped, metrics

    state_out = PPOState(policy_shardings, value_shardings, whole)  # type: ignore[arg-type]  # a tree of shardings
    return jax.jit(update, donate_argnums=0, out_shardings=(state_out, whole, whole))


def _packed_rollout(group: PackPlan, rollout: Rollout, shard: Shard) -> Rollout:
    """The rollout's [B, T] fields in packed order; those without a place for every token stay."""
    batch = jax.tree.map(lambda x: gather(x, group.source_GRS) if x.ndim >= 2 else x, rollout)
    if batch.hidden is None:
        return batch
    return batch.replace(hidden=shard(shard(batch.hidden, *KEPT), *PICKED))


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
