"""Llama, Mistral, Qwen2 and Qwen3 as transformers writes them: tensors and config.json, both ways."""

from typing import Any

from easyrl.hf.fields import Fields, check_read_back
from easyrl.hf.layout import HFTensor
from easyrl.models.layers import RopeScaling
from easyrl.models.llama import LlamaConfig

# model_type in config.json -> what its class names begin with.
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HEAD_CLASSES = {"lm": "ForCausalLM", "reward": "ForSequenceClassification", "value": "ForTokenClassification"}
SCALAR_HEADS = {"reward": "score", "value": "score"}

# A checkpoint of the bare trunk (LlamaModel) leaves this out of every name.
TRUNK_PREFIX = "model."

# Buffers that old versions of transformers saved, and that follow from the configuration.
IGNORED = r".*\.rotary_emb\.inv_freq"

_LAYER = "model.layers.{i}."

TENSORS = {
    "embed/tokens": HFTensor("model.embed_tokens.weight", "V D -> V D"),
    "layers/attn_norm": HFTensor(_LAYER + "input_layernorm.weight", "D -> D"),
    "layers/attn/q": HFTensor(_LAYER + "self_attn.q_proj.weight", "(N H) D -> D N H"),
    "layers/attn/q_bias": HFTensor(_LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    "layers/attn/q_norm": HFTensor(_LAYER + "self_attn.q_norm.weight", "H -> H"),
    "layers/attn/k": HFTensor(_LAYER + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    "layers/attn/k_bias": HFTensor(_LAYER + "self_attn.k_proj.bias", "(K H) -> K H"),
    "layers/attn/k_norm": HFTensor(_LAYER + "self_attn.k_norm.weight", "H -> H"),
    "layers/attn/v": HFTensor(_LAYER + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    "layers/attn/v_bias": HFTensor(_LAYER + "self_attn.v_proj.bias", "(K H) -> K H"),
    "layers/attn/o": HFTensor(_LAYER + "self_attn.o_proj.weight", "D (N H) -> N H D"),
    "layers/attn/o_bias": HFTensor(_LAYER + "self_attn.o_proj.bias", "D -> D"),
    "layers/mlp_norm": HFTensor(_LAYER + "post_attention_layernorm.weight", "D -> D"),
    "layers/mlp/gate": HFTensor(_LAYER + "mlp.gate_proj.weight", "F D -> D F"),
    "layers/mlp/gate_bias": HFTensor(_LAYER + "mlp.gate_proj.bias", "F -> F"),
    "layers/mlp/up": HFTensor(_LAYER + "mlp.up_proj.weight", "F D -> D F"),
    "layers/mlp/up_bias": HFTensor(_LAYER + "mlp.up_proj.bias", "F -> F"),
    "layers/mlp/down": HFTensor(_LAYER + "mlp.down_proj.weight", "D F -> F D"),
    "layers/mlp/down_bias": HFTensor(_LAYER + "mlp.down_proj.bias", "D -> D"),
    "final_norm": HFTensor("model.norm.weight", "D -> D"),
    "head/kernel": HFTensor("lm_head.weight", "V D -> D V"),
}

# What transformers takes when config.json is silent, where the model types differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


def config_from_hf(raw: dict[str, Any], source: str) -> LlamaConfig:
    """The LlamaConfig that a config.json describes, in the spelling of transformers 4 or 5.

    Raises UserError naming `source` and the field for a field that is missing, has the wrong type, or asks for
    something the network here does not do.
    """
    fields = Fields(raw, source)
    hf_type = fields.choice("model_type", tuple(CLASSES))
    fields.choice("hidden_act", ("silu", "swish"), "silu")
    defaults = _DEFAULTS[hf_type]

    width, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    absent_kv_heads = num_heads if "num_key_value_heads" in raw else defaults.get("num_key_value_heads", num_heads)
    num_kv_heads = fields.size("num_key_value_heads", absent_kv_heads)
    if num_heads % num_kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    if width % num_heads and raw.get("head_dim") is None and "head_dim" not in defaults:
        raise fields.fail("num_attention_heads", f"a divisor of hidden_size={width}")
    head_size = fields.size("head_dim", defaults.get("head_dim", width // num_heads))
    if head_size % 2:
        raise fields.fail("head_dim", "an even number (rotary embeddings turn pairs)")

    num_layers = fields.size("num_hidden_layers")
    max_positions = fields.size("max_position_embeddings", defaults["max_position_embeddings"])
    rope_theta, rope_scaling = _rope(fields, max_positions)
    window, sliding_layers = _sliding_window(fields, hf_type, num_layers)
    attention_bias = hf_type in ("llama", "qwen3") and fields.flag("attention_bias", False)
    return LlamaConfig(
        vocab_size=fields.size("vocab_size"),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        mlp_size=fields.size("intermediate_size"),
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or hf_type == "qwen2",
        out_bias=attention_bias,
        mlp_bias=hf_type == "llama" and fields.flag("mlp_bias", False),
        qk_norm=hf_type == "qwen3",
        sliding_window=window,
        sliding_layers=sliding_layers,
        hf_type=hf_type,
    )


def _rope(fields: Fields, max_positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    theta = fields.number("rope_theta", 10000.0)
    rope = fields.object("rope_scaling") or fields.object("rope_parameters")
    if rope is None:
        return theta, None
    theta = rope.number("rope_theta", theta)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.fail("partial_rotary_factor", "1.0")
    kind = rope.choice("rope_type" if "rope_type" in rope.raw else "type", ("default", "linear", "llama3"), "default")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    # transformers 5 looks beside rope_scaling for it first, transformers 4 in there alone.
    trained = "original_max_position_embeddings"
    original = rope.size(trained, fields.size(trained, max_positions))
    if fields.size(trained, original) != original:
        raise fields.fail(trained, f"{original}, as rope_scaling has it")
    return theta, RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=original,
    )


def _sliding_window(fields: Fields, hf_type: str, num_layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """(window, which layers use it; None: all of them)."""
    raw = fields.raw
    slides = hf_type == "mistral" or (hf_type in ("qwen2", "qwen3") and fields.flag("use_sliding_window", False))
    if "sliding_window" in raw and raw["sliding_window"] is None:  # which, unlike no word of it, means none
        slides = False
    window = fields.size("sliding_window", 4096) if slides else None

    # Only Qwen reads layer_types; elsewhere it must agree with what transformers does without it.
    types = raw.get("layer_types")
    if types is None:
        if window is None or hf_type == "mistral":
            return window, None
        first = raw.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise fields.fail("max_window_layers", "a whole number of 0 or more")
        return _named_layers(window, tuple(i >= first for i in range(num_layers)))
    if not isinstance(types, list) or len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise fields.fail("layer_types", f"{num_layers} times full_attention or sliding_attention")
    sliding = tuple(name == "sliding_attention" for name in types)
    if any(sliding) and window is None:
        raise fields.fail("layer_types", "full_attention in every layer, because no sliding window is set")
    if hf_type == "mistral" and window is not None and not all(sliding):
        raise fields.fail("layer_types", "sliding_attention in every layer, which is all that this model type does")
    return _named_layers(window, sliding)


def _named_layers(window: int | None, sliding: tuple[bool, ...]) -> tuple[int | None, tuple[bool, ...] | None]:
    """One way to say it: no window when no layer slides, no list when all do."""
    if not any(sliding):
        return None, None
    return window, None if all(sliding) else sliding


def config_to_hf(cfg: LlamaConfig) -> dict[str, Any]:
    """config.json for `cfg`, without what depends on the head or the tokenizer.

    Rotary settings are written in the spelling of transformers 4, which 5 reads as well. Raises UserError for a
    configuration that no transformers class computes.
    """
    raw: dict[str, Any] = {
        "model_type": cfg.hf_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _rope_to_hf(cfg.rope_scaling),
        "tie_word_embeddings": cfg.tied_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if cfg.hf_type in ("llama", "qwen3"):
        raw["attention_bias"] = cfg.out_bias
    if cfg.hf_type == "llama":
        raw["mlp_bias"] = cfg.mlp_bias
    if cfg.hf_type == "mistral":
        raw["sliding_window"] = cfg.sliding_window
    if cfg.hf_type in ("qwen2", "qwen3"):
        slides = cfg.sliding_window is not None
        sliding = cfg.sliding_layers or (slides,) * cfg.num_layers
        raw["use_sliding_window"] = slides
        raw["sliding_window"] = cfg.sliding_window
        raw["max_window_layers"] = sliding.index(True) if slides else cfg.num_layers
        raw["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]

    check_read_back(cfg, config_from_hf, raw)
    return raw


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
