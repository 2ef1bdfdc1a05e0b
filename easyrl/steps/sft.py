"""Supervised fine-tuning: one optimizer step on a batch of packed rows, and the loss that is reported as perplexity.

`mask[b, t]` is True where `tokens[b, t + 1]` is a token to learn (an answer's, or any), in the convention of
`steps.logprobs`. The loss is the mean of -log p over the True entries of the whole batch, so it depends neither on how
the rows are packed and grouped nor on how many devices share them.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from easyrl.core.groups import PackPlan, Plans, gather
from easyrl.core.masking import Mean, constant_mean, mean_of
from easyrl.core.sharding import Shard, put, replicated
from easyrl.data.packing import Packing
from easyrl.models.families import ModelConfig, param_specs
from easyrl.steps.logprobs import next_token_logprobs
from easyrl.steps.packed import count_planned, grads_over_groups, place_plans, sums_over_groups, tokens_planned
from easyrl.steps.segments import packed_rows
from easyrl.steps.state import TrainState, apply_gradients, state_shardings

Array = jax.Array


class SFTBatch(flax.struct.PyTreeNode):
    """A padded batch and the plans that pack it."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T], False at each sequence's last token
    plans: Plans


def place_sft_batch(tokens: np.ndarray, mask: np.ndarray, packing: Packing, mesh: Mesh) -> SFTBatch:
    """Host arrays as a batch that every device holds."""
    placed_tokens, placed_mask = put((np.asarray(tokens, np.int32), np.asarray(mask, bool)), replicated(mesh))
    return SFTBatch(placed_tokens, placed_mask, place_plans(packing, len(tokens), mesh))


def make_sft_step(cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> Callable:
    """`step(state: TrainState, batch: SFTBatch) -> (state, metrics)`, jitted, `state` donated.

        loss = -sum_bt mask[b, t] log p(tokens[b, t + 1] | tokens[b, :t + 1]) / sum_bt mask[b, t]

    Metrics (`Mean` pairs): loss, entropy over the same tokens, grad_norm before clipping, skipped (1 where loss
    or gradient was not finite and the state was left as it was), tokens (all the real ones, learnt or not).
    """
    objective = _objective(cfg, mesh)
    shardings = state_shardings(param_specs(cfg, "lm"), optimizer, mesh)

    def step(state: TrainState, batch: SFTBatch) -> tuple[TrainState, dict[str, Mean]]:
        count = count_planned(batch.plans, batch.mask)
        grads, metrics = grads_over_groups(
            batch.plans,
            lambda params, group: objective(params, group, batch, jnp.maximum(count, 1.0)),
            state.params,
            shardings.params,
        )
        state, taken = apply_gradients(state, grads, optimizer, metrics["loss"].total)
        metrics["grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["skipped"] = constant_mean(1.0 - taken)
        metrics["tokens"] = constant_mean(tokens_planned(batch.plans))
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_sft_eval(cfg: ModelConfig, mesh: Mesh) -> Callable:
    """`evaluate(params, batch: SFTBatch) -> metrics`, jitted: loss and entropy as in training, without a gradient.

    Add up the batches of a data set with `core.masking.add_metrics`; `perplexity` of the sum is the data set's.
    """
    objective = _objective(cfg, mesh)

    def evaluate(params: dict, batch: SFTBatch) -> dict[str, Mean]:
        return sums_over_groups(batch.plans, lambda group: objective(params, group, batch, 1.0)[1])

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def perplexity(loss: Mean) -> float:
    """exp(mean negative log-likelihood per token), of a loss summed over any number of batches."""
    return float(np.exp(np.float64(loss.total) / max(np.float64(loss.count), 1.0)))


def _objective(cfg: ModelConfig, mesh: Mesh) -> Callable:
    """`objective(params, group, batch, count) -> (the group's summed loss / count, its metrics)`."""
    shard = Shard(mesh)

    def objective(params: dict, group: PackPlan, batch: SFTBatch, count) -> tuple[Array, dict[str, Mean]]:
        rows = packed_rows(group, batch.tokens, shard)
        mask = gather(batch.mask, group.source_GRS, False)
        logprobs, entropies = next_token_logprobs(params, cfg, *rows, wanted=mask, shard=shard)
        loss = mean_of(-logprobs, mask)
        return loss.total / count, {"loss": loss, "entropy": mean_of(entropies, mask)}

    return objective
