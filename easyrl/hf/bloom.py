"""BLOOM as transformers writes it: tensors and config.json, both ways."""

from typing import Any

from easyrl.hf.fields import Fields, check_read_back
from easyrl.hf.layout import HFTensor
from easyrl.models.bloom import BloomConfig

# model_type in config.json -> what its class names begin with.
CLASSES = {"bloom": "Bloom"}
HEAD_CLASSES = {"lm": "ForCausalLM", "reward": "ForSequenceClassification", "value": "ForTokenClassification"}
SCALAR_HEADS = {"reward": "score", "value": "classifier"}

# A checkpoint of the bare trunk (BloomModel), as the published ones are, leaves this out of every name.
TRUNK_PREFIX = "transformer."

IGNORED = r""

_LAYER = "transformer.h.{i}."

# Each head's query, key and value lie together. C: query, key, value.
TENSORS = {
    "embed/tokens": HFTensor("transformer.word_embeddings.weight", "V D -> V D"),
    "embed/norm/scale": HFTensor("transformer.word_embeddings_layernorm.weight", "D -> D"),
    "embed/norm/bias": HFTensor("transformer.word_embeddings_layernorm.bias", "D -> D"),
    "layers/attn_norm/scale": HFTensor(_LAYER + "input_layernorm.weight", "D -> D"),
    "layers/attn_norm/bias": HFTensor(_LAYER + "input_layernorm.bias", "D -> D"),
    "layers/attn/qkv": HFTensor(_LAYER + "self_attention.query_key_value.weight", "(N C H) D -> D C N H"),
    "layers/attn/qkv_bias": HFTensor(_LAYER + "self_attention.query_key_value.bias", "(N C H) -> C N H"),
    "layers/attn/o": HFTensor(_LAYER + "self_attention.dense.weight", "D (N H) -> N H D"),
    "layers/attn/o_bias": HFTensor(_LAYER + "self_attention.dense.bias", "D -> D"),
    "layers/mlp_norm/scale": HFTensor(_LAYER + "post_attention_layernorm.weight", "D -> D"),
    "layers/mlp_norm/bias": HFTensor(_LAYER + "post_attention_layernorm.bias", "D -> D"),
    "layers/mlp/up": HFTensor(_LAYER + "mlp.dense_h_to_4h.weight", "F D -> D F"),
    "layers/mlp/up_bias": HFTensor(_LAYER + "mlp.dense_h_to_4h.bias", "F -> F"),
    "layers/mlp/down": HFTensor(_LAYER + "mlp.dense_4h_to_h.weight", "D F -> F D"),
    "layers/mlp/down_bias": HFTensor(_LAYER + "mlp.dense_4h_to_h.bias", "D -> D"),
    "final_norm/scale": HFTensor("transformer.ln_f.weight", "D -> D"),
    "final_norm/bias": HFTensor("transformer.ln_f.bias", "D -> D"),
    "head/kernel": HFTensor("lm_head.weight", "V D -> D V"),
}


def config_from_hf(raw: dict[str, Any], source: str) -> BloomConfig:
    """The BloomConfig that a config.json describes, in the spelling of today or of the published checkpoints.

    ALiBi sets no limit to positions, so `max_positions` is `seq_length`, the length that the published models were
    trained on. Raises UserError as `hf.llama.config_from_hf` does.
    """
    fields = Fields(raw, source)
    hidden_size = fields.spelled("hidden_size", "n_embed")
    n_head = fields.spelled("n_head", "num_attention_heads")
    width, num_heads = fields.size(hidden_size), fields.size(n_head)
    if width % num_heads:
        raise fields.fail(n_head, f"a divisor of {hidden_size}={width}")
    if fields.flag("slow_but_exact", False) and fields.size("pretraining_tp", 1) > 1:
        raise fields.fail("slow_but_exact", "false, because transformers then leaves biases out")
    return BloomConfig(
        vocab_size=fields.size("vocab_size"),
        width=width,
        num_layers=fields.size(fields.spelled("n_layer", "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=width // num_heads,
        mlp_size=4 * width,
        max_positions=fields.size("seq_length", 2048),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        residual_after_norm=fields.flag("apply_residual_connection_post_layernorm", False),
        hf_type=fields.choice("model_type", tuple(CLASSES)),
    )


def config_to_hf(cfg: BloomConfig) -> dict[str, Any]:
    """config.json for `cfg`, without what depends on the head or the tokenizer.

    Raises UserError for a configuration that no transformers class computes.
    """
    raw = {
        "model_type": cfg.hf_type,
        "vocab_size": cfg.vocab_size,
        "seq_length": cfg.max_positions,
        "hidden_size": cfg.width,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "layer_norm_epsilon": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied_embeddings,
        "apply_residual_connection_post_layernorm": cfg.residual_after_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    check_read_back(cfg, config_from_hf, raw)
    return raw
