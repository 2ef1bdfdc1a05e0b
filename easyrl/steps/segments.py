"""Sequences inside packed rows: a model's input for one group, and one number for each sequence.

A padded batch [B, T] holds one sequence a row, and a plan's `source` (b * T + t) remembers which sequence every packed
token came from, so numbers per token come together per sequence wherever packing put them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from easyrl.core.groups import PackPlan, gather
from easyrl.core.sharding import Shard
from easyrl.data.packing import Packing

Array = jax.Array


def packed_rows(group: PackPlan, tokens_BT: Array, shard: Shard) -> tuple[Array, Array, Array]:
    """(tokens, positions, segment_ids) of one group, each int32 [R, S], rows split over the data axes."""
    rows = (gather(tokens_BT, group.source_GRS), group.positions_GRS, group.segment_ids_GRS)
    return tuple(shard(x, "batch", "time") for x in rows)  # type: ignore[return-value]


def sequence_sums(values_RS: Array, group: PackPlan, shape_BT: tuple[int, ...]) -> Array:
    """float32 [B]: packed `values` summed over the tokens of each sequence; 0 for sequences outside this group."""
    B, T = shape_BT
    row = jnp.where(group.source_GRS >= 0, group.source_GRS // T, B)
    return jnp.zeros(B, jnp.float32).at[row.reshape(-1)].add(values_RS.reshape(-1).astype(jnp.float32), mode="drop")


def last_tokens(tokens_BT: Array, lengths_B: Array, pad_id: int | None = None) -> Array:
    """bool [B, T]: True at the last real token of each row that is not `pad_id`, nowhere in a row of length 0.

    That is where transformers' sequence classifiers read a score (in a row of nothing but `pad_id` at its first token).
    It makes a difference where the end-of-text token serves as padding too, as GPT-2's does: then the score of a text
    that ends with it is read before it.
    """
    places = jnp.arange(tokens_BT.shape[1])
    counts = places < lengths_B[:, None]
    if pad_id is not None:
        counts &= tokens_BT != pad_id
    last_B = jnp.max(jnp.where(counts, places, 0), axis=1)
    return (places == last_B[:, None]) & (lengths_B[:, None] > 0)


def pairs_together(packing: Packing, shape_BT: tuple[int, ...]) -> bool:
    """Whether a host's packing keeps sequences 2i and 2i + 1 in one group."""
    group_of = np.full(shape_BT[0] // 2, -1)
    first = 0  # group of this shape
    for plan, shape in zip(packing.plans, packing.shapes, strict=True):
        inside = plan.source >= 0
        group = np.broadcast_to(first + np.arange(len(inside))[:, None] // shape.rows, inside.shape)[inside]
        pair = plan.source[inside] // shape_BT[1] // 2
        before = group_of[pair]
        group_of[pair] = group
        if np.any((before >= 0) | (group_of[pair] != group)):
            return False
        first += -(-len(inside) // shape.rows)
    return True
