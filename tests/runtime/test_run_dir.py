import datetime
import errno
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from easyrl.core.command_line import load_config
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.runtime import run_dir
from easyrl.runtime.run_config import RunConfig
from easyrl.runtime.run_dir import make_run_dir


@dataclass(frozen=True)
class Config:
    lr: float = flag(1e-3, "Learning rate.")
    output_dir: str = flag("", "Where to write.")


def test_the_default_name_says_script_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run_dir("", "train_ppo")
    assert re.fullmatch(r"runs/train_ppo-\d{8}-\d{6}", str(run.path))
    assert run.path.is_dir()


def test_runs_that_start_in_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    class Noon(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datetime.datetime", Noon)
    found = [make_run_dir("", "train_ppo").path.name for _ in range(3)]
    assert found == [f"train_ppo-20300102-120000{end}" for end in ("", "-1", "-2")]


HOLDING = """
import sys
from easyrl.runtime.run_dir import make_run_dir
run = make_run_dir(sys.argv[1], "train_ppo", sys.argv[2])
print(1, flush=True)
sys.stdin.read()
"""


def test_folders_are_one_runs_until_it_ends_or_dies(tmp_path):
    output_dir, checkpoint_dir = str(tmp_path / "run"), str(tmp_path / "checkpoints")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, output_dir, checkpoint_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError) as caught:
        make_run_dir(output_dir, "train_ppo")
    assert str(caught.value) == f"--output_dir={output_dir}: another run is writing there"
    with pytest.raises(UserError) as caught:
        make_run_dir(str(tmp_path / "other"), "train_ppo", checkpoint_dir)
    assert str(caught.value) == f"--checkpoint_dir={checkpoint_dir}: another run is writing there"
    holder.kill()
    holder.wait()
    first = make_run_dir(output_dir, "train_ppo", checkpoint_dir)
    first.close()
    assert len(make_run_dir(output_dir, "train_ppo", checkpoint_dir).locks) == 2  # one after another in one process


def test_checkpoints_in_their_usual_place_are_one_runs_too(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, first, ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError) as caught:
        make_run_dir(second, "train_ppo", f"{first}/checkpoints")
    assert str(caught.value) == f"--checkpoint_dir={first}/checkpoints: another run is writing there"
    holder.kill()
    holder.wait()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "third"), f"{first}/checkpoints"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError) as caught:
        make_run_dir(first, "train_ppo")
    assert str(caught.value) == f"--output_dir={first}, checkpoints: another run is writing there"
    holder.kill()
    holder.wait()


@pytest.mark.parametrize("checkpoint_dir", ["run", "./run/", "."])
def test_checkpoints_have_a_folder_that_does_not_hold_the_run(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        make_run_dir("run", "train_ppo", checkpoint_dir)
    found = "holds --output_dir=run, expected a folder for checkpoints alone"
    assert str(caught.value) == f"--checkpoint_dir={checkpoint_dir}: {found}" and not list(tmp_path.iterdir())
    make_run_dir("run", "train_ppo", "run/checkpoints").close()


def test_a_store_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(make_run_dir("run", "train_ppo", "gs://bucket/checkpoints").locks) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_where_there_are_no_locks_a_run_goes_without(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unknown)
    assert not make_run_dir(str(tmp_path), "train_ppo").locks


def test_a_new_run_leaves_an_earlier_ones_files_under_other_names(tmp_path, capsys):
    run = make_run_dir(str(tmp_path), "train_ppo")
    for name in ("hf", "hf_best", "hf-4", "hf-4.1", "rollouts"):
        (tmp_path / name).mkdir()
    for name in ("best.json", "report.html", "thesis.txt"):
        (tmp_path / name).write_text("old")
    before = {path.name for path in tmp_path.iterdir()}
    run.begin(Config(), start=4, run_id="")
    assert {path.name for path in tmp_path.iterdir()} == before | {"config.yaml"} and not capsys.readouterr().out
    run.begin(Config(), start=0, run_id="first")
    kept = ["best.1.json", "hf.1", "hf-4.2", "hf_best.1", "report.1.html", "rollouts.1"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *kept, "hf-4.1", "thesis.txt", "config.yaml", "run_id.txt", ".lock", "checkpoints",
    }  # fmt: skip
    assert capsys.readouterr().out == f"files of an earlier run in {tmp_path} have other names now: {', '.join(kept)}\n"
    assert run.run_id == "first"
    run.begin(Config(), start=0, run_id="second")
    assert run.run_id == "second" and not capsys.readouterr().out


def test_the_config_written_repeats_the_run(tmp_path):
    config = Config(lr=0.1 + 0.2)
    run = make_run_dir(str(tmp_path / "a" / "b"), "train_ppo")
    assert not run.config.exists()
    run.save_config(config)
    assert load_config(Config, [f"--config={run.config}"]) == config


def test_a_run_repeated_from_its_config_is_not_gone_on_with(tmp_path):
    run = make_run_dir(str(tmp_path), "train_sft")
    run.save_config(RunConfig(seed=3, output_dir="run", checkpoint_dir="checkpoints"))
    assert load_config(RunConfig, [f"--config={run.config}"]) == RunConfig(seed=3)


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("old")
    run = make_run_dir(str(tmp_path), "train_ppo")
    assert run.metrics.read_text() == "old"


def test_the_config_of_an_earlier_run_is_kept_where_it_differs(tmp_path):
    run = make_run_dir(str(tmp_path), "train_ppo")
    for lr in (0.1, 0.1, 0.2, 0.3):
        run.save_config(Config(lr=lr))
    kept = {path.name: load_config(Config, [f"--config={path}"]).lr for path in tmp_path.glob("*.yaml")}
    assert kept == {"config.1.yaml": 0.1, "config.2.yaml": 0.2, "config.yaml": 0.3}


def test_the_places_in_a_run(tmp_path):
    run = make_run_dir(str(tmp_path), "train_ppo")
    places = (run.config, run.metrics, run.samples, run.checkpoints, run.hf, run.report)
    names = ["config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "hf", "report.html"]
    assert [place.relative_to(tmp_path) for place in places] == [Path(name) for name in names]


def wrong_dirs(tmp_path):
    (tmp_path / "file").write_text("x")
    yield str(tmp_path / "file"), "expected a folder, found a file"
    yield str(tmp_path / "file" / "run"), "cannot write there: Not a directory"
    yield "/proc/easyrl", "cannot write there: No such file or directory"
    yield "gs://bucket/run", "expected a local folder"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    for place, message in wrong_dirs(tmp_path):
        with pytest.raises(UserError, match=re.escape(f"--output_dir={place}: {message}")):
            make_run_dir(place, "train_ppo")
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_may_only_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=f"--output_dir={tmp_path}: cannot write there: Permission denied"):
        make_run_dir(str(tmp_path), "train_ppo")


def test_other_processes_write_nothing_and_hear_the_name_from_process_0(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "from_first", lambda create: str(tmp_path / "named"))
    monkeypatch.setattr(run_dir, "is_first", lambda: False)
    run = make_run_dir("", "train_ppo")
    run.save_config(Config())
    assert run.path == tmp_path / "named" and not run.path.exists()
