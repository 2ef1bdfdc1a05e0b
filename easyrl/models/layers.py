"""The small parts models are made of."""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

PRODUCT = "product"  # the name of what --remat=dots keeps: products of matrices, those of attention among them


def rounded(w: Array, dtype) -> Array:
    """`w` in float32, with the digits that a copy of it in `dtype` would have.

    Products with it are then those with the copy, and its gradient is added up in float32 and rounded once. A cast to
    `dtype` and back will not do, because XLA may leave both out.
    """
    format = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w.astype(jnp.float32), format.nexp, format.nmant)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, in float32 throughout (Zhang and Sennrich 2019, eq. 4)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * rounded(scale, x.dtype)).astype(x.dtype)


def layer_norm(x: Array, params: dict, eps: float) -> Array:
    """(x - mean) / std * scale + bias over the last axis, in float32 throughout (Ba et al. 2016, eq. 4)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (normed * rounded(params["scale"], x.dtype) + rounded(params["bias"], x.dtype)).astype(x.dtype)


# By transformers' names. gelu_new is the tanh approximation, which BLOOM computes too.
ACTIVATIONS: dict[str, Callable] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def lookup(table: Array, ids_BT: Array, dtype, shard: Callable, rows: str) -> Array:
    """The rows of `table` that `ids` name, [B, T, D] in `dtype`.

    `rows` is the logical axis of the table's rows. The table is split over fsdp by width and the batch by rows. A table
    is much larger than what is looked up in it, so it stays where it is: each device looks up its part of the width for
    the rows of all that share the table, which then change places. Its gradient adds up in float32: a common token's is
    a sum of thousands, which in bfloat16 stops growing at some 256 of equal size.
    """
    found = _take(table.astype(dtype), ids_BT, shard, rows)
    return shard(found, "batch", "time", "width")


def _take(table: Array, ids_BT: Array, shard: Callable, rows: str) -> Array:
    """[B, T, D], split by width as the table is."""
    ids_BT = shard(ids_BT, "shared_batch", "time")
    return shard(jnp.take(shard(table, rows, "embed"), ids_BT, axis=0), "shared_batch", "time", "embed")


def _lookup_backward(dtype, shard, rows: str, saved: tuple[Array, Array], of_out: Array) -> tuple[Array, np.ndarray]:
    table, ids_BT = saved
    of_found = shard(of_out, "shared_batch", "time", "embed").astype(jnp.float32)
    take = lambda table: _take(table, ids_BT, shard, rows)
    (of_table,) = jax.linear_transpose(take, jax.ShapeDtypeStruct(table.shape, jnp.float32))(of_found)
    return of_table.astype(table.dtype), np.zeros(ids_BT.shape, jax.dtypes.float0)


lookup.defvjp(
    lambda table, ids_BT, dtype, shard, rows: (lookup(table, ids_BT, dtype, shard, rows), (table, ids_BT)),
    _lookup_backward,
)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slope of every head, float32 [N]: attention is biased by -slope x distance (Press et al. 2022, section 3).

    For N = 2^p heads the geometric series 2^(-8/N), 2^(-16/N), ...; for another N that of the power of two below it,
    then every other slope of the series for the power above it, as the authors' code does.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    series = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    return np.concatenate([series(power), series(2 * power)[::2][: num_heads - power]]).astype(np.float32)


class OutputsFirst(flax.struct.PyTreeNode):
    """A weight [in..., out...] that lies in memory as [out..., in...].

    A processor without matrix units copies a weight into the order in which it multiplies. With few rows to multiply
    that takes longer than multiplying, and least where every output's numbers lie together.
    """

    weight: Array

    @classmethod
    def of(cls, weight: Array, inputs: int) -> "OutputsFirst":
        """`weight` [in..., out...], whose first `inputs` dimensions are those contracted, laid out so."""
        return cls(_rotate(weight, inputs))

    def product(self, x: Array, contracted: int = 1, dtype=None) -> Array:
        """x [..., in...] times the weight, over `contracted` dimensions: [..., out...], added up in `dtype`."""
        rows, outs = x.ndim - contracted, self.weight.ndim - contracted
        # The compiler would merge the transpositions into the product, and so undo the order that this class is for.
        x = jax.lax.optimization_barrier(_rotate(x, rows))
        dims = tuple(range(outs, outs + contracted)), tuple(range(contracted))
        out = jax.lax.dot_general(self.weight, x, (dims, ((), ())), preferred_element_type=dtype)
        return _rotate(jax.lax.optimization_barrier(out), outs)


def _rotate(x: Array, first: int) -> Array:
    """`x` with its first so many dimensions last."""
    return jnp.transpose(x, (*range(first, x.ndim), *range(first)))


def linear(x: Array, w: Array | OutputsFirst, contracted: int = 1) -> Array:
    """The product of `x` [B, T, in...] and `w` [in..., out...], over `contracted` dimensions: [B, T, out...]."""
    if isinstance(w, OutputsFirst):
        return w.product(x, contracted)
    return checkpoint_name(_linear(x, w, contracted), PRODUCT)


def add_bias(x: Array, bias: Array) -> Array:
    """x + bias, whose gradient, a sum over all tokens, adds up in float32 (`rounded`)."""
    return (x.astype(jnp.float32) + rounded(bias, x.dtype)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: Array, w: Array, contracted: int) -> Array:
    """The gradient is the usual one, with the weights' product written in the order in which they lie: x^T dy. The
    order that automatic differentiation picks, (dy^T x)^T, has some compilers (XLA's for CPUs) transpose dy first.
    """
    return jnp.tensordot(x, w, contracted)


def _linear_backward(contracted: int, saved: tuple[Array, Array], of_out: Array) -> tuple[Array, Array]:
    x, w = saved
    batch, outs = (0, 1), of_out.ndim - 2
    out_dims = tuple(range(2, 2 + outs)), tuple(range(contracted, contracted + outs))
    of_x = jax.lax.dot_general(of_out, w, (out_dims, ((), ())))
    of_w = jax.lax.dot_general(x, of_out, ((batch, batch), ((), ())))
    return of_x, of_w


_linear.defvjp(lambda x, w, contracted: (_linear(x, w, contracted), (x, w)), _linear_backward)


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up (Shazeer 2020), whose backward pass keeps its two arguments and nothing else of their size."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: tuple[Array, Array], of_out: Array) -> tuple[Array, Array]:
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    return of_out * up * sigmoid * (1 + gate * (1 - sigmoid)), of_out * gate * sigmoid


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    kind `linear`: every frequency divided by `factor` (position interpolation, Chen et al. 2023).
    kind `llama3`: as in Llama 3.1: wavelengths longer than original_max_positions / low_freq_factor are stretched by
    `factor`, those shorter than original_max_positions / high_freq_factor are left, with a smooth step between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def rope_frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """The head_size / 2 rotary frequencies, in radians per position (Su et al. 2021, section 3.2.2)."""
    freqs = 1.0 / theta ** (np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    assert scaling.kind == "llama3", scaling.kind
    wavelengths = 2 * np.pi / freqs
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)  # 0: stretched in full, 1: left alone
    return (1 - smooth) * freqs / scaling.factor + smooth * freqs


def rope_tables(positions_BT: Array, freqs: np.ndarray) -> tuple[Array, Array]:
    """cos and sin of every token's angles, each float32 [B, T, H/2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: Array, cos: Array, sin: Array) -> Array:
    """Rotate each head's (first half, second half) pairs by the tokens' angles: Hugging Face's pairing, not Meta's."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
