import errno
import sys
from dataclasses import dataclass

import jax
import pytest

from easyrl.core import distributed
from easyrl.core.config import flag
from easyrl.core.errors import RunFailed, UserError
from easyrl.runtime import trackers as trackers_module
from easyrl.runtime.jsonl import read_jsonl
from easyrl.runtime.loop import run_loop
from easyrl.runtime.run_dir import make_run_dir
from easyrl.runtime.trackers import JsonlTracker, LoggerConfig, start_trackers, tracker_hooks
from easyrl.runtime.troubles import Troubles


@dataclass(frozen=True)
class Config:
    lr: float = flag(0.25, "Learning rate.")
    logger: LoggerConfig = flag(LoggerConfig(), "Trackers.")


@pytest.fixture
def run(tmp_path):
    return make_run_dir(str(tmp_path / "run"), "train_ppo")


SAMPLES = [{"prompt": "Say hi", "response": "hi", "reward": 1.0}, {"prompt": "Say ho", "response": "", "reward": -1.0}]


def test_a_run_leaves_its_metrics_and_samples(run):
    trackers = start_trackers(LoggerConfig(), run, Config())
    trackers[0].log_samples(0, SAMPLES)
    hooks = tracker_hooks(trackers, log_freq=2, total=3)
    run_loop(0.0, [1.0, 2.0, 3.0], lambda s, b: (s + b, {"loss": s}), start=0, total=3, hooks=hooks)
    rows = read_jsonl(run.metrics)
    # Every step, whatever log_freq says.
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.0), (2, 1.0), (3, 3.0)]
    assert list(rows[0]) == ["step", "loss", "time/step"]
    assert read_jsonl(run.samples) == [{"step": 0} | sample for sample in SAMPLES]


def test_log_freq_is_for_the_other_trackers_which_also_see_evaluations_and_the_end(run):
    class Other:
        def __init__(self):
            self.logged = []
            self.closed = False

        def log(self, step, metrics):
            self.logged.append(step)

        def log_samples(self, step, samples):
            pass

        def close(self):
            self.closed = True

    other = Other()
    hooks = tracker_hooks([JsonlTracker(run), other], log_freq=3, total=8)
    step_fn = lambda state, step: (state, {"eval/loss": 0.0} if step == 5 else {})
    run_loop(0, range(1, 9), step_fn, start=0, total=8, hooks=hooks)
    assert other.logged == [3, 5, 6, 8] and other.closed
    assert len(read_jsonl(run.metrics)) == 8


def test_only_process_0_tracks(run, monkeypatch):
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert start_trackers(LoggerConfig(wandb=True, tensorboard=True), run, Config()) == []
    assert not run.metrics.exists()


def test_nothing_is_imported_that_was_not_asked_for(run, monkeypatch):
    for name in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    assert len(start_trackers(LoggerConfig(), run, Config())) == 1


@pytest.mark.parametrize(
    ("logger", "module"),
    [({"wandb": True}, "wandb"), ({"online": True}, "wandb"), ({"tensorboard": True}, "tensorboardX")],
)
def test_a_missing_package_is_named(run, monkeypatch, logger, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"--logger\.\w+: .*{module} is not installed; pip install {module}"):
        start_trackers(LoggerConfig(**logger), run, Config())


