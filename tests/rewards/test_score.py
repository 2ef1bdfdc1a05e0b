import numpy as np
import pytest

from easyrl.rewards.score import score_responses
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


def test_a_batch_without_a_kept_response_has_finite_metrics(batch_of):
    config = RewardConfig(missing_eos="mask")
    sources = [constant("a", 1.0), constant("b", 1.0)]
    scored, _ = score_responses(batch_of("x", ended=[False]), sources, (1.0, 1.0), config, RunningMoments())
    assert np.isfinite(list(scored.metrics.values())).all()


def test_sources_of_one_name_are_told_apart(batch_of):
    sources = [constant("rm", 1.0), constant("rm", 2.0), constant("rm", 3.0)]
    scored, _ = score_responses(batch_of("x"), sources, (1.0,) * 3, RewardConfig(), RunningMoments())
    named = {name: value for name, value in scored.metrics.items() if name.startswith("env/reward/")}
    assert named == {"env/reward/rm": 1.0, "env/reward/rm2": 2.0, "env/reward/rm3": 3.0}
