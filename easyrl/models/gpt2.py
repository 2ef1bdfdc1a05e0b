"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases everywhere, one matrix for query, key and value.

Read top to bottom: the configuration, the parameters, then embed -> block -> final_norm. `models/trunk.py` scans the
block over the stacked layers. BLOOM's blocks are the same and taken from here (`models/bloom.py`).

Axes: B batch, T time, D width, N heads, H head size, C = 3 (query, key, value), F feed-forward, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, ones, zeros

from easyrl.core.params import ParamSpec
from easyrl.models.config import ModelConfig
from easyrl.models.layers import ACTIVATIONS, add_bias, layer_norm, linear, lookup

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """What a GPT-2-like network is.

    `residual_after_norm`: each half of a block adds to its normed input (GPT-2 and every published BLOOM: to the input
    itself).
    """

    family: ClassVar[str] = "gpt2"

    tied_embeddings: bool = True
    activation: str = "gelu_new"
    residual_after_norm: bool = False
    hf_type: str = "gpt2"


def trunk_specs(cfg: GPT2Config) -> dict:
    """The parameters below the head. Layers are stacked on a leading axis L."""
    positions = ParamSpec((cfg.max_positions, cfg.width), ("positions", "embed"), normal(0.01))
    return {"embed": {"tokens": embedding_spec(cfg), "positions": positions}, **block_specs(cfg)}


def embedding_spec(cfg: GPT2Config) -> ParamSpec:
    return ParamSpec((cfg.vocab_size, cfg.width), ("vocab", "embed"), normal(0.02))


def block_specs(cfg: GPT2Config) -> dict:
    """The parameters above the embeddings."""
    L, D, N, H, F = cfg.num_layers, cfg.width, cfg.num_heads, cfg.head_size, cfg.mlp_size
    weight = normal(0.02)
    into_residual = normal(0.02 / (2 * L) ** 0.5)  # the residual stream keeps its size with depth (section 2.3)
    attn = {
        "qkv": ParamSpec((L, D, 3, N, H), ("layers", "embed", "qkv", "heads", "head_size"), weight),
        "qkv_bias": ParamSpec((L, 3, N, H), ("layers", "qkv", "heads", "head_size"), zeros),
        "o": ParamSpec((L, N, H, D), ("layers", "heads", "head_size", "embed"), into_residual),
        "o_bias": ParamSpec((L, D), ("layers", "norm"), zeros),
    }
    mlp = {
        "up": ParamSpec((L, D, F), ("layers", "embed", "mlp"), weight),
        "up_bias": ParamSpec((L, F), ("layers", "mlp"), zeros),
        "down": ParamSpec((L, F, D), ("layers", "mlp", "embed"), into_residual),
        "down_bias": ParamSpec((L, D), ("layers", "norm"), zeros),
    }
    return {
        "layers": {"attn": attn, "mlp": mlp, "attn_norm": norm_specs(D, L), "mlp_norm": norm_specs(D, L)},
        "final_norm": norm_specs(D),
    }


def norm_specs(width: int, *layers: int) -> dict:
    """A layer norm's scale and bias, for each of `layers` layers if given."""
    shape, axes = (*layers, width), ("layers", "norm")[-1 - len(layers) :]
    return {"scale": ParamSpec(shape, axes, ones), "bias": ParamSpec(shape, axes, zeros)}


def embed(params: dict, cfg: GPT2Config, tokens_BT: Array, positions_BT: Array, shard: Callable) -> Array:
    """Token embeddings plus position embeddings, [B, T, D] in the compute dtype."""
    tables = params["embed"]
    x = lookup(tables["tokens"], tokens_BT, cfg.dtype, shard, "vocab")
    # Padding may have any position: one past the end of the table would look up NaN.
    in_table = jnp.minimum(positions_BT, cfg.max_positions - 1)
    return x + lookup(tables["positions"], in_table, cfg.dtype, shard, "positions")


def position_tables(cfg: GPT2Config, positions_BT: Array) -> None:
    """Nothing: blocks do not look at positions."""


def block(layer: dict, cfg: GPT2Config, x_BTD: Array, tables: None, attend: Callable, shard: Callable):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    `layer` holds one layer's parameters. `attend(q_BTNH, k_BNTH, v_BNTH) -> (out_BTNH, kv)` masks, caches and attends;
    what it returns as `kv` is handed back untouched. Returns (x_BTD, kv).
    """
    layer = jax.tree.map(lambda w: w.astype(cfg.dtype), layer)
    attn, mlp = layer["attn"], layer["mlp"]

    y = layer_norm(x_BTD, layer["attn_norm"], cfg.norm_eps)
    qkv_BTCNH = add_bias(linear(y, attn["qkv"]), attn["qkv_bias"])
    q = shard(qkv_BTCNH[:, :, 0], "batch", "time", "heads", None)
    k, v = (shard(qkv_BTCNH[:, :, i].swapaxes(1, 2), "batch", "heads", "time", None) for i in (1, 2))
    out, kv = attend(q, k, v)
    out = add_bias(linear(out, attn["o"], 2), attn["o_bias"])
    x_BTD = shard((y if cfg.residual_after_norm else x_BTD) + out, "batch", "time", "width")

    y = layer_norm(x_BTD, layer["mlp_norm"], cfg.norm_eps)
    hidden = ACTIVATIONS[cfg.activation](add_bias(linear(y, mlp["up"]), mlp["up_bias"]))
    hidden = shard(hidden, "batch", "time", "mlp")
    out = add_bias(linear(hidden, mlp["down"]), mlp["down_bias"])
    x_BTD = shard((y if cfg.residual_after_norm else x_BTD) + out, "batch", "time", "width")
    return x_BTD, kv


def final_norm(params: dict, cfg: GPT2Config, x_BTD: Array) -> Array:
    return layer_norm(x_BTD, params["final_norm"], cfg.norm_eps)
