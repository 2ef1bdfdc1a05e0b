"""Tokens to hidden states: a family's block run over its layers.

Stacked layers are scanned, which keeps compile time independent of depth: training, scoring and prefill. Layers that
`unstack_layers` has taken apart are unrolled, which spares decoding a copy of every layer's weights at every step. A
model may also be run in two parts, a bottom and a top (`models/branch.py`). One function serves all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from easyrl.core.params import ParamSpec
from easyrl.models.branch import depth, stacks
from easyrl.models.cache import Cache, write
from easyrl.models.families import ModelConfig, family_of, param_specs
from easyrl.models.layers import PRODUCT, OutputsFirst
from easyrl.models.long_attention import CUDNN_FORWARD, attention_for, device_of

Array = jax.Array


def keep_products(primitive, *arguments, **parameters) -> bool:
    """The policy of `jax.checkpoint` that keeps products of matrices, what attention gives among them."""
    named = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return primitive.name == CUDNN_FORWARD or named(primitive, *arguments, **parameters)


# What the backward pass may keep of a layer, by the names of --remat.
REMAT_POLICIES = {
    "none": None,  # keep everything, recompute nothing
    "full": jax.checkpoint_policies.nothing_saveable,  # keep a layer's input only
    "dots": keep_products,
}


# The dimensions of a layer's weight that a product contracts, by the name of the first.
INPUTS = {"embed": 1, "mlp": 1, "heads": 2}


def unstack_layers(params: dict, cfg: ModelConfig, shard=None, run: Callable | None = None) -> dict:
    """Parameters of a language model as decoding wants them: `layers` in stacks of one, all in the compute dtype.

    A scan slices each layer out of the stacked arrays, and on some platforms (CPU) that copies it. One step of decoding
    does little else than read the weights, so they are laid out once for all steps: as `shard` says, which is that of
    `core.sharding.DECODE_RULES`, and on a CPU with their outputs first (a tied head, too, which then is one by itself).
    Each array is laid out by itself: `run(function, w, n)` gives function(w, 0) to function(w, n - 1), which may be
    programs of their own.
    """
    run = run or (lambda function, w, n: [function(w, i) for i in range(n)])
    shard = shard or (lambda x, *axes: x)
    specs = param_specs(cfg, "lm")
    few_rows = device_of(shard).platform == "cpu"

    def outputs_first(w: Array, spec: ParamSpec) -> Array | OutputsFirst:
        """A layer's weight [1, ...]; what is not multiplied with stays."""
        inputs = INPUTS.get(spec.axes[1], 0)
        if not few_rows or not 0 < inputs < len(spec.axes) - 1:
            return w
        return jax.tree.map(lambda w: w[None], OutputsFirst.of(w[0], inputs))

    def lay_out(w: Array, spec: ParamSpec) -> Array:
        return run(lambda w, i: shard(w.astype(cfg.dtype), *spec.axes), w, 1)[0]

    def apart(w: Array, spec: ParamSpec) -> list[Array | OutputsFirst]:
        """A weight of a stack, layer by layer."""

        def one(w: Array, i: int | Array) -> Array | OutputsFirst:
            layer = jax.lax.dynamic_slice_in_dim(w, i, 1).astype(cfg.dtype)
            return outputs_first(shard(layer, *spec.axes), spec)

        return run(one, w, w.shape[0])

    layers: list[dict] = []
    for stack in stacks(params):
        weights = jax.tree.map(apart, stack, specs["layers"])
        is_weight = lambda x: isinstance(x, list)
        layers += (jax.tree.map(lambda w, i=i: w[i], weights, is_leaf=is_weight) for i in range(depth(stack)))
    rest = {name: jax.tree.map(lay_out, part, specs[name]) for name, part in params.items() if name != "layers"}
    if few_rows:
        tied = "head" not in rest
        kernel = rest["embed"]["tokens"] if tied else rest["head"]["kernel"]
        rest["head"] = {
            "kernel": OutputsFirst(kernel) if tied else run(lambda w, i: OutputsFirst.of(w, 1), kernel, 1)[0]
        }
    return rest | {"layers": tuple(layers)}


def trunk(
    params: dict,
    cfg: ModelConfig,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    *,
    below: Array | None = None,
    cache: Cache | None = None,
    shard=None,
) -> tuple[Array, Cache | None]:
    """Hidden states [B, T, D] after the final norm: `run_layers`, whose arguments these are, and the norm."""
    x, cache = run_layers(
        params, cfg, tokens_BT, positions_BT, segment_ids_BT, below=below, cache=cache, shard=shard
    )  # fmt: skip
    return family_of(cfg).final_norm(params, cfg, x), cache


