"""Attention that leaves out later keys: in blocks of queries, or by a TPU's splash kernel. Neither holds the scores of
all pairs of a long row.

Both compute what `models.attention.attend` does, for tokens that attend among themselves: key s stands where query s
does, so nobody attends to what comes later in its row, packed or not.

Axes: B batch, T time, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from easyrl.models.attention import attend

Array = jax.Array

SHORT = 1024  # queries up to which all scores and weights are kept for the backward pass
LONG_BLOCK = 512  # queries in a block of more, at least: what is computed twice should be large products
FEW_BLOCKS, MOST_BLOCKS = 4, 8  # of few queries, and of more than SHORT; each is compiled by itself
LANES = 128  # blocks are multiples of it, as the sides of matrix units are


def block_size(num_queries: int) -> int:
    """Queries in a block."""
    short = num_queries <= SHORT
    wanted = -(-num_queries // (FEW_BLOCKS if short else MOST_BLOCKS))
    return max(LANES if short else LONG_BLOCK, -(-wanted // LANES) * LANES)


def attend_in_blocks(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    mask_of: Callable[[slice, slice], Array],
    alibi_of: Callable[[slice, slice], tuple | None],
) -> Array:
    """`attend`, a block of queries at a time, each with the keys up to its end.

    mask_of(rows, columns) is that part of the mask, [B, rows, columns], and alibi_of likewise the argument `alibi` of
    `attend`. As later keys are left out, little more than the half of all pairs is computed. Where there
    are more than `SHORT` queries, the scores and weights of a block are computed again in the backward pass, so that
    only one block's exist at once.
    """
    T, size = q_BTNH.shape[1], block_size(q_BTNH.shape[1])
    blocks = []
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        columns = slice(0, rows.stop)

        def block(q, k, v, rows=rows, columns=columns):
            return attend(q, k, v, mask_of(rows, columns), alibi=alibi_of(rows, columns))

        run = block if T <= SHORT else jax.checkpoint(block)
        blocks.append(run(q_BTNH[:, rows], k_BKTH[:, :, columns], v_BKTH[:, :, columns]))
    return jnp.concatenate(blocks, axis=1)


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
    device = device_of(shard)
    one = splash_mask.CausalMask((T, T)) if window is None else splash_mask.LocalMask((T, T), (window - 1, 0), 0)

    def local(q_BNTH, k_BKTH, v_BKTH, segments_BT):
        kernel = splash.make_splash_mha_single_device(
            splash_mask.MultiHeadMask([one] * q_BNTH.shape[1]),
            block_sizes=blocks,
            interpret=device.platform != "tpu",
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


def device_of(shard: Callable) -> jax.Device:
    """One of the devices that a program is for: those of the mesh behind `shard`, else JAX's default ones."""
    mesh = getattr(shard, "mesh", None)
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


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

    `auto` is cuDNN on a GPU in half precision, splash on a TPU from v4 on, blocks elsewhere. What cannot be had is
    replaced by something simpler. With a bias cuDNN would want it whole in memory, and splash knows of none; splash
    wants rows of a multiple of 128 tokens, and all layers to have the same window (not `mixed`). Blocks and splash are
    for tokens that attend among themselves. A single query, one step of decoding, reads the cache once whatever the
    way, and so few queries as make one block are plain XLA's.
    """
    if queries == 1:
        return "xla"
    attention = _wanted(attention, device)
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if attention == "cudnn" and (biased or not half or head_size % 8 or head_size > 128):
        attention = "blocks"
    if attention == "splash" and (biased or mixed or queries % LANES or queries != keys):
        attention = "blocks"
    if attention == "blocks" and (queries != keys or queries <= LANES):
        attention = "xla"
    return attention


def sees_stems(attention: str, device: jax.Device) -> bool:
    """Whether packed rows may have stems (`core.segments`), of which the splash kernel knows nothing."""
    return _wanted(attention, device) != "splash"


def _wanted(attention: str, device: jax.Device) -> str:
    """What `auto` stands for, where everything can be had."""
    if attention != "auto":
        return attention
    old = device.device_kind in ("TPU v2", "TPU v3")
    return {"gpu": "cudnn", "tpu": "blocks" if old else "splash"}.get(device.platform, "blocks")
