"""Where metrics and samples go: JSON lines always, Weights & Biases and TensorBoard by flag."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from easyrl.core.config import flag, to_dict
from easyrl.core.distributed import is_first
from easyrl.core.errors import UserError
from easyrl.runtime.jsonl import JsonlWriter
from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.run_dir import RunDir
from easyrl.runtime.troubles import Troubles

Sample = dict[str, Any]


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
    folder, 0 for one that is new there; `troubles` is told when JSON lines cannot be written.
    """
    if not is_first():
        return []
    with run.writing():
        trackers: list[Tracker] = [JsonlTracker(run, start, troubles)]
    if logger.wandb or logger.online:
        trackers.append(WandbTracker(logger, run, to_dict(config)))
    if logger.tensorboard:
        trackers.append(TensorboardTracker(run, start))
    return trackers


def tracker_hooks(
    trackers: Sequence[Tracker], log_freq: int, total: int, troubles: Troubles | None = None
) -> list[Hook]:
    """Hooks that hand metrics to the trackers: every step to JSON lines, to the others those that `log_freq` divides,
    those with an evaluation and the last of `total`.

    `troubles` is told of those that cannot write.
    """
    troubles = troubles or Troubles()

    def shown(info: StepInfo) -> bool:
        evaluated = any(name.startswith("eval/") for name in info.metrics)
        return info.step % log_freq == 0 or info.step == total or evaluated

    def hook(tracker: Tracker) -> Hook:
        def on_step(info: StepInfo) -> None:
            if isinstance(tracker, JsonlTracker) or shown(info):
                tracker.log(info.step, info.metrics)

        return troubles.tolerate(Hook(on_step, close=tracker.close), type(tracker).__name__)

    return [hook(tracker) for tracker in trackers]


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
    """TensorBoard event files in the run's `tensorboard/` folder."""

    def __init__(self, run: RunDir, start: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("--logger.tensorboard: tensorboardX is not installed; pip install tensorboardX") from error
        # Events of steps that the run does again are hidden.
        self._writer = SummaryWriter(logdir=str(run.path / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            text = "\n\n".join(f"**{name}**\n\n{value}" for name, value in sample.items())
            self._writer.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        self._writer.close()


def _kept_id(run: RunDir) -> str:
    """The id this run has had on Weights & Biases since its first start."""
    path = run.path / "wandb_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
