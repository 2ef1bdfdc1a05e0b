"""Log-probs of the tokens of a batch: the only place where tokens are shifted by one.

`logprobs[:, t]` scores `tokens[:, t + 1]` given the tokens up to t. Whatever a trainer needs (old, new, reference, SFT,
DPO) comes from here, and the log-prob itself from `models.heads.token_logprobs`, which the sampler uses too.
"""

import functools

import jax
import jax.numpy as jnp

from easyrl.core.sharding import Shard
from easyrl.models.families import ModelConfig, param_specs
from easyrl.models.heads import lm_head, lm_logits, token_logprobs
from easyrl.models.trunk import trunk

Array = jax.Array

# Logits exist at once for this many time steps, or, where rows are few, for so many that they make up this many tokens:
# enough for full matrix rate, and no [B, T, V] array.
CHUNK = 128
CHUNK_TOKENS = 512

CHUNKS = "chunks"  # the scope of the loops over chunks, by which programs can be told how often they run


def target_mask(segment_ids_BT: Array) -> Array:
    """bool [B, T]: True at t where tokens[:, t + 1] exists and belongs to the same segment as tokens[:, t]."""
    following = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    return (segment_ids_BT == following) & (segment_ids_BT > 0)


def next_token_logprobs(
    params: dict,
    cfg: ModelConfig,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    *,
    wanted: Array | None = None,
    temperature: float = 1.0,
    below: Array | None = None,
    shard: Shard | None = None,
) -> tuple[Array, Array]:
    """(logprobs, entropies), both float32 [B, T], of packed or padded rows.

    logprobs[:, t] = log p(tokens[:, t + 1] | its segment's tokens up to t) with p = softmax(logits / temperature);
    entropies[:, t] is that distribution's entropy in nats. Both are 0 where `target_mask` or `wanted` (bool [B, T];
    None: all) is False, and no logits are computed there: prompts and padding cost nothing above the trunk. `below`:
    hidden states that the layers of `params` go on from, if those are not all (`models/branch.py`).
    """
    hidden, _ = trunk(params, cfg, tokens_BT, positions_BT, segment_ids_BT, below=below, shard=shard)
    targets = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    mask = target_mask(segment_ids_BT)
    mask = mask if wanted is None else mask & wanted
    return chunked_logprobs(params, cfg, hidden, targets, mask, temperature, shard)


