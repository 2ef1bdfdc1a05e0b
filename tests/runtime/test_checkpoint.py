"""When a run saves, what it keeps, how it stops, and what it does when it cannot save."""

import errno
import json
import threading

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from easyrl.core import checkpoints as store
from easyrl.core.errors import RunFailed, RunStopped, UserError
from easyrl.runtime.checkpoint import open_checkpoints, spare_steps
from easyrl.runtime.loop import run_loop
from easyrl.runtime.run_config import RunConfig
from easyrl.runtime.run_dir import make_run_dir
from easyrl.runtime.troubles import Troubles


class Counter:
    """A memory of how many steps there were."""

    def __init__(self):
        self.value = 0

    def remember(self):
        return self.value

    def recall(self, remembered):
        self.value = remembered


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    monkeypatch.setattr(
        "easyrl.runtime.checkpoint.write_models", lambda folder, models: folder.mkdir(parents=True, exist_ok=True)
    )


class Run:
    """A run of `total` steps, each adding 1 to its state, with `metrics_of(step)`; `at` is called in every step."""

    def __init__(self, folder, total=6, metrics_of=None, at=lambda step, run: None, clock=None, **flags):
        config = RunConfig(output_dir=str(folder), **flags)
        run_dir = make_run_dir(config.output_dir, "train_sft", config.checkpoint_dir)
        self.checkpoints = open_checkpoints(config, run_dir, "train_sft", "rows")
        self.troubles, self.counter, self.ended = Troubles(), Counter(), False
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        self.state = self.checkpoints.restore({"x": number}, lambda: {"x": jnp.float32(0)})
        options = {"clock": clock} if clock else {}
        memories = {"counter": self.counter}
        self.checkpoints.recall(memories)
        hook = self.checkpoints.hook(memories, [], self.troubles, total=total, best_by="eval/loss", **options)

        def step(state, number):
            self.counter.value += 1
            at(number, self)
            return {"x": state["x"] + 1}, (metrics_of or (lambda step: {"loss": 1.0 / step}))(number)

        start = self.checkpoints.start
        self.state = run_loop(
            self.state, range(start + 1, total + 1), step, start=start, total=total, hooks=[hook],
            metrics=self.checkpoints.metrics,
        )  # fmt: skip
        self.checkpoints.check_end(self.troubles)
        self.ended = True


def wait_for_saves():
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def steps_in(folder):
    return store.whole_steps(epath.Path(folder / "checkpoints"))


def test_the_last_step_is_saved_always_and_others_by_number(tmp_path):
    Run(tmp_path / "a", total=5)
    Run(tmp_path / "b", total=5, save_model_freq=2, keep_checkpoints=0)
    assert (steps_in(tmp_path / "a"), steps_in(tmp_path / "b")) == ([5], [2, 4, 5])


def test_saved_by_the_clock(tmp_path):
    now = [0.0]

    def tick(step, run):
        now[0] += 20.0

    Run(tmp_path, total=9, at=tick, clock=lambda: now[0], save_minutes=1.0, keep_checkpoints=0)
    assert steps_in(tmp_path) == [3, 6, 9]
    assert Run(tmp_path, total=9, save_minutes=1.0).counter.value == 9  # nothing was left to do


def test_what_is_kept():
    def facts(**scores):
        return {int(step[1:]): {"score": score} for step, score in scores.items()}

    some = facts(s2=None, s4=-0.5, s6=-0.2, s8=-0.2, s10=-0.9, s12=None)
    assert spare_steps(some, 2, 0) == [2, 4, 8]  # 6 is the first of the best
    assert spare_steps(some, 1, 4) == [2, 10]
    assert spare_steps(some, 0, 0) == []
    for step in (8, 10, 12):
        some[step]["measured"] = "other rows"
    assert spare_steps(some, 1, 0) == [2, 4, 8, 10]  # of a run of an earlier version, which is taken to be the same
    for step in (2, 4, 6):
        some[step]["measured"] = "rows"
    assert spare_steps(some, 1, 0) == [2, 4, 6, 10]


