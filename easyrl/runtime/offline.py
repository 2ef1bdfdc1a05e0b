"""What the offline trainers (SFT, reward models, DPO) share: their flags, and everything of a run but its step.

A script finds what there is (`find_start`, `load_data`), builds its own update and evaluation, and hands them to
`train`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from easyrl.core.config import flag, to_dict
from easyrl.core.distributed import is_first, quiet, say
from easyrl.core.errors import UserError
from easyrl.core.masking import Mean
from easyrl.core.sharding import fetch
from easyrl.data.dataset import HeldOutConfig, PackedDatasetConfig, load_dataset
from easyrl.data.loader import Batch, Loader
from easyrl.data.messages import Message
from easyrl.data.prompts import PromptDataset
from easyrl.data.templates import Template, load_template
from easyrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from easyrl.hf.export import check_replaceable
from easyrl.hf.model_card import ModelCard
from easyrl.hf.refs import FoundModel, find_model
from easyrl.hf.saved import SavedModel
from easyrl.runtime.checkpoint import Checkpoints, Memory, open_checkpoints
from easyrl.runtime.evaluation import Evaluation
from easyrl.runtime.guard import Guard, bad_weights, culprits, listed, terms_of
from easyrl.runtime.interrupt import stopping_at_signals
from easyrl.runtime.loop import Hook, StepInfo, run_loop
from easyrl.runtime.metrics import timeless
from easyrl.runtime.progress import progress_hook
from easyrl.runtime.recording import save_recording
from easyrl.runtime.report import write_report
from easyrl.runtime.run_config import RunConfig, compute_settings, find_shapes
from easyrl.runtime.run_dir import RunDir, make_run_dir
from easyrl.runtime.trackers import start_trackers, tracker_hooks
from easyrl.runtime.troubles import Troubles
from easyrl.steps.optimizer import make_schedule, optimizer_facts
from easyrl.steps.state import TrainState

PlacedBatch = TypeVar("PlacedBatch")

HF_BEST = "hf_best"  # in the run's folder: the export of the weights that did best on held-out data
BAR = {"loss": "loss", "eval": "eval/loss", "tok/s": "tokens_per_second"}


@dataclasses.dataclass(frozen=True)
class OfflineConfig(RunConfig):
    """The flags of an offline trainer."""

    load_checkpoint: str = flag(
        "",
        "The model to start from: hf::DIR_OR_HUB_ID, easyrl::DIR (a run's checkpoint; one of this script's is gone on "
        "with, see --resume), params::FILE@CONFIG (EasyLM's) or random::PRESET_OR_CONFIG_JSON (with --tokenizer).",
    )
    tokenizer: str = flag("", "Folder or hub id of the tokenizer. Empty: that of --load_checkpoint.")
    template: str = flag(
        "tokenizer", "Chat format: tulu, vicuna, chatml, llama3, none, a Jinja file, or the tokenizer's own."
    )

    train_dataset: PackedDatasetConfig = flag(PackedDatasetConfig(), "Data to train on; a batch is one optimizer step.")
    eval_dataset: HeldOutConfig = flag(HeldOutConfig(), "Held-out data, cut and batched as the training data.")
    save_best: bool = flag(False, "Also export the weights of the best evaluation, to hf_best.", may_change=True)

    total_steps: int = flag(0, "Optimizer steps. 0: as many as --num_epochs passes take.", least=0)
    lr: float = flag(2e-5, "Peak learning rate.", least=0)
    end_lr: float = flag(0.0, "Learning rate after the last step of a linear or cosine schedule.", least=0)
    warmup_ratio: float = flag(0.03, "Share of all steps over which the learning rate rises from 0.", least=0, most=1)

    @property
    def held_out(self) -> PackedDatasetConfig:
        """The evaluation data as the training data are described."""
        return self.eval_dataset.like(self.train_dataset)

    @property
    def longest(self) -> tuple[str, int]:
        """The most tokens that the model is to read at once, and the flags that say so."""
        return "--train_dataset.seq_length", self.train_dataset.seq_length


class Start(NamedTuple):
    """What training starts from, before a weight is read."""

    model: FoundModel
    tokenizer: Tokenizer  # with the template as its chat template, ready for the export
    template: Template


def find_start(config: OfflineConfig, head: str = "lm") -> Start:
    """The model that --load_checkpoint names, to train with this head, with its tokenizer and chat template.

    Raises UserError naming the flag when one cannot be had, or they do not fit each other or the lengths asked for.
    """
    model = find_model(config.load_checkpoint, head=head, compute=compute_settings(config))
    name, longest = config.longest
    if model.cfg.max_positions < longest:
        raise UserError(
            f"{name}={longest}: the model of --load_checkpoint={config.load_checkpoint} reads up to "
            f"{model.cfg.max_positions} tokens"
        )
    tokenizer = load_tokenizer(config.tokenizer or str(model.directory or ""))
    check_vocabulary(tokenizer, model.cfg.vocab_size)
    template = load_template(config.template, tokenizer)
    tokenizer.chat_template = template.jinja
    return Start(model, tokenizer, template)


def load_prompts(config: OfflineConfig, template: Template) -> tuple[PromptDataset, PromptDataset | None]:
    """Prompts to draw answers to, in training and, if there are any, held out; prints what became of the rows."""
    prompts = [PromptDataset(config.train_dataset, template, config.seed)]
    if config.eval_dataset.path:
        prompts.append(PromptDataset(config.held_out, template, config.seed, name="eval_dataset", keep_last=True))
    for name, one in zip(("train_dataset", "eval_dataset"), prompts, strict=False):
        say(f"--{name}: {one.dataset.summary()}")
    return prompts[0], prompts[1] if len(prompts) > 1 else None


def load_data(config: OfflineConfig, kind: str, template: Template, mesh: Mesh) -> tuple[Loader, Loader | None]:
    """Batches of the training data and, if there are any, of the held-out data; prints what became of the rows.

    `kind` is one of `data.formats.KINDS`. Raises UserError naming flag and file.
    """
    dataset, find = load_dataset(config.train_dataset, kind, template), partial(find_shapes, config, mesh)
    loaders = [Loader(dataset, config.train_dataset, config.seed, find_shapes=find)]
    if config.eval_dataset.path:
        dataset = load_dataset(config.held_out, kind, template, "eval_dataset")
        held_out = config.held_out
        loader = Loader(dataset, held_out, config.seed, name="eval_dataset", find_shapes=find, keep_last=True)
        loaders.append(loader)
    for name, loader in zip(("train_dataset", "eval_dataset"), loaders, strict=False):
        say(f"--{name}: {loader.summary()}")
    return loaders[0], loaders[1] if len(loaders) > 1 else None


def held_out_batches(held_out: Loader) -> Iterator[Batch]:
    """Every batch of held-out data once, under a progress bar."""
    batches = held_out.order.steps(0)
    return iter(tqdm(held_out.batches(0, batches), desc="evaluating", total=batches, leave=False, disable=quiet()))


def count_steps(config: OfflineConfig, loader: Loader | PromptDataset) -> int:
    """Optimizer steps of the run."""
    return config.total_steps or sum(loader.order.steps(epoch) for epoch in range(config.num_epochs))


def learning_rate(config: OfflineConfig, total: int) -> optax.Schedule:
    """The learning rate of every one of `total` steps."""
    warmup = math.ceil(config.warmup_ratio * total)
    return make_schedule(config.lr_schedule, config.lr, total, warmup, config.end_lr)


def open_run(
    config: OfflineConfig, script: str, loader: Loader, frozen: Sequence[FoundModel] = ()
) -> tuple[RunDir, Checkpoints]:
    """The folder of the run, and its checkpoints, with the one to go on from if there is one.

    `frozen` are the models that the run reads and does not train.

    Raises UserError when something other than an earlier export stands where one is to go, or for a checkpoint of
    another run.
    """
    run_dir = make_run_dir(config.output_dir, script)
    for name in (run_dir.hf.name, HF_BEST):
        check_replaceable(run_dir.path / name)
    return run_dir, open_checkpoints(config, run_dir, script, loader.dataset.fingerprint, frozen)


def model_card(
    config: OfflineConfig, method: str, template: Template, total: int, metrics: dict[str, float], **facts: Any
) -> ModelCard:
    """What the README.md of the exported model says; `facts` are the method's own hyperparameters.

    A method with a reference or a source of reward adds them by `dataclasses.replace`.
    """
    base_model = config.load_checkpoint.partition("::")[2]
    data = config.train_dataset
    return ModelCard(
        title=f"{method} from {Path(base_model).name}",
        method=method,
        base_model=base_model,
        datasets=(data.path,),
        template=config.template,
        input_format=template.render((Message("user", "Your message here!"),), add_generation_prompt=True),
        hyperparameters={
            "learning_rate": config.lr,
            "total_train_batch_size": f"{data.batch_rows} packed rows" if data.batch_rows else data.batch_size,
            **optimizer_facts(config.optimizer),
            "lr_scheduler_type": config.lr_schedule,
            "lr_scheduler_warmup_ratio": config.warmup_ratio,
            **({} if config.total_steps else {"num_epochs": config.num_epochs}),
            "training steps": total,
            "maximum sequence length": data.seq_length,
            **{name.replace("_", " "): value for name, value in facts.items()},
            "seed": config.seed,
        },
        metrics=timeless(metrics),
    )


def train(
    config: OfflineConfig,
    run_dir: RunDir,
    checkpoints: Checkpoints,
    state: TrainState,
    loader: Loader | PromptDataset,
    held_out: Loader | PromptDataset | None,
    place: Callable[[Any], PlacedBatch],
    update: Callable[[TrainState, PlacedBatch], tuple[TrainState, dict[str, Any]]],
    loss_of: Callable[[dict, PlacedBatch], Mean],
    measure: Callable[[dict, Any], dict[str, Any]],
    export: Callable[[Path, dict, dict[str, float]], None],
    model: SavedModel,
    *,
    total: int,
    method: str,
    best_by: str = "loss",
    bar: dict[str, str] = BAR,
    hooks: Sequence[Hook] = (),
    memories: Mapping[str, Memory] | None = None,
    samples: list[dict[str, Any]] | None = None,
) -> None:
    """Runs the steps up to `total` on the loader's batches, with evaluation, checkpoints, exports and the report.

    Args:
      state: the state after step `checkpoints.start`.
      place: how a batch gets onto the devices.
      update: one step on it.
      loss_of: the loss on it alone, for finding the samples whose loss is not finite.
      measure: `measure(params, held_out) -> metrics`, called when there are held-out data; `best_by` is the one that
        picks the best step (see `Evaluation`).
      export: `export(folder, params, metrics)` writes a model.
      model: what readers of the checkpoints need to know of it.
      method: its name for people, as the title of the report.
      bar: label and name of the metrics that the progress bar shows.
      hooks: the method's own, called before the others, so that they may add to the metrics.
      memories: what they remember from step to step, by name.
      samples: rows for samples.jsonl, to which updates and evaluations append.
    """
    run_dir.begin(config, start=checkpoints.start)
    troubles = Troubles()
    start = checkpoints.start
    trackers = start_trackers(config.logger, run_dir, config, start=start, troubles=troubles)
    rate = learning_rate(config, total)
    evaluation = Evaluation(
        run_dir.path / "best.json",
        None if held_out is None else lambda params: measure(params, held_out),
        every=config.eval_freq,
        total=total,
        best_by=best_by,
        on_best=partial(export, run_dir.path / HF_BEST) if config.save_best else None,
        troubles=troubles,
    )

    def log_samples(step: int) -> None:
        for tracker in trackers if samples else ():
            tracker.log_samples(step, samples or ())
        if samples:
            samples.clear()

    def numbered_step(state: TrainState, numbered: tuple[int, Any]) -> tuple[TrainState, dict[str, Any]]:
        number, batch = numbered
        state, metrics = update(state, place(batch))
        metrics = metrics | {"learning_rate": rate(number - 1)}
        if isinstance(batch, Batch):
            metrics["tokens/padding_share"] = batch.packing.padding_share()
        if evaluation.due(number):
            metrics |= evaluation(state.params, number)
        log_samples(number)
        return state, metrics

    def export_step(info: StepInfo) -> None:
        export(run_dir.path / f"hf-{info.step}", info.state.params, info.metrics)

    def finish(info: StepInfo) -> None:
        with troubles.attempt("the export", "which starting it again would write"):
            export(run_dir.hf, info.state.params, info.metrics)
        if is_first():
            with troubles.attempt("the report", "without it"):
                write_report(run_dir, method)
        say(f"model: {run_dir.hf}   report: {run_dir.report}")

    def explain(step: int, metrics: Mapping[str, float], state: TrainState | None) -> str:
        """What was not finite in a step."""
        samples = loader.order.samples(step - 1)
        terms = terms_of(metrics, {"loss": "the loss", "grad_norm": "the gradient"})
        if state is None:
            return f"{terms} of a batch of the samples {listed(samples.tolist())}"
        if bad := bad_weights(state.params):
            return f"{terms}, from the weights {listed(bad)}"
        is_bad = lambda some: not np.isfinite(fetch(loss_of(state.params, place(loader.take(some)))).total)
        alone = culprits(samples, is_bad)
        return f"{terms} of the samples {listed(alone or samples.tolist())}"

    def keep(step: int, metrics: Mapping[str, float]) -> Path:
        """The batch of a step as a file for replay."""
        facts = {"step": step, "total": total, "config": to_dict(config), "metrics": dict(metrics)}
        return save_recording(
            run_dir.path / "batches" / f"step-{step}.safetensors", place(loader.batch(step - 1)), facts
        )

    guard = Guard(config.max_bad_steps, explain, keep)
    saving = checkpoints.hook(
        {"evaluation": evaluation, "guard": guard, **(memories or {})}, [model], troubles,
        total=total, best_by=f"eval/{best_by}",
    )  # fmt: skip
    start_metrics = evaluation(state.params, 0) if start == 0 else {}
    log_samples(0)
    for tracker in trackers if start_metrics else ():
        tracker.log(0, start_metrics)
    with stopping_at_signals(checkpoints.request_stop):
        run_loop(
            state,
            enumerate(loader.batches(start, total), start + 1),
            numbered_step,
            start=start,
            total=total,
            hooks=[
                *hooks,
                progress_hook(total, bar, start=start),
                *tracker_hooks(trackers, config.log_freq, troubles),
                guard.hook(),
                saving,
                troubles.tolerate(Hook(export_step, every=config.export_freq, needs_state=True), "hf-STEP"),
                Hook(on_end=finish, close=run_dir.close),
            ],
            metrics=checkpoints.metrics,
        )
    guard.check()
    checkpoints.check_end(troubles)
