"""A run of an offline trainer (SFT, reward models, DPO) from its first step to its report."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from easyrl.core.config import to_dict
from easyrl.core.masking import Mean
from easyrl.core.sharding import fetch
from easyrl.data.loader import Batch, Loader
from easyrl.data.prompts import PromptDataset
from easyrl.hf.saved import SavedModel
from easyrl.runtime.checkpoint import Checkpoints, Memory
from easyrl.runtime.evaluation import Evaluation, digest
from easyrl.runtime.guard import Guard, bad_weights, check_weights, culprits, listed, terms_of
from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.offline import HF_BEST, OfflineConfig, learning_rate
from easyrl.runtime.recording import save_recording
from easyrl.runtime.run_dir import RunDir
from easyrl.runtime.training import Export, Training, run_training
from easyrl.runtime.troubles import Troubles
from easyrl.steps.state import TrainState

PlacedBatch = TypeVar("PlacedBatch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(Generic[PlacedBatch]):
    """What a trainer does in a run: how it learns, measures and exports.

    name: for people, as the title of the report.
    place: how a batch gets onto the devices.
    update: one step on it.
    loss_of: the loss on it alone, for finding the samples whose loss is not finite; None: it cannot be had again.
    measure: `measure(params, held_out) -> metrics`, called when there are held-out data; `best_by` is the one that
      picks the best step (see `Evaluation`).
    measured_by: a name of the settings that decide what `measure` finds of the same weights and data.
    export: `export(folder, params, metrics)` writes a model.
    model: what readers of the checkpoints need to know of it.
    bar: label and name of the metrics that the progress bar shows.
    hooks: the method's own, called before the others, so that they may add to the metrics.
    memories: what they remember from step to step, by name.
    faults: `faults(step)`, of one of the last two steps: what was done wrong by others, so that it had no loss.
    samples: rows for samples.jsonl, to which updates and evaluations append, and from which they are taken.
    """

    name: str
    place: Callable[[Any], PlacedBatch]
    update: Callable[[TrainState, PlacedBatch], tuple[TrainState, dict[str, Any]]]
    loss_of: Callable[[dict, PlacedBatch], Mean] | None
    measure: Callable[[dict, Any], dict[str, Any]]
    export: Callable[[Path, dict, dict[str, float]], None]
    model: SavedModel
    bar: Mapping[str, str]
    best_by: str = "loss"
    measured_by: str = ""
    hooks: Sequence[Hook] = ()
    memories: Mapping[str, Memory] = dataclasses.field(default_factory=dict)
    faults: Callable[[int], Sequence[str]] = lambda step: ()
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)


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
    troubles = Troubles()
    rate = jax.jit(learning_rate(config, total), out_shardings=state.updates.sharding)

    def export(folder: Path, params: dict, metrics: dict[str, float]) -> None:
        check_weights(folder, params)
        method.export(folder, params, metrics)

    measured = "" if held_out is None else digest(held_out.dataset.fingerprint, method.measured_by)
    evaluation = Evaluation(
        run_dir.path / "best.json",
        None if held_out is None else lambda params: method.measure(params, held_out),
        every=config.eval_freq,
        total=total,
        best_by=method.best_by,
        on_best=partial(export, run_dir.path / HF_BEST) if config.save_best else None,
        measured=measured,
        troubles=troubles,
    )

    def check_export(info: StepInfo) -> None:
        evaluation.check_export(run_dir.path / HF_BEST, checkpoints.folder)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        now = rate(state.updates)  # the optimizer counts as the state does: without the updates that are left out
        state, metrics = method.update(state, method.place(batch))
        metrics = metrics | {"learning_rate": now}
        if isinstance(batch, Batch):
            metrics["tokens/padding_share"] = batch.packing.padding_share()
        return state, metrics

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

        alone = []
        if (loss_of := method.loss_of) is not None:

            def is_bad(some: np.ndarray) -> bool:
                loss = loss_of(state.params, method.place(loader.take(some)))
                return not np.isfinite(fetch(loss).total)

            alone = culprits(samples, is_bad)
        return f"{terms} of the samples {listed(alone or samples.tolist())}"

    def keep(step: int, metrics: Mapping[str, float]) -> Path:
        """The batch of a step as a file for replay."""
        facts = {"step": step, "total": total, "config": to_dict(config), "metrics": dict(metrics)}
        batch = method.place(loader.batch(step - 1))
        return save_recording(run_dir.path / "batches" / f"step-{step}.safetensors", batch, facts)

    training = Training[TrainState](
        name=method.name,
        batches=loader.batches(checkpoints.start, total),
        step=step,
        evaluate=lambda state, step: evaluation(state.params, step) if step == 0 or evaluation.due(step) else {},
        exports=[Export("model", run_dir.hf, lambda folder, state, metrics: export(folder, state.params, metrics))],
        models=[method.model],
        bar=method.bar,
        best_by=f"eval/{method.best_by}",
        measured=measured,
        guard=Guard(config.max_bad_steps, explain, keep),
        memories={"evaluation": evaluation, **method.memories},
        hooks=[*method.hooks, *([Hook(on_end=check_export)] if config.save_best else [])],
        samples=method.samples,
    )
    run_training(config, run_dir, checkpoints, troubles, state, training, total)
