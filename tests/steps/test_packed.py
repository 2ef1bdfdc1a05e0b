"""Gradients summed over groups: in float32, and without a second array of their size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from easyrl.core.groups import gather
from easyrl.core.params import abstract, shardings
from easyrl.core.sharding import Shard, put, replicated
from easyrl.data.packing import Shape, pack
from easyrl.models.families import param_specs
from easyrl.steps.logprobs import next_token_logprobs
from easyrl.steps.packed import grads_over_groups, place_plans
from easyrl.steps.segments import packed_rows


def plans_of(number: int, length: int, mesh):
    """As many groups as sequences, of one sequence each."""
    return place_plans(pack(np.full(number, length), length, [Shape(1, length)], packed=False), number, mesh)


def test_gradients_of_bfloat16_parameters_add_up_in_float32(one_device):
    """512 gradients of 1/256 and one of 1: in bfloat16 the sum would never leave 1."""
    number = 513
    slopes = put(np.array([[1.0]] + [[1 / 256]] * (number - 1), np.float32), replicated(one_device))

    def objective(params, group):
        assert params["w"].dtype == jnp.bfloat16
        return jnp.sum(params["w"] * jnp.sum(gather(slopes, group.source_GRS)).astype(jnp.bfloat16)), ()

    params = put({"w": np.ones(3, jnp.bfloat16)}, replicated(one_device))
    sum_up = lambda params, plans: grads_over_groups(plans, objective, params, {"w": replicated(one_device)})
    grads, _ = jax.jit(sum_up)(params, plans_of(number, 1, one_device))
    assert grads["w"].dtype == jnp.float32
    np.testing.assert_array_equal(grads["w"], [3.0] * 3)


def test_a_group_has_no_gradient_of_its_own(cfg, one_device):
    """The memory of a program with few tokens and many weights: the sum, and what is left over for all else."""
    cfg = dataclasses.replace(cfg, width=256, mlp_size=1024, num_layers=24)
    specs, shard = param_specs(cfg, "lm"), Shard(one_device)
    plans = plans_of(4, 32, one_device)
    tokens = put(np.ones((4, 32), np.int32), replicated(one_device))

    def objective(params, group):
        logprobs, _ = next_token_logprobs(params, cfg, *packed_rows(group, tokens, shard), shard=shard)
        return -jnp.sum(logprobs), ()

    def norm(params, plans):
        grads, _ = grads_over_groups(plans, objective, params, shardings(specs, one_device))
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads))

    params = abstract(specs, jnp.float32)
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    program = jax.jit(norm).lower(params, plans).compile()
    assert size < program.memory_analysis().temp_size_in_bytes < 1.5 * size
