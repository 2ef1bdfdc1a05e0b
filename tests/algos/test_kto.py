"""KTO against a hand-worked batch and numpy, its reference point, gradients, filler and splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easyrl.algos.kto import kto_baseline, kto_loss

NAN = float("nan")


def s(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def batch():
    rng = np.random.default_rng(4)
    logprobs = -rng.uniform(2, 20, size=7).astype(np.float32)
    ref = logprobs + 2 * rng.normal(size=7).astype(np.float32)
    return logprobs, ref, np.array([1, 0, 1, 0, 0, 1, 1], bool), np.array([1, 1, 1, 0, 1, 1, 0], bool)


def test_by_hand():
    # beta 0.5, z0 = 1. Desirable, r = 3: weight 2 * (1 - s(0.5 * 2)) = 2 * 0.2689414 = 0.5378828.
    # Undesirable, r = -1: 1 - s(0.5 * (1 + 1)) = 0.2689414.
    logprobs, ref = jnp.array([-4.0, -6.0, NAN]), jnp.array([-7.0, -5.0, NAN])
    desirable, mask = jnp.array([True, False, True]), jnp.array([True, True, False])
    loss, metrics = kto_loss(logprobs, ref, desirable, mask, 1.0, beta=0.5, desirable_weight=2.0)
    np.testing.assert_allclose(loss, [0.5378828 + 0.2689414, 2.0], rtol=1e-6)
    expected = {
        "rewards/chosen": 1.5,
        "rewards/rejected": -0.5,
        "logps/chosen": -4.0,
        "logps/rejected": -6.0,
        "kl": 1.0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-6, err_msg=name)
    assert metrics["rewards/chosen"].count == metrics["rewards/rejected"].count == 1


@pytest.mark.parametrize("baseline", [0.7, 0.0, -0.7])
def test_equals_numpy(batch, baseline):
    logprobs, ref, desirable, mask = batch
    r, z0 = logprobs - ref, max(baseline, 0.0)
    losses = np.where(desirable, 1.5 * (1 - s(0.3 * (r - z0))), 0.8 * (1 - s(0.3 * (z0 - r))))
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    loss, metrics = kto_loss(*batch, baseline, **options)
    np.testing.assert_allclose(loss.value, losses[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"].value, z0, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"].value, 0.3 * r[mask & desirable].mean(), rtol=1e-5)


def test_gradients(batch):
    logprobs, ref, desirable, mask = batch
    check_grads(
        lambda x: kto_loss(x, ref, desirable, mask, 0.5, beta=0.3)[0].value,
        (logprobs,), order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-2,
    )  # fmt: skip
    grads = jax.grad(lambda x: kto_loss(x, ref, desirable, mask, 0.5, beta=0.3)[0].total)(logprobs)
    assert np.all(grads[mask & desirable] < 0) and np.all(grads[mask & ~desirable] > 0)
    # The reference point steers, but is not trained.
    assert jax.grad(lambda z: kto_loss(*batch, z, beta=0.3)[0].total)(0.5) == 0


def test_at_the_reference_every_answer_costs_a_half(batch):
    logprobs, _, desirable, mask = batch
    loss, metrics = kto_loss(logprobs, logprobs, desirable, mask, 0.0, beta=0.3)
    np.testing.assert_allclose(loss.value, 0.5)
    assert metrics["rewards/chosen"].value == 0


def test_a_weight_of_0_switches_one_side_off(batch):
    logprobs, ref, desirable, mask = batch
    grads = jax.grad(
        lambda x: kto_loss(x, ref, desirable, mask, 0.0, beta=0.3, undesirable_weight=0.0)[0].total
    )(logprobs)  # fmt: skip
    assert np.any(grads) and not np.any(grads[~desirable])


def test_baseline_by_hand_and_in_parts():
    # Log-ratios 1, -4 and 6 of mismatched answers: mean 1, though the parts' own means, held at 0, would be 0 and 6.
    logprobs, ref, mask = jnp.array([-3.0, -9.0, -1.0, NAN]), jnp.array([-4.0, -5.0, -7.0, 0.0]), jnp.arange(4) < 3
    whole = kto_baseline(logprobs, ref, mask)
    np.testing.assert_allclose([whole.total, whole.count, whole.value], [3.0, 3.0, 1.0])
    parts = [kto_baseline(logprobs[i], ref[i], mask[i]) for i in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(jax.tree.map(lambda a, b: a + b, *parts), whole)
    assert not np.any(jax.grad(lambda x: kto_baseline(x, ref, mask).total)(logprobs))


def test_filler_order_and_splits(batch):
    logprobs, ref, desirable, mask = batch
    expected = jax.tree.leaves(kto_loss(*batch, 0.4, beta=0.3))
    poisoned = [np.where(mask, x, NAN) for x in (logprobs, ref)]
    np.testing.assert_array_equal(jax.tree.leaves(kto_loss(*poisoned, desirable, mask, 0.4, beta=0.3)), expected)
    grads = jax.grad(lambda x: kto_loss(x, poisoned[1], desirable, mask, 0.4, beta=0.3)[0].total)(poisoned[0])
    assert np.isfinite(grads).all() and not np.any(grads[~mask])
    order = np.array([5, 0, 6, 2, 1, 4, 3])
    shuffled = kto_loss(*[x[order] for x in batch], 0.4, beta=0.3)
    np.testing.assert_allclose(jax.tree.leaves(shuffled), expected, rtol=1e-5, atol=1e-6)
    parts = [kto_loss(*part, 0.4, beta=0.3) for part in zip(*[np.split(x, [3]) for x in batch], strict=True)]
    total = jax.tree.leaves(jax.tree.map(lambda a, b: a + b, *parts))
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": NAN}, {"desirable_weight": -1.0}, {"undesirable_weight": NAN}]
)
def test_refusals(batch, options):
    with pytest.raises(ValueError, match=r"must be positive|must not be negative"):
        kto_loss(*batch, 0.0, **({"beta": 0.1} | options))
