"""Llama, and the families that are the same network with switches: Mistral, Qwen2, Qwen3.

Read top to bottom: the configuration, the parameters, then embed -> block -> final_norm. `models/trunk.py` scans the
block over the stacked layers.

Axes: B batch, T time, D width, N query heads, K key/value heads, H head size, F feed-forward, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
from jax.nn.initializers import normal, ones, zeros

from easyrl.core.params import ParamSpec
from easyrl.models.config import ModelConfig
from easyrl.models.layers import (
    RopeScaling,
    add_bias,
    apply_rope,
    linear,
    lookup,
    rms_norm,
    rope_frequencies,
    rope_tables,
    swiglu,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """What a Llama-like network is."""

    family: ClassVar[str] = "llama"

    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hf_type: str = "llama"


def trunk_specs(cfg: LlamaConfig) -> dict:
    """The parameters below the head. Layers are stacked on a leading axis L."""
    L, D, F = cfg.num_layers, cfg.width, cfg.mlp_size
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_size
    weight = normal(0.02)
    into_residual = normal(0.02 / (2 * L) ** 0.5)  # GPT-2's scaling: the residual stream keeps its size with depth

    attn = {
        "q": ParamSpec((L, D, N, H), ("layers", "embed", "heads", "head_size"), weight),
        "k": ParamSpec((L, D, K, H), ("layers", "embed", "kv_heads", "head_size"), weight),
        "v": ParamSpec((L, D, K, H), ("layers", "embed", "kv_heads", "head_size"), weight),
        "o": ParamSpec((L, N, H, D), ("layers", "heads", "head_size", "embed"), into_residual),
    }
    if cfg.qkv_bias:
        attn["q_bias"] = ParamSpec((L, N, H), ("layers", "heads", "head_size"), zeros)
        attn["k_bias"] = ParamSpec((L, K, H), ("layers", "kv_heads", "head_size"), zeros)
        attn["v_bias"] = ParamSpec((L, K, H), ("layers", "kv_heads", "head_size"), zeros)
    if cfg.out_bias:
        attn["o_bias"] = ParamSpec((L, D), ("layers", "norm"), zeros)
    if cfg.qk_norm:
        attn["q_norm"] = ParamSpec((L, H), ("layers", "norm"), ones)
        attn["k_norm"] = ParamSpec((L, H), ("layers", "norm"), ones)

    mlp = {
        "gate": ParamSpec((L, D, F), ("layers", "embed", "mlp"), weight),
        "up": ParamSpec((L, D, F), ("layers", "embed", "mlp"), weight),
        "down": ParamSpec((L, F, D), ("layers", "mlp", "embed"), into_residual),
    }
    if cfg.mlp_bias:
        mlp["gate_bias"] = ParamSpec((L, F), ("layers", "mlp"), zeros)
        mlp["up_bias"] = ParamSpec((L, F), ("layers", "mlp"), zeros)
        mlp["down_bias"] = ParamSpec((L, D), ("layers", "norm"), zeros)

    return {
        "embed": {"tokens": ParamSpec((cfg.vocab_size, D), ("vocab", "embed"), weight)},
        "layers": {
            "attn": attn,
            "mlp": mlp,
            "attn_norm": ParamSpec((L, D), ("layers", "norm"), ones),
            "mlp_norm": ParamSpec((L, D), ("layers", "norm"), ones),
        },
        "final_norm": ParamSpec((D,), ("norm",), ones),
    }


def embed(params: dict, cfg: LlamaConfig, tokens_BT: Array, positions_BT: Array, shard: Callable) -> Array:
    """Token embeddings [B, T, D] in the compute dtype."""
    return lookup(params["embed"]["tokens"], tokens_BT, cfg.dtype, shard, "vocab")


def position_tables(cfg: LlamaConfig, positions_BT: Array) -> tuple[Array, Array]:
    """What every block needs to know of the positions: the rotary cos and sin, computed once for all layers."""
    return rope_tables(positions_BT, rope_frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling))


def block(layer: dict, cfg: LlamaConfig, x_BTD: Array, tables: tuple[Array, Array], attend: Callable, shard: Callable):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    `layer` holds one layer's parameters. `attend(q_BTNH, k_BKTH, v_BKTH) -> (out_BTNH, kv)` masks, caches and attends;
    what it returns as `kv` is handed back untouched. Returns (x_BTD, kv).
    """
    layer = jax.tree.map(lambda w: w.astype(cfg.dtype), layer)
    attn, mlp = layer["attn"], layer["mlp"]

    y = rms_norm(x_BTD, layer["attn_norm"], cfg.norm_eps)
    q, k, v = (linear(y, attn[name]) for name in ("q", "k", "v"))  # BTNH, BTKH, BTKH
    if cfg.qkv_bias:
        q, k, v = (add_bias(x, attn[name]) for x, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
    if cfg.qk_norm:
        q, k = rms_norm(q, attn["q_norm"], cfg.norm_eps), rms_norm(k, attn["k_norm"], cfg.norm_eps)
    q = shard(apply_rope(q, *tables), "batch", "time", "heads", None)
    k = shard(apply_rope(k, *tables).swapaxes(1, 2), "batch", "kv_heads", "time", None)
    v = shard(v.swapaxes(1, 2), "batch", "kv_heads", "time", None)
    out, kv = attend(q, k, v)
    out = linear(out, attn["o"], 2)
    x_BTD = shard(x_BTD + (add_bias(out, attn["o_bias"]) if cfg.out_bias else out), "batch", "time", "width")

    y = rms_norm(x_BTD, layer["mlp_norm"], cfg.norm_eps)
    gate, up = linear(y, mlp["gate"]), linear(y, mlp["up"])
    if cfg.mlp_bias:
        gate, up = add_bias(gate, mlp["gate_bias"]), add_bias(up, mlp["up_bias"])
    hidden = shard(swiglu(gate, up), "batch", "time", "mlp")
    out = linear(hidden, mlp["down"])
    x_BTD = shard(x_BTD + (add_bias(out, mlp["down_bias"]) if cfg.mlp_bias else out), "batch", "time", "width")
    return x_BTD, kv


def final_norm(params: dict, cfg: LlamaConfig, x_BTD: Array) -> Array:
    return rms_norm(x_BTD, params["final_norm"], cfg.norm_eps)
