"""Packed passes over ragged rows: how every trainer runs a model, in groups of packed rows (core/groups.py).

Plans go to the devices, and sums and gradients add up over the groups.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from easyrl.core.groups import PackPlan, Plans, gather, over_groups
from easyrl.core.sharding import put, replicated, stand_in
from easyrl.data.packing import Packing, Plan, Shape

Array = jax.Array


def place_plans(packing: Packing, sequences: int, mesh: Mesh) -> Plans:
    """The plans of a batch of `sequences` sequences, with as many groups as it could need, on every device."""
    return put(fill_plans(packing, sequences), replicated(mesh))


def fill_plans(packing: Packing, sequences: int) -> Plans:
    """The same on the host."""

    def in_groups(plan: Plan, rows: int) -> PackPlan:
        used, length = plan.source.shape
        groups = -(-sequences // rows)
        assert used <= rows * groups, (used, rows, groups)

        def fill(array: np.ndarray, empty: int) -> np.ndarray:
            full = np.full((groups * rows, length), empty, np.int32)
            full[:used] = array
            return full.reshape(groups, rows, length)

        count = np.asarray(-(-used // rows), np.int32)
        arrays: Any = (fill(plan.source, -1), fill(plan.positions, 0), fill(plan.segment_ids, 0), count)
        return PackPlan(*arrays)

    return tuple(in_groups(plan, shape.rows) for plan, shape in zip(packing.plans, packing.shapes, strict=True))


def abstract_plans(shapes: Sequence[Shape], sequences: int, mesh: Mesh) -> Plans:
    """Stand-ins for the plans that `place_plans` makes of a batch packed into groups of these shapes."""
    grids = (stand_in(mesh, jnp.int32, -(-sequences // shape.rows), *shape) for shape in shapes)
    return tuple(PackPlan(grid, grid, grid, stand_in(mesh, jnp.int32)) for grid in grids)


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

        def of_float32(wide):
            return objective(jax.tree.map(lambda w, x: w.astype(x.dtype), wide, params), group)

        wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)  # no copy: what is cast back is what it was
        pull: Any  # JAX calls it a function, which has no `with_refs`
        loss, pull, group_metrics = jax.vjp(of_float32, wide, has_aux=True)
        # Each layer's gradient is added where it belongs as soon as it is known: a group has none of its own, which
        # would be as large as the sum and be written and read once more.
        sums = jax.tree.map(jax.new_ref, grads)
        pull.with_refs(sums)(jnp.ones_like(loss))
        grads = jax.tree.map(jax.freeze, sums)
        return jax.lax.with_sharding_constraint(grads, shardings), jax.tree.map(jnp.add, metrics, group_metrics)

    return over_groups(plans, (grads, metrics), body)
