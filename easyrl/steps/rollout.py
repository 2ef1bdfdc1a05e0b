"""PPO's host side: sampled responses laid out for training, minibatches, and the check before the first update."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyrl.core.ahead import Call
from easyrl.core.errors import UserError
from easyrl.core.masking import Mean, add_metrics
from easyrl.core.sharding import fetch, put, replicated, stand_in
from easyrl.data.packing import Shape, pack
from easyrl.steps.packed import abstract_plans, place_plans
from easyrl.steps.ppo import PPOState
from easyrl.steps.scoring import Passes, Rollout, abstract_rollout


@dataclasses.dataclass(frozen=True)
class SampledBatch:
    """A batch of samples on the host: each row a prompt directly followed by its response, padded on the right to T.

    tokens int32 [B, T]; mask bool [B, T], True at t where tokens[:, t + 1] is a response token; sampler_logprobs and
    sampler_entropies float32 [B, T] in the same convention; prompt_lengths, response_lengths int [B] (a response's end
    token counts); ended bool [B]: whether the response stopped by itself.
    """

    tokens: np.ndarray
    mask: np.ndarray
    sampler_logprobs: np.ndarray
    sampler_entropies: np.ndarray
    prompt_lengths: np.ndarray
    response_lengths: np.ndarray
    ended: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.response_lengths

    def take(self, chosen: np.ndarray | slice) -> "SampledBatch":
        """Some of the samples, in this order."""
        return SampledBatch(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def response(self, row: int) -> np.ndarray:
        return self.tokens[row, self.prompt_lengths[row] : self.lengths[row]]


def join_samples(prompts: np.ndarray, prompt_lengths: np.ndarray, samples, *, pad_id: int) -> SampledBatch:
    """Prompts and `sampling.decode.Samples` as one `SampledBatch` with T = P + C.

    prompts [N, P], padded on the right; the samples hold the same number of responses to each, those to one prompt next
    to each other, B = N * n in all.
    """
    samples = fetch(samples)
    B, C = samples.tokens_BC.shape
    each = B // len(prompts)
    prompts, prompt_lengths = np.repeat(prompts, each, axis=0), np.repeat(prompt_lengths, each)
    tokens = np.full((B, prompts.shape[1] + C), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    logprobs, entropies = np.zeros((2, *tokens.shape), np.float32)
    for row, (start, length) in enumerate(zip(prompt_lengths, samples.lengths_B, strict=True)):
        tokens[row, :start] = prompts[row, :start]
        tokens[row, start : start + length] = samples.tokens_BC[row, :length]
        before = slice(start - 1, start + length - 1)
        mask[row, before] = True
        logprobs[row, before] = samples.logprobs_BC[row, :length]
        entropies[row, before] = samples.entropies_BC[row, :length]
    return SampledBatch(tokens, mask, logprobs, entropies, prompt_lengths, samples.lengths_B, samples.ended_B)


def minibatches(num_samples: int, size: int, epochs: int, key: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Sample numbers of each minibatch: every epoch visits all samples once, in an order drawn from `key`."""
    for epoch in range(epochs):
        order = np.random.default_rng((*key, epoch)).permutation(num_samples)
        yield from order.reshape(-1, size)


