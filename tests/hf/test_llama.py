"""config.json in and out. That the numbers mean the same as in transformers is shown in test_parity.py."""

import pytest

from easyrl.core.errors import UserError
from easyrl.hf.families import config_from_hf, family_of, tensors
from easyrl.hf.layout import named_leaves
from easyrl.models.families import param_specs
from easyrl.models.layers import RopeScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = {"use_sliding_window": True, "sliding_window": 8}


def test_defaults_are_those_of_transformers(tiny):
    bare = {
        key: value for key, value in tiny().items() if key not in ("num_key_value_heads", "max_position_embeddings")
    }
    llama, mistral = config_from_hf(bare, "x"), config_from_hf({**bare, "model_type": "mistral", "hidden_size": 128,
                                                               "num_attention_heads": 8}, "x")  # fmt: skip
    qwen3 = config_from_hf({**bare, "model_type": "qwen3", "num_key_value_heads": 2}, "x")
    assert (llama.num_kv_heads, llama.head_size, llama.max_positions, llama.norm_eps) == (4, 4, 2048, 1e-6)
    assert (mistral.num_kv_heads, mistral.sliding_window, mistral.max_positions) == (8, 4096, 131072)
    assert (qwen3.head_size, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_both_spellings_of_rotary_settings(tiny, spelling):
    cfg = config_from_hf(tiny(**spelling), "x")
    assert cfg.rope_theta == 5e5
    assert cfg.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert config_from_hf(tiny(rope_scaling={"type": "linear", "factor": 2}), "x").rope_scaling == RopeScaling(
        "linear", 2.0
    )
    assert config_from_hf(tiny(rope_parameters={"rope_type": "default", "rope_theta": 7.0}), "x").rope_theta == 7.0


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, 8, None),
        ({"model_type": "mistral", "sliding_window": None}, None, None),
        ({"model_type": "qwen2", **QWEN, "max_window_layers": 1}, 8, (False, True)),
        ({"model_type": "qwen2", **QWEN, "max_window_layers": 0}, 8, None),
        ({"model_type": "qwen2", **QWEN, "max_window_layers": 2}, None, None),
        ({"model_type": "qwen2", **QWEN, "use_sliding_window": False}, None, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, 4096, None),
        ({"model_type": "qwen2", **QWEN, "sliding_window": None, "max_window_layers": 0}, None, None),
        ({"model_type": "qwen3", **QWEN, "layer_types": ["sliding_attention", "full_attention"]}, 8, (True, False)),
    ],
)
def test_sliding_windows(tiny, changes, window, layers):
    cfg = config_from_hf(tiny(**changes), "x")
    assert (cfg.sliding_window, cfg.sliding_layers) == (window, layers)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "qwen2", **QWEN, "max_window_layers": 1},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    ],
)
def test_export_says_what_import_reads(tiny, changes):
    cfg = config_from_hf(tiny(**changes), "x")
    assert config_from_hf(family_of(cfg).config_to_hf(cfg), "x") == cfg


@pytest.mark.parametrize(
    "settings",
    [
        [{"attention_bias": True, "mlp_bias": True}, {"model_type": "qwen3", "head_dim": 4}],
        [{"model_type": "gpt2", "tie_word_embeddings": False}],
        [{"model_type": "bloom", "tie_word_embeddings": False}],
    ],
)
def test_every_parameter_has_a_tensor(tiny, settings):
    """Of whatever switches: no leaf without a name, no name without a leaf."""
    leaves, names = set(), set()
    for changes in settings:
        cfg = config_from_hf(tiny(**changes), "x")
        for head in ("lm", "value"):
            leaves |= named_leaves(param_specs(cfg, head)).keys()
            names |= tensors(cfg, head).keys()
    assert leaves == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "conf: model_type is 'gemma2', expected one of llama, mistral"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], expected one of"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": None}, "vocab_size is None, expected a whole number of 1 or more"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads=4"),
        ({"hidden_size": 18}, "num_attention_heads is 4, expected a divisor of hidden_size=18"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a number above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a number above 0"),
        ({"rope_theta": 10**400}, "expected a number above 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling: type is 'dynamic', expected default or lin",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
            "original_max_position_embeddings is 16, expected 32, as rope_scaling has it",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["sliding_attention"] * 2}, "expected full_attention in every layer"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "expected 2 times full_attention"),
        ({"model_type": "qwen2", **QWEN, "max_window_layers": "all"}, "max_window_layers is 'all'"),
    ],
)
def test_refused(tiny, changes, message):
    with pytest.raises(UserError) as error:
        config_from_hf(tiny(**changes), "conf")
    assert str(error.value).startswith("conf")
    assert message in str(error.value)
