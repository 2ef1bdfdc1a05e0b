"""What training changes: parameters and their optimizer state."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyrl.core.params import abstract, shardings
from easyrl.core.sharding import replicated

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """One model in training. `updates` counts the optimizer steps taken, skipped ones left out."""

    params: dict
    opt_state: Any
    updates: Array  # int32 scalar


def state_shardings(specs: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where every part of a state lives: moments like the parameters they belong to, counters everywhere."""
    param_shardings = shardings(specs, mesh)
    opt_state = jax.eval_shape(optimizer.init, abstract(specs, jnp.float32))
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        opt_state,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(param_shardings, opt_shardings, replicated(mesh))  # type: ignore[arg-type]  # of shardings


def create_train_state(params: dict, specs: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at the start of training, from parameters that already lie where `specs` put them."""
    create = functools.partial(_new_state, optimizer)
    return jax.jit(create, out_shardings=state_shardings(specs, optimizer, mesh), donate_argnums=0)(params)


def abstract_train_state(specs: dict, dtype: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes, types and shardings of `create_train_state`: what a checkpoint is restored into."""
    shapes = jax.eval_shape(functools.partial(_new_state, optimizer), abstract(specs, dtype))
    return with_shardings(shapes, state_shardings(specs, optimizer, mesh))


def _new_state(optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """Moments are float32 whatever the parameters are: 0.999 is 1 in bfloat16, and nothing would decay."""
    return TrainState(params, optimizer.init(optax.tree.cast(params, jnp.float32)), jnp.zeros((), jnp.int32))


def with_shardings(shapes: Any, placed: Any) -> Any:
    """A tree of shapes and types with the shardings of another tree of its structure."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def apply_gradients(
    state: TrainState, grads: dict, optimizer: optax.GradientTransformation, loss: Array, apply: Array | bool = True
) -> tuple[TrainState, Array]:
    """One optimizer step where `apply` holds and the loss and the gradients are finite; else the state as it was.

    Returns (state, whether the step was taken). The decision is one number, computed from sums over all devices, so all
    of them decide alike, and the host need not know it.
    """
    taken = apply & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))

    def step(state):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(_add_updates(state.params, updates, state.updates), opt_state, state.updates + 1)

    return jax.lax.cond(taken, step, lambda state: state, state), taken


def _add_updates(params: dict, updates: dict, number: Array) -> dict:
    """Parameters + updates. Those in bfloat16 are rounded up or down at random, so that they move as far on average.

    Rounded to nearest, a weight would stay where it is for ever under updates below 1/512 of it, which those of
    fine-tuning are (Zamirai et al. 2020, arXiv:2010.06192). The draw comes from the update's `number`.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(leaves))
    added = [
        round_at_random(p.astype(jnp.float32) + u, key) if p.dtype == jnp.bfloat16 else optax.apply_updates(p, u)
        for p, u, key in zip(leaves, jax.tree.leaves(updates), keys, strict=True)
    ]
    return jax.tree.unflatten(structure, added)


def round_at_random(x: Array, key: Array) -> Array:
    """float32 `x` as one of its two neighbours in bfloat16, drawn so that the mean is `x`. Infinities and NaN stay."""
    cut = 16  # bits that bfloat16 has not
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) >> cut << cut
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x).astype(jnp.bfloat16)
