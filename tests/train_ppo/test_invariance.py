"""The same iteration, prompts to exported weights, on every mesh and with every micro-batch size."""

import numpy as np
import pytest

ONE_STEP = {"max_steps_per_epoch": 1, "logged_samples": 8, "entropy_coef": 0.01}
LAYOUT = ("tokens/padding_share",)  # the one metric that is about how rows lie on devices


@pytest.fixture(scope="module")
def on_one_device(run):
    return run(micro_batch_size=1, **ONE_STEP)


def assert_same(result, expected):
    assert [sample | {"reward": None} for sample in result.samples] == [
        sample | {"reward": None} for sample in expected.samples
    ]
    (metrics,), (expected_metrics,) = result.metrics, expected.metrics
    assert metrics.keys() == expected_metrics.keys()
    for name in metrics.keys() - LAYOUT:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], atol=1e-5, rtol=1e-5, err_msg=name)
    for folder in ("hf", "hf_value"):
        weights, expected_weights = result.weights(folder), expected.weights(folder)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, expected_weights[name], atol=1e-5, err_msg=f"{folder} {name}")


ALONE = [pytest.param(mesh_dim, marks=pytest.mark.slow) for mesh_dim in ("8,1,1", "1,8,1", "1,1,8")]  # in tests/steps


@pytest.mark.parametrize("mesh_dim", [*ALONE, "2,2,2"])
def test_every_mesh_gives_the_same(mesh_dim, run, on_one_device):
    assert_same(run(num_devices=8, mesh_dim=mesh_dim, **ONE_STEP), on_one_device)


def test_the_samplers_log_probs_give_the_same_whichever_responses_wait(run, on_one_device):
    assert_same(run(old_logprobs="sampler", decode_rows=2, **ONE_STEP), on_one_device)


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_every_micro_batch_size_gives_the_same(micro_batch_size, run, on_one_device):
    assert_same(run(micro_batch_size=micro_batch_size, **ONE_STEP), on_one_device)
