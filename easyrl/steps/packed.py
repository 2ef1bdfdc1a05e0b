"""Packed passes over ragged rows: how every trainer runs a model.

The host plans (data/packing.py) which tokens go side by side; here the plan meets the device. Rows are processed in
groups of a fixed shape by a loop whose trip count is data: one compiled program serves every batch, and runs only as
many groups as the batch has tokens for.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyrl.core.sharding import put, replicated
from easyrl.data.packing import Packing, Plan

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


def place_plans(packing: Packing, sequences: int, mesh: Mesh) -> Plans:
    """The plans of a batch of `sequences` sequences, with as many groups as it could need, on every device."""

    def place(plan: Plan, rows: int) -> PackPlan:
        used, length = plan.source.shape
        groups = -(-sequences // rows)
        assert used <= rows * groups, (used, rows, groups)

        def fill(array: np.ndarray, empty: int) -> np.ndarray:
            full = np.full((groups * rows, length), empty, np.int32)
            full[:used] = array
            return full.reshape(groups, rows, length)

        count = np.asarray(-(-used // rows), np.int32)
        arrays = (fill(plan.source, -1), fill(plan.positions, 0), fill(plan.segment_ids, 0), count)
        return PackPlan(*put(arrays, replicated(mesh)))

    return tuple(place(plan, shape.rows) for plan, shape in zip(packing.plans, packing.shapes, strict=True))


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


def count_planned(plans: Plans, mask_BT: Array) -> Array:
    """float32 scalar: how many True entries of a padded batch the plans hold."""
    return sum((jnp.sum(gather(mask_BT, plan.source_GRS, False), dtype=jnp.float32) for plan in plans), jnp.zeros(()))


def tokens_planned(plans: Plans) -> Array:
    """int32 scalar: the tokens that the plans hold."""
    return sum((jnp.sum(plan.segment_ids_GRS > 0) for plan in plans), jnp.zeros((), jnp.int32))


def sums_over_groups(plans: Plans, measure: Callable[[PackPlan], Any]) -> Any:
    """The sum of `measure(group)`, a tree of arrays, over the groups in use."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(measure, plans[0].group(0)))
    return over_groups(plans, zeros, lambda group, sums: jax.tree.map(jnp.add, sums, measure(group)))


def grads_over_groups(
    plans: Plans, objective: Callable[[dict, PackPlan], tuple[Array, Any]], params: dict, shardings: dict
) -> tuple[dict, Any]:
    """The gradient of `objective(params, group) -> (loss, metrics)`, summed over the groups, and the summed metrics.

    Each group's loss must already be divided by counts of the whole batch, so that a sum over groups is the batch's
    mean whatever the grouping. Gradients add up in float32, laid out like the parameters; `metrics` is a tree of sums.
    """
    shapes = jax.eval_shape(objective, params, plans[0].group(0))[1]
    metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def body(group, carry):
        grads, metrics = carry
        group_grads, group_metrics = jax.grad(objective, has_aux=True)(params, group)
        grads = jax.tree.map(jnp.add, grads, group_grads)
        return jax.lax.with_sharding_constraint(grads, shardings), jax.tree.map(jnp.add, metrics, group_metrics)

    return over_groups(plans, (grads, metrics), body)
