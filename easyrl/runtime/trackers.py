"""Where metrics and samples go: JSON lines always, Weights & Biases and TensorBoard by flag."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from easyrl.core.config import flag, to_dict
from easyrl.core.distributed import is_first
from easyrl.core.errors import UserError
from easyrl.runtime.jsonl import JsonlWriter
from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.run_dir import RunDir
from easyrl.runtime.troubles import Troubles

Sample = dict[str, Any]

FLUSH_SECONDS = 120  # between waits for TensorBoard's events to be on the disk


@dataclass(frozen=True)
class LoggerConfig:
    """Trackers beside metrics.jsonl and samples.jsonl, which are always written."""

    wandb: bool = flag(False, "Log to Weights & Biases, offline unless --logger.online.")
    tensorboard: bool = flag(False, "Log to TensorBoard, in the run's folder.")
    online: bool = flag(False, "Send to the Weights & Biases server; implies --logger.wandb.")
    project: str = flag("easyrl", "Weights & Biases project.")
    entity: str = flag("", "Weights & Biases user or team; empty: your default.")
    prefix: str = flag("", "Put before the project's name as PREFIX--PROJECT; empty: nothing.")
    prefix_to_id: bool = flag(False, "Put the prefix before the run's id instead.")
    experiment_id: str = flag("", "Weights & Biases run id; empty: made up once and kept in the run's folder.")
    notes: str = flag("", "A note shown with the run on Weights & Biases.")


class Tracker(Protocol):
    """Takes the metrics of a step, and samples (prompt, response, reward, ...) now and then."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None: ...

    def close(self) -> None: ...


def start_trackers(
    logger: LoggerConfig, run: RunDir, config: Any, *, start: int = 0, troubles: Troubles | None = None
) -> list[Tracker]:
    """The trackers that `logger` asks for, JSON lines first; none on other processes than 0.

    `config` is the script's resolved configuration, shown with the run; `start` is the step the run goes on from in its
    folder, 0 for one that is new there; `troubles` is told what cannot be written, of the others also for reasons of
    their own: a run does not end for them.
    """
    if not is_first():
        return []
    troubles = troubles or Troubles()
    with run.writing():
        trackers: list[Tracker] = [JsonlTracker(run, start, troubles)]
    if logger.wandb or logger.online:
        trackers.append(_Tolerated(WandbTracker(logger, run, to_dict(config)), "metrics to Weights & Biases", troubles))
    if logger.tensorboard:
        with run.writing():
            trackers.append(_Tolerated(TensorboardTracker(run, start), "metrics to TensorBoard", troubles))
    return trackers


def tracker_hooks(trackers: Sequence[Tracker], log_freq: int, total: int) -> list[Hook]:
    """Hooks that hand metrics to the trackers: every step to JSON lines, to the others those that `log_freq` divides,
    those with an evaluation and the last of `total`.
    """

    def shown(info: StepInfo) -> bool:
        evaluated = any(name.startswith("eval/") for name in info.metrics)
        return info.step % log_freq == 0 or info.step == total or evaluated

    def hook(tracker: Tracker) -> Hook:
        def on_step(info: StepInfo) -> None:
            if isinstance(tracker, JsonlTracker) or shown(info):
                tracker.log(info.step, info.metrics)

        return Hook(on_step, close=tracker.close)

    return [hook(tracker) for tracker in trackers]


