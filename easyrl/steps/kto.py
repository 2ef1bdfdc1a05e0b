"""KTO: one optimizer step on single answers, each labelled good or bad, and evaluation.

Rows 2i and 2i + 1 of a batch are answer i and its mismatch, the same prompt before an answer to another one
(`data.mismatched`). The mismatches are never trained on. They run first, for the reference point z0, which is a mean
over the whole batch; then the answers run with their gradient, in groups that share z0.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from easyrl.algos.kto import kto_baseline, kto_loss
from easyrl.core.masking import Mean, constant_mean
from easyrl.core.sharding import Shard, put, replicated
from easyrl.data.packing import Plan, pack
from easyrl.models.families import ModelConfig, param_specs
from easyrl.steps.dpo import DPOConfig, answer_logprobs
from easyrl.steps.packed import PackPlan, grads_over_groups, place_plan, sums_over_groups
from easyrl.steps.state import TrainState, apply_gradients, state_shardings

Array = jax.Array


class KTOBatch(flax.struct.PyTreeNode):
    """A padded batch of answers and mismatches, what the reference says of them, and the two plans that pack them."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T], True at t where tokens[b, t + 1] is a token of the answer; nowhere in a filler
    ref_logprobs: Array  # float32 [B]
    desirable: Array  # bool [B / 2]
    plan: PackPlan  # of the answers, rows 0, 2, ...
    mismatched_plan: PackPlan  # of rows 1, 3, ...


def plan_both(lengths: np.ndarray, width: int, row_length: int) -> tuple[Plan, Plan]:
    """(plan of the answers, plan of the mismatches) for the sequences of a batch."""
    answers = np.arange(len(lengths)) % 2 == 0
    return (
        pack(np.where(answers, lengths, 0), width, row_length),
        pack(np.where(answers, 0, lengths), width, row_length),
    )


def place_kto(
    tokens: np.ndarray,
    mask: np.ndarray,
    ref_logprobs: np.ndarray,
    desirable: np.ndarray,
    packings: tuple[Plan, Plan],
    rows: int,
    groups: int,
    mesh: Mesh,
) -> KTOBatch:
    """Host arrays as a batch that every device holds, each plan in `groups` groups of `rows` packed rows."""
    arrays = (
        np.asarray(tokens, np.int32),
        np.asarray(mask, bool),
        np.asarray(ref_logprobs, np.float32),
        np.asarray(desirable, bool),
    )
    plans = (place_plan(*packing, rows, groups, mesh) for packing in packings)
    return KTOBatch(*put(arrays, replicated(mesh)), *plans)


def make_kto_step(cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, config: DPOConfig) -> Callable:
    """`step(state: TrainState, batch: KTOBatch) -> (state, metrics)`, jitted, `state` donated.

        loss = mean over answers of `algos.kto.kto_loss`, with z0 = `algos.kto.kto_baseline` over all mismatches

    Metrics (`Mean` pairs): loss and those of `kto_loss`, rewards/margins, entropy over the tokens of the answers,
    grad_norm before clipping, skipped (1 where the gradient was not finite and the state was left as it was), tokens
    worked on.
    """
    objective = _objective(cfg, mesh, config)
    shardings = state_shardings(param_specs(cfg, "lm"), optimizer, mesh)

    def step(state: TrainState, batch: KTOBatch) -> tuple[TrainState, dict[str, Mean]]:
        baseline = _baseline(state.params, cfg, batch, mesh)
        count = jnp.maximum(jnp.sum(batch.mask.any(axis=1)[::2], dtype=jnp.float32), 1.0)
        grads, metrics = grads_over_groups(
            batch.plan,
            lambda params, group: objective(params, group, batch, baseline, count),
            state.params,
            shardings.params,
        )
        state, taken = apply_gradients(state, grads, optimizer, jnp.bool_(True))
        metrics = with_margins(metrics)
        metrics["grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["skipped"] = constant_mean(1.0 - taken)
        segments = (batch.plan.segment_ids_GRS, batch.mismatched_plan.segment_ids_GRS)
        metrics["tokens"] = constant_mean(sum(jnp.sum(ids > 0) for ids in segments))
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_kto_eval(cfg: ModelConfig, mesh: Mesh, config: DPOConfig) -> Callable:
    """`evaluate(params, batch: KTOBatch) -> sums`, jitted: the metrics of the loss, each batch with a z0 of its own.

    Add up the batches of a data set with `core.masking.add_means`, then take `with_margins` of the sum.
    """
    objective = _objective(cfg, mesh, config)

    def evaluate(params: dict, batch: KTOBatch) -> dict[str, Mean]:
        baseline = _baseline(params, cfg, batch, mesh)
        return sums_over_groups(batch.plan, lambda group: objective(params, group, batch, baseline, 1.0)[1])

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def with_margins(metrics: dict[str, Mean]) -> dict[str, Mean]:
    """The summed metrics of a batch or data set, with `rewards/margins`: of means over different answers."""
    margin = metrics["rewards/chosen"].value - metrics["rewards/rejected"].value
    return metrics | {"rewards/margins": constant_mean(margin)}


def _baseline(params: dict, cfg: ModelConfig, batch: KTOBatch, mesh: Mesh) -> Array:
    """z0 of the batch, before it is held at 0."""
    shard = Shard(mesh)
    logprobs = sums_over_groups(
        batch.mismatched_plan,
        lambda group: answer_logprobs(params, cfg, group, batch.tokens, batch.mask, shard)[0],
    )
    real = batch.mask.any(axis=1)[1::2]
    return kto_baseline(logprobs[1::2], batch.ref_logprobs[1::2], real).value


def _objective(cfg: ModelConfig, mesh: Mesh, config: DPOConfig) -> Callable:
    """`objective(params, group, batch, baseline, count) -> (the group's summed loss / count, its metrics)`."""
    shard = Shard(mesh)

    def objective(params: dict, group: PackPlan, batch: KTOBatch, baseline, count) -> tuple[Array, dict[str, Mean]]:
        logprobs, lengths, entropy = answer_logprobs(params, cfg, group, batch.tokens, batch.mask, shard)
        loss, metrics = kto_loss(
            logprobs[::2], batch.ref_logprobs[::2], batch.desirable, lengths[::2] > 0, baseline,
            beta=config.beta, desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
        )  # fmt: skip
        return loss.total / count, {"loss": loss} | metrics | {"entropy": entropy}

    return objective