def most_chunks(rows: int, length: int) -> int:
    """The number of chunks of `rows` rows of `length` tokens that all want their logits."""
    return -(-length // min(max(CHUNK, CHUNK_TOKENS // rows), length))


def chunked_logprobs(
    params: dict,
    cfg: ModelConfig,
    hidden_BTD: Array,
    targets_BT: Array,
    mask_BT: Array,
    temperature: float,
    shard: Shard | None = None,
) -> tuple[Array, Array]:
    """`token_logprobs` where `mask_BT` is True, and 0 elsewhere, a chunk of logits at a time.

    Each row's masked positions are moved to its front, and only the chunks that hold any are computed: a loop whose
    trip count is data. Its gradient is a second such loop, which computes the logits of a chunk once more. Devices meet
    before and after a loop, and not for every chunk: the head is gathered once, and each device adds up the gradient of
    its own rows.
    """
    B, T, _ = hidden_BTD.shape
    num_chunks = most_chunks(B, T)
    size = -(-T // num_chunks)
    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
    used = -(-jnp.max(jnp.sum(mask_BT, axis=1, dtype=jnp.int32)) // size)

    def split(x_BT: Array) -> Array:
        """[B, T, ...] as chunks [num_chunks, B, size, ...]."""
        padded = jnp.pad(x_BT, [(0, 0), (0, num_chunks * size - T), *[(0, 0)] * (x_BT.ndim - 2)])
        return padded.reshape(B, num_chunks, size, *x_BT.shape[2:]).swapaxes(0, 1)

    hidden, targets = split(_reorder(hidden_BTD, order_BT)), split(jnp.take_along_axis(targets_BT, order_BT, axis=1))
    chunks = _logprobs_of_chunks(cfg, temperature, shard, lm_head(params, cfg), hidden, targets, used)
    front = (chunk.swapaxes(0, 1).reshape(B, num_chunks * size)[:, :T] for chunk in chunks)
    back_BT = jnp.argsort(order_BT, axis=1)
    logprobs, entropies = (jnp.where(mask_BT, jnp.take_along_axis(x, back_BT, axis=1), 0.0) for x in front)
    return logprobs, entropies


@jax.custom_vjp
def _reorder(x_BTD: Array, order_BT: Array) -> Array:
    """x[b, order[b, t]] for a permutation `order[b]`, whose gradient is the inverse permutation: no scatter."""
    return jnp.take_along_axis(x_BTD, order_BT[..., None], axis=1)


def _reorder_backward(order_BT: Array, gradient: Array) -> tuple[Array, None]:
    return jnp.take_along_axis(gradient, jnp.argsort(order_BT, axis=1)[..., None], axis=1), None


_reorder.defvjp(lambda x, order: (_reorder(x, order), order), _reorder_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _logprobs_of_chunks(
    cfg: ModelConfig,
    temperature: float,
    shard: Shard | None,
    head: dict,
    hidden_CBSD: Array,
    targets_CBS: Array,
    used: Array,
) -> tuple[Array, Array]:
    """`token_logprobs` of the first `used` of C chunks, each float32 [C, B, S]; 0 in the others."""
    head = _gathered(head, cfg, shard)

    def body(number, outs):
        new = token_logprobs(lm_logits(head, cfg, hidden_CBSD[number]), targets_CBS[number], temperature)
        return tuple(out.at[number].set(x) for out, x in zip(outs, new, strict=True))

    zeros = jnp.zeros(targets_CBS.shape, jnp.float32)
    with jax.named_scope(CHUNKS):
        return jax.lax.fori_loop(0, used, body, (zeros, zeros))


def _chunks_backward(cfg: ModelConfig, temperature: float, shard: Shard | None, saved, gradients):
    head, hidden_CBSD, targets_CBS, used = saved
    whole = _gathered(head, cfg, shard)
    C, B, S, D = hidden_CBSD.shape
    # A sum over rows that several devices share has to be the same on all of them after every chunk. So each part of
    # the rows that lies together has a sum of its own, and these are added up once.
    parts = shard.parts("batch") if shard else 1
    in_parts = lambda x: x.reshape(C, parts, B // parts, *x.shape[2:])
    hidden, targets, of_logprobs, of_entropies = map(in_parts, (hidden_CBSD, targets_CBS, *gradients))

    keep_apart = lambda sums: _pinned(sums, cfg, shard, "batch", whole=True)

    def of_part(hidden_BSD, targets_BS, *gradients_BS):
        chunk = lambda head, hidden: token_logprobs(lm_logits(head, cfg, hidden), targets_BS, temperature)
        return jax.vjp(chunk, whole, hidden_BSD)[1](gradients_BS)

    def body(number, sums):
        of_head, of_hidden = sums
        of_heads, of_chunk = jax.vmap(of_part)(*(x[number] for x in (hidden, targets, of_logprobs, of_entropies)))
        return keep_apart(jax.tree.map(jnp.add, of_head, of_heads)), of_hidden.at[number].set(of_chunk)

    of_head = jax.tree.map(lambda w: jnp.zeros((parts, *w.shape), jnp.float32), head)
    with jax.named_scope(CHUNKS):
        of_head, of_hidden = jax.lax.fori_loop(0, used, body, (keep_apart(of_head), jnp.zeros_like(hidden)))
    of_head = _pinned(jax.tree.map(lambda sums: jnp.sum(sums, axis=0), of_head), cfg, shard)
    of_head = jax.tree.map(lambda sum, w: sum.astype(w.dtype), of_head, head)
    return of_head, of_hidden.reshape(C, B, S, D), None, None


_logprobs_of_chunks.defvjp(
    lambda cfg, temperature, shard, *arrays: (_logprobs_of_chunks(cfg, temperature, shard, *arrays), arrays),
    _chunks_backward,
)


def _gathered(head: dict, cfg: ModelConfig, shard: Shard | None) -> dict:
    """The head as chunks read it: in the compute dtype, and no longer split over what rows are split over."""
    return _pinned(jax.tree.map(lambda w: w.astype(cfg.dtype), head), cfg, shard, whole=True)


def _pinned(weights: dict, cfg: ModelConfig, shard: Shard | None, *before: str, whole: bool = False) -> dict:
    """Arrays of the shapes in `lm_head`, behind dimensions `before`, laid out like it; `whole`: not split by width."""
    if shard is None:
        return weights
    specs = lm_head(param_specs(cfg, "lm"), cfg)
    axes = lambda spec: ("width" if whole and axis == "embed" else axis for axis in spec.axes)
    return jax.tree.map(lambda w, spec: shard(w, *before, *axes(spec)), weights, specs)
