"""Attention that leaves out later keys: in blocks of queries, by a TPU's splash kernel, or by cuDNN's flash kernel on a
GPU. None holds the scores of all pairs of a long row.

All compute what `models.attention.attend` does, for tokens that attend among themselves: key s stands where query s
does, so nobody attends to what comes later in its row, packed or not. `attention_for` chooses among them.

Axes: B batch, T time, S key time, N query heads, K key/value heads, G = N / K, M = G x T, H head size.
"""

import re
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from easyrl.models.attention import Alibi, attend, attention_mask, grouped_queries, masked_scores, ungrouped
from easyrl.models.config import ModelConfig
from easyrl.models.layers import PRODUCT, alibi_slopes

Array = jax.Array

LONG = 1024  # queries from which on one block's scores are to exist at a time
LONG_BLOCK = 512  # queries in a block of more, at least: large products
FEW_BLOCKS, MOST_BLOCKS = 4, 8  # of up to LONG queries, and of more; each is compiled by itself
LANES = 128  # blocks are multiples of it, as the sides of matrix units are

# The primitive of cuDNN's forward pass. Its results have no name by which --remat=dots could tell that it keeps them.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"

Masks = tuple[Array | None, Array | None]  # [B, rows, columns] of layers without and with a window, None: no such layer


def block_size(num_queries: int) -> int:
    """Queries in a block."""
    short = num_queries <= LONG
    wanted = -(-num_queries // (FEW_BLOCKS if short else MOST_BLOCKS))
    return max(LANES if short else LONG_BLOCK, -(-wanted // LANES) * LANES)


def blocks_of(num_queries: int) -> list[tuple[slice, slice]]:
    """(queries, keys) of every block: those keys that do not come later in the row than all of its queries."""
    size = block_size(num_queries)
    stops = [min(start + size, num_queries) for start in range(0, num_queries, size)]
    return [(slice(start, stop), slice(0, stop)) for start, stop in zip([0, *stops], stops, strict=False)]


def pick_mask(masks: Masks, is_sliding: Array | bool) -> Array:
    """The mask of a layer with a window, or of one without."""
    full, window = masks
    if full is None or window is None:
        mask = window if full is None else full
        assert mask is not None
        return mask
    return jnp.where(is_sliding, window, full)


def attend_in_blocks(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    masks: Sequence[Masks],
    is_sliding: Array | bool,
    alibi: tuple[np.ndarray, Array] | None,
) -> Array:
    """`attend`, a block of queries at a time, each with the keys up to its end: little more than half of all pairs.

    `masks` are those of `blocks_of(T)`; alibi is (slopes [N], positions [B, T]). No scores or weights are kept for the
    backward pass, which computes them again from each query's log-sum-exp, as Dao et al. 2022 (FlashAttention,
    appendix B.2) do: with P = softmax(S), O = P V and D = rowsum(dO * O)

        dV = P^T dO        dS = P * (dO V^T - D)        dQ = dS K        dK = dS^T Q
    """
    q_BKGTH = grouped_queries(q_BTNH, k_BKTH.shape[1])
    return ungrouped(_in_blocks(q_BKGTH, k_BKTH, v_BKTH, tuple(masks), is_sliding, alibi))


@jax.custom_vjp
def _in_blocks(q_BKGTH: Array, k_BKTH: Array, v_BKTH: Array, masks, is_sliding, alibi) -> Array:
    return _blocks_forward(q_BKGTH, k_BKTH, v_BKTH, masks, is_sliding, alibi)[0]


def _blocks_forward(q_BKGTH: Array, k_BKTH: Array, v_BKTH: Array, masks, is_sliding, alibi):
    outs, log_sums = [], []
    for (rows, columns), mask in zip(blocks_of(q_BKGTH.shape[3]), masks, strict=True):
        q, k, v = q_BKGTH[:, :, :, rows], k_BKTH[:, :, columns], v_BKTH[:, :, columns]
        scores = masked_scores(q, k, pick_mask(mask, is_sliding), _bias(alibi, rows, columns))
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        summed = _product("BKMS,BKSH->BKMH", _rows(weights).astype(v.dtype), v).reshape(q.shape)
        outs.append((summed / total).astype(q.dtype))
        log_sums.append(largest + jnp.log(total))
    kept = jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)
    out_BKGTH, log_sums_BKGT1 = checkpoint_name(kept, PRODUCT)
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, masks, is_sliding, alibi, out_BKGTH, log_sums_BKGT1)


def _blocks_backward(kept, of_out_BKGTH: Array):
    q_BKGTH, k_BKTH, v_BKTH, masks, is_sliding, alibi, out_BKGTH, log_sums_BKGT1 = kept
    T = q_BKGTH.shape[3]
    of_q, of_k, of_v = [], jnp.zeros(k_BKTH.shape, jnp.float32), jnp.zeros(v_BKTH.shape, jnp.float32)
    products = of_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)
    along_out_BKGT1 = jnp.sum(products, axis=-1, keepdims=True)
    for (rows, columns), mask in zip(blocks_of(T), masks, strict=True):
        if T > LONG:
            # The next block waits for this one's sums, so that its scores do not exist beside them.
            q_BKGTH, of_k, of_v = jax.lax.optimization_barrier((q_BKGTH, of_k, of_v))
        q, k, v = q_BKGTH[:, :, :, rows], k_BKTH[:, :, columns], v_BKTH[:, :, columns]
        of_out = _rows(of_out_BKGTH[:, :, :, rows])
        scores = masked_scores(q, k, pick_mask(mask, is_sliding), _bias(alibi, rows, columns))
        weights = jnp.exp(scores - log_sums_BKGT1[:, :, :, rows])
        of_weights = _product("BKMH,BKSH->BKMS", of_out, v).reshape(weights.shape)
        of_scores = _rows(weights * (of_weights - along_out_BKGT1[:, :, :, rows])).astype(k.dtype)
        of_q.append(_product("BKMS,BKSH->BKMH", of_scores, k).reshape(q.shape).astype(q.dtype))
        of_k = of_k.at[:, :, columns].add(_product("BKMS,BKMH->BKSH", of_scores, _rows(q)))
        of_v = of_v.at[:, :, columns].add(_product("BKMS,BKMH->BKSH", _rows(weights).astype(v.dtype), of_out))
    return jnp.concatenate(of_q, axis=3), of_k.astype(k_BKTH.dtype), of_v.astype(v_BKTH.dtype), None, None, None


