"""Rewards per token, GAE, whitening and explained variance against hand-worked vectors, numpy loops and relations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easyrl.algos.advantages import explained_variance, gae, last_position, token_rewards, whiten

NAN = float("nan")


def bools(*rows):
    return jnp.array(rows, dtype=bool)


def loop_gae(rewards, values, mask, gamma, lam):
    """The definition, one entry at a time in float64: A_t = sum_l (gamma lam)^l delta_{t+l} up to the segment's end."""
    advantages = np.zeros(rewards.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        end = t
        while end < mask.shape[1] and mask[b, end]:
            end += 1
        for s in range(t, end):
            next_value = values[b, s + 1] if s + 1 < end else 0.0
            advantages[b, t] += (gamma * lam) ** (s - t) * (rewards[b, s] + gamma * next_value - values[b, s])
    return advantages, np.where(mask, advantages + values, 0.0)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 9)).astype(np.float32)
    mask = np.zeros((3, 9), bool)
    mask[0, 2:7] = True  # prompt, response, padding
    mask[1, 0:9] = True  # nothing masked
    mask[2, 1:3] = mask[2, 5:9] = True  # two responses packed in a row
    return rewards, values, mask


# --- token_rewards -------------------------------------------------------------------------------------------------


def test_last_position():
    mask = bools([0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0])
    expected = bools([0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0])
    np.testing.assert_array_equal(last_position(mask), expected)


def test_token_rewards_by_hand():
    # Row 0: -0.1 * [1, 2] on the two response tokens, score 5 added to the second: [-0.1, 4.8].
    # Row 1: one response token, -0.1 * 3 - 2 = -2.3.
    kl = jnp.array([[NAN, 1.0, 2.0, NAN], [3.0, NAN, NAN, NAN]])
    mask = bools([0, 1, 1, 0], [1, 0, 0, 0])
    rewards = token_rewards(jnp.array([5.0, -2.0]), kl, mask, kl_coef=0.1)
    np.testing.assert_allclose(rewards, [[0.0, -0.1, 4.8, 0.0], [-2.3, 0.0, 0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("kl_dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_a_score_of_0_7_does_not_become_0(kl_dtype):
    """Regression: a reward tensor made with zeros_like(token_ids) is integer and truncates the score."""
    mask = bools([0, 1, 1, 0])
    rewards = token_rewards(jnp.array([0.7]), jnp.zeros((1, 4), kl_dtype), mask, kl_coef=0.05)
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[0.0, 0.0, 0.7, 0.0]], rtol=1e-6)


def test_integer_scores_are_floats_too():
    rewards = token_rewards(jnp.array([3]), jnp.full((1, 2), 0.5), bools([1, 1]), kl_coef=0.1)
    np.testing.assert_allclose(rewards, [[-0.05, 2.95]], rtol=1e-6)


def test_the_score_sits_on_the_token_that_ended_the_response():
    """Regression: not one slot after it. mask[t] is about tokens[t+1], so the reward for end-of-text sits at t = 4."""
    end_of_text, pad = 2, 0
    tokens = np.array([11, 12, 13, 21, 22, end_of_text, pad, pad])  # prompt of 3, response of 3
    mask = bools([0, 0, 1, 1, 1, 0, 0, 0])
    rewards = np.asarray(token_rewards(jnp.array([1.0]), jnp.zeros((1, 8)), mask, kl_coef=0.1))[0]
    (slot,) = np.nonzero(rewards)[0]
    assert tokens[slot + 1] == end_of_text


def test_a_row_without_response_gets_nothing():
    rewards = token_rewards(jnp.array([NAN, 1.0]), jnp.zeros((2, 2)), bools([0, 0], [0, 1]), kl_coef=0.1)
    np.testing.assert_array_equal(rewards, [[0.0, 0.0], [0.0, 1.0]])


# --- gae -----------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # gamma = 0.9, lam = 0.5, so gamma * lam = 0.45; three live steps, r = [1, 0, 2], V = [0.5, 1, 1.5].
    # delta_2 = 2 - 1.5 = 0.5;  delta_1 = 0 + 0.9 * 1.5 - 1 = 0.35;  delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4
    # A_2 = 0.5;  A_1 = 0.35 + 0.45 * 0.5 = 0.575;  A_0 = 1.4 + 0.45 * 0.575 = 1.65875
    rewards = jnp.array([[NAN, 1.0, 0.0, 2.0, NAN]])
    values = jnp.array([[NAN, 0.5, 1.0, 1.5, NAN]])
    advantages, returns = gae(rewards, values, bools([0, 1, 1, 1, 0]), 0.9, 0.5)
    np.testing.assert_allclose(advantages, [[0, 1.65875, 0.575, 0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0, 2.15875, 1.575, 2.0, 0]], rtol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0), (0.0, 0.7)])
