"""python -m easyrl.replay: a recorded step's updates, made once more, are the same to the last bit."""

import functools
import math

import jax
import numpy as np
import pytest

from easyrl import replay, train_dpo, train_rm
from easyrl.core.command_line import load_config
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.sharding import make_mesh
from easyrl.runtime.jsonl import read_jsonl
from tests.offline import TINY, run_script, write_rows
from tests.train_ppo.conftest import materials, run, write_model  # noqa: F401  (fixtures)

PAIRS = [
    {"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad"} for word in ("sun", "why", "it", "a b")
]


def start(recording, checkpoint, *more):
    argv = [str(recording), f"--load_checkpoint=easyrl::{checkpoint}", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        replay.main(load_config(replay.Config, argv))


@pytest.fixture(scope="module")
def recorded(run):  # noqa: F811
    return run(
        record_rollouts=2, save_model_freq=1, lr_schedule="linear", value_lr=1e-2, policy_freeze_epochs=0.5,
        cliprange_value=math.inf,
    ).path  # fmt: skip


def test_the_updates_of_a_step_of_ppo_bit_for_bit(recorded, capsys):
    start(recorded / "rollouts" / "step-2.safetensors", recorded / "checkpoints" / "1", "--tolerance=0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 2, recorded on cpu with jax ")
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows.pop("metric") == ["recorded", "replayed", "difference"]
    assert {"ppo/loss/policy", "ppo/policy/grad_norm", "ppo/val/error", "ppo/loss/total"} <= rows.keys()
    assert all(row[0] == row[1] and row[2] == "0" for row in rows.values())


def test_the_policys_schedule_begins_when_it_is_no_longer_frozen(recorded):
    frozen, free = read_jsonl(recorded / "metrics.jsonl")
    assert (frozen["ppo/learning_rate"], free["ppo/learning_rate"]) == (0, pytest.approx(1e-3))


def test_other_weights_give_other_numbers_and_exit_status_1(recorded, capsys):
    with pytest.raises(RunFailed, match=r"of \d+ metrics differ by more than --tolerance=1e-05"):
        start(recorded / "rollouts" / "step-2.safetensors", recorded / "checkpoints" / "2")
    out = capsys.readouterr().out
    assert out.startswith("note: the recording is of step 2, and the checkpoint has seen 2 steps") and " !" in out


def test_what_cannot_be_replayed_is_one_line(recorded, tmp_path):
    recording = recorded / "rollouts" / "step-2.safetensors"
    with pytest.raises(UserError, match=r"^found no FILE, expected the rollouts/"):
        replay.main(load_config(replay.Config, []))
    with pytest.raises(UserError, match="found no whole checkpoint"):
        start(recording, tmp_path)
    for wrong in ("", "hf::x", "easyrl::", "x"):
        with pytest.raises(
            UserError, match=f"^--load_checkpoint={wrong}: expected easyrl::RUN/checkpoints/1, the state"
        ):
            replay.main(load_config(replay.Config, [str(recording), f"--load_checkpoint={wrong}", "--mesh_dim=1,-1,1"]))
    with pytest.raises(UserError, match="cannot be read as a recorded batch"):
        start(tmp_path / "nothing", recorded)


@pytest.mark.parametrize("script", [train_rm, train_dpo], ids=["rm", "dpo"])
def test_the_batch_that_ended_a_run(script, tmp_path, monkeypatch, capsys):
    """Its loss is not finite in the replay either; everything else is as recorded."""
    monkeypatch.setenv("EASYRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("easyrl.data.formats.LARGEST", np.inf)  # lets a margin in that is refused
    rows = [PAIRS[0] | {"margin": 1e39}, *PAIRS[1:]]
    flags = TINY | {
        "load_checkpoint": f"hf::{write_model(tmp_path / 'model')}", "max_bad_steps": 0, "num_epochs": 3,
        "train_dataset.path": write_rows(tmp_path / "rows.jsonl", rows), "train_dataset.batch_size": 4,
        "output_dir": tmp_path / "run",
    }  # fmt: skip
    if script is train_dpo:
        # DPO reads no margins: its reference is what is bad.
        monkeypatch.setattr(train_dpo, "answers_of", spoilt(train_dpo.answers_of))
    with pytest.raises(RunFailed, match="a number that is not finite"):
        run_script(script, flags)
    capsys.readouterr()
    start(tmp_path / "run" / "batches" / "step-1.safetensors", tmp_path / "run", "--tolerance=0")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["loss"][0] == "none" and rows["loss"][2:] == ["not", "finite"]
    assert rows["skipped"] == ["1", "1", "0"] and rows["tokens"][2] == "0"


def spoilt(answers_of):
    """`answers_of` with a reference that gives the first answer of every batch a NaN."""

    def spoil(*args, **kwargs):
        place = answers_of(*args, **kwargs)

        def placer(batch):
            placed = place(batch)
            return placed.replace(ref_logprobs=placed.ref_logprobs.at[0].set(float("nan")))

        return placer

    return spoil
