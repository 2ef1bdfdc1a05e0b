"""A run of SFT that broke off and went on is the run that never did. tests/torture.py has the other trainers."""

import contextlib
import errno
import io
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from easyrl import train_sft
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.tokenizer import load_tokenizer
from easyrl.hf.refs import load_model
from easyrl.runtime.metrics import timeless
from tests.offline import TINY, die, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import write_model

WORDS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on"]
SECRET = "hf_planted0secret1"
ROWS = [{"prompt": word, "completion": f" {word} is good"} for word in WORDS * 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYRL_CACHE", str(folder / "cache"))
        patch.setattr("easyrl.runtime.training.write_report", lambda *_: None)
        for name in ("HF_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, SECRET)
        yield folder


def start(folder, output_dir, num_devices=1, dies_before=0, **more):
    flags = TINY | {
        "load_checkpoint": f"hf::{folder / 'model'}", "train_dataset.path": folder / "rows.jsonl",
        "eval_dataset.path": folder / "rows.jsonl", "num_epochs": 3, "eval_freq": 2, "save_model_freq": 1,
        "output_dir": output_dir,
    }  # fmt: skip
    run_script(train_sft, flags | more, num_devices, dies_before)
    return output_dir


def assert_identical(run, expected):
    ours, theirs = ([timeless(row) for row in metrics_of(path)] for path in (run, expected))
    assert ours == theirs
    assert (run / "best.json").read_text() == (expected / "best.json").read_text()
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (run, expected))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert (run / "hf" / "README.md").read_text() == (expected / "hf" / "README.md").read_text()


@pytest.fixture(scope="module")
def unbroken(folder):
    """A whole run; what it printed is in `unbroken.log` beside it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        run = start(folder, folder / "unbroken", logger__tensorboard=True)
    (folder / "unbroken.log").write_text(printed.getvalue())
    return run


@pytest.fixture(scope="module")
def broken(folder):
    """A run that broke off twice, and was at step 3 the second time; its folder was named from the one above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for dies_before in (3, 4):
            start(folder, "broken", dies_before=dies_before)
        assert [row["step"] for row in metrics_of(folder / "broken")] == list(range(dies_before))
    return folder / "broken"


def test_bit_for_bit(folder, unbroken, broken, tmp_path):
    run = shutil.copytree(broken, tmp_path / "run")
    assert_identical(start(folder, run), unbroken)
    # A run that is complete only writes its model again.
    assert_identical(start(folder, run), unbroken)


@pytest.mark.parametrize(("num_devices", "mesh_dim"), [(2, "1,2,1"), (8, "2,2,2")])
def test_on_other_devices_to_1e_5(num_devices, mesh_dim, folder, unbroken, broken, tmp_path):
    run = shutil.copytree(broken, tmp_path / "run")
    start(folder, run, num_devices, mesh_dim=mesh_dim)
    ours, theirs = ([timeless(row) for row in metrics_of(path)] for path in (run, unbroken))
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"tokens/padding_share"}:  # about how rows lie on devices
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (run, unbroken))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


def test_by_hand_from_any_step_into_another_folder(folder, unbroken, broken, tmp_path):
    """Whose files of another run, which is not gone on with, get other names."""
    write_rows(tmp_path / "metrics.jsonl", [{"step": step, "loss": 9.0} for step in range(5)])
    (tmp_path / "best.json").write_text("{}")
    run = start(folder, tmp_path, load_checkpoint=f"easyrl::{broken / 'checkpoints' / '2'}")
    assert [row["step"] for row in metrics_of(run)] == [3, 4, 5, 6]
    assert len((run / "metrics.1.jsonl").read_text().splitlines()) == 5 and (run / "best.1.json").read_text() == "{}"
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (run, unbroken))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_step_is_not_saved_before_its_model_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "export_model", die)
    start(folder, tmp_path, export_freq=2)
    assert [path.parent.name for path in tmp_path.glob("checkpoints/*/run.json")] == ["1"]


def test_with_other_flags_it_is_refused_and_nothing_is_touched(folder, broken, tmp_path):
    run = shutil.copytree(broken, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"with other flags: --lr was 0.01, is 0\.02\. .*--allow_config_change=lr"):
        start(folder, run, lr=2e-2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_is_a_model_for_other_scripts(unbroken, broken):
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    exported = load_model(f"hf::{unbroken / 'hf'}", mesh, head="lm")
    saved = load_model(f"easyrl::{unbroken}", mesh, head="lm")
    assert saved.stop_ids == exported.stop_ids and saved.cfg == exported.cfg
    jax.tree.map(np.testing.assert_array_equal, saved.params, exported.params)
    assert load_tokenizer(str(saved.directory)).get_vocab() == load_tokenizer(str(exported.directory)).get_vocab()
    earlier = load_model(f"easyrl::{broken / 'checkpoints' / '2'}", mesh, head="lm", dtype="bfloat16")
    assert earlier.params["head"]["kernel"].dtype == "bfloat16"
    assert not np.array_equal(earlier.params["head"]["kernel"], exported.params["head"]["kernel"].astype("bfloat16"))
    value = load_model(f"easyrl::{unbroken}", mesh, head="value", new_head="zeros").params
    np.testing.assert_array_equal(value["embed"]["tokens"], exported.params["embed"]["tokens"])
    assert not value["head"]["scalar"].any() and "kernel" not in value["head"]
    with pytest.raises(UserError, match="holds a model without the head of a reward model"):
        load_model(f"easyrl::{unbroken}", mesh, head="reward")


def test_a_disk_that_fails_costs_nothing_but_time(folder, unbroken, tmp_path, monkeypatch, capfd):
    """Exports and checkpoints cannot be written from some step on: the run is made to its end, and fails there."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("easyrl.hf.export.write_checkpoint", full)
        patch.setattr("easyrl.core.checkpoints.write_atomic", full)
        with pytest.raises(RunFailed, match=r"could not write checkpoints \(No space.*; the export \(No space"):
            start(folder, tmp_path, export_freq=4)
    assert [row["step"] for row in metrics_of(tmp_path)] == list(range(7))
    told = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 3  # checkpoints, hf-4, the export: each once
    assert not (tmp_path / "hf").exists() and not list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert_identical(start(folder, tmp_path), unbroken)


def test_no_secret_of_the_environment_is_written(unbroken):
    files = [path for path in unbroken.parent.rglob("*") if path.is_file()]
    assert len(files) > 20 and "rows read" in (unbroken.parent / "unbroken.log").read_text()
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
