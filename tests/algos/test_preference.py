"""Reward-model losses against hand-worked vectors, numpy, limits, and splits of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easyrl.algos.preference import logistic_loss, pairwise_loss, pointwise_loss

NAN = float("nan")


def softplus(x):
    return np.logaddexp(0.0, x)


def split(arrays, places):
    return zip(*[np.split(x, places) for x in arrays], strict=True)


def add(*results):
    return jax.tree.leaves(jax.tree.map(lambda *leaves: sum(leaves), *results))


@pytest.fixture
def pairs():
    rng = np.random.default_rng(2)
    chosen, rejected = 2 * rng.normal(size=(2, 7)).astype(np.float32)
    return chosen, rejected, np.array([1, 1, 0, 1, 1, 0, 1], bool)


def test_pairwise_by_hand():
    # Margins ln 3 and -ln 3: -log sigmoid = ln(4/3) = 0.287682 and ln 4 = 1.386294. Sums 2 and 0 of the scores:
    # centring at 0.1 adds 0.1 * (4 + 0).
    chosen = jnp.array([1 + np.log(3) / 2, -np.log(3) / 2, NAN])
    rejected = jnp.array([1 - np.log(3) / 2, np.log(3) / 2, NAN])
    mask = jnp.array([True, True, False])
    loss, metrics = pairwise_loss(chosen, rejected, mask, center_coef=0.1)
    np.testing.assert_allclose([loss.total, loss.count], [0.287682 + 1.386294 + 0.4, 2.0], rtol=1e-6)
    expected = {
        "accuracy": 0.5,
        "margin": 0.0,
        "rewards/chosen": 0.5,
        "rewards/rejected": 0.5,
        "mean_reward": 0.5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value, value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"center_coef": 0.03}])
@pytest.mark.parametrize("with_margins", [False, True])
def test_pairwise_equals_numpy(pairs, options, with_margins):
    chosen, rejected, mask = pairs
    margins = np.linspace(0, 1.5, 7, dtype=np.float32)
    x = chosen - rejected - (margins if with_margins else 0)
    e = options.get("label_smoothing", 0.0)
    losses = (1 - e) * softplus(-x) + e * softplus(x) + options.get("center_coef", 0.0) * (chosen + rejected) ** 2
    loss, metrics = pairwise_loss(*pairs, margins=jnp.array(margins) if with_margins else None, **options)
    np.testing.assert_allclose(loss.value, losses[mask].mean(), rtol=1e-5)
    # The metrics are about the scores, whatever margin was asked for.
    np.testing.assert_allclose(metrics["accuracy"].value, (chosen > rejected)[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"].value, (chosen - rejected)[mask].mean(), rtol=1e-5)


def test_pairwise_limits(pairs):
    chosen, rejected, mask = pairs
    plain = pairwise_loss(*pairs)[0].value
    np.testing.assert_allclose(pairwise_loss(*pairs, margins=jnp.zeros(7))[0].value, plain, rtol=1e-6)
    np.testing.assert_allclose(pairwise_loss(chosen + 3, rejected + 3, mask)[0].value, plain, rtol=1e-5)
    assert pairwise_loss(chosen + 3, rejected + 3, mask, center_coef=0.1)[0].value > plain
    np.testing.assert_allclose(pairwise_loss(chosen, chosen, mask)[0].value, np.log(2), rtol=1e-6)
    assert pairwise_loss(chosen, chosen, mask)[1]["accuracy"].value == 0  # ties are wrong
    np.testing.assert_allclose(pairwise_loss(chosen + 200, rejected - 200, mask)[0].value, 0.0, atol=1e-6)


def test_smoothing_has_its_minimum_at_the_log_odds():
    x = jnp.log(0.9 / 0.1)
    np.testing.assert_allclose(jax.grad(logistic_loss)(x, 0.1), 0.0, atol=1e-6)
    assert logistic_loss(x, 0.1) < min(logistic_loss(x - 0.1, 0.1), logistic_loss(x + 0.1, 0.1))


def test_pairwise_gradients(pairs):
    chosen, rejected, mask = pairs
    options = {"margins": jnp.full(7, 0.3), "label_smoothing": 0.1, "center_coef": 0.05}
    check_grads(
        lambda *scores: pairwise_loss(*scores, mask, **options)[0].value,
        (chosen, rejected), order=1, modes=["rev"], atol=1e-3, rtol=1e-2, eps=1e-2,
    )  # fmt: skip
    grads = jax.grad(lambda *scores: pairwise_loss(*scores, mask)[0].total, argnums=(0, 1))(chosen, rejected)
    assert np.all(grads[0][mask] < 0) and np.all(grads[1][mask] > 0)  # up with the chosen, down with the rejected
    # d/dr of -log sigmoid(r) is -sigmoid(-r).
    np.testing.assert_allclose(grads[0][mask], -1 / (1 + np.exp(chosen - rejected))[mask], rtol=1e-5)


def test_pairwise_filler_order_and_splits(pairs):
    chosen, rejected, mask = pairs
    margins = np.linspace(0, 1, 7, dtype=np.float32)

    def run(chosen, rejected, mask, margins):
        return pairwise_loss(chosen, rejected, mask, margins=margins, center_coef=0.1, label_smoothing=0.1)

    expected = jax.tree.leaves(run(chosen, rejected, mask, margins))
    poisoned = [np.where(mask, x, NAN) for x in (chosen, rejected, margins)]
    np.testing.assert_array_equal(jax.tree.leaves(run(*poisoned[:2], mask, poisoned[2])), expected)
    grads = jax.grad(lambda x: run(x, poisoned[1], mask, poisoned[2])[0].total)(poisoned[0])
    assert np.isfinite(grads).all() and not np.any(grads[~mask])
    arrays = (chosen, rejected, mask, margins)
    np.testing.assert_allclose(add(*[run(*part) for part in split(arrays, [1, 3])]), expected, rtol=1e-5, atol=1e-6)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    np.testing.assert_allclose(jax.tree.leaves(run(*[x[order] for x in arrays])), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_scores_are_compared_in_float32():
    loss, _ = pairwise_loss(jnp.array([1.0], jnp.bfloat16), jnp.array([0.5], jnp.bfloat16), jnp.array([True]))
    assert loss.total.dtype == jnp.float32
    np.testing.assert_allclose(loss.value, softplus(-0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and less than 0.5, found 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": NAN}, "label_smoothing"),
        ({"center_coef": -0.01}, "center_coef must not be negative"),
        ({"center_coef": NAN}, "center_coef"),
    ],
)
def test_pairwise_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        pairwise_loss(jnp.zeros(1), jnp.zeros(1), jnp.ones(1, bool), **options)


def test_pointwise_by_hand():
    # Score ln 3 is a probability of 3/4. Good: ln(4/3) = 0.287682. Bad: ln 4 = 1.386294. Score 0: ln 2 = 0.693147.
    scores = jnp.array([np.log(3), np.log(3), 0.0, -2.0])
    labels, mask = jnp.array([1, 0, 1, NAN]), jnp.array([True, True, True, False])
    loss, metrics = pointwise_loss(scores, labels, mask)
    np.testing.assert_allclose([loss.total, loss.count], [0.287682 + 1.386294 + 0.693147, 3.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"].value, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["mean_reward"].value, 2 * np.log(3) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], [np.log(3), 2.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], [np.log(3), 1.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_pointwise_equals_numpy(pairs, dtype):
    scores, _, mask = pairs
    labels = (np.arange(7) % 2).astype(dtype)
    losses = np.where(labels.astype(bool), softplus(-scores), softplus(scores))
    loss, metrics = pointwise_loss(scores, labels, mask)
    np.testing.assert_allclose(loss.value, losses[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"].value, ((scores > 0) == labels.astype(bool))[mask].mean(), rtol=1e-6)


def test_pointwise_is_pairwise_against_a_score_of_0(pairs):
    scores, _, mask = pairs
    good = pointwise_loss(scores, np.ones(7), mask)[0]
    np.testing.assert_allclose(good, pairwise_loss(scores, 0 * scores, mask)[0], rtol=1e-6)


def test_pointwise_gradients_filler_and_splits(pairs):
    scores, _, mask = pairs
    labels = np.array([1, 0, 0, 0.25, 1, 1, 0], np.float32)
    check_grads(
        lambda x: pointwise_loss(x, labels, mask)[0].value,
        (scores,), order=1, modes=["rev"], atol=1e-3, rtol=1e-2, eps=1e-2,
    )  # fmt: skip
    poisoned = np.where(mask, scores, NAN)
    grads = jax.grad(lambda x: pointwise_loss(x, labels, mask)[0].total)(poisoned)
    np.testing.assert_allclose(grads, np.where(mask, 1 / (1 + np.exp(-scores)) - labels, 0.0), rtol=1e-5)
    parts = [pointwise_loss(*part) for part in split((poisoned, labels, mask), [2, 5])]
    expected = jax.tree.leaves(pointwise_loss(scores, labels, mask))
    np.testing.assert_allclose(add(*parts), expected, rtol=1e-5, atol=1e-6)
