"""Meshes from flags, and the one rules table: what fits, and what is refused by name."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from easyrl.core.errors import UserError
from easyrl.core.sharding import (
    Shard,
    make_mesh,
    num_data_shards,
    parse_mesh_dim,
    put,
    sharding_for,
    spec_for,
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1,-1,1", (1, 8, 1)),
        ("-1,1,1", (8, 1, 1)),
        ("2,2,2", (2, 2, 2)),
        ("2,-1,2", (2, 2, 2)),
        ("mp:4,dp:2,fsdp:-1", (2, 1, 4)),
        (" 1, 8, 1", (1, 8, 1)),
    ],
)
def test_mesh_dim(text, sizes):
    assert parse_mesh_dim(text, 8) == dict(zip(("dp", "fsdp", "mp"), sizes, strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,1", "expected three sizes"),
        ("1,1,1,1", "expected three sizes"),
        ("dp:1,1,1", "expected three sizes"),
        ("dp:1,fsdp:1,tp:8", "'tp' is not one of dp, fsdp, mp"),
        ("dp:1,dp:1,mp:8", "'dp' is not one of dp, fsdp, mp, each given once"),
        ("1,x,1", "the size of fsdp is 'x'"),
        ("1,0,8", "the size of fsdp is 0"),
        ("-1,-1,1", "found it for dp and fsdp"),
        ("3,-1,1", "8 devices"),
        ("1,1,1", "8 devices"),
        ("1,16,1", "8 devices"),
    ],
)
def test_a_wrong_mesh_dim_is_one_clear_line(text, found):
    with pytest.raises(UserError, match=found) as error:
        parse_mesh_dim(text, 8)
    assert str(error.value).startswith(f"--mesh_dim={text}")
    assert "\n" not in str(error.value)


def test_meshes_leave_propagation_to_the_compiler():
    mesh = make_mesh("2,2,2")
    assert mesh.axis_names == ("dp", "fsdp", "mp")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert num_data_shards(mesh) == 4


def test_the_rules():
    mesh = make_mesh("2,2,2")
    spec = spec_for(("layers", "embed", "heads", "head_size"), (3, 16, 4, 8), mesh, "q")
    assert spec == PartitionSpec(None, ("fsdp",), ("mp",), None)
    assert spec_for(("batch", "time", None), (8, 5, 7), mesh, "x") == PartitionSpec(("dp", "fsdp"), None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embed", "mlp"), (16, 7), "--mesh_dim: parameter gate has mlp=7, which does not divide by mp=2"),
        (("batch",), (6,), "--mesh_dim: parameter gate has batch=6, which does not divide by dp=2 x fsdp=2"),
        (("mlp", "vocab"), (8, 8), "parameter gate: axes 'mlp' and 'vocab' both claim the mesh axis mp"),
        (("batch", "embed"), (8, 8), "parameter gate: axes 'batch' and 'embed' both claim the mesh axis fsdp"),
        (("experts",), (8,), "parameter gate: logical axis 'experts' has no rule"),
        (("embed",), (8, 8), "parameter gate: 1 logical axes"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_array(axes, shape, message):
    with pytest.raises(UserError) as error:
        spec_for(axes, shape, make_mesh("2,2,2"), "parameter gate")
    assert str(error.value).startswith(message)


def test_shard_pins_an_activation():
    mesh = make_mesh("2,2,2")
    shard = Shard(mesh)
    x = jax.jit(lambda x: shard(x, "batch", "time", "mlp"))(np.zeros((4, 3, 8), np.float32))
    assert x.sharding.is_equivalent_to(sharding_for(("batch", "time", "mlp"), x.shape, mesh, "x"), 3)


def test_host_arrays_are_placed_in_parts():
    mesh = make_mesh("2,2,2")
    host = {"tokens": np.arange(24).reshape(8, 3)}
    placed = put(host, NamedSharding(mesh, PartitionSpec(("dp", "fsdp"))))
    np.testing.assert_array_equal(placed["tokens"], host["tokens"])
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 3)}