_in_blocks.defvjp(_blocks_forward, _blocks_backward)


def _bias(alibi: tuple[np.ndarray, Array] | None, rows: slice, columns: slice) -> Alibi | None:
    """The argument `alibi` of `masked_scores` for a block."""
    if alibi is None:
        return None
    slopes_N, positions_BT = alibi
    return slopes_N, positions_BT[:, rows, None] - positions_BT[:, None, columns]


def _rows(x_BKGTS: Array) -> Array:
    """The queries of a group as rows of one matrix, [B, K, M, S]."""
    B, K, G, T, S = x_BKGTS.shape
    return x_BKGTS.reshape(B, K, G * T, S)


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def attend_by_splash(
    q_BTNH: Array, k_BKTH: Array, v_BKTH: Array, segments_BT: Array, *, window: int | None, shard: Callable
) -> Array:
    """`attend` by the splash kernel (Pallas), each device for its part of the batch and of the heads.

    T is a multiple of 128. A token attends within its segment, padding (segment 0) to padding before it. Off a TPU the
    kernel is interpreted, which is slow and for tests.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    size = splash_block(T)
    blocks = splash.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
        block_kv_dkv_compute=size, block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip
    interpreted = device_of(shard).platform != "tpu"
    if interpreted:  # Python shows it once
        warnings.warn("--attention=splash: not on a TPU, so the kernel is interpreted, which is slow", stacklevel=2)
    one = splash_mask.CausalMask((T, T)) if window is None else splash_mask.LocalMask((T, T), (window - 1, 0), 0)

    def local(q_BNTH, k_BKTH, v_BKTH, segments_BT):
        kernel = splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([one] * q_BNTH.shape[1]),
            block_sizes=blocks,
            interpret=interpreted,
            residual_checkpoint_name=PRODUCT,
        )
        return jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(segments_BT, segments_BT))

    heads = lambda name: ("batch", name, "time", None)
    map_devices = getattr(shard, "map_devices", lambda function, inputs, outputs: function)
    run = map_devices(
        local, (heads("heads"), heads("kv_heads"), heads("kv_heads"), ("batch", "time")), heads("heads")
    )  # fmt: skip
    out_BNTH = run((q_BTNH * (H**-0.5)).swapaxes(1, 2), k_BKTH, v_BKTH, segments_BT)
    return out_BNTH.swapaxes(1, 2).astype(q_BTNH.dtype)


def splash_block(length: int) -> int:
    """Queries and keys in a block of the kernel."""
    return next(size for size in (512, 384, 256, LANES) if length % size == 0)


def attend_by_cudnn(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask_BTS: Array, *, causal: bool) -> Array:
    """`attend` by cuDNN's flash kernel, in half precision.

    With `causal`, for tokens that attend among themselves, it leaves out later keys. The mask goes to it as a bias,
    [B, T, S] numbers. A window spares it nothing: before version 9.10.2 cuDNN takes none beside a bias.
    """
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BKSH.swapaxes(1, 2),
        v_BKSH.swapaxes(1, 2),
        mask=mask_BTS[:, None],
        is_causal=causal,
        implementation="cudnn",
    )


def device_of(shard: Callable) -> jax.Device:
    """One of the devices that a program is for: those of the mesh behind `shard`, else JAX's default ones."""
    mesh = getattr(shard, "mesh", None)
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def attention_for(
    cfg: ModelConfig,
    sliding: Sequence[bool],
    queries: tuple[Array, Array],
    keys: tuple[Array, Array],
    shard: Callable,
) -> Callable[..., Array]:
    """How layers attend, `attend(q_BTNH, k_BKSH, v_BKSH, is_sliding) -> out_BTNH`: in the way that `choose` names.

    `sliding` says which of the layers have the window. Queries and keys are given by their positions and segment ids,
    [B, T] and [B, S] each. Masks are made here, once for all layers.
    """
    (positions_BT, segments_BT), (positions_BS, segments_BS) = queries, keys
    T, S = positions_BT.shape[1], positions_BS.shape[1]
    way = choose(
        cfg.attention, device_of(shard), dtype=cfg.dtype, head_size=cfg.head_size, queries=T, keys=S, biased=cfg.alibi,
        mixed=any(sliding) != all(sliding),
    )  # fmt: skip
    if way == "splash":
        window = cfg.sliding_window if all(sliding) else None
        return lambda q, k, v, is_sliding: attend_by_splash(q, k, v, segments_BT, window=window, shard=shard)

    def masks(rows: slice, columns: slice) -> Masks:
        """Those for these queries and keys."""
        q, k = (positions_BT[:, rows], segments_BT[:, rows]), (positions_BS[:, columns], segments_BS[:, columns])
        full = None if all(sliding) else attention_mask(*q, *k)
        return full, attention_mask(*q, *k, window=cfg.sliding_window) if any(sliding) else None

    slopes_N = alibi_slopes(cfg.num_heads) if cfg.alibi else None
    if way == "blocks":
        block_masks = [masks(*block) for block in blocks_of(T)]
        alibi = None if slopes_N is None else (slopes_N, positions_BT)
        return lambda q, k, v, is_sliding: attend_in_blocks(q, k, v, block_masks, is_sliding, alibi)

    whole = masks(slice(None), slice(None))
    if way == "cudnn":
        return lambda q, k, v, is_sliding: attend_by_cudnn(q, k, v, pick_mask(whole, is_sliding), causal=T == S)
    bias = None if slopes_N is None else (slopes_N, positions_BT[:, :, None] - positions_BS[:, None])
    return lambda q, k, v, is_sliding: attend(q, k, v, pick_mask(whole, is_sliding), alibi=bias)