class _Tolerated:
    """A tracker that raises nothing: `troubles` is told that `thing` could not be written."""

    def __init__(self, tracker: Tracker, thing: str, troubles: Troubles):
        self._tracker = tracker
        self._attempt = partial(troubles.attempt, thing, any_error=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with self._attempt():
            self._tracker.log(step, metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        with self._attempt():
            self._tracker.log_samples(step, samples)

    def close(self) -> None:
        with self._attempt(then="without it"):
            self._tracker.close()


class JsonlTracker:
    """metrics.jsonl, one object a step, and samples.jsonl, one object a sample; `JsonlWriter` says how they go on."""

    def __init__(self, run: RunDir, start: int = 0, troubles: Troubles | None = None):
        self._metrics = JsonlWriter(run.metrics, start, troubles)
        self._samples = JsonlWriter(run.samples, start, troubles)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics.write(step, metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._samples.write(step, sample)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class WandbTracker:
    """Weights & Biases. Nothing leaves the machine unless `online`; the key is wandb's affair and is never read here.

    A resumed run goes on under the same id, kept in `wandb_id.txt`.
    """

    def __init__(self, logger: LoggerConfig, run: RunDir, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError("--logger.wandb: the package wandb is not installed; pip install wandb") from error
        experiment_id, project = logger.experiment_id or _kept_id(run), logger.project
        if logger.prefix and logger.prefix_to_id:
            experiment_id = f"{logger.prefix}--{experiment_id}"
        elif logger.prefix:
            project = f"{logger.prefix}--{project}"
        try:
            self._run = wandb.init(
                project=project,
                entity=logger.entity or None,
                id=experiment_id,
                name=run.path.name,
                notes=logger.notes or None,
                dir=str(run.path),
                config=config,
                mode="online" if logger.online else "offline",
                resume="allow" if logger.online else None,  # wandb refuses to resume a run it keeps offline
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"--logger.{'online' if logger.online else 'wandb'}: wandb did not start: {error}"
            ) from error
        # wandb's own step may only grow, and a resumed run starts before the last one it has seen: use ours.
        self._run.define_metric("*", step_metric="step")
        self._table = wandb.Table

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step} | metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        names = dict.fromkeys(name for sample in samples for name in sample)
        rows = [[sample.get(name) for name in names] for sample in samples]
        self._run.log({"step": step, "samples": self._table(columns=[*names], data=rows, allow_mixed_types=True)})

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files in the run's `tensorboard/` folder.

    tensorboardX's `SummaryWriter` writes in a thread that the first error of a disk ends, and then waits for it for
    ever. Here the error is raised, and the events after it go to a new file: nobody reads on behind a torn one.
    """

    def __init__(self, run: RunDir, start: int = 0):
        try:
            import tensorboardX.event_file_writer
            import tensorboardX.proto.event_pb2
            import tensorboardX.summary
        except ImportError as error:
            raise UserError("--logger.tensorboard: tensorboardX is not installed; pip install tensorboardX") from error
        self._library, self._folder = tensorboardX, run.path / "tensorboard"
        self._file, self._flushed = self._open(), -math.inf
        if start:  # events of steps that the run does again are hidden
            messages = tensorboardX.proto.event_pb2
            again = messages.SessionLog(status=messages.SessionLog.START)
            self._write([messages.Event(step=start + 1, session_log=again)])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        scalar = self._library.summary.scalar
        self._write_summaries(step, [scalar(name, value) for name, value in metrics.items()])

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        summaries = []
        for number, sample in enumerate(samples):
            text = "\n\n".join(f"**{name}**\n\n{value}" for name, value in sample.items())
            summaries.append(self._library.summary.text(f"samples/{number}", text))
        self._write_summaries(step, summaries)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> Any:
        self._folder.mkdir(parents=True, exist_ok=True)
        # The library's own part of the name is the second.
        prefix, suffix = str(self._folder / "events"), f".{uuid.uuid4().hex[:12]}"
        return self._library.event_file_writer.EventsWriter(prefix, suffix)

    def _write_summaries(self, step: int, summaries: Sequence[Any]) -> None:
        self._write([self._library.proto.event_pb2.Event(step=step, summary=summary) for summary in summaries])

    def _write(self, events: Sequence[Any]) -> None:
        try:
            self._file = self._file or self._open()
            for event in events:
                event.wall_time = time.time()
                self._file.write_event(event)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()
        except OSError:
            self._file = None
            raise


def _kept_id(run: RunDir) -> str:
    """The id this run has had on Weights & Biases since its first start."""
    path = run.path / "wandb_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
