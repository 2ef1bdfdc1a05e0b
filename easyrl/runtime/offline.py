"""What the offline trainers (SFT, reward models, DPO) share before the first step: their flags, and what is found.

A script finds what there is (`find_start`, `load_data`), opens its run (`open_run`), builds its own update and
evaluation, and hands them to `runtime.offline_run.train`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh
from tqdm import tqdm

from easyrl.core.config import flag
from easyrl.core.distributed import quiet, say
from easyrl.core.errors import UserError
from easyrl.data.dataset import HeldOutConfig, PackedDatasetConfig, load_dataset
from easyrl.data.loader import Batch, Loader
from easyrl.data.messages import Message
from easyrl.data.prompts import PromptDataset
from easyrl.data.templates import Template, load_template
from easyrl.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from easyrl.hf.export import check_replaceable
from easyrl.hf.model_card import ModelCard, name_of, template_of
from easyrl.hf.refs import FoundModel, check_length, find_model
from easyrl.models.long_attention import sees_stems
from easyrl.runtime.checkpoint import Checkpoints, open_checkpoints
from easyrl.runtime.metrics import timeless
from easyrl.runtime.run_config import RunConfig, compute_settings, find_shapes
from easyrl.runtime.run_dir import RunDir, make_run_dir
from easyrl.steps.optimizer import make_schedule, optimizer_facts, updates_in

HF_BEST = "hf_best"  # in the run's folder: the export of the weights that did best on held-out data


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
    lr: float = flag(2e-5, "Peak learning rate.", least=0, below=math.inf)
    end_lr: float = flag(
        0.0, "Learning rate after the last step of a linear or cosine schedule.", least=0, below=math.inf
    )
    warmup_ratio: float = flag(0.03, "Share of all steps over which the learning rate rises from 0.", least=0, most=1)

    def __post_init__(self) -> None:
        self.eval_dataset.check()
        if self.end_lr and self.lr_schedule == "constant":
            raise UserError(f"--end_lr={self.end_lr:g}: --lr_schedule=constant does not read it")

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
    if config.save_best and not config.eval_dataset.path:
        raise UserError("--save_best: nothing says which is the best, expected --eval_dataset.path, too")
    model = find_model(config.load_checkpoint, head=head, compute=compute_settings(config))
    flags, longest = config.longest
    check_length(model, f"--load_checkpoint={config.load_checkpoint}", longest, flags)
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
    stems = sees_stems(config.attention, mesh.devices.flat[0])
    loaders = [Loader(dataset, config.train_dataset, config.seed, find_shapes=find, stems=stems)]
    if config.eval_dataset.path:
        dataset = load_dataset(config.held_out, kind, template, "eval_dataset")
        held_out = config.held_out
        loader = Loader(
            dataset, held_out, config.seed, name="eval_dataset", find_shapes=find, keep_last=True, stems=stems
        )  # fmt: skip
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
    warmup = updates_in(config.warmup_ratio, total)
    return make_schedule(config.lr_schedule, config.lr, total, warmup, config.end_lr)


def open_run(
    config: OfflineConfig, script: str, loader: Loader, frozen: Sequence[FoundModel] = ()
) -> tuple[RunDir, Checkpoints]:
    """The folder of the run, and its checkpoints, with the one to go on from if there is one.

    `frozen` are the models that the run reads and does not train.

    Raises UserError when something other than an earlier export stands where one is to go, or for a checkpoint of
    another run.
    """
    run_dir = make_run_dir(config.output_dir, script, config.checkpoint_dir)
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
        title=f"{method} from {name_of(config.load_checkpoint)}",
        method=method,
        base_model=base_model,
        datasets=(data.path,),
        template=template_of(config.template),
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
