"""The key/value cache of cached decoding."""

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the tokens seen so far, and who they are.

    Slots fill from the left, the same slot for every row; a slot that holds padding has segment 0 and is never attended
    to. So prompts of any mix of lengths are padded on the right, and the tokens generated after them follow in slots
    P, P+1, ... with each row's own positions; or, in a ring, around (`sampling.refill`).

    One buffer for each layer, because a stacked one would be sliced, and so copied, at every step. The layout
    [batch, heads, slots, size] keeps what one head reads contiguous.
    """

    keys: tuple[Array, ...]  # [B, K, S, H] for each layer
    values: tuple[Array, ...]  # likewise
    positions_BS: Array
    segment_ids_BS: Array
    index: Array  # int32 scalar: the slot that is written next

    @property
    def size(self) -> int:
        """How many slots there are, filled or not."""
        return self.positions_BS.shape[1]


def init_cache(cfg, batch: int, size: int) -> Cache:
    """An empty cache of `size` slots for `batch` rows, in the compute dtype."""
    shape = (batch, cfg.num_kv_heads, size, cfg.head_size)
    return Cache(
        keys=tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_layers)),
        values=tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_layers)),
        positions_BS=jnp.zeros((batch, size), jnp.int32),
        segment_ids_BS=jnp.zeros((batch, size), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def grow_cache(cache: Cache, size: int) -> Cache:
    """The same cache with room for `size` slots (at least as many as it has); the new ones are free."""

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, size - cache.size if i == axis else 0) for i in range(x.ndim)])

    return Cache(
        keys=tuple(pad(k, 2) for k in cache.keys),
        values=tuple(pad(v, 2) for v in cache.values),
        positions_BS=pad(cache.positions_BS, 1),
        segment_ids_BS=pad(cache.segment_ids_BS, 1),
        index=cache.index,
    )


def roll_cache(cache: Cache, index: Array) -> Cache:
    """The same cache as a ring, turned so that its next free slot is `index`."""
    turn = lambda x, axis: jnp.roll(x, index - cache.index, axis)
    return Cache(
        keys=tuple(turn(k, 2) for k in cache.keys),
        values=tuple(turn(v, 2) for v in cache.values),
        positions_BS=turn(cache.positions_BS, 1),
        segment_ids_BS=turn(cache.segment_ids_BS, 1),
        index=index,
    )


def repeat_rows(cache: Cache, times: int) -> Cache:
    """Every row `times` times, copies of a row next to each other."""
    if times == 1:
        return cache
    repeated = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), cache.replace(index=None))
    return repeated.replace(index=cache.index)


def write(slots: Array, new: Array, index: Array, axis: int) -> Array:
    """`slots` with `new` at index, index + 1, ... of `axis`. A buffer that `new` fills whole becomes `new`."""
    if slots.shape == new.shape:
        return new.astype(slots.dtype)
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis)
