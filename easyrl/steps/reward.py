"""Reward models: an optimizer step on scored sequences, evaluation, and scoring.

A score is the scalar head's output at a sequence's last real token that is not `pad_id`, the pad token that the model's
config.json names, if any (`last_tokens`). Sequences run packed, and each group of rows hands its scores to the losses
of `algos.preference`, whose means are over all pairs (or sequences) of the batch.

A pair's loss couples two scores, and both get their gradient from one forward pass; so both sequences of a pair must be
in one group, and `place_reward_batch` refuses any other plan. The alternative, one pass for all scores and a second one
for the gradient of their sum weighted by d loss / d score, would take any plan and cost a third more.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from easyrl.algos.preference import pairwise_loss, pointwise_loss
from easyrl.core.ahead import Call
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.groups import PackPlan, Plans, gather, over_groups
from easyrl.core.masking import Mean, constant_mean, nan_where_empty
from easyrl.core.sharding import Shard, fetch, num_data_shards, put, replicated
from easyrl.data.packing import Packing, group_shapes, pack
from easyrl.models.families import ModelConfig, param_specs
from easyrl.models.heads import scalar
from easyrl.models.trunk import trunk
from easyrl.steps.packed import grads_over_groups, place_plans, sums_over_groups, tokens_planned
from easyrl.steps.segments import last_tokens, packed_rows, pairs_together, sequence_sums
from easyrl.steps.state import TrainState, apply_gradients, state_shardings

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """How scores become a loss (`algos.preference`)."""

    loss: str = flag(
        "pairwise",
        "pairwise: the chosen answer scores higher; pointwise: the score is the logit of label 1.",
        choices=("pairwise", "pointwise"),
    )
    label_smoothing: float = flag(
        0.0, "Pairwise: the share of preferences taken to be the wrong way round, below 0.5.", least=0
    )
    center_coef: float = flag(
        0.0, "Pairwise: weight of (chosen + rejected)^2, which holds the mean score near 0.", least=0
    )

    def __post_init__(self) -> None:
        if self.label_smoothing >= 0.5:
            raise UserError(f"--label_smoothing={self.label_smoothing}: expected less than 0.5")
        for name in ("label_smoothing", "center_coef") if self.loss == "pointwise" else ():
            if getattr(self, name):
                raise UserError(f"--{name}={getattr(self, name)}: --loss=pointwise does not read it")


class RewardBatch(flax.struct.PyTreeNode):
    """A padded batch, what is known of its answers, and the plans that pack it.

    Pairwise, rows 2i and 2i + 1 are the chosen and the rejected answer of pair i and `targets` are margins [B / 2];
    pointwise, `targets` are labels [B]. Rows of length 0 are filler.
    """

    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B]
    targets: Array  # float32
    plans: Plans


def place_reward_batch(
    tokens: np.ndarray,
    lengths: np.ndarray,
    targets: np.ndarray,
    packing: Packing,
    mesh: Mesh,
) -> RewardBatch:
    """Host arrays as a batch that every device holds.

    Raises ValueError when `packing` parts a pair; whether there are pairs shows in the size of `targets`.
    """
    paired = len(targets) != len(tokens)
    if paired and not pairs_together(packing, tokens.shape):
        raise ValueError("the packing plan parts a pair: both its sequences must be in one group")
    arrays = (np.asarray(tokens, np.int32), np.asarray(lengths, np.int32), np.asarray(targets, np.float32))
    placed_tokens, placed_lengths, placed_targets = put(arrays, replicated(mesh))
    return RewardBatch(placed_tokens, placed_lengths, placed_targets, place_plans(packing, len(tokens), mesh))


def make_reward_step(
    cfg: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: RewardLossConfig,
    *,
    pad_id: int | None = None,
) -> Callable:
    """`step(state: TrainState, batch: RewardBatch) -> (state, metrics)`, jitted, `state` donated.

    Metrics (`Mean` pairs): loss and those of `algos.preference`, grad_norm before clipping, skipped (1 where loss
    or gradient was not finite and the state was left as it was), tokens (those worked on: a shared prompt once).
    """
    objective = _objective(cfg, mesh, config, pad_id)
    shardings = state_shardings(param_specs(cfg, "reward"), optimizer, mesh)

    def step(state: TrainState, batch: RewardBatch) -> tuple[TrainState, dict[str, Mean]]:
        count = jnp.maximum(jnp.sum(_real(batch), dtype=jnp.float32), 1.0)
        grads, metrics = grads_over_groups(
            batch.plans, lambda params, group: objective(params, group, batch, count), state.params, shardings.params
        )
        metrics = by_label(metrics)
        state, taken = apply_gradients(state, grads, optimizer, metrics["loss"].total)
        metrics["grad_norm"] = constant_mean(optax.tree.norm(grads))
        metrics["skipped"] = constant_mean(1.0 - taken)
        metrics["tokens"] = constant_mean(tokens_planned(batch.plans))
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def make_reward_eval(cfg: ModelConfig, mesh: Mesh, config: RewardLossConfig, *, pad_id: int | None = None) -> Callable:
    """`evaluate(params, batch: RewardBatch) -> (metrics, scores)`, jitted.

    Metrics are the loss and those of `algos.preference`, accuracy among them: add up the batches of a data set with
    `core.masking.add_metrics`, then take `by_label` of the sum. Scores are float32 [B], 0 for filler.
    """
    shard = Shard(mesh)

    def evaluate(params: dict, batch: RewardBatch) -> tuple[dict[str, Mean], Array]:
        def measure(group: PackPlan) -> tuple[dict[str, Mean], Array]:
            scores, here = _group_scores(params, cfg, group, batch.tokens, batch.lengths, pad_id, shard)
            return _group_loss(scores, here, batch, config)[1], scores

        return sums_over_groups(batch.plans, measure)

    return jax.jit(evaluate, out_shardings=replicated(mesh))


def by_label(metrics: dict[str, Mean]) -> dict[str, Mean]:
    """The summed metrics of a batch or data set, with NaN for the reward of a label that none of its answers has."""
    return nan_where_empty(metrics, {"rewards/chosen", "rewards/rejected"})


def _objective(cfg: ModelConfig, mesh: Mesh, config: RewardLossConfig, pad_id: int | None) -> Callable:
    """`objective(params, group, batch, count) -> (the group's summed loss / count, its metrics)`."""
    shard = Shard(mesh)

    def objective(params: dict, group: PackPlan, batch: RewardBatch, count) -> tuple[Array, dict[str, Mean]]:
        scores, here = _group_scores(params, cfg, group, batch.tokens, batch.lengths, pad_id, shard)
        loss, metrics = _group_loss(scores, here, batch, config)
        return loss.total / count, metrics

    return objective


def _group_loss(
    scores: Array, here: Array, batch: RewardBatch, config: RewardLossConfig
) -> tuple[Mean, dict[str, Mean]]:
    """(loss, metrics with the loss) over the pairs, or sequences, that are in this group."""
    if config.loss == "pairwise":
        loss, metrics = pairwise_loss(
            scores[::2], scores[1::2], here[::2] & here[1::2], margins=batch.targets,
            label_smoothing=config.label_smoothing, center_coef=config.center_coef,
        )  # fmt: skip
    else:
        loss, metrics = pointwise_loss(scores, batch.targets, here)
    return loss, {"loss": loss} | metrics


def _real(batch: RewardBatch) -> Array:
    """bool, shaped like the targets: the pairs, or sequences, that are not filler."""
    real = batch.lengths > 0
    return real if len(batch.targets) == len(real) else real[::2] & real[1::2]


def _group_scores(
    params: dict, cfg: ModelConfig, group: PackPlan, tokens: Array, lengths: Array, pad_id: int | None, shard: Shard
) -> tuple[Array, Array]:
    """(scores float32 [B], whether the sequence is in this group, bool [B])."""
    hidden, _ = trunk(params, cfg, *packed_rows(group, tokens, shard), shard=shard)
    last = gather(last_tokens(tokens, lengths, pad_id), group.source_GRS, False)
    scores = jnp.where(last, scalar(params, cfg, hidden), 0.0)
    return sequence_sums(scores, group, tokens.shape), sequence_sums(last, group, tokens.shape) > 0


def make_scorer(cfg: ModelConfig, mesh: Mesh, pad_id: int | None) -> Callable:
    """`score(params, tokens, lengths, plan) -> float32 [B]`, jitted: the score of each sequence, no gradient."""
    shard, cfg = Shard(mesh), cfg.without_gradient

    def score(params: dict, tokens: Array, lengths: Array, plan: Plans) -> Array:
        def body(group: PackPlan, scores: Array) -> Array:
            return scores + _group_scores(params, cfg, group, tokens, lengths, pad_id, shard)[0]

        return over_groups(plan, jnp.zeros(len(lengths), jnp.float32), body)

    return jax.jit(score, out_shardings=replicated(mesh))


class SequenceScorer:
    """A frozen reward model behind a host function: token sequences in, scores out.

    Args:
      params: of `param_specs(cfg, "reward")`, on `mesh`.
      max_length: the most tokens of a sequence, and the length of the longest packed rows.
      num_sequences: scored in one call of the compiled program; more are scored in several.
      rows: packed rows in one pass, a multiple of the devices that share the batch. 0: as `group_shapes` has it.
      pad_id: the pad token of the model's config.json, which no score is read at.

    One program serves every batch, and runs as many passes as the batch has tokens for.
    """

    def __init__(
        self,
        params: dict,
        cfg: ModelConfig,
        mesh: Mesh,
        *,
        max_length: int,
        num_sequences: int,
        rows: int = 0,
        pad_id: int | None = None,
    ):
        self._params, self._mesh = params, mesh
        self._max_length, self._num_sequences = max_length, num_sequences
        self._shapes = group_shapes(max_length, num_data_shards(mesh), rows=rows, sequences=num_sequences)
        self._score = make_scorer(cfg, mesh, pad_id)

    def __call__(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [B]: the score of each sequence.

        Every process calls this with the same sequences and gets all the scores. Raises ValueError for a sequence
        that is empty or longer than max_length.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        wrong = np.flatnonzero((lengths < 1) | (lengths > self._max_length))
        if wrong.size:
            found = f"sequence {wrong[0]} has {lengths[wrong[0]]} tokens"
            raise ValueError(f"{found}, expected 1 to {self._max_length}")
        starts = range(0, len(sequences), self._num_sequences)
        parts = [sequences[start : start + self._num_sequences] for start in starts]
        scores = [fetch(self.call(part).run())[: len(part)] for part in parts]
        return np.concatenate([np.zeros(0, np.float32), *scores])

    def call(self, sequences: Sequence[np.ndarray] = (), name: str = "reward") -> Call:
        """The call of the device program on up to num_sequences sequences; which these are does not change it."""
        tokens = np.zeros((self._num_sequences, self._max_length), np.int32)
        lengths = np.zeros(self._num_sequences, np.int32)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)], lengths[row] = sequence, len(sequence)
        packing = pack(lengths, self._max_length, self._shapes)
        whole = put((tokens, lengths), replicated(self._mesh))
        placed = place_plans(packing, self._num_sequences, self._mesh)
        return Call(name, self._score, (self._params, *whole, placed))
