import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.rewards.shaping import (
    MissingEos,
    RewardConfig,
    RunningMoments,
    parse_missing_eos,
    parse_weights,
    shape_rewards,
    update_moments,
)

SCORES = np.array([1.0, 2.0, -3.0, 4.0])
ENDED = np.array([True, False, True, False])


def shape(moments=RunningMoments(), **flags):  # noqa: B008 - a tuple
    return shape_rewards(SCORES, ENDED, RewardConfig(**flags), moments)


def test_by_default_a_reward_is_its_score():
    shaped, moments = shape()
    np.testing.assert_array_equal(shaped.rewards, SCORES)
    assert shaped.rewards.dtype == np.float32 and shaped.keep.all()
    assert moments == RunningMoments()


@pytest.mark.parametrize(
    ("rule", "scores", "keep"),
    [
        ("none", [1, 2, -3, 4], [1, 1, 1, 1]),
        ("subtract:0.5", [1, 1.5, -3, 3.5], [1, 1, 1, 1]),
        ("replace:-10", [1, -10, -3, -10], [1, 1, 1, 1]),
        ("mask", [1, 2, -3, 4], [1, 0, 1, 0]),
    ],
)
def test_a_missing_end_of_text(rule, scores, keep):
    shaped, _ = shape(missing_eos=rule)
    np.testing.assert_array_equal(shaped.scores, scores)
    np.testing.assert_array_equal(shaped.rewards, scores)
    np.testing.assert_array_equal(shaped.keep, np.array(keep, bool))


def test_gain_and_bias_come_after_the_missing_end_as_in_easylm():
    shaped, _ = shape(missing_eos="replace:-10", reward_gain=2.0, reward_bias=1.0)
    np.testing.assert_allclose(shaped.rewards, [3.0, -19.0, -5.0, -19.0])
    np.testing.assert_allclose(shaped.scores, [1.0, -10.0, -3.0, -10.0])


def test_the_clip_is_in_units_of_the_score_or_of_its_spread():
    np.testing.assert_allclose(shape(reward_clip=2.0, reward_gain=3.0)[0].rewards, [3.0, 6.0, -6.0, 6.0])
    rewards = shape(reward_clip=0.5, normalize_rewards=True)[0].rewards
    assert rewards.min() == -0.5 and rewards.max() == 0.5


def test_a_fraction_stays_a_fraction():
    """A reward tensor made like token ids would turn 0.7 into 0."""
    shaped, _ = shape_rewards([0, 1], ENDED[:2], RewardConfig(reward_bias=0.7), RunningMoments())
    np.testing.assert_allclose(shaped.rewards, [0.7, 1.7], rtol=1e-6)


def test_normalised_rewards_of_the_first_batch_have_mean_0_and_spread_1():
    shaped, moments = shape(normalize_rewards=True)
    assert shaped.rewards.mean() == pytest.approx(0.0, abs=1e-6)
    assert shaped.rewards.std() == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_array_equal(shaped.scores, SCORES)
    assert moments.seen == 4 and moments.mean == pytest.approx(SCORES.mean())


def test_normalisation_uses_everything_seen_so_far():
    batches = np.random.default_rng(0).normal(5.0, 3.0, size=(6, 8))
    config, moments, ended = RewardConfig(normalize_rewards=True), RunningMoments(), np.ones(8, bool)
    for number, batch in enumerate(batches):
        shaped, moments = shape_rewards(batch, ended, config, moments)
        seen = batches[: number + 1]
        np.testing.assert_allclose(shaped.rewards, (batch - seen.mean()) / seen.std(), rtol=1e-5)


def test_masked_scores_do_not_enter_the_moments():
    _, moments = shape(normalize_rewards=True, missing_eos="mask")
    assert moments.seen == 2 and moments.mean == -1.0
    nothing, moments = shape_rewards(
        SCORES, np.zeros(4, bool), RewardConfig(normalize_rewards=True, missing_eos="mask"), RunningMoments()
    )
    assert moments == RunningMoments() and np.isfinite(nothing.rewards).all()


def test_equal_scores_normalise_to_zero():
    shaped, _ = shape_rewards(np.full(4, 7.0), ENDED, RewardConfig(normalize_rewards=True), RunningMoments())
    np.testing.assert_array_equal(shaped.rewards, np.zeros(4))


def test_moments_do_not_depend_on_how_the_numbers_were_split():
    values = 1e6 + np.random.default_rng(1).normal(size=1000)  # far from 0, where the sum of squares alone would fail
    whole = update_moments(RunningMoments(), values)
    split = RunningMoments()
    for part in np.split(values, [1, 2, 10, 10, 700]):
        split = update_moments(split, part)
    assert whole.mean == pytest.approx(values.mean(), rel=1e-14) and whole.std == pytest.approx(values.std(), rel=1e-9)
    np.testing.assert_allclose(split, whole, rtol=1e-9)


def test_moments_survive_a_checkpoint():
    moments = update_moments(RunningMoments(), SCORES)
    restored = RunningMoments(*np.asarray(moments, np.float64).tolist())
    assert restored == moments and all(type(value) is float for value in moments)


@pytest.mark.parametrize("text", ["none", "mask", "subtract:1", "replace:-10", "replace:1e-3"])
def test_missing_eos_is_read(text):
    rule, _, value = text.partition(":")
    assert parse_missing_eos(text) == MissingEos(rule, float(value or 0))


@pytest.mark.parametrize(
    "text", ["", "None", "subtract", "subtract:-1", "subtract:0", "replace:x", "replace:nan", "mask:1"]
)
def test_a_wrong_missing_eos_is_named_when_the_config_is_read(text):
    with pytest.raises(UserError, match=f"^--missing_eos={text}: expected none, mask"):
        RewardConfig(missing_eos=text)


def test_a_negative_clip_is_refused():
    with pytest.raises(UserError, match=r"^--reward_clip=-1\.0: expected"):
        RewardConfig(reward_clip=-1.0)


def test_weights():
    assert parse_weights(RewardConfig(), 2, 1) == (1.0, 1.0, 1.0)
    assert parse_weights(RewardConfig(reward_weights="1.0, 0.5,-2"), 2, 1) == (1.0, 0.5, -2.0)


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,x", "1,nan", "1,"])
def test_wrong_weights_are_named(text):
    with pytest.raises(UserError, match=f"^--reward_weights={text}: expected 2 numbers .* 1 reward models and 1 func"):
        parse_weights(RewardConfig(reward_weights=text), 1, 1)


def test_no_source_at_all_is_refused():
    with pytest.raises(UserError, match="--load_checkpoint_reward and --reward_function are both empty"):
        parse_weights(RewardConfig(), 0, 0)
