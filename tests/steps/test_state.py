"""A model's training state: weights in bfloat16 keep their moments in float32, and move under small updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from easyrl.core.params import ParamSpec
from easyrl.core.sharding import make_mesh
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer
from easyrl.steps.state import apply_gradients, create_train_state, round_at_random

SPECS = {"kernel": ParamSpec((64, 64), ("embed", "mlp"), jax.nn.initializers.zeros)}


def test_weights_in_bfloat16_move_as_far_as_those_in_float32():
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    # One update is a 3,000th of a weight: rounded to nearest, none would ever move.
    optimizer = make_optimizer(OptimizerConfig(clip_gradient=0), optax.constant_schedule(1e-5))
    step = jax.jit(lambda state, grads: apply_gradients(state, grads, optimizer, jnp.float32(0))[0])
    ends = []
    for dtype in (jnp.float32, jnp.bfloat16):
        state = create_train_state({"kernel": jnp.full((64, 64), 0.03, dtype)}, SPECS, optimizer, mesh)
        for number in range(200):
            state = step(state, {"kernel": jnp.full((64, 64), -0.1 - 0.001 * number)})
        assert state.params["kernel"].dtype == dtype
        assert {moment.dtype for moment in jax.tree.leaves(state.opt_state) if moment.ndim} == {np.dtype("float32")}
        ends.append(np.asarray(state.params["kernel"], np.float32))
    plain, random = ends
    np.testing.assert_allclose(random.mean() - np.float32(jnp.bfloat16(0.03)), plain.mean() - 0.03, rtol=0.02)
    assert len(np.unique(random)) > 10
    again = round_at_random(jnp.asarray(random), jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(again, np.float32), random)  # what bfloat16 holds stays


def test_rounding_at_random_is_right_on_average_and_leaves_infinities():
    x = jnp.full(40_000, 1 + 1 / 512)  # a quarter of the way from 1 to its neighbour
    up = np.asarray(round_at_random(x, jax.random.key(0)), np.float32)
    assert set(up) == {1, 1 + 1 / 128}
    np.testing.assert_allclose((up > 1).mean(), 0.25, atol=0.01)
    odd = jnp.asarray([np.inf, -np.inf, np.nan, 0.0])
    np.testing.assert_array_equal(np.asarray(round_at_random(odd, jax.random.key(0)), np.float32), odd)