def test_the_best_evaluated_checkpoint_is_kept_until_a_better_one(tmp_path):
    losses = {2: 0.5, 4: 0.3, 6: 0.4, 8: float("nan")}

    def metrics(step):
        return {"eval/loss": losses[step]} if step in losses else {}

    Run(tmp_path, total=9, metrics_of=metrics, save_model_freq=1, keep_checkpoints=1)
    assert steps_in(tmp_path) == [4, 9]


def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(tmp_path):
    def stop(step, run):
        if step == 3:
            run.checkpoints.request_stop("SIGTERM")

    with pytest.raises(RunStopped) as caught:
        Run(tmp_path, at=stop)
    assert str(caught.value) == (
        f"SIGTERM: stopped after step 3, saved in {tmp_path}/checkpoints; the same command with "
        f"--output_dir={tmp_path} goes on"
    )
    assert steps_in(tmp_path) == [3]
    run = Run(tmp_path)
    assert run.ended and float(run.state["x"]) == 6 and run.counter.value == 6


def test_started_anew_what_was_there_gets_another_name(tmp_path, capsys):
    Run(tmp_path, total=2)
    assert float(Run(tmp_path, total=3, resume="never").state["x"]) == 3
    assert steps_in(tmp_path) == [3] and (tmp_path / "checkpoints.1" / "2" / "run.json").exists()
    assert capsys.readouterr().out == f"checkpoints of an earlier run are in {tmp_path / 'checkpoints.1'} now\n"


def test_started_anew_a_folder_for_checkpoints_stays_locked(tmp_path, capsys):
    flags = {"checkpoint_dir": str(tmp_path / "checkpoints"), "resume": "never"}
    Run(tmp_path / "run", total=2, **flags)
    assert not capsys.readouterr().out
    lock = (tmp_path / "checkpoints" / ".lock").stat().st_ino
    Run(tmp_path / "run", total=3, **flags)
    assert steps_in(tmp_path) == [3] and (tmp_path / "checkpoints.1" / "2" / "run.json").exists()
    assert (tmp_path / "checkpoints" / ".lock").stat().st_ino == lock
    assert capsys.readouterr().out == f"checkpoints of an earlier run are in {tmp_path / 'checkpoints.1'} now\n"


@pytest.mark.parametrize("where", ["in the background", "at once"])
def test_saves_that_fail_do_not_stop_a_run(where, tmp_path, monkeypatch, capfd):
    Run(tmp_path, total=2)
    real = store.write_atomic, store.Writer.start

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def disk(step, run):
        wait_for_saves()
        broken = step in (3, 4, 5)
        if where == "at once":
            monkeypatch.setattr(store.Writer, "start", full if broken else real[1])
        else:
            monkeypatch.setattr(store, "write_atomic", full if broken else real[0])
        if step == 6:
            assert steps_in(tmp_path) == [2]  # the one before it all

    Run(tmp_path, total=6, at=disk, save_model_freq=2)
    assert steps_in(tmp_path) == [2, 6]
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "easyrl: warning: could not write checkpoints: No space left on device; the run goes on, trying again at the "
        "next save; earlier checkpoints are as they were",
        "easyrl: checkpoints: written again",
    ]


def test_a_run_whose_last_save_fails_ends_as_failed_and_does_it_when_started_again(tmp_path, monkeypatch):
    tries = []

    def full(*_):
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    def disk(step, run):
        wait_for_saves()
        if step == 5:
            monkeypatch.setattr(store, "write_atomic", full)

    with pytest.raises(RunFailed, match=r"could not write checkpoints \(No space left on device\)"):
        Run(tmp_path, total=6, at=disk, save_model_freq=4)
    assert len(tries) == 2 and steps_in(tmp_path) == [4]
    monkeypatch.undo()
    monkeypatch.setattr("easyrl.runtime.checkpoint.write_models", lambda folder, models: None)
    run = Run(tmp_path, total=6)
    assert run.counter.value == 6 and steps_in(tmp_path) == [4, 6]


