"""PPO with numbers that are not finite: an update less, or the end of the run, and always a word about it."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyrl.core.errors import RunFailed
from easyrl.runtime.flight import PPOBatch
from easyrl.runtime.recording import as_tree, load_recording
from tests.train_ppo.conftest import write_model

NOT_FINITE = ("ppo/not_finite", "ppo/policy/not_finite", "ppo/val/not_finite")


def poisoned(folder, tensor, row=0):
    """The folder of an exported model, one number of one tensor now NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][row] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_bad_reward_costs_one_step_and_nothing_else(run, materials, capsys):
    result = run(
        load_checkpoint_reward="", reward_function=f"{materials.functions}:vowels,{materials.functions}:once_infinite",
        max_steps_per_epoch=3, export_freq=1, normalize_rewards=True,
    )  # fmt: skip
    first, second, third = result.metrics
    assert [second[name] for name in NOT_FINITE] == [1, 1, 1]
    assert [row[name] for row in (first, third) for name in NOT_FINITE] == [0] * 6
    assert second["env/reward_mean"] is None and second["ppo/loss/policy"] is None
    assert None not in third.values()
    for model in ("hf-1", "hf"):
        assert all(np.isfinite(weights).all() for weights in result.weights(model).values())
    same = [np.array_equal(result.weights("hf-1")[name], result.weights("hf-2")[name]) for name in result.weights()]
    assert all(same) and not np.array_equal(
        result.weights("hf-2")["lm_head.weight"], result.weights()["lm_head.weight"]
    )
    errors = capsys.readouterr().err
    assert "step 2: an update was left out: reward once_infinite of response 5 is 1e+39" in errors
    assert "1 of the run's steps left out an update" in errors


def test_a_reward_that_stays_bad_ends_the_run_with_the_batch_kept(run, materials, tmp_path):
    with pytest.raises(RunFailed) as caught:
        run(
            load_checkpoint_reward="", reward_function=f"{materials.functions}:nan", max_steps_per_epoch=5,
            max_bad_steps=1, output_dir=tmp_path,
        )  # fmt: skip
    path = tmp_path / "rollouts" / "step-2.safetensors"
    assert str(caught.value).startswith("step 2: stopped, as more steps in a row than --max_bad_steps=1 had")
    assert "reward nan of response 7 is nan" in str(caught.value) and str(path) in str(caught.value)
    arrays, facts = load_recording(path)
    rollout = as_tree(PPOBatch, arrays).rollout
    assert np.isnan(rollout.scores).tolist() == [False] * 7 + [True] and not rollout.finite
    assert facts["step"] == 2 and facts["config"]["max_bad_steps"] == 1 and facts["metrics"]["ppo/not_finite"] == 1


@pytest.mark.parametrize(
    ("flag", "head", "tensor", "said"),
    [
        ("policy", "lm", "model.norm.weight", "weights of the policy: final_norm; the policy's log-prob of responses"),
        ("value", "value", "score.weight", "weights of the value model: head/"),
        ("reference", "lm", "model.norm.weight", "the reference's log-prob of responses 0, 1, 2, 3, 4 and 3 more"),
        ("reward", "reward", "score.weight", "reward reward of response 0 is nan"),
    ],
)
def test_bad_weights_are_named_with_the_model_and_its_term(flag, head, tensor, said, run, tmp_path, materials):
    folder = poisoned(write_model(tmp_path / flag, head), tensor)
    flags = {f"load_checkpoint_{flag}": f"hf::{folder}", "max_bad_steps": 0, "output_dir": tmp_path / "run"}
    if flag != "value":
        flags["load_checkpoint_value"] = f"hf::{materials.policy}"
    with pytest.raises(RunFailed) as caught:
        run(**flags)
    assert said in str(caught.value)


@pytest.mark.parametrize(("flag", "head", "tensor", "export"), [
    ("policy", "lm", "model.norm.weight", "hf"), ("value", "value", "score.weight", "hf_value"),
])  # fmt: skip
def test_bad_weights_that_a_run_survives_are_not_exported(flag, head, tensor, export, run, tmp_path, materials):
    folder = poisoned(write_model(tmp_path / flag, head), tensor)
    flags = {"load_checkpoint_value": f"hf::{materials.policy}", f"load_checkpoint_{flag}": f"hf::{folder}"}
    with pytest.raises(RunFailed, match=f"/{export}: not exported, as these weights are not finite: "):
        run(**flags, max_steps_per_epoch=1, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / export).exists()


def test_rollouts_are_recorded_when_asked_for(run):
    result = run(record_rollouts=2, max_steps_per_epoch=4)
    assert sorted(path.name for path in (result.path / "rollouts").iterdir()) == [
        "step-2.safetensors",
        "step-4.safetensors",
    ]
    arrays, facts = load_recording(result.path / "rollouts" / "step-4.safetensors")
    batch = as_tree(PPOBatch, arrays)
    row = result.metrics[3]
    assert {name: facts["metrics"][name] for name in row if name != "step"} == {
        name: value for name, value in row.items() if name != "step"
    }
    assert batch.rollout.scores.mean() == pytest.approx(row["ppo/mean_scores"], rel=1e-5)
    np.testing.assert_array_equal(batch.rollout.mask.sum(axis=1), batch.response_lengths)
    np.testing.assert_allclose(
        batch.sampler_logprobs[batch.rollout.mask], batch.rollout.old_logprobs[batch.rollout.mask], atol=1e-4
    )
