"""Groups of packed rows on the device: how ragged sequences run through a model.

The host plans (data/packing.py) which tokens go side by side; here the plan meets the device. Rows are processed in
groups of a fixed shape by a loop whose trip count is data: one compiled program serves every batch, and runs only as
many groups as the batch has tokens for.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

GROUPS = "groups"  # the scope of the loop over groups, by which programs can be told how often it runs


class PackPlan(flax.struct.PyTreeNode):
    """Which token of a padded batch [B, T] goes where in G groups of R packed rows of length S.

    All int32. `source` is an index into the flattened batch (b * T + t), or -1 for padding. Groups from `count` on are
    empty.
    """

    source_GRS: Array
    positions_GRS: Array
    segment_ids_GRS: Array
    count: Array

    def group(self, number: Array | int) -> "PackPlan":
        """One group as a plan without the leading axis."""
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
        return PackPlan(pick(self.source_GRS), pick(self.positions_GRS), pick(self.segment_ids_GRS), self.count)


Plans = tuple[PackPlan, ...]  # one for each shape of groups


def gather(x_BT: Array, source: Array, empty: Any = 0) -> Array:
    """Values of a padded batch in packed order; `empty` (0, False) where the plan has padding.

    A token may have one value or an array of them, along further axes.
    """
    each = x_BT.shape[2:]
    real = (source >= 0).reshape(*source.shape, *[1] * len(each))
    return jnp.where(real, x_BT.reshape(-1, *each)[jnp.maximum(source, 0)], jnp.asarray(empty, x_BT.dtype))


def scatter(into_BT: Array, source: Array, values: Array) -> Array:
    """`into_BT` with packed `values` put back where they came from; padding is dropped. Further axes as in `gather`."""
    B, T, *each = into_BT.shape
    index = jnp.where(source >= 0, source, B * T)
    values = values.reshape(-1, *each).astype(into_BT.dtype)
    return into_BT.reshape(-1, *each).at[index.reshape(-1)].set(values, mode="drop").reshape(into_BT.shape)


def over_groups(plans: Plans, carry: Any, body: Callable[[PackPlan, Any], Any]) -> Any:
    """carry = body(group, carry) for every group in use. The trip count is data: one program for every batch."""
    for plan in plans:

        def step(number, carry, plan=plan):
            # Of a plan with one group XLA would see that no round differs from another, and compute in front of the
            # loop, all over again, as much as fits in memory there.
            group, _ = jax.lax.optimization_barrier((plan.group(number), number))
            return body(group, carry)

        with jax.named_scope(GROUPS):
            carry = jax.lax.fori_loop(0, plan.count, step, carry)
    return carry
