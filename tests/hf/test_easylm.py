"""Files in EasyLM's layout, written here with msgpack and flax as EasyLM writes them, against the same safetensors."""

import re

import flax.serialization
import jax
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file

from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.hf.families import read_config
from easyrl.hf.load import load_params
from easyrl.hf.refs import find_model, load_model
from easyrl.hf.safetensors_io import WEIGHTS

HEADS, KV_HEADS, LAYERS = 4, 2, 2


def neighbours(weight, heads):
    """transformers' rows of a q or k projection, pairs (i, i + H/2), in EasyLM's order of neighbouring pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def easylm_params(directory, *, hf_rotary=False):
    """{key: array} as EasyLM would hold the model of a transformers folder: kernels [in, out]."""
    theirs = load_file(directory / WEIGHTS)
    turn = (lambda w, heads: w) if hf_rotary else neighbours
    params = {("transformer", "wte", "embedding"): theirs["model.embed_tokens.weight"]}
    for i in range(LAYERS):
        h, layer = f"model.layers.{i}.", ("transformer", "h", str(i))
        params |= {
            (*layer, "attention", "wq", "kernel"): turn(theirs[h + "self_attn.q_proj.weight"], HEADS).T,
            (*layer, "attention", "wk", "kernel"): turn(theirs[h + "self_attn.k_proj.weight"], KV_HEADS).T,
            (*layer, "attention", "wv", "kernel"): theirs[h + "self_attn.v_proj.weight"].T,
            (*layer, "attention", "wo", "kernel"): theirs[h + "self_attn.o_proj.weight"].T,
            (*layer, "feed_forward", "w1", "kernel"): theirs[h + "mlp.gate_proj.weight"].T,
            (*layer, "feed_forward", "w2", "kernel"): theirs[h + "mlp.down_proj.weight"].T,
            (*layer, "feed_forward", "w3", "kernel"): theirs[h + "mlp.up_proj.weight"].T,
            (*layer, "attention_norm", "kernel"): theirs[h + "input_layernorm.weight"],
            (*layer, "ffn_norm", "kernel"): theirs[h + "post_attention_layernorm.weight"],
        }
    params["transformer", "ln_f", "kernel"] = theirs["model.norm.weight"]
    for head in ("lm_head", "score"):
        if f"{head}.weight" in theirs:
            params[head, "kernel"] = theirs[f"{head}.weight"].T
    return {key: np.ascontiguousarray(value) for key, value in params.items()}


def write_stream(path, params, chunk_bytes=10**9):
    """As EasyLM's StreamingCheckpointer: (key, flax bytes) one behind the other, long values in chunks."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for key, value in params.items():
            data = flax.serialization.to_bytes(value)
            if len(data) <= chunk_bytes:
                file.write(packer.pack((key, data)))
                continue
            for number, start in enumerate(range(0, len(data), chunk_bytes)):
                file.write(packer.pack(((*key, f"chunk_{number}"), data[start : start + chunk_bytes])))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("mesh_dim", ["1,1,1", "2,2,2"])
@pytest.mark.parametrize("head", ["lm", "reward"])
def test_a_stream_has_the_weights_of_the_folder(folder, tmp_path, head, mesh_dim):
    directory, path = folder(head), tmp_path / "streaming_params"
    write_stream(path, easylm_params(directory))
    mesh = make_mesh(mesh_dim, jax.devices()[: 8 if mesh_dim == "2,2,2" else 1])
    expected = load_params(directory, read_config(directory), head, mesh, "float32")
    found = load_model(f"params::{path}@{directory}", mesh, head=head)
    assert_same(found.params, expected)
    assert found.cfg == read_config(directory)


def test_a_value_model_from_a_reward_model_in_bfloat16(folder, make, tmp_path, mesh):
    directory, path = folder("reward", max_shard_bytes=5e9), tmp_path / "value_streaming_params"
    half = {key: value.astype(jax.numpy.bfloat16) for key, value in easylm_params(directory).items()}
    write_stream(path, half)
    loaded = load_model(f"params::{path}@{directory}/config.json", mesh, head="value", dtype="bfloat16").params
    assert loaded["head"].pop("scalar_bias") == 0
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), make("reward")[1]))


