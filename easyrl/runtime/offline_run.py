"""A run of an offline trainer (SFT, reward models, DPO) from its first step to its report."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from easyrl.core.config import to_dict
from easyrl.core.distributed import is_first, say
from easyrl.core.masking import Mean
from easyrl.core.sharding import fetch
from easyrl.data.loader import Batch, Loader
from easyrl.data.prompts import PromptDataset
from easyrl.hf.saved import SavedModel
from easyrl.runtime.checkpoint import Checkpoints, Memory
from easyrl.runtime.evaluation import Evaluation
from easyrl.runtime.guard import Guard, bad_weights, check_weights, culprits, listed, terms_of
from easyrl.runtime.interrupt import stopping_at_signals
from easyrl.runtime.loop import Hook, StepInfo, run_loop
from easyrl.runtime.offline import HF_BEST, OfflineConfig, learning_rate
from easyrl.runtime.progress import progress_hook
from easyrl.runtime.recording import save_recording
from easyrl.runtime.report import write_report
from easyrl.runtime.run_dir import RunDir
from easyrl.runtime.trackers import start_trackers, tracker_hooks
from easyrl.runtime.troubles import Troubles
from easyrl.steps.state import TrainState

PlacedBatch = TypeVar("PlacedBatch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Generic[PlacedBatch]):
    """What a trainer does in a run: how it learns, measures and exports.

    name: for people, as the title of the report.
    place: how a batch gets onto the devices.
    update: one step on it.
    loss_of: the loss on it alone, for finding the samples whose loss is not finite.
    measure: `measure(params, held_out) -> metrics`, called when there are held-out data; `best_by` is the one that
      picks the best step (see `Evaluation`).
    export: `export(folder, params, metrics)` writes a model.
    model: what readers of the checkpoints need to know of it.
    bar: label and name of the metrics that the progress bar shows.
    hooks: the method's own, called before the others, so that they may add to the metrics.
    memories: what they remember from step to step, by name.
    faults: `faults(step)`, of one of the last two steps: what was done wrong by others, so that it had no loss.
    samples: rows for samples.jsonl, to which updates and evaluations append; None: there are none.
    """

    name: str
    place: Callable[[Any], PlacedBatch]
    update: Callable[[TrainState, PlacedBatch], tuple[TrainState, dict[str, Any]]]
    loss_of: Callable[[dict, PlacedBatch], Mean]
    measure: Callable[[dict, Any], dict[str, Any]]
    export: Callable[[Path, dict, dict[str, float]], None]
    model: SavedModel
    bar: Mapping[str, str]
    best_by: str = "loss"
    hooks: Sequence[Hook] = ()
    memories: Mapping[str, Memory] = dataclasses.field(default_factory=dict)
    faults: Callable[[int], Sequence[str]] = lambda step: ()
    samples: list[dict[str, Any]] | None = None


def train(
    config: OfflineConfig,
    run_dir: RunDir,
    checkpoints: Checkpoints,
    state: TrainState,
    loader: Loader | PromptDataset,
    held_out: Loader | PromptDataset | None,
    method: Method,
    total: int,
) -> None:
    """Runs the steps up to `total` on the loader's batches, with evaluation, checkpoints, exports and the report.

    `state` is that after step `checkpoints.start`.
    """
    run_dir.begin(config, start=checkpoints.made_here)
    troubles, start = Troubles(), checkpoints.start
    trackers = start_trackers(config.logger, run_dir, config, start=checkpoints.made_here, troubles=troubles)
    rate = jax.jit(learning_rate(config, total), out_shardings=state.updates.sharding)

    def export(folder: Path, params: dict, metrics: dict[str, float]) -> None:
        check_weights(folder, params)
        method.export(folder, params, metrics)

    evaluation = Evaluation(
        run_dir.path / "best.json",
        None if held_out is None else lambda params: method.measure(params, held_out),
        every=config.eval_freq,
        total=total,
        best_by=method.best_by,
        on_best=partial(export, run_dir.path / HF_BEST) if config.save_best else None,
        troubles=troubles,
    )

    def log_samples(step: int) -> None:
        if not method.samples:
            return
        for tracker in trackers:
            tracker.log_samples(step, method.samples)
        method.samples.clear()

    def step_fn(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        now = rate(state.updates)  # the optimizer counts as the state does: without the updates that are left out
        state, metrics = method.update(state, method.place(batch))
        metrics = metrics | {"learning_rate": now}
        if isinstance(batch, Batch):
            metrics["tokens/padding_share"] = batch.packing.padding_share()
        return state, metrics

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        metrics = evaluation(state.params, step) if evaluation.due(step) else {}
        log_samples(step)
        return metrics

    def export_step(info: StepInfo) -> None:
        export(run_dir.path / f"hf-{info.step}", info.state.params, info.metrics)

    def finish(info: StepInfo) -> None:
        with troubles.attempt("the export", "which starting it again would write"):
            export(run_dir.hf, info.state.params, info.metrics)
        if is_first():
            with troubles.attempt("the report", "without it"):
                write_report(run_dir, method.name)
        say(f"model: {run_dir.hf}   report: {run_dir.report}")

    def explain(step: int, metrics: Mapping[str, float], state: TrainState | None) -> str:
        """What was not finite in a step."""
        samples = loader.order.samples(step - 1)
        terms = terms_of(metrics, {"loss": "the loss", "grad_norm": "the gradient"})
        faults = listed(method.faults(step))
        if state is not None and (bad := bad_weights(state.params)):
            return f"{terms or faults}, from the weights {listed(bad)}"
        if not terms:
            return faults
        if state is None:
            return f"{terms} of a batch of the samples {listed(samples.tolist())}"

        def is_bad(some: np.ndarray) -> bool:
            loss = method.loss_of(state.params, method.place(loader.take(some)))
            return not np.isfinite(fetch(loss).total)

        alone = culprits(samples, is_bad)
        return f"{terms} of the samples {listed(alone or samples.tolist())}"

    def keep(step: int, metrics: Mapping[str, float]) -> Path:
        """The batch of a step as a file for replay."""
        facts = {"step": step, "total": total, "config": to_dict(config), "metrics": dict(metrics)}
        batch = method.place(loader.batch(step - 1))
        return save_recording(run_dir.path / "batches" / f"step-{step}.safetensors", batch, facts)

    guard = Guard(config.max_bad_steps, explain, keep)
    saving = checkpoints.hook(
        {"evaluation": evaluation, "guard": guard, **method.memories}, [method.model], troubles,
        total=total, best_by=f"eval/{method.best_by}",
    )  # fmt: skip
    start_metrics = evaluation(state.params, 0) if start == 0 else {}
    log_samples(0)
    for tracker in trackers if start_metrics else ():
        tracker.log(0, start_metrics)
    with stopping_at_signals(checkpoints.request_stop):
        run_loop(
            state,
            loader.batches(start, total),
            step_fn,
            start=start,
            total=total,
            hooks=[
                *method.hooks,
                progress_hook(total, method.bar, start=start),
                *tracker_hooks(trackers, config.log_freq, total, troubles),
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