def run_layers(
    params: dict,
    cfg: ModelConfig,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    *,
    below: Array | None = None,
    cache: Cache | None = None,
    shard=None,
) -> tuple[Array, Cache | None]:
    """Hidden states [B, T, D] after the layers that `params` hold, before the final norm.

    tokens, positions, segment_ids: int32 [B, T]. Segment 0 is padding; under packing positions restart in each sequence
    (`core.segments` says what ids mean; splash attention knows of no stems).
    With a `cache`, the T tokens are written to its next T slots and attend over all of it; without one they attend over
    themselves. `shard` pins activations to a mesh (`core.sharding.Shard`).

    `params` hold all layers or the lowest; or, where `below` gives the hidden states [B, T, D] that come from the
    layers beneath, the topmost, and then no embeddings. Their `layers` are one stack or a tuple of stacks, from the
    bottom up; the layers of a stack are scanned, a stack of one is run as it is. A cache is for all layers.
    """
    family = family_of(cfg)
    shard = shard or (lambda x, *axes: x)
    x = family.embed(params, cfg, tokens_BT, positions_BT, shard) if below is None else below
    x = shard(x, "batch", "time", "width")
    tables = family.position_tables(cfg, positions_BT)
    if cache is None:
        k_positions, k_segments = positions_BT, segment_ids_BT
    else:
        k_positions = write(cache.positions_BS, positions_BT, cache.index, axis=1)
        k_segments = write(cache.segment_ids_BS, segment_ids_BT, cache.index, axis=1)
    num_layers = sum(depth(stack) for stack in stacks(params))
    lowest = 0 if below is None else cfg.num_layers - num_layers
    sliding = _sliding_layers(cfg)[lowest : lowest + num_layers]
    attend = attention_for(cfg, sliding, (positions_BT, segment_ids_BT), (k_positions, k_segments), shard)

    def body(x, scanned):
        layer, is_sliding, slots = scanned

        def attend_layer(q, k, v):
            if cache is not None:
                k, v = (write(old, new, cache.index, axis=2) for old, new in zip(slots, (k, v), strict=True))
            out = attend(q, k, v, is_sliding)
            return out, None if cache is None else (k, v)

        return family.block(layer, cfg, shard(x, "batch", "time", "width"), tables, attend_layer, shard)

    def step(*, alone: bool) -> Callable:
        """`body` as the backward pass wants it, `alone` or in a scan."""
        policy = REMAT_POLICIES[cfg.remat]
        # Inside a scan nothing can be merged with the backward pass's recomputation; outside it would be.
        kept = body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=alone)
        # Of a layer that is computed again, what goes into it is all that is kept: that is split over mp, too.
        return lambda x, scanned: kept(shard(x, "batch", "sequence", "width") if cfg.remat == "full" else x, scanned)

    # Layers that are unrolled are traced once for all of them: jit remembers the trace, and `inline` copies it, so that
    # the program stays what it would be without (as calls, bfloat16 would be rounded between layers).
    run_alone, run_scanned = jax.jit(step(alone=True), inline=True), step(alone=False)
    # One (k, v) a layer, or None.
    kvs: list = [None] * num_layers if cache is None else list(zip(cache.keys, cache.values, strict=True))
    first = 0
    for stack in stacks(params):
        size = depth(stack)
        here = slice(first, first + size)
        if size == 1:
            layer = jax.tree.map(lambda w: w.squeeze(0), stack)
            x, kvs[first] = run_alone(x, (layer, sliding[first], kvs[first]))
        else:
            stacked = jax.tree.map(lambda *slots: jnp.stack(slots), *kvs[here])
            x, stacked = jax.lax.scan(run_scanned, x, (stack, jnp.asarray(sliding[here]), stacked))
            kvs[here] = [jax.tree.map(lambda slots, i=i: slots[i], stacked) for i in range(size)]
        first += size

    if cache is None:
        return x, None
    keys, values = zip(*kvs, strict=True)
    return x, Cache(keys, values, k_positions, k_segments, cache.index + tokens_BT.shape[1])


def _sliding_layers(cfg: ModelConfig) -> tuple[bool, ...]:
    """For each layer, whether its attention is limited to cfg.sliding_window."""
    if cfg.sliding_window is None:
        return (False,) * cfg.num_layers
    return cfg.sliding_layers or (True,) * cfg.num_layers
