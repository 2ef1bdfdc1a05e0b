"""Norms and rotary embeddings against their formulas, and the relations they must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.models.layers import (
    OutputsFirst,
    RopeScaling,
    add_bias,
    alibi_slopes,
    apply_rope,
    layer_norm,
    linear,
    lookup,
    rms_norm,
    rope_frequencies,
    rope_tables,
)

rng = np.random.default_rng(0)


def rotate(x_TH, positions, freqs):
    """`apply_rope` of one head of one row."""
    cos, sin = rope_tables(jnp.asarray(positions)[None], freqs)
    return np.asarray(apply_rope(jnp.asarray(x_TH, jnp.float32)[None, :, None], cos, sin))[0, :, 0]


def test_rms_norm_is_its_formula():
    x, scale = rng.normal(size=(3, 5, 8)), rng.normal(size=8)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, atol=1e-5)


def test_rms_norm_keeps_its_statistics_in_float32():
    x = jnp.full((1, 512), 300.0, jnp.float16)  # its square overflows float16
    out = rms_norm(x, jnp.ones(512), 1e-5)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=1e-3)


def test_layer_norm_is_its_formula():
    x, scale, bias = rng.normal(2.0, 3.0, (3, 5, 8)), rng.normal(size=8), rng.normal(size=8)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    out = layer_norm(jnp.asarray(x), {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, 1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_alibi_slopes_of_the_paper():
    """8 heads: 1/2 to 1/256. 12 heads: those, then every other slope of 16 heads. 1 head: 1/256."""
    eighths = [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes(8), eighths)
    np.testing.assert_allclose(alibi_slopes(12), [*eighths, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    np.testing.assert_allclose(alibi_slopes(1), [2**-8])


def test_rope_is_a_rotation_of_half_pairs():
    H, freqs = 8, rope_frequencies(8, 10000.0, None)
    x = rng.normal(size=(3, H))
    z = (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * np.array([0, 1, 7])[:, None] * freqs)
    np.testing.assert_allclose(rotate(x, [0, 1, 7], freqs), np.concatenate([z.real, z.imag], -1), atol=1e-5)


def test_rope_products_depend_on_relative_positions_only():
    freqs = rope_frequencies(16, 10000.0, None)
    q, k = rng.normal(size=(2, 4, 16))
    far = rotate(q, np.arange(4) + 90, freqs) @ rotate(k, np.arange(4) + 90, freqs).T
    near = rotate(q, np.arange(4), freqs) @ rotate(k, np.arange(4), freqs).T
    np.testing.assert_allclose(far, near, atol=1e-4)


def test_linear_scaling_is_position_interpolation():
    x, plain = rng.normal(size=(4, 16)), rope_frequencies(16, 10000.0, None)
    stretched = rope_frequencies(16, 10000.0, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(rotate(x, [0, 4, 8, 40], stretched), rotate(x, [0, 1, 2, 10], plain), atol=1e-5)


def test_llama3_scaling_leaves_short_waves_and_stretches_long_ones():
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    plain, scaled = rope_frequencies(64, 10000.0, None), rope_frequencies(64, 10000.0, scaling)
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 64 / 4, wavelengths > 64 / 1
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert short.any() and long.any() and between.any()
    assert np.all((scaled < plain) & (scaled > plain / 8), where=between)
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0)])
def test_position_zero_is_not_rotated(scaling):
    x = rng.normal(size=(1, 8))
    np.testing.assert_allclose(rotate(x, [0], rope_frequencies(8, 500.0, scaling)), x, atol=1e-6)


def test_a_common_token_gets_all_of_its_gradient_in_bfloat16():
    ids = jnp.zeros((16, 512), jnp.int32)
    total = lambda table: lookup(table, ids, jnp.bfloat16, lambda x, *axes: x, "vocab").astype(jnp.float32).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.ones((2, 3))), [[16 * 512] * 3, [0] * 3])


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_in_bfloat16_take_the_digits_and_the_gradient_of_their_weights_from_float32(norm):
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((8192, 8), (2, 8)))
    apply = lambda weights, x: (
        rms_norm(x, weights[0], 1e-5)
        if norm == "rms"
        else layer_norm(x, {"scale": weights[0], "bias": weights[1]}, 1e-5)
    )
    x = jnp.abs(x).astype(jnp.bfloat16)
    copies = jax.jit(apply)(weights.astype(jnp.bfloat16), x)
    np.testing.assert_array_equal(jax.jit(apply)(weights, x).astype(jnp.float32), copies.astype(jnp.float32))
    total = lambda weights, x: jnp.sum(apply(weights, x).astype(jnp.float32) * 1.25)
    exact = jax.grad(total)(weights, x.astype(jnp.float32))
    np.testing.assert_allclose(jax.jit(jax.grad(total))(weights, x), exact, rtol=2**-8)  # rounded once


def test_gradients_of_biases_in_bfloat16_add_up_in_float32():
    x, bias = jnp.ones((2, 4096, 8), jnp.bfloat16), jnp.arange(8, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(add_bias(x, bias), x + bias)
    total = lambda bias: jnp.sum(add_bias(x, bias), dtype=jnp.float32)
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(bias), 2 * 4096)


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (5,)), ((6,), (3, 2, 4)), ((3, 4), (5,))])
def test_a_weight_with_its_outputs_first_gives_the_same_products(inputs, outputs):
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, *inputs), (*inputs, *outputs)))
    laid_out = OutputsFirst.of(w, len(inputs))
    assert laid_out.weight.shape == (*outputs, *inputs)
    product = jax.jit(linear, static_argnums=2)(x, laid_out, len(inputs))
    np.testing.assert_allclose(product, np.tensordot(x, w, len(inputs)), rtol=1e-5, atol=1e-5)
