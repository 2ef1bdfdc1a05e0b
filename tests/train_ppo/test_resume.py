"""A run of PPO that broke off and went on is the run that never did."""

import json
import shutil

import jax
import numpy as np
import pytest

from easyrl import train_ppo
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.hf.refs import load_model
from tests.offline import die
from tests.train_ppo.conftest import Result

# Everything that a run remembers from step to step is in use: both optimizers, the KL coefficient, reward moments.
FLAGS = {
    "num_epochs": 2, "kl_target": 0.5, "kl_horizon": 16, "normalize_rewards": True, "lr_schedule": "linear",
    "save_model_freq": 1, "eval_freq": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(materials):
    return FLAGS | {"eval_dataset__path": materials.prompts, "eval_dataset__split": "[:8]"}


@pytest.fixture(scope="module")
def unbroken(run, flags):
    return run(**flags)


def assert_identical(result: Result, expected: Result) -> None:
    assert result.metrics == expected.metrics
    assert result.samples == expected.samples
    for folder in ("hf", "hf_value"):
        weights, expected_weights = result.weights(folder), expected.weights(folder)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected_weights[name], err_msg=f"{folder} {name}")


@pytest.fixture(scope="module")
def broken(run, flags):
    """A run that broke off after step 2."""
    broken = run(**flags, dies_before=3)
    assert [row["step"] for row in broken.metrics] == [0, 1, 2]
    assert not (broken.path / "hf").exists()
    return broken


def test_bit_for_bit(run, flags, unbroken, broken, tmp_path):
    folder = shutil.copytree(broken.path, tmp_path / "run")
    assert_identical(run(**flags, output_dir=folder), unbroken)
    assert not list(folder.glob("*.1.*"))


def test_a_step_is_not_saved_before_its_model_is_there(run, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ppo, "export_model", die)
    run(**flags, output_dir=tmp_path, export_freq=2)
    assert [path.parent.name for path in tmp_path.glob("checkpoints/*/run.json")] == ["1"]


def test_with_other_weights_of_frozen_models_it_is_refused(run, flags, broken, tmp_path):
    folder = shutil.copytree(broken.path, tmp_path / "run")
    path = folder / "checkpoints" / "2" / "run.json"
    facts = json.loads(path.read_text())
    assert facts["frozen"].keys() == {"load_checkpoint_policy", "load_checkpoint_reward"}  # the first is the reference
    path.write_text(json.dumps(facts | {"frozen": dict.fromkeys(facts["frozen"], "others")}))
    with pytest.raises(UserError, match=r"_policy=\S+ has other weights now; --load_checkpoint_reward=\S+ has other"):
        run(**flags, output_dir=folder)


def test_with_another_kl_coefficient_it_goes_on_from_that(run, flags, broken, tmp_path):
    folder = shutil.copytree(broken.path, tmp_path / "run")
    result = run(**flags, output_dir=folder, kl_coef=5, allow_config_change="kl_coef")
    before, after = (result.metrics[step]["objective/kl_coef"] for step in (2, 3))
    assert before < 0.1 and after == 5


def test_on_eight_devices_to_1e_5(run, flags, unbroken, broken, tmp_path, capfd):
    folder = shutil.copytree(broken.path, tmp_path / "run")
    result = run(**flags, output_dir=folder, num_devices=8, mesh_dim="1,8,1")
    assert "--mini_batch_size=4: of the 8 parts that dp x fsdp of --mesh_dim=1,8,1 makes" in capfd.readouterr().err
    for row, expected in zip(result.metrics, unbroken.metrics, strict=True):
        for name in row.keys() - {"tokens/padding_share"}:  # about how rows lie on devices
            np.testing.assert_allclose(row[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=name)
    for folder in ("hf", "hf_value"):
        for name, weight in result.weights(folder).items():
            np.testing.assert_allclose(weight, unbroken.weights(folder)[name], atol=1e-5, err_msg=f"{folder} {name}")


def test_policy_and_value_model_can_be_taken_from_a_checkpoint(unbroken):
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    for head, folder in (("lm", "hf"), ("value", "hf_value")):
        saved, exported = (
            load_model(ref, mesh, head=head).params
            for ref in (f"easyrl::{unbroken.path}", f"hf::{unbroken.path / folder}")
        )
        jax.tree.map(np.testing.assert_array_equal, saved, exported)
    with pytest.raises(UserError, match="holds a model without the head of a reward model"):
        load_model(f"easyrl::{unbroken.path}", mesh, head="reward")
