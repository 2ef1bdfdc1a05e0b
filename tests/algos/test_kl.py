"""KL estimators against exact sums over a vocabulary, in value and in gradient; the adaptive controller by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easyrl.algos.kl import ESTIMATORS, adaptive_kl_coef, kl_estimate
from easyrl.core.masking import mean_of

NAN = float("nan")
POLICY = jnp.array([0.3, -0.8, 1.1, 0.0, -0.4])  # logits over a vocabulary of five
REFERENCE = jnp.array([0.1, 0.5, 0.7, -0.9, 0.2])


def exact_kl(logits_p, logits_q):
    p, q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    return jnp.sum(jnp.exp(p) * (p - q))


def expectation(name, logits, reference=REFERENCE):
    """E[estimate] over tokens drawn from the policy, the draw itself not differentiated: what a sampled loss is."""
    logprobs, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    weights = jax.lax.stop_gradient(jnp.exp(logprobs))
    return jnp.sum(weights * kl_estimate(name, logprobs, ref, jnp.ones(5, bool)))


def test_estimates_by_hand():
    # d = ln 2: k1 = 0.693147, k2 = 0.240227, k3 = 1/2 - 1 + ln 2 = 0.193147. d = -1: -1, 0.5, e - 2 = 0.718282.
    d, zero, mask = jnp.array([np.log(2), -1.0, 0.0]), jnp.zeros(3), jnp.ones(3, bool)
    np.testing.assert_allclose(kl_estimate("k1", d, zero, mask), [0.693147, -1.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(kl_estimate("k2", d, zero, mask), [0.240227, 0.5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(kl_estimate("k3", d, zero, mask), [0.193147, 0.718282, 0.0], rtol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equal_policies_have_no_kl(name):
    logprobs = jnp.array([[-3.0, -0.2, -11.0]])
    np.testing.assert_array_equal(kl_estimate(name, logprobs, logprobs, logprobs < 0), np.zeros((1, 3)))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name):
    np.testing.assert_allclose(expectation(name, POLICY), exact_kl(POLICY, REFERENCE), rtol=1e-5)


def test_k2_is_nearly_unbiased_when_policies_are_close():
    near = REFERENCE + 0.01 * POLICY
    np.testing.assert_allclose(expectation("k2", near), exact_kl(near, REFERENCE), rtol=2e-2)


def test_k2_and_k3_are_never_negative_and_keep_small_digits():
    d = jnp.linspace(-3, 3, 101)
    assert jnp.all(kl_estimate("k2", d, 0 * d, d == d) >= 0) and jnp.all(kl_estimate("k3", d, 0 * d, d == d) >= 0)
    small = jnp.array([1e-3])
    np.testing.assert_allclose(kl_estimate("k3", small, 0 * small, small > 0), [5e-7], rtol=2e-3)


def test_gradients_in_a_loss_are_what_the_table_says():
    true_gradient = jax.grad(exact_kl)(POLICY, REFERENCE)
    reversed_gradient = jax.grad(lambda logits: exact_kl(REFERENCE, logits))(POLICY)
    assert jnp.max(jnp.abs(true_gradient)) > 0.05
    np.testing.assert_allclose(jax.grad(expectation, argnums=1)("k1", POLICY), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(jax.grad(expectation, argnums=1)("k2", POLICY), true_gradient, atol=1e-6)
    np.testing.assert_allclose(jax.grad(expectation, argnums=1)("k3", POLICY), reversed_gradient, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_padding_is_not_read_in_value_or_gradient(name):
    logprobs, ref = jnp.array([[-1.0, NAN, -2.0]]), jnp.array([[-1.5, -jnp.inf, NAN]])
    mask = jnp.array([[True, False, False]])
    kl = kl_estimate(name, logprobs, ref, mask)
    assert kl[0, 0] != 0 and not np.any(kl[0, 1:])
    grads = jax.grad(lambda x: jnp.sum(kl_estimate(name, x, ref, mask)))(logprobs)
    assert grads[0, 0] != 0 and not np.any(grads[0, 1:])


def test_the_mean_is_not_diluted_by_padding():
    """Regression: KL averaged over padding shrinks with the width of the batch."""
    logprobs, ref = jnp.zeros((1, 8)), jnp.full((1, 8), -0.5)
    mask = jnp.arange(8)[None] < 2
    np.testing.assert_allclose(mean_of(kl_estimate("k1", logprobs, ref, mask), mask).value, 0.5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradient_check(name):
    logprobs = jnp.array([-1.0, -0.3, -2.0])
    mask = jnp.array([True, True, False])
    check_grads(lambda x: kl_estimate(name, x, logprobs * 0.7, mask), (logprobs,), order=1, modes=["rev"], rtol=1e-2)


def test_half_precision_comes_back_as_float32():
    half = jnp.zeros(2, jnp.bfloat16)
    assert kl_estimate("k3", half, half, jnp.ones(2, bool)).dtype == jnp.float32


def test_unknown_estimator():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4', expected one of k1, k2, k3"):
        kl_estimate("k4", jnp.zeros(1), jnp.zeros(1), jnp.ones(1, bool))


def test_adaptive_coefficient_by_hand():
    # Target 6, horizon 1000, 100 samples: K = 0.1. KL 6.6 is 10 % over: 0.2 * (1 + 0.1 * 0.1) = 0.202.
    # KL 60 saturates at +20 %: 0.2 * 1.02 = 0.204. KL 0 saturates at -20 %: 0.2 * 0.98 = 0.196.
    for observed, expected in ((6.6, 0.202), (6.0, 0.2), (60.0, 0.204), (0.0, 0.196), (-3.0, 0.196)):
        np.testing.assert_allclose(adaptive_kl_coef(0.2, observed, 6.0, 100, 1000.0), expected, rtol=1e-6)
    assert adaptive_kl_coef(0.25, 60.0, 6.0, 0, 1000.0) == 0.25  # of no response nothing is known


def test_adaptive_coefficient_finds_its_target():
    # A policy whose KL is 1 / coefficient settles where the coefficient is 1 / target.
    coef = 1.0
    for _ in range(400):
        coef = adaptive_kl_coef(coef, 1 / coef, 4.0, 64, 640.0)
    np.testing.assert_allclose(coef, 0.25, rtol=1e-3)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 1e4), (-1.0, 1e4), (6.0, 0.0), (6.0, -1.0)])
def test_adaptive_coefficient_refuses(target, horizon):
    with pytest.raises(ValueError, match=r"target KL|KL horizon"):
        adaptive_kl_coef(0.2, 1.0, target, 64, horizon)