def test_a_place_that_cannot_be_written_is_named_before_the_first_step(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("easyrl.runtime.checkpoint.write_models", read_only)
    with pytest.raises(UserError, match="cannot write checkpoints there: Read-only file system"):
        Run(tmp_path)


def test_facts_are_readable_and_exact(tmp_path):
    Run(tmp_path, total=3)
    facts = json.loads((tmp_path / "checkpoints" / "3" / "run.json").read_text())
    assert facts["step"] == 3 and facts["metrics"]["loss"] == 1.0 / 3 and facts["config"]["seed"] == 42


def open_again(folder, **flags):
    """Opens a run and begins it, as a trainer does: what it is given is what its folder holds from here on."""
    config = RunConfig(output_dir=str(folder), **flags)
    run_dir = make_run_dir(config.output_dir, "train_sft", config.checkpoint_dir)
    opened = open_checkpoints(config, run_dir, "train_sft", "rows")
    run_dir.begin(config, start=opened.made_here, run_id=opened.run_id)
    run_dir.close()
    return opened


def whole(opened, step):
    """Writes the facts of a step, as the end of a save does."""
    path = opened.folder / str(step)
    path.mkdir(parents=True)
    facts = opened._facts | {"format": 1, "step": step, "metrics": {}, "memories": {}}
    (path / "run.json").write_text(json.dumps(facts))


def test_a_folder_whose_files_are_another_runs_is_not_gone_on_with(tmp_path):
    first = open_again(tmp_path / "run")
    whole(first, 10)
    assert open_again(tmp_path / "run").made_here == 10
    with pytest.raises(UserError) as caught:
        open_again(tmp_path / "run", checkpoint_dir=str(tmp_path / "big"))
    usual = tmp_path / "run" / "checkpoints"
    assert str(caught.value) == (
        f"--checkpoint_dir={tmp_path / 'big'}: holds no whole checkpoint, while {usual} holds step 10; go on there "
        f"without the flag, or with --resume=easyrl::{usual}, or start anew with --resume=never"
    )
    second = open_again(tmp_path / "run", checkpoint_dir=str(tmp_path / "big"), resume="never")
    whole(second, 20)
    assert second.run_id != first.run_id
    # The flag forgotten: the first run's checkpoint, and the second one's rows.
    third = open_again(tmp_path / "run")
    assert (third.start, third.made_here) == (10, 0)
    again = open_again(tmp_path / "run")  # killed before a checkpoint of its own
    assert (again.start, again.made_here) == (10, 0)
    whole(again, 15)
    assert open_again(tmp_path / "run").made_here == 15


def test_a_run_goes_on_in_another_folder_for_checkpoints(tmp_path):
    first = open_again(tmp_path / "run")
    whole(first, 10)
    flags = {"checkpoint_dir": str(tmp_path / "big"), "resume": f"easyrl::{tmp_path / 'run'}"}
    moved = open_again(tmp_path / "run", **flags)
    assert (moved.start, moved.made_here, moved.run_id) == (10, 10, first.run_id)
    fork = open_again(tmp_path / "fork", resume=f"easyrl::{tmp_path / 'run'}")
    assert (fork.start, fork.made_here) == (10, 0) and fork.run_id != first.run_id


def test_a_run_from_before_runs_had_ids_goes_on(tmp_path):
    first = open_again(tmp_path / "run")
    first._facts.pop("run_id")
    (tmp_path / "run" / "run_id.txt").unlink()
    whole(first, 10)
    for _ in range(2):  # the first of them killed before a checkpoint of its own
        opened = open_again(tmp_path / "run")
        assert (opened.start, opened.made_here) == (10, 10)
    whole(opened, 12)
    assert open_again(tmp_path / "run").made_here == 12


def test_started_anew_a_link_to_another_disk_stays_one(tmp_path, capsys):
    (tmp_path / "big").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big")
    Run(tmp_path / "run", total=2)
    Run(tmp_path / "run", total=3, resume="never")
    assert (tmp_path / "run" / "checkpoints").is_symlink() and (tmp_path / "big" / "3" / "run.json").exists()
    assert (tmp_path / "big.1" / "2" / "run.json").exists()
    assert capsys.readouterr().out == f"checkpoints of an earlier run are in {tmp_path / 'big.1'} now\n"


def test_a_folder_that_cannot_be_set_aside_is_named(tmp_path, monkeypatch):
    def mounted(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    Run(tmp_path, total=2)
    monkeypatch.setattr("easyrl.runtime.checkpoint.set_aside", mounted)
    with pytest.raises(UserError, match="checkpoints: cannot write checkpoints there: Device or resource busy"):
        Run(tmp_path, total=2, resume="never")
