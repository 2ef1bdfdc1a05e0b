"""Tokens to hidden states: a family's block scanned over its stacked layers.

The scan keeps compile time independent of depth. One function serves training, scoring, prefill and cached decoding.
"""

import functools

import jax
import jax.numpy as jnp

from easyrl.models.attention import attend, attention_mask
from easyrl.models.cache import Cache
from easyrl.models.families import ModelConfig, family_of

Array = jax.Array

# What the backward pass may keep of a layer, by the names of --remat.
REMAT_POLICIES = {
    "none": None,  # keep everything, recompute nothing
    "full": jax.checkpoint_policies.nothing_saveable,  # keep a layer's input only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products with weights
}


def trunk(
    params: dict,
    cfg: ModelConfig,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    *,
    cache: Cache | None = None,
    shard=None,
) -> tuple[Array, Cache | None]:
    """Hidden states [B, T, D] after the final norm.

    tokens, positions, segment_ids: int32 [B, T]. Segment 0 is padding; under packing positions restart in each segment.
    With a `cache`, the T tokens are written to its next T slots and attend over all of it; without one they attend over
    themselves. `shard` pins activations to a mesh (`core.sharding.Shard`).
    """
    family = family_of(cfg)
    shard = shard or (lambda x, *axes: x)
    x = shard(family.embed(params, cfg, tokens_BT, shard), "batch", "time", "width")
    tables = family.position_tables(cfg, positions_BT)
    if cache is None:
        k_positions, k_segments = positions_BT, segment_ids_BT
    else:
        start = (0, cache.index)
        k_positions = jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT, start)
        k_segments = jax.lax.dynamic_update_slice(cache.segment_ids_BS, segment_ids_BT, start)
    mask_of = functools.partial(attention_mask, positions_BT, segment_ids_BT, k_positions, k_segments)
    sliding = _sliding_layers(cfg)
    full_mask = None if all(sliding) else mask_of()
    window_mask = mask_of(window=cfg.sliding_window) if any(sliding) else None

    def layer_mask(is_sliding):
        if full_mask is None or window_mask is None:
            return window_mask if full_mask is None else full_mask
        return jnp.where(is_sliding, window_mask, full_mask)

    def body(carry, scanned):
        x, kv = carry
        layer, number, is_sliding = scanned

        def attend_layer(q, k, v):
            if kv is None:
                return attend(q, k, v, layer_mask(is_sliding), implementation=cfg.attention), None
            slot = (number, 0, 0, cache.index, 0)
            new_kv = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), slot)
                for old, new in zip(kv, (k, v), strict=True)
            )
            k_all, v_all = (jax.lax.dynamic_index_in_dim(array, number, keepdims=False) for array in new_kv)
            return attend(q, k_all, v_all, layer_mask(is_sliding), implementation=cfg.attention), new_kv

        return family.block(layer, cfg, x, tables, attend_layer, shard), None

    policy = REMAT_POLICIES[cfg.remat]
    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    kv = None if cache is None else (cache.k_LBKSH, cache.v_LBKSH)
    scanned = (params["layers"], jnp.arange(cfg.num_layers), jnp.asarray(sliding))
    (x, kv), _ = jax.lax.scan(body, (x, kv), scanned)
    hidden = family.final_norm(params, cfg, x)
    if cache is None:
        return hidden, None
    return hidden, Cache(*kv, k_positions, k_segments, cache.index + tokens_BT.shape[1])


def _sliding_layers(cfg: ModelConfig) -> tuple[bool, ...]:
    """For each layer, whether its attention is limited to cfg.sliding_window."""
    if cfg.sliding_window is None:
        return (False,) * cfg.num_layers
    return cfg.sliding_layers or (True,) * cfg.num_layers
