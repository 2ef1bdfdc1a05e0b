"""Sampling responses: the prompts' prefill, then cached decoding until every row has ended.

Axes: B rows (prompts, or prompts x samples), P prompt, C completion, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.groups import Plans
from easyrl.core.sharding import DECODE_RULES, Shard, num_data_shards
from easyrl.models.cache import Cache, grow_cache, repeat_rows
from easyrl.models.families import ModelConfig
from easyrl.models.heads import lm_logits, token_logprobs
from easyrl.models.trunk import trunk, unstack_layers
from easyrl.sampling.logits import choose, keep_top_k, keep_top_p, penalise_repetition, suppress
from easyrl.sampling.loops import (
    Loop,
    decode_loops,
    most_unfinished,
    overwrite_rows,
    put_rows,
    take_rows,
    unfinished_first,
)
from easyrl.sampling.prefill import Prompts, prefill
from easyrl.sampling.refill import REFILLS, Queue, ring_of

Array = jax.Array

LOGPROB_SPACES = ("sampling", "model")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Nothing is filtered unless asked for: no hidden top-k."""

    max_new_tokens: int = flag(128, "Most tokens in a response, the end token included.")
    min_new_tokens: int = flag(0, "End tokens are ruled out before this many tokens.")
    temperature: float = flag(1.0, "Logits are divided by this. 0: the most likely token (greedy).")
    top_k: int = flag(0, "Sample among the k most likely tokens. 0: all.")
    top_p: float = flag(1.0, "Sample among the most likely tokens that make up this mass. 1: all.")
    repetition_penalty: float = flag(1.0, "Divides the positive logits of tokens seen so far, multiplies the negative.")

    def __post_init__(self) -> None:
        expected = {
            "max_new_tokens": ("1 or more", self.max_new_tokens >= 1),
            "min_new_tokens": (
                f"0 to max_new_tokens={self.max_new_tokens}",
                0 <= self.min_new_tokens <= self.max_new_tokens,
            ),
            "temperature": ("0 or more", self.temperature >= 0),
            "top_k": ("0 or more", self.top_k >= 0),
            "top_p": ("more than 0, at most 1", 0 < self.top_p <= 1),
            "repetition_penalty": ("more than 0", self.repetition_penalty > 0),
        }
        for name, (what, holds) in expected.items():
            if not holds:
                raise UserError(f"{name}: found {getattr(self, name)}, expected {what}")


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How much is decoded at a time. Inherited by scripts that sample."""

    decode_rows: int = flag(
        0, "Responses decoded at once, by all devices together; others wait for one to end. Changes memory and speed; "
        "responses only as rounding does. 0: all.", least=0, may_change=True,
    )  # fmt: skip


class Samples(flax.struct.PyTreeNode):
    """Responses, each row's tokens from the left."""

    tokens_BC: Array  # int32; pad_id after the response
    lengths_B: Array  # int32; the end token counts
    logprobs_BC: Array  # float32; 0 after the response, as are entropies
    entropies_BC: Array  # of the distributions that log-probs are of
    ended_B: Array  # bool: the last token is a stop id, which the model sampled; False: cut at max_new_tokens
    steps: Array  # int32: how often tokens were drawn, one for each row: for the longest row, if all begin at once


class _Rows(flax.struct.PyTreeNode):
    """The responses so far, after `steps` rounds of drawing, and what they are drawn from."""

    steps: Array
    prompt_lengths_B: Array
    keys_B: Array
    last_B: Array  # the token drawn last
    tokens_BC: Array
    logprobs_BC: Array
    entropies_BC: Array
    lengths_B: Array
    ended_B: Array  # the last token is a stop id
    # Tokens of the prompt and the response so far; None without a repetition penalty, and of what is not being decoded.
    seen_BV: Array | None

    @property
    def over_B(self) -> Array:
        """bool: the response has ended or is full, or the row only fills the batch."""
        return self.ended_B | (self.lengths_B >= self.tokens_BC.shape[1]) | (self.prompt_lengths_B == 0)


