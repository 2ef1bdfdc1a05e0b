"""Preference tuning on pairs: one optimizer step with any loss of `algos.dpo`, evaluation, and reference log-probs.

An answer's log-prob is the sum over its tokens, in the convention of `steps.logprobs`: `mask[b, t]` is True where
`tokens[b, t + 1]` is a token of the answer. Rows 2i and 2i + 1 of a batch are pair i's chosen and rejected answer.

Both answers of a pair must come out of the same forward pass to get their gradient, so a plan keeps them in one group
(`place_answers` refuses any other). Losses are means over all pairs of the batch, whatever the packing and grouping.
The reference enters as numbers, one for each answer: whether they were computed beforehand and kept on disk
(`runtime.reference`) or a moment ago by a reference model in memory, the step is the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from easyrl.algos.dpo import LOSSES, NLL_COEF, REFERENCE_FREE, Pairs, dpo_loss, loss_options, nll
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.groups import PackPlan, Plans, gather
from easyrl.core.masking import Mean, constant_mean, mean_of
from easyrl.core.sharding import Shard, put, replicated
from easyrl.data.packing import Packing
from easyrl.models.families import ModelConfig, param_specs
from easyrl.steps.logprobs import next_token_logprobs
from easyrl.steps.packed import grads_over_groups, place_plans, sums_over_groups, tokens_planned
from easyrl.steps.segments import packed_rows, pairs_together, sequence_sums
from easyrl.steps.state import TrainState, apply_gradients, state_shardings

Array = jax.Array

KTO = "kto"
KTO_OPTIONS = frozenset({"beta", "desirable_weight", "undesirable_weight"})
NLL_OPTIONS = frozenset({"nll_coef", "nll_per_token"})  # of every loss on pairs


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """The loss and its numbers (docs/dpo.md). Inherited by the script's config, so the flags carry plain names."""

    loss: str = flag("sigmoid", "The loss: on pairs, or on single answers with a label (kto).", choices=(*LOSSES, KTO))
    beta: float = flag(
        0.1, "Strength of the pull to the reference, or scale of the reward: 2 to 10 for simpo, 5 for sigmoid_norm.",
        above=0,
    )  # fmt: skip
    label_smoothing: float = flag(
        0.0, "The share of preferences taken to be the wrong way round, below 0.5 (conservative DPO; robust).", least=0
    )
    ipo_average: bool = flag(True, "ipo: log-ratios per token, as its authors meant; false: summed over the answer.")
    simpo_gamma: float = flag(0.5, "simpo: the margin that the reward of the chosen answer is to keep.", least=0)
    dpop_lambda: float = flag(
        50.0, "dpop: charge for each nat that the chosen answer falls below the reference.", least=0
    )
    nll_coef: float = flag(
        0.0, "Weight of the chosen answers' negative log-likelihood, added to the loss (RPO); orpo has 1 already.",
        least=0,
    )  # fmt: skip
    nll_per_token: bool = flag(True, "In that term every token weighs the same, as in SFT; false: every answer.")
    desirable_weight: float = flag(1.0, "kto: weight of the answers labelled good.", least=0)
    undesirable_weight: float = flag(1.0, "kto: weight of the answers labelled bad.", least=0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(DPOConfig):
            value = getattr(self, field.name)
            if field.name not in self.facts and value != field.default:
                raise UserError(f"--{field.name}={value}: --loss={self.loss} does not read it")
        if not self.nll_per_token and not self.nll_weight:
            raise UserError("--nll_per_token=False: needs --nll_coef, which is 0")
        if self.label_smoothing >= 0.5:
            raise UserError(f"--label_smoothing={self.label_smoothing}: expected less than 0.5")

    @property
    def facts(self) -> dict[str, Any]:
        """The loss and the values of the flags that it reads."""
        options = KTO_OPTIONS if self.loss == KTO else loss_options(self.loss) | NLL_OPTIONS
        names = (field.name for field in dataclasses.fields(DPOConfig))
        return {name: getattr(self, name) for name in names if name == "loss" or name in options}

    @property
    def reads_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.loss not in REFERENCE_FREE

    @property
    def nll_weight(self) -> float:
        """The weight of the NLL term, the loss's own included."""
        return self.nll_coef + NLL_COEF.get(self.loss, 0.0)

    @property
    def loss_kwargs(self) -> dict[str, Any]:
        """The arguments of `dpo_loss` for this loss."""
        values = {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "ipo_average": self.ipo_average,
            "simpo_gamma": self.simpo_gamma,
            "dpop_lambda": self.dpop_lambda,
        }
        return {name: value for name, value in values.items() if name in loss_options(self.loss)}


class AnswerBatch(flax.struct.PyTreeNode):
    """A padded batch of answered prompts, what the reference says of them, and the plans that pack it."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T], nowhere True in a filler
    ref_logprobs: Array  # float32 [B]; not read by the losses that need no reference
    plans: Plans


def place_answers(
    tokens: np.ndarray,
    mask: np.ndarray,
    ref_logprobs: np.ndarray,
    packing: Packing,
    mesh: Mesh,
    *,
    paired: bool,
) -> AnswerBatch:
    """Host arrays as a batch that every device holds.

    Raises ValueError when answers are `paired` and `packing` parts a pair.
    """
    if paired and not pairs_together(packing, tokens.shape):
        raise ValueError("the packing plan parts a pair: both its answers must be in one group")
    arrays = (np.asarray(tokens, np.int32), np.asarray(mask, bool), np.asarray(ref_logprobs, np.float32))
    placed = put(arrays, replicated(mesh))
    return AnswerBatch(placed[0], placed[1], placed[2], place_plans(packing, len(tokens), mesh))


def answer_logprobs(
    params: dict, cfg: ModelConfig, group: PackPlan, tokens_BT: Array, mask_BT: Array, shard: Shard
) -> tuple[Array, Array, Mean]:
    """(log-probs [B] summed over each answer's tokens, numbers [B] of those tokens, entropy per answer token).

    Of the sequences in this group; the others have 0 in both.
    """
    rows = packed_rows(group, tokens_BT, shard)
    mask = gather(mask_BT, group.source_GRS, False)
    logprobs, entropies = next_token_logprobs(params, cfg, *rows, wanted=mask, shard=shard)
    sums = sequence_sums(jnp.where(mask, logprobs, 0.0), group, tokens_BT.shape)
    return sums, sequence_sums(mask, group, tokens_BT.shape), mean_of(entropies, mask)


def make_answer_logprobs(cfg: ModelConfig, mesh: Mesh) -> Callable:
    """`logprobs(params, tokens, mask, plan) -> float32 [B]`, jitted: the log-prob of each answer, no gradient."""
    shard, cfg = Shard(mesh), cfg.without_gradient

    def logprobs(params: dict, tokens: Array, mask: Array, plan: Plans) -> Array:
        return sums_over_groups(plan, lambda group: answer_logprobs(params, cfg, group, tokens, mask, shard)[0])

    return jax.jit(logprobs, out_shardings=replicated(mesh))


def make_dpo_step(cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, config: DPOConfig) -> Callable:
    """`step(state: TrainState, batch: AnswerBatch) -> (state, metrics)`, jitted, `state` donated.

        loss = mean over pairs of LOSSES[config.loss] + config.nll_weight * NLL of the chosen answers

    Metrics (`Mean` pairs): loss and those of `algos.dpo.dpo_loss`, nll_loss and preference_loss where there is an NLL
    term, entropy over the tokens of the answers, grad_norm before clipping, skipped (1 where loss or gradient was
    not finite and the state was left as it was), tokens worked on. A batch without a pair changes nothing, not even by
    momentum.
    """
    objective = _objective(cfg, mesh, config)
    shardings = state_shardings(param_specs(cfg, "lm"), optimizer, mesh)

    def step(state: TrainState, batch: AnswerBatch) -> tuple[TrainState, dict[str, Mean]]:
        counts = _counts(batch, config)
        grads, metrics = grads_over_groups(
            batch.plans, lambda params, group: objective(params, group, batch, counts), state.params, shardings.params
        )
        pairs = metrics["preference_loss"].count > 0
        metrics = with_total_loss(metrics, config)
        state, taken = apply_gradients(state, grads, optimizer, metrics["loss"].total, pairs)
        metrics["grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["skipped"] = constant_mean(pairs & ~taken)
        metrics["tokens"] = constant_mean(tokens_planned(batch.plans))
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_dpo_eval(cfg: ModelConfig, mesh: Mesh, config: DPOConfig) -> Callable:
    """`evaluate(params, batch: AnswerBatch) -> sums`, jitted: the metrics of the loss, without a gradient.

    Add up the batches of a data set with `core.masking.add_metrics`, then take `with_total_loss` of the sum.
    """
    objective = _objective(cfg, mesh, config)

    def evaluate(params: dict, batch: AnswerBatch) -> dict[str, Mean]:
        return sums_over_groups(batch.plans, lambda group: objective(params, group, batch, (1.0, 1.0))[1])

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def with_total_loss(metrics: dict[str, Mean], config: DPOConfig) -> dict[str, Mean]:
    """The summed metrics of a batch or data set, with `loss`: its two terms have counts of their own."""
    if not config.nll_weight:
        return {"loss" if name == "preference_loss" else name: mean for name, mean in metrics.items()}
    total = metrics["preference_loss"].value + config.nll_weight * metrics["nll_loss"].value
    return {"loss": constant_mean(total)} | metrics


def _objective(cfg: ModelConfig, mesh: Mesh, config: DPOConfig) -> Callable:
    """`objective(params, group, batch, counts) -> (the group's part of the batch's loss, its metrics)`."""
    shard = Shard(mesh)

    def objective(params: dict, group: PackPlan, batch: AnswerBatch, counts) -> tuple[Array, dict[str, Mean]]:
        logprobs, lengths, entropy = answer_logprobs(params, cfg, group, batch.tokens, batch.mask, shard)
        ref = batch.ref_logprobs
        pairs = Pairs(
            chosen=logprobs[::2], rejected=logprobs[1::2], ref_chosen=ref[::2], ref_rejected=ref[1::2],
            chosen_lengths=lengths[::2], rejected_lengths=lengths[1::2],
        )  # fmt: skip
        here = (pairs.chosen_lengths > 0) & (pairs.rejected_lengths > 0)
        loss, metrics = dpo_loss(config.loss, pairs, here, **config.loss_kwargs)
        num_pairs, num_likely = counts
        total = loss.total / num_pairs
        metrics = {"preference_loss": loss} | metrics
        if config.nll_weight:
            likely = nll(pairs.chosen, pairs.chosen_lengths, here, per_token=config.nll_per_token)
            total += config.nll_weight * likely.total / num_likely
            metrics["nll_loss"] = likely
        return total, metrics | {"entropy": entropy}

    return objective


def _counts(batch: AnswerBatch, config: DPOConfig) -> tuple[Array, Array]:
    """What the two terms of the loss are divided by: pairs, and tokens of chosen answers (or pairs)."""
    lengths = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)
    real = (lengths[::2] > 0) & (lengths[1::2] > 0)
    num_pairs = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)
    if not config.nll_per_token:
        return num_pairs, num_pairs
    return num_pairs, jnp.maximum(jnp.sum(jnp.where(real, lengths[::2], 0.0)), 1.0)
