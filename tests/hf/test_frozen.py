"""Models read, held and written in two parts: a frozen bottom and the tops on it."""

import jax
import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.core.params import shardings
from easyrl.core.sharding import make_mesh
from easyrl.hf.export import export_model
from easyrl.hf.frozen import load_frozen
from easyrl.hf.load import load_params
from easyrl.hf.refs import find_model, load_weights
from easyrl.hf.safetensors_io import WEIGHTS
from easyrl.models.branch import cut, join
from easyrl.models.families import param_specs

LAYERS = {"num_hidden_layers": 3}
BOTTOM, TOP = range(2), range(2, 3)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2"])
@pytest.mark.parametrize("part", [BOTTOM, TOP])
def test_a_part_is_read_from_the_whole(folder, make, mesh_dim, part):
    mesh = make_mesh(mesh_dim, jax.devices()[: 8 if mesh_dim == "2,2,2" else 1])
    cfg, params = make(**LAYERS)
    loaded = load_params(folder(**LAYERS), cfg, "lm", mesh, "float32", layers=part)
    assert_same(loaded, cut(params, part))
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings(param_specs(cfg, "lm", part), mesh)


def test_parts_of_a_random_model_are_those_of_the_whole(mesh):
    found = find_model("random::debug")
    whole, part = load_weights(found, mesh, head="lm"), range(1, found.cfg.num_layers)
    assert_same(load_weights(found, mesh, head="lm", layers=part), cut(whole, part))


MODELS = {
    "llama": "debug",
    "bloom": '{"model_type": "bloom", "vocab_size": 48, "hidden_size": 16, "n_layer": 3, "n_head": 2}',
}


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("model", MODELS)
def test_two_parts_are_written_as_one_model(tmp_path, mesh, head, model):
    found = find_model(f"random::{MODELS[model]}")
    cfg, params = found.cfg, load_weights(found, mesh, head=head)
    bottom, top = cut(params, range(1)), cut(params, range(1, cfg.num_layers))
    one = export_model(tmp_path / "one", cfg, params, head)
    two = export_model(tmp_path / "two", cfg, join(bottom, top), head)
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="do not have the structure"):
        export_model(tmp_path / "none", cfg, join(bottom, params), head)


def start(tmp_path, make, name, change=None, head="lm"):
    """A model's folder, found; `change(params)` alters what it holds."""
    cfg, params = make(head, **LAYERS)
    params = jax.tree.map(np.array, params)
    if change:
        change(params)
    params = jax.tree.map(jax.numpy.asarray, params)
    return find_model(f"hf::{export_model(tmp_path / name, cfg, params, head)}", flag=f"--load_checkpoint_{name}")


def change_top(params):
    params["layers"]["mlp"]["up"][2] += 1


def change_bottom(params):
    params["layers"]["mlp"]["up"][1, 0, 0] += 1


def change_embeddings(params):
    params["embed"]["tokens"][0, 0] += 1


def test_models_whose_tops_alone_differ_share_the_bottom(tmp_path, make, mesh):
    policy, reference, value = (
        start(tmp_path, make, "policy"), start(tmp_path, make, "reference", change_top),
        start(tmp_path, make, "value", change_top, head="value"),
    )  # fmt: skip
    frozen = load_frozen(policy, reference, value, 1, mesh, dtype="bfloat16", param_dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jax.numpy.dtype("bfloat16")}
    assert_same(frozen.bottom, cut(load_weights(policy, mesh, head="lm", dtype="bfloat16"), BOTTOM))
    assert_same(frozen.reference, cut(load_weights(reference, mesh, head="lm", dtype="bfloat16"), TOP))
    whole = load_frozen(policy, reference, value, 0, mesh, dtype="float32", param_dtype="float32")
    assert whole.bottom is None
    assert_same(whole.reference, load_weights(reference, mesh, head="lm"))


@pytest.mark.parametrize("change", [change_bottom, change_embeddings])
def test_a_model_with_another_bottom_is_refused(tmp_path, make, mesh, change):
    policy, value = start(tmp_path, make, "policy"), start(tmp_path, make, "value", change, head="value")
    with pytest.raises(UserError, match=r"^--load_checkpoint_value: its embeddings or lower layers are not"):
        load_frozen(policy, policy, value, 1, mesh, dtype="float32", param_dtype="float32")
