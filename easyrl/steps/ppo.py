"""PPO's updates: optimizer steps of policy and value model on minibatches of the rollout that `steps/scoring.py` froze.

With --num_layers_unfrozen the models are tops on one frozen bottom (`models/branch.py`), whose hidden states are in the
rollout. Without, they are whole models, and the bottom is None.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyrl.algos.kl import kl_estimate
from easyrl.algos.ppo import entropy_bonus, policy_loss, value_loss
from easyrl.core.groups import PackPlan, Plans, gather
from easyrl.core.masking import Mean, constant_mean, masked_sum
from easyrl.core.sharding import Shard, replicated, stand_in
from easyrl.models.branch import trained_layers, with_embeddings
from easyrl.models.config import ModelConfig
from easyrl.models.families import param_specs
from easyrl.models.heads import scalar
from easyrl.models.trunk import trunk
from easyrl.steps.logprobs import next_token_logprobs
from easyrl.steps.optimizer import make_schedule
from easyrl.steps.packed import count_planned, grads_over_groups
from easyrl.steps.ppo_config import PPOConfig
from easyrl.steps.scoring import KEPT, PICKED, Rollout
from easyrl.steps.segments import packed_rows
from easyrl.steps.state import TrainState, abstract_train_state, apply_gradients, state_shardings

Array = jax.Array


def branch_specs(cfg: ModelConfig, head: str, ppo: PPOConfig) -> dict:
    """The parameters that policy (head `lm`), reference or value model (`value`) have for themselves."""
    return param_specs(cfg, head, trained_layers(cfg.num_layers, ppo.num_layers_unfrozen))


class PPOState(flax.struct.PyTreeNode):
    """Everything PPO changes."""

    policy: TrainState
    value: TrainState
    kl_coef: Array  # float32 scalar


def make_ppo_schedules(
    kind: str, lr: float, value_lr: float, *, policy_updates: int, value_updates: int, warmup_updates: int = 0
) -> tuple[optax.Schedule, optax.Schedule]:
    """Learning rates of policy and value model, each over the updates of its own. `value_lr` 0: as the policy's."""
    return (
        make_schedule(kind, lr, policy_updates, warmup_updates),
        make_schedule(kind, value_lr or lr, value_updates, warmup_updates),
    )


def abstract_ppo_state(
    policy_cfg: ModelConfig,
    value_cfg: ModelConfig,
    ppo: PPOConfig,
    dtype: Any,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> PPOState:
    """Shapes, types and shardings of a state with parameters of this `dtype`: what a checkpoint is restored into."""
    return PPOState(
        abstract_train_state(branch_specs(policy_cfg, "lm", ppo), dtype, policy_optimizer, mesh),
        abstract_train_state(branch_specs(value_cfg, "value", ppo), dtype, value_optimizer, mesh),
        stand_in(mesh, jnp.float32),
    )


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
    --target_kl: once a minibatch exceeds it, this and the later updates of the batch change nothing, and the later ones
    compute nothing and count in no mean. Nor does a minibatch without a token to learn from change anything, not even
    by momentum, nor one from a rollout that is not `finite`; and a model whose loss or gradient is not finite stays as
    it was. With `train_policy=False` (critic warm-up) only the
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

    def policy_step(state: PPOState, rollout, plan, stopped, bottom, num_tokens, runs):
        grads, metrics = grads_over_groups(
            plan, lambda p, g: policy_objective(p, g, rollout, bottom, state.kl_coef, num_tokens),
            state.policy.params, policy_shardings.params,
        )  # fmt: skip
        if ppo.target_kl:
            stopped |= metrics["ppo/policy/approxkl"].value > ppo.target_kl
        wanted, loss = ~stopped & (num_tokens > 0), metrics["ppo/loss/policy"].total
        policy, taken = apply_gradients(state.policy, grads, policy_optimizer, loss, wanted & rollout.finite)
        metrics["ppo/policy/grad_norm"] = Mean(optax.tree.norm(grads), runs)
        metrics["ppo/policy/skipped"] = constant_mean(1.0 - taken)
        metrics["ppo/policy/not_finite"] = constant_mean(wanted & ~taken)
        return policy, stopped, metrics

    def value_step(state: PPOState, rollout, plan, stopped, num_tokens, runs):
        grads, metrics = grads_over_groups(
            plan, lambda p, g: value_objective(p, g, rollout, num_tokens), state.value.params, value_shardings.params
        )
        wanted, loss = ~stopped & (num_tokens > 0), metrics["ppo/loss/value"].total
        value, taken = apply_gradients(state.value, grads, value_optimizer, loss, wanted & rollout.finite)
        metrics["ppo/val/grad_norm"] = Mean(optax.tree.norm(grads), runs)
        metrics["ppo/val/skipped"] = constant_mean(1.0 - taken)
        metrics["ppo/val/not_finite"] = constant_mean(wanted & ~taken)
        return value, metrics

    def update(state: PPOState, rollout: Rollout, plan: Plans, stopped, bottom=None):
        num_tokens = count_planned(plan, rollout.mask)
        metrics: dict[str, Mean] = {}
        policy, runs = state.policy, 1.0 - stopped  # 1 or 0: a minibatch behind the stop has no groups, and no gradient
        plan = tuple(each.replace(count=jnp.where(stopped, 0, each.count)) for each in plan)
        if train_policy:
            policy, stopped, metrics = policy_step(state, rollout, plan, stopped, bottom, num_tokens, runs)
        value, value_metrics = value_step(state, rollout, plan, stopped, num_tokens, runs)
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
