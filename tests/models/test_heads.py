"""The one definition of a log-probability: its value, and its hand-written gradient against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.models.heads import lm_logits, token_logprobs
from tests.tiny import tiny_config


def by_log_softmax(logits, targets, temperature):
    """The textbook form, differentiated by JAX."""
    logp = jax.nn.log_softmax(logits / temperature)
    logprobs = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return logprobs, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(0), 4)
    logits, targets = 3 * jax.random.normal(keys[0], (2, 5, 17)), jax.random.randint(keys[1], (2, 5), 0, 17)
    return logits, targets, jax.random.normal(keys[2], (2, 5)), jax.random.normal(keys[3], (2, 5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_values_and_gradient_equal_autodiff_of_log_softmax(temperature, batch):
    logits, targets, of_logprobs, of_entropy = batch

    def pull_back(function):
        values, vjp = jax.vjp(lambda x: function(x, targets, temperature), logits)
        return values, vjp((of_logprobs, of_entropy))[0]

    (values, gradient), (expected, expected_gradient) = pull_back(token_logprobs), pull_back(by_log_softmax)
    np.testing.assert_allclose(values[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(values[1], expected[1], atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_huge_logits_stay_finite():
    logits = jnp.array([[1e4, 0.0, -1e4]])
    logprobs, entropy = token_logprobs(logits, jnp.array([0]))
    gradient = jax.grad(lambda x: token_logprobs(x, jnp.array([1]))[0].sum())(logits)
    assert logprobs[0] == 0 and entropy[0] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, [[-1, 1, 0]], atol=1e-6)


def test_temperature_zero_scores_at_temperature_one(batch):
    logits, targets, *_ = batch
    np.testing.assert_array_equal(token_logprobs(logits, targets, 0.0)[0], token_logprobs(logits, targets, 1.0)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_the_logits_is_multiplied_in_the_compute_dtype(tied):
    cfg = tiny_config(vocab_size=17, width=8, dtype="bfloat16")
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, of_logits = (
        jax.random.normal(key, (2, 3, size), dtype)
        for key, size, dtype in ((keys[0], 8, "bfloat16"), (keys[1], 17, "float32"))
    )
    kernel = jax.random.normal(keys[2], (17, 8) if tied else (8, 17))
    place = (lambda w: {"embed": {"tokens": w}}) if tied else (lambda w: {"head": {"kernel": w}})
    pull = lambda kernel, hidden: jax.vjp(lambda w, x: lm_logits(place(w), cfg, x), kernel, hidden)[1](of_logits)

    products = [line for line in jax.jit(pull).lower(kernel, hidden).as_text().splitlines() if "dot_general" in line]
    assert products and all("xbf16>, tensor" in line.split(" : ")[-1] for line in products)
    as_matrix = kernel.T if tied else kernel
    of_kernel, of_hidden = pull(kernel, hidden)
    expected = jnp.einsum("btd,btv->dv", hidden.astype("float32"), of_logits)
    np.testing.assert_allclose(of_kernel.T if tied else of_kernel, expected, rtol=0.02, atol=0.05)
    np.testing.assert_allclose(of_hidden.astype("float32"), of_logits @ as_matrix.T, rtol=0.02, atol=0.1)
