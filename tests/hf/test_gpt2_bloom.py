"""GPT-2's and BLOOM's folders as they are published. That the numbers are transformers' is shown in test_parity.py."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyrl.core.errors import UserError
from easyrl.core.params import shardings
from easyrl.core.sharding import make_mesh
from easyrl.hf.families import config_from_hf, family_of, read_config
from easyrl.hf.load import load_params
from easyrl.hf.presets import PRESETS
from easyrl.hf.safetensors_io import WEIGHTS
from easyrl.models.families import param_specs

FAMILIES = ("gpt2", "bloom")


def load(directory, mesh, head="lm", **kwargs):
    return load_params(directory, read_config(directory), head, mesh, "float32", **kwargs)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_published_configurations():
    """The fields of openai-community/gpt2-large and bigscience/bloomz-7b1-mt that say what the network is."""
    gpt2 = config_from_hf(
        {
            "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36, "n_positions": 1024, "vocab_size": 50257,
        },
        "x",
    )  # fmt: skip
    bloom = config_from_hf(
        {
            "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "layer_norm_epsilon": 1e-05,
            "n_embed": 4096, "n_layer": 30, "num_attention_heads": 32, "pretraining_tp": 4, "seq_length": 2048,
            "slow_but_exact": False, "vocab_size": 250880,
        },
        "x",
    )  # fmt: skip
    assert gpt2 == config_from_hf(PRESETS["gpt2-large"], "x")
    assert bloom == config_from_hf(PRESETS["bloomz-7b1"], "x")
    assert (gpt2.mlp_size, gpt2.head_size, gpt2.tied_embeddings) == (5120, 64, True)
    assert (bloom.mlp_size, bloom.head_size, bloom.max_positions, bloom.tied_embeddings) == (16384, 128, 2048, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2", "activation_function": "gelu", "n_inner": 20, "layer_norm_epsilon": 1e-6},
        {"model_type": "gpt2", "tie_word_embeddings": False},
        {"model_type": "bloom", "apply_residual_connection_post_layernorm": True, "seq_length": 99},
    ],
)
def test_export_says_what_import_reads(tiny, changes):
    cfg = config_from_hf(tiny(**changes), "x")
    assert config_from_hf(family_of(cfg).config_to_hf(cfg), "x") == cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True, expected false"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights is False, expected true"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention is True, expected false"),
        ({"model_type": "gpt2", "activation_function": "swish"}, "expected gelu_new or gelu_pytorch_tanh or gelu or"),
        ({"model_type": "gpt2", "n_embd": 18}, "num_attention_heads is 4, expected a divisor of n_embd=18"),
        ({"model_type": "bloom", "hidden_size": 18}, "is 4, expected a divisor of hidden_size=18"),
        ({"model_type": "bloom", "num_hidden_layers": None}, "n_layer is missing"),
        (
            {"model_type": "bloom", "slow_but_exact": True, "pretraining_tp": 2},
            "slow_but_exact is True, expected false",
        ),
    ],
)
def test_refused(tiny, changes, message):
    with pytest.raises(UserError) as error:
        config_from_hf(tiny(**changes), "conf")
    assert str(error.value).startswith("conf")
    assert message in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_gets_the_same_values(folder, make, family):
    """Fused query, key and value are split by heads, which lie apart in GPT-2's tensor."""
    cfg, params = make(model_type=family)
    mesh = make_mesh("2,2,2")
    loaded = load(folder(model_type=family), mesh)
    assert_same(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings(param_specs(cfg, "lm"), mesh)
    qkv = loaded["layers"]["attn"]["qkv"]
    assert {shard.data.shape for shard in qkv.addressable_shards} == {(2, 8, 3, 2, 4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_published_checkpoints(folder, make, mesh, family):
    """Without `transformer.`, and for GPT-2 with the causal mask that transformers once saved."""
    directory = folder(model_type=family)
    published = {name.removeprefix("transformer."): x for name, x in load_file(directory / WEIGHTS).items()}
    if family == "gpt2":
        published |= {
            "h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32),
            "h.1.attn.masked_bias": np.full((), -1e4, np.float32),
        }
    save_file(published, directory / WEIGHTS)
    assert_same(load(directory, mesh), make(model_type=family)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_model_from_a_reward_model_and_back(folder, make, mesh, family):
    """Here transformers' two classifiers name their heads differently."""
    reward = make("reward", model_type=family)[1]
    directory = folder("reward", model_type=family)
    assert "score.weight" in load_file(directory / WEIGHTS)
    value = load(directory, mesh, "value")
    assert value["head"].pop("scalar_bias") == 0
    assert_same(value, reward)

    directory = folder("value", model_type=family)
    tensors = load_file(directory / WEIGHTS)
    assert {"classifier.weight", "classifier.bias"} <= tensors.keys()
    save_file(tensors | {"classifier.bias": np.zeros(1, np.float32)}, directory / WEIGHTS)
    assert_same(load(directory, mesh, "reward"), reward)
    with pytest.raises(UserError, match=r"holds a classifier \(classifier\.weight\), expected a language model"):
        load(directory, mesh)