def test_wandb_offline_keeps_the_run_and_its_id_in_the_folder(run, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is an optional tracker")
    logged, real_init = [], wandb.init

    def init(**options):
        logged.append(options)
        return real_init(**options)

    monkeypatch.setattr(wandb, "init", init)
    for start in (0, 2):
        trackers = start_trackers(LoggerConfig(wandb=True, prefix="lab", notes="first"), run, Config(), start=start)
        trackers[1].log(start + 1, {"loss": float("nan")})
        trackers[1].log_samples(start + 1, SAMPLES)
        trackers[1].log(start + 2, {"loss": 0.5})
        for tracker in trackers:
            tracker.close()
    first, second = logged
    assert first["mode"] == "offline" and first["project"] == "lab--easyrl" and first["config"]["lr"] == 0.25
    assert first["id"] == second["id"] == (run.path / "wandb_id.txt").read_text()
    assert len(list(run.path.glob("wandb/offline-run-*/*.wandb"))) == 2


def test_wandb_that_cannot_start_is_one_line(run, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is an optional tracker")

    def init(**options):
        raise wandb.errors.UsageError("No API key configured.\nUse wandb login")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(
        UserError, match=r"--logger\.online: wandb did not start: No API key configured\. Use wandb login"
    ):
        start_trackers(LoggerConfig(online=True), run, Config())


def test_tensorboard_gets_scalars_and_samples(run):
    pytest.importorskip("tensorboardX", reason="TensorBoard is an optional tracker")
    tracker = start_trackers(LoggerConfig(tensorboard=True), run, Config())[1]
    tracker.log(3, {"env/reward_mean": 0.5})
    tracker.log_samples(3, SAMPLES)
    tracker.close()
    (events,) = (run.path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"env/reward_mean" in data and b"Say hi" in data


class Broken:
    """Stands for a tracker whose library fails with errors of its own."""

    def __init__(self, *_):
        pass

    def log(self, *_):
        raise RuntimeError("the service is gone")

    log_samples = close = log


def test_a_tracker_that_fails_does_not_end_a_run(run, monkeypatch, capfd):
    monkeypatch.setattr(trackers_module, "WandbTracker", Broken)
    troubles = Troubles()
    started = start_trackers(LoggerConfig(wandb=True), run, Config(), troubles=troubles)
    for tracker in started:
        tracker.log(0, {"loss": 1.0})
        tracker.log_samples(0, SAMPLES)
    hooks = tracker_hooks(started, log_freq=1, total=2)
    run_loop(0.0, [1.0, 2.0], lambda s, b: (s + b, {"loss": s}), start=0, total=2, hooks=hooks)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [0, 1, 2]
    assert [line for line in capfd.readouterr().err.splitlines() if line] == [
        "easyrl: warning: could not write metrics to Weights & Biases: RuntimeError: the service is gone; the run goes "
        "on, trying again next time"
    ]
    with pytest.raises(RunFailed, match="could not write metrics to Weights & Biases"):
        troubles.end()


def test_a_disk_that_fails_tensorboard_neither_holds_the_run_nor_what_comes_after(run, monkeypatch, capfd):
    library = pytest.importorskip("tensorboardX.event_file_writer", reason="TensorBoard is an optional tracker")
    real = library.EventsWriter.write_event

    def full(self, event):
        raise OSError(errno.ENOSPC, "No space left on device")

    troubles = Troubles()
    tracker = start_trackers(LoggerConfig(tensorboard=True), run, Config(), troubles=troubles)[1]
    tracker.log(1, {"before": 1.0})
    monkeypatch.setattr(library.EventsWriter, "write_event", full)
    for step in range(2, 20):
        tracker.log(step, {"meanwhile": 1.0})
    monkeypatch.setattr(library.EventsWriter, "write_event", real)
    tracker.log(20, {"after": 1.0})
    tracker.close()
    troubles.end()
    files = [path.read_bytes() for path in (run.path / "tensorboard").iterdir()]
    for name in (b"before", b"after"):
        assert sum(name in data for data in files) == 1
    assert not any(b"meanwhile" in data for data in files)
    assert capfd.readouterr().err.count("could not write metrics to TensorBoard: No space left on device") == 1


def test_tensorboard_hides_the_steps_that_are_done_again(run):
    pytest.importorskip("tensorboardX", reason="TensorBoard is an optional tracker")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    start_trackers(LoggerConfig(tensorboard=True), run, Config(), start=7)[1].close()
    (path,) = (run.path / "tensorboard").iterdir()
    data = path.read_bytes()
    assert Event.FromString(record(data, 1)).session_log.status == SessionLog.START
    assert Event.FromString(record(data, 1)).step == 8


def record(data, number):
    """The bytes of one of TensorBoard's records: length, checksum of it, bytes, checksum of them."""
    place = 0
    for _ in range(number):
        place += int.from_bytes(data[place : place + 8], "little") + 16
    return data[place + 12 : place + 12 + int.from_bytes(data[place : place + 8], "little")]