def sample_ids(prompt_ids: Array, num_samples: int) -> Array:
    """The sample ids [B * n] of n = `num_samples` samples for each prompt: prompt_id * n + j, a prompt's together."""
    return (jnp.asarray(prompt_ids)[:, None] * num_samples + jnp.arange(num_samples)).reshape(-1)


def make_sampling(
    cfg: ModelConfig,
    sampling: SamplingConfig,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int = 0,
    logprob_space: str = "sampling",
    num_samples: int = 1,
    decode_rows: int = 0,
    unstacked: bool = False,
    mesh: Mesh | None = None,
) -> Callable[..., Samples]:
    """The jitted `sample(params, prompts_BP, prompt_lengths_B, plans, key, sample_ids) -> Samples`.

    prompts int32 [B, P], right-padded with anything; prompt_lengths int32 [B], where 0 marks a row that only fills the
    batch and gets an empty response; plans say how the prompts are packed (`sampling.prefill`), and come from
    `steps.sampling`. With `num_samples` = n each prompt is prefilled once and gets n responses: sample_ids and all
    results have B * n rows, a prompt's next to each other. Where these are more than `decode_rows`, if any, that many
    are decoded at once, and whenever some have ended others take their place.

    A row's response is a function of the weights, its prompt, `key` and its sample id: token t is drawn with
    fold_in(fold_in(key, sample_id), t), so neither its neighbours nor the batch size, the padding or the mesh matter,
    nor does whether it waits.
    Decoding has a copy of the weights, as `models.trunk.unstack_layers` lays them out. With `unstacked` the params are
    laid out so already: nothing is copied, and the prefill's layers are unrolled, too.
    `key` should encode the seed and the step. A response stops with the first of `stop_ids` that it samples, and holds
    no other; nothing is appended.

    logprobs[b, t] = log p(tokens[b, t] | prompt, tokens[b, :t]) by `models.heads.token_logprobs`, at `temperature` in
    logprob_space `sampling` and at 1 in `model`: in both before repetition penalty, suppressed ends, top-k and top-p,
    which a trainer's forward pass does not know of.

    Raises UserError for a stop id outside the vocabulary, and for B or decode_rows that the mesh's dp x fsdp does not
    divide.
    """
    if logprob_space not in LOGPROB_SPACES:
        raise UserError(f"logprob_space: found {logprob_space!r}, expected one of {', '.join(LOGPROB_SPACES)}")
    for stop_id in stop_ids:
        if not 0 <= stop_id < cfg.vocab_size:
            raise UserError(f"stop_ids: found {stop_id}, expected ids below the vocabulary size {cfg.vocab_size}")
    shards = 1 if mesh is None else num_data_shards(mesh)
    if decode_rows % shards or decode_rows < 0:
        raise UserError(f"decode_rows: found {decode_rows}, expected 0 or a multiple of dp x fsdp = {shards}")
    C = sampling.max_new_tokens
    logprob_temperature = sampling.temperature if logprob_space == "sampling" else 1.0
    cfg = cfg.without_gradient
    shard, decode_shard = (None, None) if mesh is None else (Shard(mesh), Shard(mesh, DECODE_RULES))

    def by_row(x: Array) -> Array:
        return x if shard is None else shard(x, "batch", *[None] * (x.ndim - 1))

    def draw(params: dict, hidden_BD: Array, rows: _Rows) -> _Rows:
        """The next token of every row that goes on."""
        goes_on_B = ~rows.over_B
        logits_BV = lm_logits(params, cfg, hidden_BD)
        tokens_B = next_tokens(sampling, logits_BV, rows.keys_B, rows.lengths_B, stop_ids, rows.seen_BV)
        logprobs_B, entropies_B = token_logprobs(logits_BV, tokens_B, logprob_temperature)
        seen_BV = rows.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(seen_BV.shape[0]), tokens_B].set(True)
        here_BC = (jnp.arange(C) == rows.lengths_B[:, None]) & goes_on_B[:, None]
        put = lambda into_BC, new_B: jnp.where(here_BC, new_B[:, None], into_BC)
        return rows.replace(
            steps=rows.steps + 1,
            last_B=tokens_B,
            tokens_BC=put(rows.tokens_BC, tokens_B),
            logprobs_BC=put(rows.logprobs_BC, logprobs_B),
            entropies_BC=put(rows.entropies_BC, entropies_B),
            lengths_B=rows.lengths_B + goes_on_B,
            ended_B=rows.ended_B | (goes_on_B & jnp.isin(tokens_B, jnp.asarray(stop_ids, jnp.int32))),
            seen_BV=seen_BV,
        )

    def decode(params: dict, cache: Cache, rows: _Rows) -> tuple[Cache, _Rows]:
        """The rows with one token more, through the next slot of their cache."""
        hidden_B1D, filled = trunk(
            params,
            cfg,
            rows.last_B[:, None],
            (rows.prompt_lengths_B + rows.lengths_B - 1)[:, None],
            (~rows.over_B)[:, None].astype(jnp.int32),
            cache=cache,
            shard=decode_shard,
        )
        assert filled is not None
        return filled, draw(params, hidden_B1D[:, 0], rows)

    def decode_around(params: dict, cache: Cache, rows: _Rows) -> tuple[Cache, _Rows]:
        """The same with a cache that is a ring: behind the last slot comes the first."""
        cache, rows = decode(params, cache, rows)
        return cache.replace(index=cache.index % cache.size), rows

    def leave(rows: _Rows) -> _Rows:
        """The rows of responses that are not decoded."""
        return rows.replace(seen_BV=None)

    def run(loops: list[Loop], step: Callable, params: dict, cache: Cache, rows: _Rows) -> _Rows:
        """The rows once all responses have ended or are full; `step` decodes one token of each."""
        if not loops:
            return rows
        loop, *later = loops
        if loop.rows < len(rows.lengths_B):
            places_SN = unfinished_first(rows.over_B, shards, loop.rows)
            some = run(loops, step, params, take_rows(cache, places_SN), take_rows(rows, places_SN))
            return put_rows(rows, some, places_SN)

        def go_on(carry):
            cache, rows = carry
            return (cache.index < cache.size) & (most_unfinished(rows.over_B, shards) > loop.until)

        with jax.named_scope(loop.name):
            start = (grow_cache(cache, loop.size), rows)
            cache, rows = jax.lax.while_loop(go_on, lambda carry: step(params, *carry), start)
        return run(later, step, params, cache, rows)

    def run_refilled(loops: list[Loop], params: dict, begin: Callable, prompts: Prompts, every: _Rows) -> _Rows:
        """All responses, `loops[0].rows` at once: the others wait for one of these to end (`sampling.refill`).

        `begin(every, places_SN)` are the rows of these responses with their first tokens.
        """
        loop, *later = loops

        def go_on(carry):
            queue, _, rows, _ = carry
            return jnp.any(queue.waits_S) | (most_unfinished(rows.over_B, shards) > loop.until)

        def turn(carry):
            queue, every, rows, cache = carry

            def stay(carry):
                _, rows = carry
                return (most_unfinished(rows.over_B, shards) > loop.until) & ~queue.can_refill(rows.over_B)

            with jax.named_scope(loop.name):
                cache, rows = jax.lax.while_loop(stay, lambda carry: decode_around(params, *carry), (cache, rows))
            queue, refill = queue.refill(rows.over_B)
            every = put_rows(every, leave(take_rows(rows, refill.rows_SG)), refill.left_SG)
            rows = put_rows(rows, begin(every, refill.next_SG), refill.refilled_SG)
            ring = ring_of(prompts, refill.next_SG // num_samples, loop.size, cache.index)
            return queue, every, rows, overwrite_rows(cache, ring, refill.refilled_SG)

        queue = Queue.start(every.over_B, shards, loop.rows)
        rows = begin(every, queue.held_SR)
        cache = ring_of(prompts, queue.held_SR // num_samples, loop.size)
        with jax.named_scope(REFILLS):
            queue, every, rows, cache = jax.lax.while_loop(go_on, turn, (queue, every, rows, cache))
        return put_rows(every, leave(run(later, decode_around, params, cache, rows)), queue.held_SR)

    @jax.jit
    def sample(
        params: dict, prompts_BP: Array, prompt_lengths_B: Array, plans: Plans, key: Array, sample_ids: Array
    ) -> Samples:
        # Each prompt once, the head at its last token only.
        B, P = prompts_BP.shape
        prompts_BP, prompt_lengths_B = by_row(prompts_BP), by_row(prompt_lengths_B)
        hidden_BD, prompts = prefill(params, cfg, prompts_BP, prompt_lengths_B, plans, shards=shards, shard=shard)
        seen_BV = None
        if sampling.repetition_penalty != 1:
            is_prompt_BP = jnp.arange(P) < prompt_lengths_B[:, None]
            seen_BV = jnp.zeros((B, cfg.vocab_size), bool).at[jnp.arange(B)[:, None], prompts_BP].max(is_prompt_BP)

        # From here on a row is a sample.
        of_prompts = (hidden_BD, seen_BV)
        to_samples = lambda x: by_row(jnp.repeat(x, num_samples, axis=0))
        prompt_lengths_B = to_samples(prompt_lengths_B)
        B = B * num_samples
        decode_params = params if unstacked else unstack_layers(params, cfg, decode_shard)
        rows = _Rows(
            steps=jnp.zeros((), jnp.int32),
            prompt_lengths_B=prompt_lengths_B,
            keys_B=jax.vmap(jax.random.fold_in, (None, 0))(key, by_row(sample_ids)),
            last_B=by_row(jnp.zeros(B, jnp.int32)),
            tokens_BC=by_row(jnp.full((B, C), pad_id, jnp.int32)),
            logprobs_BC=by_row(jnp.zeros((B, C), jnp.float32)),
            entropies_BC=by_row(jnp.zeros((B, C), jnp.float32)),
            lengths_B=by_row(jnp.zeros(B, jnp.int32)),
            ended_B=by_row(jnp.zeros(B, bool)),
            seen_BV=None,
        )

        def begin(every: _Rows, places_SN: Array) -> _Rows:
            hidden_BD, seen_BV = take_rows(of_prompts, places_SN // num_samples)
            return draw(decode_params, hidden_BD, take_rows(every, places_SN).replace(seen_BV=seen_BV))

        loops = decode_loops(B, shards, P, C, may_end=bool(stop_ids), at_once=decode_rows)
        if loops[0].rows < B:
            rows = run_refilled(loops, decode_params, begin, prompts, rows)
        else:
            hidden_BD, seen_BV = jax.tree.map(to_samples, of_prompts)
            rows = draw(decode_params, hidden_BD, rows.replace(seen_BV=seen_BV))
            rows = run(loops, decode, decode_params, repeat_rows(prompts.cache(), num_samples), rows)
        return Samples(rows.tokens_BC, rows.lengths_B, rows.logprobs_BC, rows.entropies_BC, rows.ended_B, rows.steps)

    return sample


def next_tokens(
    sampling: SamplingConfig,
    logits_BV: Array,
    row_keys_B: Array,
    lengths_B: Array,
    stop_ids: tuple[int, ...],
    seen_BV: Array | None,
) -> Array:
    """The token that follows so many of every row, int32 [B], filtered in the order of transformers' `generate`."""
    if seen_BV is not None:
        logits_BV = penalise_repetition(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.min_new_tokens > 0:
        logits_BV = suppress(logits_BV, stop_ids, lengths_B < sampling.min_new_tokens)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return choose(jax.vmap(jax.random.fold_in)(row_keys_B, lengths_B), logits_BV)