@pytest.mark.parametrize("way", ["chunks of the stream", "chunks of flax", "train state", "flax", "hf rotary"])
def test_every_way_in_which_they_are_written(folder, make, tmp_path, mesh, monkeypatch, way):
    directory, path, kind = folder(), tmp_path / "file", "params"
    params = easylm_params(directory, hf_rotary=way == "hf rotary")
    config = str(directory)
    if way == "chunks of the stream":
        write_stream(path, params, chunk_bytes=700)
    elif way == "chunks of flax":
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 500)
        write_stream(path, params)
    elif way == "train state":
        kind = "trainstate_params"
        state = {("step",): np.int32(3), ("opt_state", "0", "count"): np.zeros((), np.int32), ("opt_state", "1"): None}
        write_stream(path, state | {("params", "params", *key): value for key, value in params.items()})
    elif way == "flax":
        kind, tree = "flax_params", {}
        for key, value in params.items():
            branch = tree
            for name in key[:-1]:
                branch = branch.setdefault(name, {})
            branch[key[-1]] = value
        path.write_bytes(flax.serialization.to_bytes({"params": tree}))
    else:
        write_stream(path, params)
        config = tmp_path / "llama.json"
        text = (directory / "config.json").read_text().replace("max_position_embeddings", "max_sequence_length")
        config.write_text(text.replace('"model_type": "llama"', '"use_hf_rotary_emb": true'))
    assert_same(load_model(f"{kind}::{path}@{config}", mesh, head="lm").params, make()[1])


def test_without_a_configuration_its_folder_has_one(folder, make, mesh):
    directory = folder()
    write_stream(directory / "streaming_params", easylm_params(directory))
    assert find_model(f"params::{directory}/streaming_params").directory == directory
    assert_same(load_model(f"params::{directory}/streaming_params", mesh, head="lm").params, make()[1])


def test_only_what_a_device_needs_is_read(folder, tmp_path, monkeypatch):
    from easyrl.hf.easylm import EasyLMCheckpoint

    directory, path, sizes = folder(), tmp_path / "streaming_params", {}
    write_stream(path, easylm_params(directory))
    read = EasyLMCheckpoint.read

    def counting_read(self, name, slices):
        array = read(self, name, slices)
        sizes.setdefault(name, []).append(array.nbytes)
        return array

    monkeypatch.setattr(EasyLMCheckpoint, "read", counting_read)
    load_model(f"params::{path}@{directory}", make_mesh("2,2,2"), head="lm")
    assert sizes["model.layers.1.self_attn.q_proj.weight"] == [16 * 16 * 4 // 4] * 4


def truncate(data):
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"cut short inside transformer\.h\.\d\..*: \d+ bytes are missing"),
        (lambda data: b"", "cannot be read"),
        (lambda data: b"\x80\x04\x95" + data, r"byte 0: found 800495.., expected a \(key, value\) pair: not an EasyLM"),
        (lambda data: data + b"PK", r"byte \d+: found 504b, expected a \(key, value\) pair"),
        (lambda data: data.replace(b"float32", b"float99"), "expected the type of transformer"),
        (lambda data: data.replace(b"float32", b"int8999"), "expected the type of transformer"),
        (lambda data: data.replace(b"wq", b"wx"), "q_proj.weight is missing"),
        (lambda data: data + msgpack.packb((("more",), flax.serialization.to_bytes(np.ones(3)))), "more is left over"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(folder, tmp_path, mesh, damage, message):
    directory, path = folder(), tmp_path / "streaming_params"
    write_stream(path, easylm_params(directory))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        load_model(f"params::{path}@{directory}", mesh, head="lm", flag="--load_checkpoint_policy")
    assert str(error.value).startswith(f"--load_checkpoint_policy: {path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"\x81\xa1a" * 20_000 + b"\xc0", b"\x81\xa1a" + b"\x91" * 20_000 + b"\xc0"])
def test_deep_nesting_is_one_line(folder, tmp_path, mesh, data):
    path = tmp_path / "flax_params"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^--load_checkpoint: {path}: (is nested too deeply|byte 3: found)"):
        load_model(f"flax_params::{path}@{folder()}", mesh, head="lm")


def test_another_size_names_tensor_and_shapes(folder, tmp_path, mesh):
    directory, path = folder(), tmp_path / "streaming_params"
    write_stream(path, easylm_params(directory))
    text = (directory / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'"intermediate_size": \d+', '"intermediate_size": 32', text))
    with pytest.raises(UserError, match=r"gate_proj.weight has shape \[24, 16\], expected \[32, 16\]"):
        load_model(f"params::{path}", mesh, head="lm")


def test_every_way_to_cut_a_file_short_is_one_line(folder, tmp_path, mesh):
    directory, path = folder(), tmp_path / "streaming_params"
    write_stream(path, {("lm_head", "kernel"): np.ones((2, 3), np.float32)})
    data = path.read_bytes()
    for end in range(1, len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"cut short|cannot be read|byte \d+"):
            load_model(f"params::{path}@{directory}", mesh, head="lm")
