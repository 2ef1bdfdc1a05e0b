"""KTO: one optimizer step on single answers, each labelled good or bad, and evaluation.

Beside the answers a batch holds mismatches, the same prompts before answers to others (`data.mismatched`). These are
never trained on. They run first, for the reference point z0, which is a mean over the whole batch; then the answers run
with their gradient, in groups that all share z0.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyrl.algos.kto import kto_baseline, kto_loss
from easyrl.core.groups import PackPlan
from easyrl.core.masking import Mean, constant_mean, nan_where_empty
from easyrl.core.sharding import Shard, replicated
from easyrl.models.families import ModelConfig, param_specs
from easyrl.steps.dpo import AnswerBatch, DPOConfig, answer_logprobs
from easyrl.steps.packed import grads_over_groups, sums_over_groups, tokens_planned
from easyrl.steps.state import TrainState, apply_gradients, state_shardings

Array = jax.Array

BY_LABEL = frozenset({"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"})


class KTOBatch(flax.struct.PyTreeNode):
    """B answers, whether each is a good one, and as many mismatches; row i of both begins with the same prompt."""

    answers: AnswerBatch
    mismatched: AnswerBatch
    desirable: Array  # bool [B]


def make_kto_step(cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, config: DPOConfig) -> Callable:
    """`step(state: TrainState, batch: KTOBatch) -> (state, metrics)`, jitted, `state` donated.

        loss = mean over answers of `algos.kto.kto_loss`, with z0 = `algos.kto.kto_baseline` over all mismatches

    Metrics (`Mean` pairs): loss and those of `kto_loss` `with_margins`, entropy over the tokens of the answers,
    grad_norm before clipping, skipped (1 where loss or gradient was not finite and the state was left as it was),
    tokens worked on.
    """
    objective = _objective(cfg, mesh, config)
    shardings = state_shardings(param_specs(cfg, "lm"), optimizer, mesh)

    def step(state: TrainState, batch: KTOBatch) -> tuple[TrainState, dict[str, Mean]]:
        baseline = _baseline(state.params, cfg, batch, mesh)
        count = jnp.maximum(jnp.sum(batch.answers.mask.any(axis=1), dtype=jnp.float32), 1.0)
        grads, metrics = grads_over_groups(
            batch.answers.plans,
            lambda params, group: objective(params, group, batch, baseline, count),
            state.params,
            shardings.params,
        )
        metrics = with_margins(metrics)
        state, taken = apply_gradients(state, grads, optimizer, metrics["loss"].total)
        metrics["grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["skipped"] = constant_mean(1.0 - taken)
        metrics["tokens"] = constant_mean(tokens_planned(batch.answers.plans) + tokens_planned(batch.mismatched.plans))
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_kto_eval(cfg: ModelConfig, mesh: Mesh, config: DPOConfig) -> Callable:
    """`evaluate(params, batch: KTOBatch) -> sums`, jitted: the metrics of the loss, each batch with a z0 of its own.

    Add up the batches of a data set with `core.masking.add_metrics`, then take `with_margins` of the sum.
    """
    objective = _objective(cfg, mesh, config)

    def evaluate(params: dict, batch: KTOBatch) -> dict[str, Mean]:
        baseline = _baseline(params, cfg, batch, mesh)
        return sums_over_groups(batch.answers.plans, lambda group: objective(params, group, batch, baseline, 1.0)[1])

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def with_margins(metrics: dict[str, Mean]) -> dict[str, Mean]:
    """The summed metrics of a batch or data set, with `rewards/margins`: of means over different answers.

    Where no answer has a label, the means over those that have it, and the margin, are NaN.
    """
    metrics = nan_where_empty(metrics, BY_LABEL)
    margin = metrics["rewards/chosen"].value - metrics["rewards/rejected"].value
    return metrics | {"rewards/margins": constant_mean(margin)}


def _baseline(params: dict, cfg: ModelConfig, batch: KTOBatch, mesh: Mesh) -> Array:
    """z0 of the batch, before it is held at 0."""
    shard, others = Shard(mesh), batch.mismatched
    logprobs = sums_over_groups(
        others.plans, lambda group: answer_logprobs(params, cfg, group, others.tokens, others.mask, shard)[0]
    )
    return kto_baseline(logprobs, others.ref_logprobs, others.mask.any(axis=1)).value


def _objective(cfg: ModelConfig, mesh: Mesh, config: DPOConfig) -> Callable:
    """`objective(params, group, batch, baseline, count) -> (the group's summed loss / count, its metrics)`."""
    shard = Shard(mesh)

    def objective(params: dict, group: PackPlan, batch: KTOBatch, baseline, count) -> tuple[Array, dict[str, Mean]]:
        answers = batch.answers
        logprobs, lengths, entropy = answer_logprobs(params, cfg, group, answers.tokens, answers.mask, shard)
        loss, metrics = kto_loss(
            logprobs, answers.ref_logprobs, batch.desirable, lengths > 0, baseline,
            beta=config.beta, desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
        )  # fmt: skip
        return loss.total / count, {"loss": loss} | metrics | {"entropy": entropy}

    return objective
