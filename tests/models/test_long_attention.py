"""Blocks of queries and the splash kernel against plain attention: values and gradients, packed, grouped, odd."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.sharding import Shard, make_mesh
from easyrl.models import long_attention
from easyrl.models.attention import attend, attention_mask
from easyrl.models.long_attention import attend_by_splash, attend_in_blocks, block_size, blocks_of, choose
from easyrl.models.trunk import trunk
from tests.tiny import draw_params, tiny_config


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


def assert_alike(one, other, arrays, real):
    """Same values where `real`, and the same gradients of a function of those."""
    real = np.asarray(real)
    weights = np.cos(np.arange(real.size, dtype=np.float32)).reshape(real.shape) * real

    def number(function):
        def weighed(*arrays):
            values = function(*arrays)
            return jnp.sum(jnp.sin(values) * weights[..., None, None]), values

        return jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))

    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize("attention", ["blocks", "splash"])
def test_a_model_gives_the_same_whatever_its_attention(attention):
    _, _, _, positions, segments = draw(2, 256, 4, 2, 8, (130, 30, 80))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 256)), jnp.int32)
    cfg = tiny_config(max_positions=256, attention="xla")
    params = draw_params(cfg)
    hidden = {}
    for way in ("xla", attention):
        run = jax.jit(trunk, static_argnums=1)
        hidden[way], _ = run(params, tiny_config(max_positions=256, attention=way), tokens, positions, segments)
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(hidden["xla"][real], hidden[attention][real], rtol=1e-4, atol=1e-5)


def test_blocks_are_large_and_few():
    assert [block_size(T) for T in (1, 128, 512, 513, 1024)] == [128, 128, 128, 256, 256]
    assert [block_size(T) for T in (1025, 4096, 4097, 8192, 100_000)] == [512, 512, 640, 1024, 12544]


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
    ],
)
def test_what_auto_chooses(platform, kind, changes, expected):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    usual = {"dtype": "bfloat16", "head_size": 128, "queries": 2048, "keys": 2048, "biased": False, "mixed": False}
    assert choose("auto", device, **{**usual, **changes}) == expected