def lengths_of(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int [B]: the lengths of the chosen samples, and 0 for the others, which then take no place in a plan."""
    return np.where(np.isin(np.arange(len(lengths)), chosen), lengths, 0)


def run_updates(
    update: Callable, state: PPOState, rollout: Rollout, lengths: np.ndarray, *, size: int, epochs: int,
    key: tuple[int, ...], shapes: Sequence[Shape], mesh: Mesh,
) -> tuple[PPOState, dict[str, Mean]]:  # fmt: skip
    """All updates from one rollout of samples with these `lengths` [B]: `epochs` passes over it in minibatches of
    `size`, in an order drawn from `key`, each packed into groups of these `shapes`.

    Metrics are means over all minibatches; {} when there are none.
    """
    width = rollout.tokens.shape[1]
    stopped, metrics = put(np.zeros((), bool), replicated(mesh)), dict[str, Mean]()
    for chosen in minibatches(len(lengths), size, epochs, key):
        packing = pack(lengths_of(lengths, chosen), width, shapes)
        state, stopped, new = update(state, rollout, place_plans(packing, size, mesh), stopped)
        metrics = add_metrics(metrics, new) if metrics else new
    return state, metrics


def calls_ahead(
    forward: Callable, finish: Callable, updates: Mapping[str, Callable], models: tuple[PPOState, dict], passes: Passes,
    *, size: int, shapes: Sequence[Shape], update_shapes: Sequence[Shape], mesh: Mesh, from_sampler: set[bool],
) -> list[Call]:  # fmt: skip
    """The calls of a step on samples that are still to come, for compiling them beforehand: updates by name, passes,
    and what finishes the rollout.

    models are the state and the reference's weights. `passes`, of `abstract_passes`, says how many samples there will
    be. from_sampler: whether `forward` is given the log-probs that were drawn; where it is called in both ways, both.
    The rest is as in `run_updates`.
    """
    state, reference = models
    drawn, samples = passes.old_logprobs, len(passes.old_logprobs)
    tokens, mask = (stand_in(mesh, dtype, *drawn.shape) for dtype in (jnp.int32, jnp.bool_))
    stopped, scores = stand_in(mesh, jnp.bool_), stand_in(mesh, jnp.float32, samples)
    weights = (state.policy.params, reference, state.value.params)
    plans, some = abstract_plans(shapes, samples, mesh), abstract_plans(update_shapes, size, mesh)
    finishing = Call("finish", finish, (tokens, mask, passes, scores, state.kl_coef))
    rollout = abstract_rollout(finish, finishing.arguments, mesh).replace(hidden=passes.hidden)
    updating = (Call(name, update, (state, rollout, some, stopped)) for name, update in updates.items())
    passing = (
        Call("passes but the policy's" if given else "passes", forward, (*weights, tokens, mask, plans),
             {"sampler": (drawn, drawn) if given else None})
        for given in sorted(from_sampler, reverse=True)
    )  # fmt: skip
    return [*updating, *passing, finishing]


# Largest differences in log-prob that rounding explains, as (mean over tokens, maximum), by compute dtype.
LOGPROB_TOLERANCE = {"float32": (1e-4, 1e-2), "bfloat16": (5e-2, 2.0)}


def self_check(
    batch: SampledBatch, rollout: Rollout, passes: Passes, again: Passes, *, same_start: bool, dtype: str, stop_ids
) -> None:
    """Refuse to train wrong: what must hold of the real batch before the first update.

    `again` are the passes computed once more from a different packing, as the update will. `same_start`: policy and
    reference start from the same weights. The rollout is `finite` and has a response that is to be learnt from. Raises
    UserError naming the first check that fails and its likely cause:

    1. no response is empty;
    2. the score sits on the last sampled token, and on none of a response that is not to be learnt from; that token is
       an end token wherever the response ended, and no other token of a response is one;
    3. the sampler's log-probs equal the trainer's, here and below where something is learnt;
    4. the ratio is 1: log-probs do not depend on packing or on the pass that computed them;
    5. KL is 0 when policy and reference start equal.
    """
    mean_limit, max_limit = LOGPROB_TOLERANCE[str(jnp.dtype(dtype))]

    empty = np.flatnonzero(~batch.mask.any(axis=1))
    if empty.size:
        raise UserError(f"self-check: the response to sample {empty[0]} is empty; every response must hold a token")

    rows, last = np.arange(len(batch.tokens)), batch.lengths - 1
    expected = np.zeros(batch.tokens.shape, np.float32)
    learnt = fetch(rollout.mask)
    expected[rows, last - 1] = np.where(learnt.any(axis=1), fetch(rollout.scores), 0)
    paid = fetch(rollout.rewards) - fetch(rollout.penalties)
    misplaced = np.flatnonzero(~np.isclose(paid, expected, rtol=1e-4, atol=1e-4).all(axis=1))
    if misplaced.size:
        raise UserError(f"self-check: the score of sample {misplaced[0]} is not paid at its last token, or not in full")
    ends = batch.tokens[rows, last]
    wrong_end = np.flatnonzero(batch.ended & ~np.isin(ends, list(stop_ids)))
    if wrong_end.size:
        raise UserError(
            f"self-check: sample {wrong_end[0]} ended, but its last token is {ends[wrong_end[0]]}, "
            f"expected one of the end tokens {sorted(stop_ids)}"
        )
    inner = batch.mask[:, :-1] & (np.arange(1, batch.tokens.shape[1]) < last[:, None])
    goes_on = np.flatnonzero((inner & np.isin(batch.tokens[:, 1:], list(stop_ids))).any(axis=1))
    if goes_on.size:
        raise UserError(f"self-check: the response to sample {goes_on[0]} goes on behind an end token")

    def compare(name: str, a, b, cause: str):
        difference = np.abs(fetch(a) - fetch(b))[learnt]
        if not (difference.mean() <= mean_limit and difference.max() <= max_limit):
            raise UserError(
                f"self-check: {name} differ by {difference.mean():.2g} on average and {difference.max():.2g} at most "
                f"(allowed {mean_limit:g} and {max_limit:g} in {dtype}); {cause}"
            )

    compare(
        "the sampler's and the trainer's log-probs", batch.sampler_logprobs, passes.old_logprobs,
        "sampler and trainer do not see the same distribution (temperature, positions or weights)",
    )  # fmt: skip
    compare(
        "log-probs of the rollout and of the first minibatch", passes.old_logprobs, again.old_logprobs,
        "the ratio would not start at 1",
    )  # fmt: skip
    if same_start:
        compare(
            "log-probs of policy and reference", passes.old_logprobs, passes.ref_logprobs,
            "both start from the same weights, so the KL must start at 0",
        )  # fmt: skip
