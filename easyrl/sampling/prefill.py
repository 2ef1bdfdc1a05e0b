"""Prefill: the prompts in packed rows through the model, and what they leave behind in the cache.

Prompts lie side by side in groups of packed rows (`core.groups`), so that little but their tokens is computed, and no
more than a group's activations exist at once. A prompt is packed on the device that has its row of the batch: keys and
values, which are large, go from packed rows to rows of the cache without leaving it.

Axes: B prompts, P prompt, R packed rows of S tokens, D width, K key/value heads, H head size.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from easyrl.core.groups import PackPlan, Plans, gather, over_groups, scatter
from easyrl.models.cache import Cache, init_cache
from easyrl.models.families import ModelConfig
from easyrl.models.trunk import trunk

Array = jax.Array


class Prompts(flax.struct.PyTreeNode):
    """What the prompts leave behind. What a token has of a layer's keys or values is in one piece, [K * H], which
    goes from a packed row into its place as it is: with heads before tokens some compilers would turn the whole cache
    around for every group, and back.
    """

    kv_BPE: tuple[tuple[Array, ...], tuple[Array, ...]]  # keys and values of every layer, E = K * H
    lengths_B: Array
    num_kv_heads: int = flax.struct.field(pytree_node=False)

    def cache(self) -> Cache:
        """A cache with these P slots, all filled: what lies behind a prompt is padding."""
        (B, P, _), K = self.kv_BPE[0][0].shape, self.num_kv_heads
        keys, values = jax.tree.map(lambda x_BPE: x_BPE.reshape(B, P, K, -1).swapaxes(1, 2), self.kv_BPE)
        positions_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
        segment_ids_BP = (positions_BP < self.lengths_B[:, None]).astype(jnp.int32)
        return Cache(keys, values, positions_BP, segment_ids_BP, jnp.int32(P))


class _Filled(flax.struct.PyTreeNode):
    """What there is of the prompts so far."""

    hidden_B1D: Array  # of last tokens
    kv_BPE: tuple[tuple[Array, ...], tuple[Array, ...]]  # as in Prompts

    def pin(self, shard: Callable) -> "_Filled":
        """The same, laid out as the cache of a mesh is."""
        kv_BPE = jax.tree.map(lambda x: shard(x, "batch", "time", "kv_heads"), self.kv_BPE)
        return _Filled(shard(self.hidden_B1D, "batch", "time", "width"), kv_BPE)

    def put(self, hidden_RSD: Array, kv_RSE: tuple, lengths_B: Array, source_RS: Array) -> "_Filled":
        """With what a group has of its tokens, whose places in the batch are `source`."""
        P = self.kv_BPE[0][0].shape[1]
        row_RS = source_RS // P
        is_last_RS = (source_RS >= 0) & (source_RS % P == lengths_B[row_RS] - 1)
        return _Filled(
            scatter(self.hidden_B1D, jnp.where(is_last_RS, row_RS, -1), hidden_RSD),
            jax.tree.map(lambda into, new: scatter(into, source_RS, new), self.kv_BPE, kv_RSE),
        )


def prefill(
    params: dict, cfg: ModelConfig, prompts_BP: Array, lengths_B: Array, plans: Plans, *, shards: int, shard=None
) -> tuple[Array, Prompts]:
    """(hidden [B, D] of every prompt's last token after the final norm, all prompts' keys and values).

    The batch and the rows of groups come in `shards` equal parts, one for each device that has its share of them, and
    a plan's `source` counts the tokens of its part from 0. A prompt of length 0 is in no plan; its hidden state and its
    slots are 0.
    """
    (B, P), K, H = prompts_BP.shape, cfg.num_kv_heads, cfg.head_size
    shard = shard or (lambda x, *axes: x)

    def body(group: PackPlan, filled: _Filled) -> _Filled:
        tokens_RS = _by_part(gather, shards)(prompts_BP, group.source_GRS)
        rows = (shard(x, "batch", "time") for x in (tokens_RS, group.positions_GRS, group.segment_ids_GRS))
        hidden_RSD, packed = trunk(params, cfg, *rows, cache=init_cache(cfg, *tokens_RS.shape), shard=shard)
        assert packed is not None
        by_token = lambda x_RKSH: x_RKSH.swapaxes(1, 2).reshape(*tokens_RS.shape, K * H)
        kv_RSE = jax.tree.map(by_token, (packed.keys, packed.values))
        return _by_part(_Filled.put, shards)(filled, hidden_RSD, kv_RSE, lengths_B, group.source_GRS).pin(shard)

    slots = (jnp.zeros((B, P, K * H), cfg.dtype),) * cfg.num_layers
    nothing = _Filled(jnp.zeros((B, 1, cfg.width), cfg.dtype), (slots, slots)).pin(shard)
    filled = over_groups(plans, nothing, body)
    return filled.hidden_B1D[:, 0], Prompts(filled.kv_BPE, lengths_B, K)


def _by_part(function: Callable, shards: int) -> Callable:
    """`function` of trees of arrays, run on each of the `shards` equal parts of their first axis by itself."""

    def run(*trees: Any) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), trees)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(function)(*parts))

    return run
