"""Parameters described once: initial values, shardings, abstract trees and counts all follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import normal, ones

from easyrl.core.errors import UserError
from easyrl.core.params import ParamSpec, abstract, init_params, num_params, path_str, shardings
from easyrl.core.sharding import make_mesh

SPECS = {
    "embed": {"tokens": ParamSpec((16, 8), ("vocab", "embed"), normal(0.02))},
    "norm": ParamSpec((8,), ("norm",), ones),
    "head": {"kernel": ParamSpec((8, 16), ("embed", "vocab"), normal(0.02))},
}


@pytest.fixture(scope="module")
def one_device():
    return make_mesh("1,1,1", jax.devices()[:1])


@pytest.fixture(scope="module")
def initial(one_device):
    return init_params(SPECS, jax.random.key(0), jnp.float32, one_device)


@pytest.mark.parametrize("mesh_dim", ["8,1,1", "1,8,1", "2,2,2"])
def test_initial_values_do_not_depend_on_the_mesh(mesh_dim, initial):
    mesh = make_mesh(mesh_dim)
    sharded = init_params(SPECS, jax.random.key(0), jnp.float32, mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded, initial)
    for leaf, sharding in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings(SPECS, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_initial_values_depend_on_the_name_and_not_on_the_company(initial, one_device):
    alone = init_params({"head": SPECS["head"]}, jax.random.key(0), jnp.float32, one_device)
    np.testing.assert_array_equal(alone["head"]["kernel"], initial["head"]["kernel"])
    assert not np.array_equal(initial["head"]["kernel"].T, initial["embed"]["tokens"])
    assert 0.01 < np.std(initial["head"]["kernel"]) < 0.03
    np.testing.assert_array_equal(initial["norm"], 1)


def test_low_precision_starts_from_the_same_numbers(initial, one_device):
    half = init_params(SPECS, jax.random.key(0), jnp.bfloat16, one_device)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, initial)


def test_abstract_is_the_tree_without_the_numbers(initial):
    mesh = make_mesh("1,8,1")
    assert abstract(SPECS, "float32") == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), initial)
    assert abstract(SPECS, "bfloat16", mesh)["norm"].dtype == jnp.bfloat16
    assert jax.tree.map(lambda leaf: leaf.sharding, abstract(SPECS, "float32", mesh)) == shardings(SPECS, mesh)


def test_counting_holds_no_array():
    huge = ParamSpec((10**6, 10**6), ("vocab", "embed"), normal(0.02))
    assert num_params(SPECS) == 16 * 8 + 8 + 8 * 16
    assert num_params({"huge": huge, **SPECS}) == 10**12 + 264


def test_a_parameter_that_does_not_fit_the_mesh_is_named():
    odd = dataclasses.replace(SPECS["head"]["kernel"], shape=(8, 15))
    with pytest.raises(UserError, match=r"parameter head/kernel has vocab=15, which does not divide by mp=2"):
        shardings({**SPECS, "head": {"kernel": odd}}, make_mesh("2,2,2"))


def test_paths_read_as_names():
    tree = {"layers": [{"q": 1}], "norm": 2}
    assert [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] == ["layers/0/q", "norm"]
