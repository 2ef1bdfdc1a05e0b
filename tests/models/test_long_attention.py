"""Blocks of queries, the splash kernel and the way to cuDNN's against plain attention: values and gradients, packed,
grouped, odd.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir
from jax.extend.core import jaxprs_in_params

from easyrl.core.sharding import Shard, make_mesh
from easyrl.models import long_attention
from easyrl.models.attention import attend, attention_mask
from easyrl.models.long_attention import (
    attend_by_cudnn,
    attend_by_splash,
    attend_in_blocks,
    block_size,
    blocks_of,
    choose,
)
from easyrl.models.trunk import trunk
from tests.tiny import draw_params, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:--attention=splash")


def draw(B, T, N, K, H, lengths):
    """Queries, keys, values, and positions and segments of rows of segments of these lengths, then padding."""
    rng = np.random.default_rng(T + N + K)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, K, T, H), (B, K, T, H)))
    positions, segments = np.zeros((2, B, T), np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        positions[:, start : start + length] = np.arange(length)
        segments[:, start : start + length] = number
        start += length
    return q, k, v, jnp.asarray(positions), jnp.asarray(segments)


def assert_alike(one, other, arrays, real, tolerance=1e-5):
    """Same values where `real`, and the same gradients of a function of those."""
    real = np.asarray(real)
    weights = np.cos(np.arange(real.size, dtype=np.float32)).reshape(real.shape) * real

    def number(function):
        def weighed(*arrays):
            values = function(*arrays)
            return jnp.sum(jnp.sin(values) * weights[..., None, None]), values

        return jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))

    def same(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    (gradients, values), (other_gradients, other_values) = (number(f)(*arrays) for f in (one, other))
    same(np.asarray(values)[real], np.asarray(other_values)[real])
    for a, b in zip(gradients, other_gradients, strict=True):
        same(a, b)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("T", "lengths", "N", "K", "window"),
    [
        (301, (130, 50, 90), 4, 2, None),
        (301, (130, 50, 90), 4, 2, 21),
        (301, (301,), 4, 1, None),
        (256, (256,), 2, 2, None),
    ],
)
def test_blocks_are_plain_attention(monkeypatch, long, T, lengths, N, K, window):
    monkeypatch.setattr(long_attention, "LONG_BLOCK", 128)
    monkeypatch.setattr(long_attention, "LONG", T - 1 if long else T)
    q, k, v, positions, segments = draw(2, T, N, K, 8, lengths)
    mask = jax.jit(attention_mask, static_argnums=4)(positions, segments, positions, segments, window)
    slopes = np.linspace(0.1, 0.5, N, dtype=np.float32) if K == 1 else None
    distance = positions[:, :, None] - positions[:, None, :]
    whole = None if slopes is None else (slopes, distance)
    alibi = None if slopes is None else (slopes, positions)

    def blocks(q, k, v):
        masks = [(mask[:, rows, columns], None) for rows, columns in blocks_of(T)]
        return attend_in_blocks(q, k, v, masks, False, alibi)

    assert_alike(blocks, lambda q, k, v: attend(q, k, v, mask, alibi=whole), (q, k, v), segments > 0)


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("with_mesh", [False, True])
def test_splash_is_plain_attention(window, with_mesh):
    """Interpreted on the CPU; on a mesh every device runs the kernel on its part of batch and heads."""
    q, k, v, positions, segments = draw(4, 256, 4, 2, 8, (130, 30, 80))
    mask = jax.jit(attention_mask, static_argnums=4)(positions, segments, positions, segments, window)
    shard = Shard(make_mesh("2,2,2")) if with_mesh else None

    def by_splash(q, k, v):
        return attend_by_splash(q, k, v, segments, window=window, shard=shard)

    assert_alike(by_splash, lambda q, k, v: attend(q, k, v, mask), (q, k, v), segments > 0)


def test_splash_says_where_it_is_slow():
    q, k, v, _, segments = draw(1, 128, 2, 2, 8, (128,))
    with pytest.warns(UserWarning, match="--attention=splash: not on a TPU, so the kernel is interpreted"):
        jax.eval_shape(lambda: attend_by_splash(q, k, v, segments, window=None, shard=None))


@pytest.fixture
def cudnn(monkeypatch):
    """Any device has cuDNN: its kernels are written out, and JAX's own code around them says how they are split."""

    def softmax_v(q_BTNH, k_BSKH, v_BSKH, bias, scale, mask_type):
        T, S, group = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
        q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, *(jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale + bias.astype(jnp.float32)
        if mask_type == fused.MaskType.CAUSAL:
            scores = jnp.where(jnp.tri(T, S, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v).astype(q_BTNH.dtype)

    def forward(q, k, v, bias, *_, scale, mask_type, is_training, **others):
        out, (B, T, N, _) = softmax_v(q, k, v, bias, scale, mask_type), q.shape
        return (out, jnp.zeros((B, N, T), jnp.float32)) if is_training else (out,)

    def backward(q, k, v, bias, *rest, scale, mask_type, variadic_args, **others):
        _, wants_bias = variadic_args
        gradients = jax.vjp(lambda *x: softmax_v(*x, scale, mask_type), q, k, v, bias)[1](rest[-1])
        return gradients if wants_bias else gradients[:3]

    for primitive, function in (
        (fused._dot_product_attention_fwd_p, forward),
        (fused._dot_product_attention_bwd_p, backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform="cpu")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(long_attention, "has_flash_kernel", lambda device: True)


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("with_mesh", [False, True])
def test_cudnn_is_given_what_plain_attention_is(cudnn, window, with_mesh):
    """On a mesh every device has its part of batch and heads."""
    q, k, v, positions, segments = draw(4, 256, 4, 2, 8, (130, 30, 80))
    mask = jax.jit(attention_mask, static_argnums=4)(positions, segments, positions, segments, window)
    shard = Shard(make_mesh("2,2,2")) if with_mesh else lambda x, *axes: x

    def by_cudnn(q, k, v):
        q, k, v = (shard(x, "batch", *axes) for x, *axes in (
            (q, "time", "heads", None), (k, "kv_heads", "time", None), (v, "kv_heads", "time", None)
        ))  # fmt: skip
        return attend_by_cudnn(q, k, v, shard(mask, "batch", "time", "time"), causal=True)

    halves = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    assert_alike(by_cudnn, lambda q, k, v: attend(q, k, v, mask), halves, segments > 0, tolerance=3e-2)


def equations(jaxpr, name):
    """All those of primitives of this name, in whatever functions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, name)


@pytest.mark.parametrize("attention", ["blocks", "splash", "cudnn"])
def test_a_model_gives_the_same_whatever_its_attention(attention, cudnn):
    _, _, _, positions, segments = draw(2, 256, 4, 2, 8, (130, 30, 80))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 256)), jnp.int32)
    half = attention == "cudnn"
    settings = {"max_positions": 256, "dtype": "bfloat16" if half else "float32"}
    params = draw_params(tiny_config(**settings))
    hidden = {}
    for way in ("xla", attention):
        run = jax.jit(trunk, static_argnums=1)
        hidden[way], _ = run(params, tiny_config(**settings, attention=way), tokens, positions, segments)
    real = np.asarray(segments > 0)
    one, other = (np.asarray(hidden[way][real], np.float32) for way in ("xla", attention))
    if half:
        assert np.sqrt(np.mean((one - other) ** 2)) < 0.02 * one.std()
    else:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def gradient_of_cudnn(**settings):
    """The program of a model's gradient."""
    _, _, _, positions, segments = draw(2, 256, 4, 2, 8, (130, 30, 80))
    cfg = tiny_config(max_positions=256, dtype="bfloat16", attention="cudnn", **settings)
    total = lambda params: jnp.sum(trunk(params, cfg, segments, positions, segments)[0].astype(jnp.float32))
    return jax.make_jaxpr(jax.grad(total))(draw_params(cfg)).jaxpr


def test_cudnn_leaves_out_later_keys(cudnn):
    for name in ("fwd", "bwd"):
        found = list(equations(gradient_of_cudnn(), f"dot_product_attention_{name}_wrapper"))
        assert found and all(one.params["mask_type"] == fused.MaskType.CAUSAL for one in found)
    # Behind other tokens a query does not stand where its key does.
    q, k, v = (jnp.zeros(shape, jnp.bfloat16) for shape in ((1, 128, 2, 8), (1, 2, 256, 8), (1, 2, 256, 8)))
    where = [(jnp.zeros((1, n), jnp.int32), jnp.ones((1, n), jnp.int32)) for n in (128, 256)]
    cfg = tiny_config(dtype="bfloat16", attention="cudnn")
    behind = long_attention.attention_for(cfg, (False,), *where, lambda x, *axes: x)
    traced = jax.make_jaxpr(lambda q, k, v: behind(q, k, v, False))(q, k, v)
    (one,) = equations(traced.jaxpr, long_attention.CUDNN_FORWARD)
    assert one.params["mask_type"] == fused.MaskType.NO_MASK


def test_remat_dots_keeps_what_cudnn_gives(cudnn):
    """JAX has the primitive by whose name it is kept, and the forward pass of a layer runs it once."""
    runs = {
        remat: len(list(equations(gradient_of_cudnn(remat=remat), long_attention.CUDNN_FORWARD)))
        for remat in ("none", "dots", "full")
    }
    assert runs == {"none": 1, "dots": 1, "full": 2}


def test_blocks_are_large_and_few():
    assert [block_size(T) for T in (1, 128, 512, 513, 1024)] == [128, 128, 128, 256, 256]
    assert [block_size(T) for T in (1025, 4096, 4097, 8192, 100_000)] == [512, 512, 640, 1024, 12544]


CAPABILITIES = {"NVIDIA H100": "9.0", "NVIDIA A100": "8.0", "Tesla T4": "7.5", "AMD Instinct MI250X": "gfx90a"}
USUAL = {"dtype": "bfloat16", "head_size": 128, "queries": 2048, "keys": 2048, "biased": False, "mixed": False}


def device_of_kind(platform, kind):
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=CAPABILITIES.get(kind))


@pytest.mark.parametrize(
    ("platform", "kind", "changes", "expected"),
    [
        ("cpu", "cpu", {}, "blocks"),
        ("cpu", "cpu", {"queries": 256, "keys": 256}, "blocks"),
        ("cpu", "cpu", {"queries": 128, "keys": 128}, "xla"),
        ("tpu", "TPU v3", {}, "blocks"),
        ("tpu", "TPU v4", {}, "splash"),
        ("tpu", "TPU v5 lite", {"queries": 128, "keys": 128}, "splash"),
        ("tpu", "TPU v5", {"queries": 2000, "keys": 2000}, "blocks"),
        ("tpu", "TPU v5", {"biased": True}, "blocks"),
        ("tpu", "TPU v5", {"mixed": True}, "blocks"),
        ("tpu", "TPU v5", {"keys": 4096}, "xla"),
        ("gpu", "NVIDIA H100", {}, "cudnn"),
        ("gpu", "NVIDIA H100", {"dtype": "float32"}, "blocks"),
        ("gpu", "NVIDIA H100", {"head_size": 100}, "blocks"),
        ("gpu", "NVIDIA H100", {"queries": 1}, "xla"),
        ("gpu", "NVIDIA H100", {"queries": 565, "keys": 565}, "blocks"),
        ("gpu", "NVIDIA H100", {"biased": True}, "blocks"),
        ("gpu", "NVIDIA A100", {}, "cudnn"),
        ("gpu", "Tesla T4", {}, "blocks"),
        ("gpu", "AMD Instinct MI250X", {}, "blocks"),
    ],
)
def test_what_auto_chooses(platform, kind, changes, expected):
    assert choose("auto", device_of_kind(platform, kind), **{**USUAL, **changes}) == expected


def test_cudnn_where_there_is_none_is_blocks():
    for platform, kind in (("cpu", "cpu"), ("tpu", "TPU v5"), ("gpu", "Tesla T4")):
        device = device_of_kind(platform, kind)
        assert choose("cudnn", device, **USUAL) == "blocks"
        assert choose("cudnn", device, **{**USUAL, "keys": 4096}) == "xla"
    assert choose("cudnn", device_of_kind("gpu", "NVIDIA H100"), **USUAL) == "cudnn"