def choose(
    attention: str,
    device: jax.Device,
    *,
    dtype: str,
    head_size: int,
    queries: int,
    keys: int,
    biased: bool,
    mixed: bool,
) -> str:
    """The way to attend, `xla`, `cudnn`, `blocks` or `splash`, that --attention asks for.

    `auto` is cuDNN in half precision on a GPU that it has a kernel for, splash on a TPU from v4 on, blocks elsewhere.
    What cannot be had is replaced by something simpler, but for splash, which is interpreted off a TPU. With a bias
    cuDNN would want it whole in memory, and splash knows of none; cuDNN has no backward pass for an odd number of
    tokens; splash wants rows of a multiple of 128 tokens, and all layers to have the same window (not `mixed`). Blocks
    and splash are for tokens that attend among themselves. A single query, one step of decoding, reads the cache once
    whatever the way, and so few queries as make one block are plain XLA's.
    """
    if queries == 1:
        return "xla"
    attention = _wanted(attention, device)
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = half and not (biased or head_size % 8 or head_size > 128 or queries % 2 or keys % 2)
    if attention == "cudnn" and not (fits and has_flash_kernel(device)):
        attention = "blocks"
    if attention == "splash" and (biased or mixed or queries % LANES or queries != keys):
        attention = "blocks"
    if attention == "blocks" and (queries != keys or queries <= LANES):
        attention = "xla"
    return attention


def sees_stems(attention: str, device: jax.Device) -> bool:
    """Whether packed rows may have stems (`core.segments`), of which the splash kernel knows nothing."""
    return _wanted(attention, device) != "splash"


def has_flash_kernel(device: jax.Device) -> bool:
    """Whether cuDNN's flash kernel runs there: on NVIDIA's GPUs of compute capability 8.0 (Ampere) and later."""
    if device.platform != "gpu":
        return False
    capability = re.fullmatch(r"(\d+)\.\d+", device.compute_capability)  # AMD's GPUs have names there
    return capability is not None and int(capability[1]) >= 8


def _wanted(attention: str, device: jax.Device) -> str:
    """What `auto` stands for, where everything can be had."""
    if attention != "auto":
        return attention
    old = device.device_kind in ("TPU v2", "TPU v3")
    return {"gpu": "cudnn", "tpu": "blocks" if old else "splash"}.get(device.platform, "blocks")