def test_gae_equals_the_definition(batch, gamma, lam):
    for got, expected in zip(gae(*map(jnp.array, batch), gamma, lam), loop_gae(*batch, gamma, lam), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert not np.any(np.asarray(got)[~batch[2]])


def test_lam_1_is_monte_carlo_minus_value(batch):
    rewards, values, mask = batch
    gamma = 0.9
    _, returns = gae(*map(jnp.array, batch), gamma, 1.0)
    b, start, end = 0, 2, 7
    expected = [sum(gamma ** (s - t) * rewards[b, s] for s in range(t, end)) for t in range(start, end)]
    np.testing.assert_allclose(returns[b, start:end], expected, rtol=1e-5, atol=1e-6)
    # ... whatever the values are.
    np.testing.assert_allclose(gae(rewards, values * -7 + 3, mask, gamma, 1.0)[1], returns, rtol=1e-4, atol=1e-5)


def test_lam_0_is_the_td_error(batch):
    rewards, values, _ = batch
    advantages, _ = gae(*map(jnp.array, batch), 0.9, 0.0)
    expected = rewards[1] + 0.9 * np.append(values[1, 1:], 0.0) - values[1]
    np.testing.assert_allclose(advantages[1], expected, rtol=1e-5, atol=1e-6)


def test_gamma_0_is_reward_minus_value(batch):
    rewards, values, mask = batch
    advantages, _ = gae(*map(jnp.array, batch), 0.0, 0.95)
    np.testing.assert_allclose(advantages, np.where(mask, rewards - values, 0.0), rtol=1e-6)


def test_exact_values_leave_no_advantage():
    # The value of a state is the return from it: with gamma = 1 and r = [1, 2, 3], V = [6, 5, 3].
    advantages, _ = gae(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[6.0, 5.0, 3.0]]), bools([1, 1, 1]), 1.0, 0.95)
    np.testing.assert_allclose(advantages, np.zeros((1, 3)), atol=1e-6)


def test_a_packed_row_equals_separate_rows(batch):
    rewards, values, mask = batch
    packed, _ = gae(*map(jnp.array, batch), 0.9, 0.95)
    for segment in (slice(1, 3), slice(5, 9)):
        alone, _ = gae(rewards[2:, segment], values[2:, segment], mask[2:, segment], 0.9, 0.95)
        np.testing.assert_allclose(packed[2, segment], alone[0], rtol=1e-6)


def test_padding_order_and_nans_do_not_matter(batch):
    rewards, values, mask = batch
    expected = np.stack(gae(*map(jnp.array, batch), 0.9, 0.95))
    wide = [np.pad(x, ((0, 0), (2, 3))) for x in batch]
    wide[0][~wide[2]] = wide[1][~wide[2]] = NAN
    got = np.stack(gae(*map(jnp.array, wide), 0.9, 0.95))
    np.testing.assert_array_equal(got[:, :, 2:-3], expected)
    order = np.array([2, 0, 1])
    np.testing.assert_array_equal(gae(rewards[order], values[order], mask[order], 0.9, 0.95)[0], expected[0][order])


