import numpy as np
import pytest

from easyrl.rewards.score import judge_responses, score_responses
from easyrl.rewards.shaping import RewardConfig, RunningMoments
from easyrl.rewards.sources import Source


def constant(name, *values, **metrics):
    return Source(name, lambda batch: (np.array(values, np.float64), metrics))


def test_a_reward_is_the_weighted_sum_of_its_sources(batch_of):
    sources = [constant("rm", 1.0, 2.0, 3.0, x=0.25), constant("f", 10.0, 0.0, 0.0)]
    scored, moments = score_responses(batch_of("a", "b", "c"), sources, (2.0, -0.5), RewardConfig(), RunningMoments())
    np.testing.assert_allclose(scored.rewards, [-3.0, 4.0, 6.0])
    assert moments == RunningMoments()
    assert scored.metrics == {
        "x": 0.25,
        "env/reward_mean": pytest.approx(7 / 3),
        "env/reward_std": pytest.approx(np.std([-3, 4, 6])),
        "env/reward_min": -3.0,
        "env/reward_max": 6.0,
        "env/reward/rm": 2.0,
        "env/reward/f": pytest.approx(10 / 3),
    }


def test_metrics_are_in_units_of_the_sources_and_over_kept_responses(batch_of):
    config = RewardConfig(missing_eos="mask", normalize_rewards=True, reward_gain=5.0)
    batch = batch_of("a", "b", "c", ended=[True, True, False])
    scored, moments = score_responses(batch, [constant("rm", 1.0, 3.0, 100.0)], (1.0,), config, RunningMoments())
    np.testing.assert_allclose(scored.rewards[:2], [-5.0, 5.0])
    assert scored.keep.tolist() == [True, True, False]
    assert scored.metrics["env/reward_mean"] == 2.0 and scored.metrics["env/reward_max"] == 3.0
    assert scored.metrics["env/reward_running_mean"] == moments.mean == 2.0
    assert "env/reward/rm" not in scored.metrics  # it would be env/reward_mean again


def test_a_batch_without_a_kept_response_has_no_reward_to_report(batch_of):
    config = RewardConfig(missing_eos="mask")
    sources = [constant("a", 1.0), constant("b", 1.0)]
    scored, _ = score_responses(batch_of("x", ended=[False]), sources, (1.0, 1.0), config, RunningMoments())
    assert scored.metrics == {} and not scored.keep.any()


def test_sources_of_one_name_are_told_apart(batch_of):
    sources = [constant("rm", 1.0), constant("rm", 2.0), constant("rm", 3.0)]
    scored, _ = score_responses(batch_of("x"), sources, (1.0,) * 3, RewardConfig(), RunningMoments())
    named = {name: value for name, value in scored.metrics.items() if name.startswith("env/reward/")}
    assert named == {"env/reward/rm": 1.0, "env/reward/rm2": 2.0, "env/reward/rm3": 3.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, -1e300])  # float32 ends at 3.4e38
@pytest.mark.parametrize("changes", [{}, {"reward_clip": 1.0}, {"normalize_rewards": True}])
def test_a_score_that_is_not_finite_is_named_and_kept_out_of_the_moments(bad, changes, batch_of):
    sources, config = [constant("rm", 1.0, 2.0, 3.0), constant("f", 0.0, bad, 0.0)], RewardConfig(**changes)
    scored, moments = score_responses(batch_of("a", "b", "c"), sources, (1.0, 0.5), config, RunningMoments())
    assert np.isfinite(scored.rewards).tolist() == [True, False, True]
    assert scored.faults == (f"reward f of response 1 is {bad:g}",)
    assert moments == (RunningMoments(2.0, 2.0, 2.0) if changes.get("normalize_rewards") else RunningMoments())


def test_a_sum_can_be_too_large_though_its_parts_are_not(batch_of):
    sources = [constant("rm", 3e38, 0.0), constant("f", 3e38, 0.0)]
    scored, _ = score_responses(batch_of("a", "b"), sources, (1.0, 1.0), RewardConfig(), RunningMoments())
    assert scored.faults == ("the sum of rewards of response 0 is not finite",)
    gained, _ = score_responses(batch_of("a", "b"), sources[:1], (1.0,), RewardConfig(reward_gain=2), RunningMoments())
    assert not np.isfinite(gained.rewards[0]) and gained.faults == scored.faults


def test_a_score_that_nobody_learns_from_may_be_anything(batch_of):
    batch, sources = batch_of("a", "b", ended=[False, True]), [constant("rm", np.nan, 2.0)]
    for rule, reward in (("mask", None), ("replace:-10", -10.0)):
        scored, _ = score_responses(batch, sources, (1.0,), RewardConfig(missing_eos=rule), RunningMoments())
        assert scored.faults == () and (reward is None or scored.rewards[0] == reward)
        assert np.isfinite(scored.metrics["env/reward_mean"])


@pytest.mark.parametrize("missing_eos", ["none", "mask", "subtract:1.5", "replace:-2"])
def test_judging_is_scoring_without_paying(batch_of, missing_eos):
    batch = batch_of("a", "b", "c", ended=[True, False, True])
    sources = [constant("rm", 1.0, 3.0, 2.0), constant("f", 0.5, 0.0, 0.0)]
    judged = judge_responses(batch, sources, (1.0, 2.0), missing_eos)
    scored, _ = score_responses(batch, sources, (1.0, 2.0), RewardConfig(missing_eos=missing_eos), RunningMoments())
    np.testing.assert_array_equal(judged.scores, scored.scores)
    np.testing.assert_array_equal(judged.keep, scored.keep)
    assert judged.metrics == scored.metrics


def test_a_score_that_is_not_finite_ranks_nothing(batch_of):
    judged = judge_responses(batch_of("a", "b"), [constant("rm", np.nan, 2.0)], (1.0,), "none")
    assert judged.keep.tolist() == [False, True] and judged.metrics["env/reward_mean"] == 2.0
    assert judged.faults == ("reward rm of response 0 is nan",)


def test_a_response_that_several_sources_fail_is_one_fault(batch_of):
    sources = [constant("rm", np.nan, 2.0, 1.0), constant("f", np.inf, -np.inf, 1.0)]
    judged = judge_responses(batch_of("a", "b", "c"), sources, (1.0, 1.0), "none")
    assert judged.keep.tolist() == [False, False, True]
    assert judged.faults == (
        "reward rm of response 0 is nan and reward f of response 0 is inf",
        "reward f of response 1 is -inf",
    )
