"""The key/value cache of cached decoding."""

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the tokens seen so far, and who they are.

    Slots fill from the left, the same slot for every row; a slot that holds padding has segment 0 and is never attended
    to. So prompts of any mix of lengths are padded on the right, and the tokens generated after them follow in slots
    P, P+1, ... with each row's own positions.

    The layout [.., heads, slots, size] keeps what one head reads contiguous.
    """

    k_LBKSH: Array
    v_LBKSH: Array
    positions_BS: Array
    segment_ids_BS: Array
    index: Array  # int32 scalar: the next free slot


def init_cache(cfg, batch: int, size: int) -> Cache:
    """An empty cache of `size` slots for `batch` rows, in the compute dtype."""
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, size, cfg.head_size)
    return Cache(
        k_LBKSH=jnp.zeros(shape, cfg.dtype),
        v_LBKSH=jnp.zeros(shape, cfg.dtype),
        positions_BS=jnp.zeros((batch, size), jnp.int32),
        segment_ids_BS=jnp.zeros((batch, size), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )
