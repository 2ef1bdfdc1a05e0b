"""What training changes: parameters and their optimizer state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyrl.core.sharding import replicated

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """One model in training. `updates` counts the optimizer steps taken, skipped ones left out."""

    params: dict
    opt_state: Any
    updates: Array  # int32 scalar


def create_train_state(params: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at the start of training, moments sharded like the parameters they belong to."""
    shapes = jax.eval_shape(optimizer.init, params)
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh)))


def apply_gradients(
    state: TrainState, grads: dict, optimizer: optax.GradientTransformation, apply: Array
) -> tuple[TrainState, Array]:
    """One optimizer step where `apply` holds and the gradients are finite; otherwise the state as it was.

    Returns (state, whether the step was taken).
    """
    taken = apply & jnp.isfinite(optax.global_norm(grads))

    def step(state):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)

    return jax.lax.cond(taken, step, lambda state: state, state), taken
