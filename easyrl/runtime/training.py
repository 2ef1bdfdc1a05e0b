"""A run of any trainer from its first step to its report: what surrounds the steps is the same for all of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from easyrl.core.distributed import is_first, say
from easyrl.hf.saved import SavedModel
from easyrl.runtime.checkpoint import Checkpoints, Memory
from easyrl.runtime.guard import Guard
from easyrl.runtime.interrupt import stopping_at_signals
from easyrl.runtime.loop import Hook, StepInfo, run_loop
from easyrl.runtime.progress import progress_hook
from easyrl.runtime.report import write_report
from easyrl.runtime.run_config import RunConfig
from easyrl.runtime.run_dir import RunDir
from easyrl.runtime.trackers import start_trackers, tracker_hooks
from easyrl.runtime.troubles import Troubles

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Export(Generic[State]):
    """A model that a run hands out: what it is called, its folder in the run's, and `write(folder, state, metrics)`."""

    name: str
    folder: Path
    write: Callable[[Path, State, dict[str, float]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Generic[State]):
    """What a trainer does in a run.

    name: for people, as the title of the report.
    batches: those of the steps that are to be made.
    step: `step(state, batch) -> (state, metrics)`.
    evaluate: `evaluate(state, step)`, asked after every step and before the first: metrics, {} where none are due.
    exports: written at the end; the first also every --export_freq steps.
    models: what readers of the checkpoints need to know of the models in the state.
    bar: label and name of the metrics that the progress bar shows.
    best_by: the metric of an evaluation that decides which checkpoint is the best.
    measured: a name of what evaluations measure; only those of one name are compared.
    guard: what ends a run of bad numbers.
    memories: everything else that is to be remembered on the host from step to step, by name.
    hooks: called before the others, so that they may add to the metrics.
    samples: rows for samples.jsonl, to which steps and evaluations append, and which are taken from here.
    """

    name: str
    batches: Iterable[Any]
    step: Callable[[State, Any], tuple[State, dict[str, Any]]]
    evaluate: Callable[[State, int], dict[str, Any]]
    exports: Sequence[Export[State]]
    models: Sequence[SavedModel]
    bar: Mapping[str, str]
    best_by: str
    guard: Guard
    measured: str = ""
    memories: Mapping[str, Memory] = dataclasses.field(default_factory=dict)
    hooks: Sequence[Hook] = ()
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def run_training(
    config: RunConfig,
    run_dir: RunDir,
    checkpoints: Checkpoints,
    troubles: Troubles,
    state: State,
    training: Training[State],
    total: int,
) -> None:
    """Makes the steps up to `total`, with progress bar, trackers, checkpoints, exports and the report.

    `state` is that after step `checkpoints.start`. `troubles` is told what cannot be written. Raises RunStopped when
    the run was asked to end early, RunFailed when bad numbers ended it or something remained unwritten.
    """
    start, guard = checkpoints.start, training.guard
    run_dir.begin(config, start=checkpoints.made_here, run_id=checkpoints.run_id)
    trackers = start_trackers(config.logger, run_dir, config, start=checkpoints.made_here, troubles=troubles)

    def evaluate(state: State, step: int) -> dict[str, Any]:
        metrics = training.evaluate(state, step)
        for tracker in trackers if training.samples else ():
            tracker.log_samples(step, training.samples)
        training.samples.clear()
        return metrics

    def export_step(info: StepInfo) -> None:
        first = training.exports[0]
        first.write(first.folder.with_name(f"{first.folder.name}-{info.step}"), info.state, info.metrics)

    def finish(info: StepInfo) -> None:
        with troubles.attempt("the export", "which starting it again would write"):
            for export in training.exports:
                export.write(export.folder, info.state, info.metrics)
        if is_first():
            with troubles.attempt("the report", "without it"):
                write_report(run_dir, training.name)

    memories = {**training.memories, "guard": guard}
    checkpoints.recall(memories)
    saving = checkpoints.hook(
        memories, training.models, troubles, total=total, best_by=training.best_by, measured=training.measured
    )
    start_metrics = evaluate(state, 0) if start == 0 else {}
    for tracker in trackers if start_metrics else ():
        tracker.log(0, start_metrics)
    with stopping_at_signals(checkpoints.request_stop):
        run_loop(
            state,
            training.batches,
            training.step,
            start=start,
            total=total,
            hooks=[
                *training.hooks,
                progress_hook(total, training.bar, start=start),
                *tracker_hooks(trackers, config.log_freq, total),
                guard.hook(),
                troubles.tolerate(Hook(export_step, every=config.export_freq, needs_state=True), "hf-STEP"),
                saving,
                Hook(on_end=finish, close=run_dir.close),
            ],
            evaluate=evaluate,
            metrics=checkpoints.metrics,
        )
    guard.check()
    checkpoints.check_end(troubles)
    models = "".join(f"{export.name}: {export.folder}   " for export in training.exports)
    say(f"{models}report: {run_dir.report}")