def test_gae_gradients(batch):
    rewards, values, mask = batch
    check_grads(lambda r, v: gae(r, v, mask, 0.9, 0.95), (rewards, values), order=1, modes=["rev"], rtol=1e-2)
    poisoned = np.where(mask, values, NAN)
    grads = jax.grad(lambda v: jnp.sum(jnp.square(gae(rewards, v, mask, 0.9, 0.95)[0])))(poisoned)
    assert np.all(np.isfinite(grads)) and not np.any(np.asarray(grads)[~mask])


# --- whiten --------------------------------------------------------------------------------------------------------


def test_whiten_by_hand():
    # 1, 2, 3, 6: mean 3, squared deviations 4 + 1 + 0 + 9 = 14.
    x, mask = jnp.array([[1.0, NAN, 2.0], [3.0, 6.0, NAN]]), bools([1, 0, 1], [1, 1, 0])
    deviations = np.array([[-2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    np.testing.assert_allclose(whiten(x, mask), deviations / np.sqrt(14 / 3), rtol=1e-6)
    shifted = whiten(x, mask, shift_mean=False)
    np.testing.assert_allclose(shifted, np.where(mask, deviations / np.sqrt(14 / 3) + 3, 0.0), rtol=1e-6)


def test_whiten_far_from_zero_keeps_its_digits():
    x = 1e4 + np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(whiten(x, x > 0), whiten(x - 1e4, x > 0), rtol=1e-5)


def test_whiten_degenerate_batches_are_finite():
    mask = bools([1, 0, 0])
    np.testing.assert_array_equal(whiten(jnp.array([[5.0, NAN, NAN]]), mask), [[0, 0, 0]])
    np.testing.assert_array_equal(whiten(jnp.full((1, 3), 5.0), ~mask), [[0, 0, 0]])
    np.testing.assert_array_equal(whiten(jnp.full((1, 3), NAN), mask & False), [[0, 0, 0]])


def test_whiten_ignores_layout_and_scale(batch):
    x, _, mask = batch
    expected = np.asarray(whiten(x, mask))
    live = expected[mask]
    np.testing.assert_allclose([live.mean(), live.std(ddof=1)], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(whiten(x * 5 - 2, mask), expected, rtol=1e-4, atol=1e-6)
    # One row or many, in any order, with any padding: the statistics belong to the batch.
    np.testing.assert_allclose(whiten(x.reshape(1, -1), mask.reshape(1, -1))[0], expected.ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whiten(x[::-1], mask[::-1]), expected[::-1], rtol=1e-5, atol=1e-6)


# --- explained_variance --------------------------------------------------------------------------------------------


def test_explained_variance_by_hand():
    # Returns 1, 2, 3 (deviations -1, 0, 1: sum of squares 2); values 1, 2, 2 leave errors 0, 0, 1, mean 1/3,
    # squared deviations 1/9 + 1/9 + 4/9 = 2/3. Explained: 1 - (2/3) / 2 = 2/3.
    returns, values = jnp.array([[1.0, 2.0, 3.0, NAN]]), jnp.array([[1.0, 2.0, 2.0, NAN]])
    pair = explained_variance(values, returns, bools([1, 1, 1, 0]))
    np.testing.assert_allclose([pair.total, pair.count, pair.value], [4 / 3, 2.0, 2 / 3], rtol=1e-6)


def test_explained_variance_limits(batch):
    returns, values, mask = map(jnp.array, batch)
    np.testing.assert_allclose(explained_variance(returns, returns, mask).value, 1.0)
    np.testing.assert_allclose(explained_variance(returns + 4, returns, mask).value, 1.0, rtol=1e-5)  # bias is free
    np.testing.assert_allclose(explained_variance(jnp.zeros_like(values), returns, mask).value, 0.0, atol=1e-6)
    assert explained_variance(-returns, returns, mask).value < -2
    assert explained_variance(values, jnp.ones_like(returns), mask).value == 0
    r, e = batch[0][batch[2]], (batch[0] - batch[1])[batch[2]]
    np.testing.assert_allclose(explained_variance(values, returns, mask).value, 1 - e.var() / r.var(), rtol=1e-5)
