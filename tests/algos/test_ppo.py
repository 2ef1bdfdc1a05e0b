"""PPO's losses against hand-worked vectors and numpy, where their gradients stop, and the peers' averaging faults."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easyrl.algos.ppo import entropy_bonus, policy_loss, value_loss
from easyrl.core.masking import Mean, add_means

NAN = float("nan")
CLIP = {"cliprange_low": 0.2, "cliprange_high": 0.3}


def policy(logprobs, old, advantages, mask=None, **options):
    logprobs, old, advantages = map(jnp.asarray, (logprobs, old, advantages))
    mask = jnp.ones(logprobs.shape, bool) if mask is None else mask
    return policy_loss(logprobs, old, advantages, mask, **(CLIP | options))


def at_ratio(ratio, advantage, **options):
    """Loss and d loss / d logprob of one token at a given ratio."""

    def loss(logprob):
        return policy(logprob[None, None], [[0.0]], [[advantage]], **options)[0].value

    return [float(x) for x in jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))]


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    old, advantages, noise = rng.normal(size=(3, 6, 8)).astype(np.float32)
    old = -np.abs(old)
    mask = np.arange(8) < np.array([8, 5, 1, 3, 7, 2])[:, None]
    return old + 0.5 * noise, old, advantages, mask


# --- policy_loss ---------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # Ratios 1.5, 1.1, 0.5, 2, 0.9 and advantages 1, 2, -1, -1, 3; clip to [0.8, 1.3].
    # max(-1.5, -1.3) = -1.3 (clipped above); -2.2; max(0.5, 0.8) = 0.8 (clipped below); max(2, 1.3) = 2; -2.7.
    # Sum -3.4 over 5 tokens.
    logprobs = jnp.log(jnp.array([[1.5, 1.1, 0.5], [2.0, 0.9, NAN]]))
    advantages = jnp.array([[1.0, 2.0, -1.0], [-1.0, 3.0, NAN]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    loss, metrics = policy(logprobs, jnp.zeros((2, 3)), advantages, mask)
    np.testing.assert_allclose([loss.total, loss.count, loss.value], [-3.4, 5.0, -0.68], rtol=1e-6)
    log_ratios = np.log([1.5, 1.1, 0.5, 2.0, 0.9])
    expected = {
        "clipfrac": 2 / 5,
        "clipfrac_low": 1 / 5,
        "clipfrac_high": 1 / 5,
        "clipfrac_dual": 0.0,
        "ratios_mean": 6.0 / 5,
        "approxkl": np.mean(np.exp(log_ratios) - 1 - log_ratios),
        "policykl": -np.mean(log_ratios),
        "advantages_mean": 4 / 5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-5, err_msg=name)
    # Dual clip at 1.8: the fourth token pays 1.8 instead of 2.
    loss, metrics = policy(logprobs, jnp.zeros((2, 3)), advantages, mask, dual_clip=1.8)
    np.testing.assert_allclose(loss.total, -3.6, rtol=1e-6)
    np.testing.assert_allclose([metrics["clipfrac_dual"].value, metrics["clipfrac"].value], [0.2, 0.6], rtol=1e-6)


def test_the_first_minibatch_has_ratio_1(batch):
    _, old, advantages, mask = batch
    loss, metrics = policy(old, old, advantages, mask, dual_clip=3.0)
    np.testing.assert_allclose(loss.value, -advantages[mask].mean(), rtol=1e-5)
    assert metrics["ratios_mean"].value == 1
    for name in ("clipfrac", "clipfrac_low", "clipfrac_high", "clipfrac_dual", "approxkl", "policykl"):
        assert metrics[name].value == 0
    # ... and its gradient is the plain policy gradient, -advantage per token.
    grads = jax.grad(lambda x: policy(x, old, advantages, mask)[0].total)(old)
    np.testing.assert_allclose(grads, np.where(mask, -advantages, 0.0), rtol=1e-6)


@pytest.mark.parametrize("dual_clip", [0.0, 1.5])
def test_policy_loss_equals_numpy(batch, dual_clip):
    logprobs, old, advantages, mask = batch
    ratio = np.exp(logprobs - old)
    losses = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.3))
    if dual_clip:
        losses = np.where(advantages < 0, np.minimum(losses, -advantages * dual_clip), losses)
    loss, metrics = policy(*batch, dual_clip=dual_clip)
    np.testing.assert_allclose(loss.value, losses[mask].mean(), rtol=1e-5)
    parts = [metrics["clipfrac_" + part].total for part in ("low", "high", "dual")]
    assert metrics["clipfrac"].total == sum(parts)
    assert parts[0] > 0 and parts[1] > 0 and bool(parts[2]) == bool(dual_clip)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "grad"),
    [
        (1.1, 2.0, 0.0, -2.2, -2.2),  # inside the range: d(-A r)/d logp = -A r
        (1.5, 2.0, 0.0, -2.6, 0.0),  # good and likely enough: no further push
        (0.5, 2.0, 0.0, -1.0, -1.0),  # good but unlikely: pushed up, the clip does not act
        (0.5, -2.0, 0.0, 1.6, 0.0),  # bad and unlikely enough: no further push
        (1.5, -2.0, 0.0, 3.0, 3.0),  # bad but likely: pushed down, unboundedly ...
        (9.0, -2.0, 0.0, 18.0, 18.0),
        (9.0, -2.0, 3.0, 6.0, 0.0),  # ... until the dual clip gives it up
        (9.0, 2.0, 3.0, -2.6, 0.0),  # the dual clip leaves good tokens alone
    ],
)
def test_where_the_gradient_stops(ratio, advantage, dual_clip, loss, grad):
    np.testing.assert_allclose(at_ratio(ratio, advantage, dual_clip=dual_clip), [loss, grad], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("log_ratio", "advantage"), [(500.0, 1.0), (500.0, -1.0), (-500.0, 1.0), (-500.0, -1.0)])
def test_absurd_ratios_stay_finite(log_ratio, advantage):
    grad = jax.grad(lambda x: policy(x, [[0.0]], [[advantage]], dual_clip=3.0)[0].total)(jnp.array([[log_ratio]]))
    assert np.isfinite(grad).all()


def test_only_logprobs_get_a_gradient(batch):
    mask = batch[3]
    grads = jax.grad(lambda *x: policy(*x, mask)[0].total, argnums=(0, 1, 2))(*batch[:3])
    assert np.any(grads[0]) and not np.any(grads[1]) and not np.any(grads[2])
    grads = jax.grad(lambda *x: policy(*x, mask)[1]["approxkl"].total)(*batch[:3])
    assert not np.any(grads)


def test_policy_gradient_check(batch):
    _, old, advantages, mask = batch
    # Away from the kinks at 0.8 and 1.3, where finite differences mean nothing.
    ratio = np.where(np.arange(8) % 2, 1.1, 2.0).astype(np.float32)
    check_grads(
        lambda x: policy(x, old, advantages, mask, dual_clip=3.0)[0].value, (old + np.log(ratio),),
        order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-2,
    )  # fmt: skip


def poison(mask, *arrays):
    return [np.where(mask, x, NAN) for x in arrays]


def test_padding_is_not_read(batch):
    *arrays, mask = batch
    expected = policy(*batch)
    np.testing.assert_array_equal(jax.tree.leaves(policy(*poison(mask, *arrays), mask)), jax.tree.leaves(expected))
    wide = [np.pad(x, ((0, 2), (0, 5))) for x in batch]
    np.testing.assert_allclose(jax.tree.leaves(policy(*wide)), jax.tree.leaves(expected), rtol=1e-5)
    grads = jax.grad(lambda x, *rest: policy(x, *rest, mask)[0].total)(*poison(mask, *arrays))
    np.testing.assert_array_equal(grads, jax.grad(lambda x, *rest: policy(x, *rest, mask)[0].total)(*arrays))


@pytest.mark.parametrize("splits", [[3], [1, 2, 5], [5]])
def test_any_split_into_micro_batches_adds_up(batch, splits):
    """Regression: means of micro-batch means weigh a token by how short its micro-batch is."""
    whole = policy(*batch)
    parts = [policy(*part) for part in zip(*[np.split(x, splits) for x in batch], strict=True)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    np.testing.assert_allclose(jax.tree.leaves(total), jax.tree.leaves(whole), rtol=1e-5)
    assert isinstance(total[0], Mean)
    wrong = np.mean([part[0].value for part in parts])
    assert abs(wrong - whole[0].value) > 1e-3


def test_any_order_gives_the_same(batch):
    rows = np.array([4, 2, 0, 5, 1, 3])
    np.testing.assert_allclose(
        jax.tree.leaves(policy(*[x[rows] for x in batch])), jax.tree.leaves(policy(*batch)), rtol=1e-5
    )


def test_approxkl_is_not_averaged_over_padding():
    """Regression: the same two live tokens in a row of 2 or of 200 have the same KL."""
    logprobs, old = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.5]])
    narrow = policy(logprobs, old, logprobs)[1]["approxkl"].value
    pad = ((0, 0), (0, 198))
    mask = jnp.arange(200)[None] < 2
    wide = policy(jnp.pad(logprobs, pad), jnp.pad(old, pad, constant_values=7.0), jnp.zeros((1, 200)), mask)[1]
    np.testing.assert_allclose(wide["approxkl"].value, narrow, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cliprange_low": 0.0}, "0 < cliprange_low <= 1"),
        ({"cliprange_low": 1.5}, "found 1.5 and 0.3"),
        ({"cliprange_high": 0.0}, "cliprange_high > 0"),
        ({"cliprange_high": NAN}, "cliprange_high > 0"),
        ({"dual_clip": 1.0}, "dual_clip must be 0"),
        ({"dual_clip": -3.0}, "found -3.0"),
        ({"dual_clip": NAN}, "dual_clip must be 0"),
    ],
)
def test_policy_loss_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        policy([[0.0]], [[0.0]], [[1.0]], **options)


# --- value_loss ----------------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    # Old value 1, clip 0.5, so values are held to [0.5, 1.5]; return 2.
    # v = 1.2: (1.2 - 2)^2 = 0.64, clip idle. v = 3: error 1, clipped to 1.5: 0.25, the larger stays: 1.
    # v = 1.9: error 0.01, clipped to 1.5: 0.25, the clip acts. Sum of halves: (0.64 + 1 + 0.25) / 2 = 0.945.
    values = jnp.array([[1.2, 3.0, 1.9, NAN]])
    ones, mask = jnp.ones((1, 4)), jnp.array([[True, True, True, False]])
    loss, metrics = value_loss(values, ones, 2 * ones, mask, cliprange_value=0.5)
    np.testing.assert_allclose([loss.total, loss.count], [0.945, 3.0], rtol=1e-6)
    for name, expected in {"clipfrac": 1 / 3, "error": 1.65 / 3, "vpred": 6.1 / 3}.items():
        np.testing.assert_allclose(metrics[name].value, expected, rtol=1e-6, err_msg=name)
    grads = jax.grad(lambda v: value_loss(v, ones, 2 * ones, mask, cliprange_value=0.5)[0].total)(values)
    np.testing.assert_allclose(grads, [[-0.8, 1.0, 0.0, 0.0]], rtol=1e-6)


def test_value_loss_equals_numpy_and_adds_up(batch):
    values, old, returns, mask = batch
    clipped = old + np.clip(values - old, -0.2, 0.2)
    losses = 0.5 * np.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    whole = value_loss(*batch, cliprange_value=0.2)
    np.testing.assert_allclose(whole[0].value, losses[mask].mean(), rtol=1e-5)
    parts = [value_loss(*part, cliprange_value=0.2) for part in zip(*[np.split(x, [1, 4]) for x in batch], strict=True)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    np.testing.assert_allclose(jax.tree.leaves(total), jax.tree.leaves(whole), rtol=1e-5)


def test_an_infinite_value_clip_is_half_the_squared_error(batch):
    values, _, returns, mask = batch
    loss, metrics = value_loss(*batch, cliprange_value=math.inf)
    np.testing.assert_allclose(loss.value, 0.5 * np.mean((values - returns)[mask] ** 2), rtol=1e-5)
    assert metrics["clipfrac"].value == 0


def test_value_gradients(batch):
    values, old, returns, mask = batch
    check_grads(
        lambda v: value_loss(v, old, returns, mask, cliprange_value=2.5)[0].value, (values,),
        order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-2,
    )  # fmt: skip
    poisoned = [*poison(mask, values, old, returns), mask]
    grads = jax.grad(lambda *x: value_loss(*x, mask, cliprange_value=0.2)[0].total, argnums=(0, 1, 2))(*poisoned[:3])
    assert np.isfinite(grads[0]).all() and not np.any(grads[0][~mask]) and not np.any(grads[1]) and not np.any(grads[2])


@pytest.mark.parametrize("cliprange_value", [0.0, -0.2, NAN])
def test_value_loss_refuses(cliprange_value):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="cliprange_value must be positive"):
        value_loss(x, x, x, x == 0, cliprange_value=cliprange_value)


# --- entropy_bonus -------------------------------------------------------------------------------------------------


def test_entropy_is_not_averaged_over_padding():
    """Regression: 2 live tokens of ln 4 and ln 2 nats, mean 1.5 ln 2, however much padding follows."""
    entropy = jnp.full((2, 50), NAN).at[0, :2].set(jnp.log(jnp.array([4.0, 2.0])))
    bonus = entropy_bonus(entropy, jnp.isfinite(entropy))
    np.testing.assert_allclose([bonus.value, bonus.count], [1.5 * np.log(2), 2.0], rtol=1e-6)
    parts = [entropy_bonus(row[None], jnp.isfinite(row)[None]) for row in entropy]
    np.testing.assert_allclose(add_means(*parts).value, bonus.value)
