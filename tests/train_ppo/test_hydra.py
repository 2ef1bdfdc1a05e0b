"""A run with --num_layers_unfrozen, from its flags to the exported models."""

import json

import numpy as np
import pytest

from easyrl.core.errors import RunFailed, UserError
from tests.test_replay import start
from tests.train_ppo.conftest import read_tensors, write_model

FROZEN = ("embed_tokens", "layers.0.", "layers.1.")


@pytest.fixture(scope="module")
def policy(materials):
    """A policy of three layers."""
    return write_model(materials.folder / "three_layers", num_layers=3)


@pytest.fixture(scope="module")
def finished(run, policy, tmp_path_factory):
    """A run that broke off after its first step and went on."""
    flags = {
        "load_checkpoint_policy": f"hf::{policy}", "num_layers_unfrozen": 1, "dtype": "bf16", "kl_coef": 0.2,
        "save_model_freq": 1, "record_rollouts": 2, "output_dir": tmp_path_factory.mktemp("run"),
    }  # fmt: skip
    run(**flags, dies_before=2)
    return run(**flags)


def is_frozen(name):
    return any(part in name for part in FROZEN)


def test_only_the_top_moves_and_both_exports_are_whole(finished, policy):
    start = read_tensors(policy)
    for folder in ("hf", "hf_value"):
        weights = finished.weights(folder)
        names = {name for name in start if "lm_head" not in name or folder == "hf"}
        assert weights.keys() == names | ({"score.weight", "score.bias"} if folder == "hf_value" else set())
        assert {str(weight.dtype) for weight in weights.values()} == {"float32"}
        for name in names:
            if is_frozen(name):  # held, and so written, to the digits of --dtype
                np.testing.assert_allclose(weights[name], start[name], rtol=2**-8, err_msg=name)
            else:
                assert not np.allclose(weights[name], start[name], rtol=2**-8), name
    for name in filter(is_frozen, start):
        np.testing.assert_array_equal(finished.weights("hf")[name], finished.weights("hf_value")[name])


def test_it_starts_from_the_reference_and_learns(finished):
    first, second = finished.metrics
    assert first["ppo/val/mean"] == 0  # from the policy's top with a new head, not from the reward model
    assert abs(first["objective/kl"]) < 0.05 and first["ppo/policy/ratios_mean"] == pytest.approx(1, abs=0.2)
    assert abs(second["objective/kl"]) > abs(first["objective/kl"]) and second["ppo/val/mean"] != 0
    card = (finished.path / "hf" / "README.md").read_text()
    assert "layers trained" in card and json.loads((finished.path / "hf" / "config.json").read_text())


def test_a_checkpoint_of_the_top_alone_is_no_model(finished, run):
    with pytest.raises(UserError, match="holds the layers from 2 on, which --num_layers_unfrozen trained"):
        run(load_checkpoint_policy=f"easyrl::{finished.path}")


def test_a_step_can_be_replayed_over_the_frozen_bottom(finished, materials, capsys):
    recording, checkpoint = finished.path / "rollouts" / "step-2.safetensors", finished.path / "checkpoints" / "1"
    start(recording, checkpoint, "--tolerance=0")
    assert "ppo/policy/grad_norm" in capsys.readouterr().out
    other = write_model(materials.folder / "other_layers", seed=5, num_layers=3)
    with pytest.raises(RunFailed, match="metrics differ"):
        start(recording, checkpoint, f"--load_checkpoint_policy=hf::{other}")
    with pytest.raises(UserError, match="--load_checkpoint_policy=hf::/nowhere: no such folder"):
        start(recording, checkpoint, "--load_checkpoint_policy=hf::/nowhere")


def test_a_run_goes_on_from_models_that_share_the_bottom(finished, run):
    again = run(
        load_checkpoint_policy=f"hf::{finished.path / 'hf'}", load_checkpoint_value=f"hf::{finished.path / 'hf_value'}",
        load_checkpoint_reference=f"hf::{finished.path / 'hf'}", num_layers_unfrozen=1, max_steps_per_epoch=1,
    )  # fmt: skip
    assert again.metrics[0]["objective/kl"] == 0 and again.metrics[0]["ppo/val/mean"] != 0
