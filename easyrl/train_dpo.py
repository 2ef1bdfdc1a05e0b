"""Direct preference optimisation: a language model learns from preferred answers, without a reward model or sampling.

    python -m easyrl.train_dpo --load_checkpoint=hf::DIR --train_dataset.path=PAIRS.jsonl --output_dir=DIR ...

    python -m easyrl.train_dpo --online --load_checkpoint=hf::DIR --train_dataset.path=PROMPTS.jsonl
                               --load_checkpoint_reward=hf::DIR ...

One step of the loop is one batch of pairs (or of labelled answers, --loss=kto), packed into rows; with --online of
prompts, to each of which the policy gives two answers that a reward ranks. docs/dpo.md explains losses, flags and
metrics.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from easyrl.core.command_line import run
from easyrl.core.config import flag, flag_specs
from easyrl.core.distributed import say
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.masking import Mean, add_metrics
from easyrl.core.sharding import check_batch, fetch, make_mesh, put, replicated
from easyrl.data.loader import Batch, Loader
from easyrl.data.mismatched import mismatched_loader
from easyrl.data.packing import Shape
from easyrl.data.prompts import PromptDataset
from easyrl.data.templates import Template
from easyrl.data.tokenizer import Tokenizer, check_vocabulary, pad_id
from easyrl.hf.export import export_model, generation_settings
from easyrl.hf.frozen import load_start
from easyrl.hf.model_card import ModelCard
from easyrl.hf.refs import FoundModel, check_length, find_model, load_weights, stop_ids_of
from easyrl.hf.saved import SavedModel
from easyrl.models.families import param_specs
from easyrl.models.long_attention import sees_stems
from easyrl.rewards.models import FoundSources, find_sources, named_sources
from easyrl.runtime.alarms import ChosenFalls, chosen_falls_hook, nothing_learnt_hook
from easyrl.runtime.evaluation import digest
from easyrl.runtime.offline import (
    OfflineConfig,
    Start,
    count_steps,
    find_start,
    held_out_batches,
    learning_rate,
    load_data,
    load_prompts,
    model_card,
    open_run,
)
from easyrl.runtime.offline_run import Method, train
from easyrl.runtime.online import EACH, OnlineConfig, OnlinePairs
from easyrl.runtime.reference import ReferenceModel, answers_of, make_reference
from easyrl.runtime.resume import continue_named
from easyrl.runtime.run_config import find_shapes
from easyrl.steps.dpo import KTO, AnswerBatch, DPOConfig, make_dpo_eval, make_dpo_step, with_total_loss
from easyrl.steps.kto import KTOBatch, make_kto_eval, make_kto_step, with_margins
from easyrl.steps.optimizer import make_optimizer
from easyrl.steps.sampling import Sampler
from easyrl.steps.state import abstract_train_state, create_train_state

SCRIPT = "train_dpo"
NO_PAIR = (
    "of no prompt two different answers could be told apart (--missing_eos=mask leaves out answers that were cut off)"
)
METHODS = {"ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}  # loss -> its name; others are DPO
Placer = Callable[[Batch], Any]  # a host batch -> the device batch that the step takes


@dataclasses.dataclass(frozen=True)
class Config(DPOConfig, OnlineConfig, OfflineConfig):
    """Tune a language model on preferences directly, held to a frozen reference."""

    load_checkpoint_reference: str = flag("", "The frozen reference. Empty: --load_checkpoint.")
    precompute_reference: bool = flag(
        True, "Ask the reference about all data before training, and keep what it says on disk for later runs; false: "
        "hold it in memory and ask it about every batch.",
    )  # fmt: skip
    lr: float = flag(5e-7, "Peak learning rate.", least=0, below=math.inf)
    warmup_ratio: float = flag(0.1, "Share of all steps over which the learning rate rises from 0.", least=0, most=1)

    def __post_init__(self) -> None:
        DPOConfig.__post_init__(self)
        OnlineConfig.__post_init__(self)
        OfflineConfig.__post_init__(self)
        if self.load_checkpoint_reference and not self.reads_reference:
            found = f"--load_checkpoint_reference={self.load_checkpoint_reference}"
            raise UserError(f"{found}: --loss={self.loss} needs no reference")
        if not self.online:
            return
        if self.loss == KTO:
            raise UserError("--loss=kto: learns from single answers, --online makes pairs; expected another loss")
        for name in ("batch_rows", "max_prompt_length"):
            if value := getattr(self.train_dataset, name):
                raise UserError(f"--train_dataset.{name}={value}: --online does not read it")

    @property
    def asks_beforehand(self) -> bool:
        """Whether the reference is asked about all answers before training: those drawn later cannot be."""
        return self.precompute_reference and not self.online

    @property
    def longest(self) -> tuple[str, int]:
        name, length = super().longest
        if not self.online:
            return name, length
        return f"{name} + --max_continuation_len", length + self.max_continuation_len

    @property
    def method(self) -> str:
        """The name of the loss for people."""
        return ("online " if self.online else "") + METHODS.get(self.loss, "DPO")


def main(config: Config) -> None:
    config = continue_named(config, SCRIPT)
    # ------------------------------------------------------------ what there is: everything but the weights
    mesh = make_mesh(config.mesh_dim)
    begin = find_start(config)
    start, tokenizer, template = begin
    found_reference = find_reference(config, start, tokenizer)
    unpaired = config.loss == KTO
    sources = None
    shapes: tuple[Shape, ...] = ()
    loader: Any
    held_out: Any
    if config.online:
        loader, held_out = load_prompts(config, template)
        sources = find_sources(config, template, dtype=DTYPES[config.dtype], max_length=config.longest[1])
        for data in (loader, held_out) if held_out else (loader,):
            sources.check(data.columns)
        shapes = pair_shapes(config, mesh)
    else:
        loader, held_out = load_data(config, "labelled" if unpaired else "pair", template, mesh)
    if unpaired:
        say(balance(config, loader.dataset.values))
    references = [found_reference] if config.reads_reference else []
    judges = [model.found for model in sources.models] if sources else []
    run_dir, checkpoints = open_run(config, SCRIPT, loader, [*references, *judges])
    measured = measured_by(config, checkpoints.frozen)

    # ------------------------------------------------------------ weights, what the reference says of the data
    dtype, specs = DTYPES[config.param_dtype], param_specs(start.cfg, "lm")
    # Asked beforehand, the model may be its own reference: it has not changed yet.
    itself = config.reads_reference and config.asks_beforehand and not config.load_checkpoint_reference
    params: Any = None
    if itself or not checkpoints.start:
        params = load_weights(start, mesh, head="lm", dtype=dtype, seed=config.seed, trained=True)
    reference = None
    if config.reads_reference:
        frozen, computed = params, DTYPES[config.dtype]
        if config.load_checkpoint_reference:
            frozen = load_weights(found_reference, mesh, head="lm", dtype=computed, seed=config.seed)
        elif not itself:
            frozen = load_start(start, mesh, dtype=computed, param_dtype=dtype, seed=config.seed)
        reference = make_reference(found_reference.cfg, frozen, mesh)
        del frozen

    def placer(loader: Loader, name: str) -> Placer:
        """How batches of `loader` get onto the devices, with what the reference says of them."""
        ask = partial(answers_of, mesh=mesh, reference=reference, beforehand=config.asks_beforehand)
        answers = ask(loader, name=name)
        if not unpaired:
            return answers
        mismatched = mismatched_loader(loader, config.train_dataset, config.seed)
        others = ask(mismatched, name=f"{name}, mismatched")

        def place(batch: Batch) -> KTOBatch:
            desirable = put(batch.values > 0.5, replicated(mesh))
            return KTOBatch(answers(batch), others(mismatched.take(batch.samples)), desirable)

        return place

    place: Any = None
    place_held_out: Any = None
    pairs = None
    if sources is not None:
        equal_start = not config.load_checkpoint_reference and not checkpoints.start
        pairs = online_pairs(
            config, begin, loader, sources, reference, mesh, shapes, equal_start=equal_start, measured_by=measured
        )  # fmt: skip
    else:
        place = placer(loader, "train_dataset")
        place_held_out = placer(held_out, "eval_dataset") if held_out else place
    if config.asks_beforehand:
        reference = None  # no longer needed, and its memory is

    # ------------------------------------------------------------ schedule, state, device programs
    total = count_steps(config, loader)
    optimizer = make_optimizer(config.optimizer, learning_rate(config, total))
    if checkpoints.start:
        params = None  # no longer needed, and there is to be room for those of the checkpoint
    first_state = partial(create_train_state, params, specs, optimizer, mesh)
    del params  # they go into the state, which is donated from step to step
    state = checkpoints.restore(abstract_train_state(specs, dtype, optimizer, mesh), first_state)
    del first_state
    make_step, make_eval = (make_kto_step, make_kto_eval) if unpaired else (make_dpo_step, make_dpo_eval)
    update = make_step(start.cfg, optimizer, mesh, config)
    evaluate = make_eval(start.cfg, mesh, config)

    # ------------------------------------------------------------ one step, one evaluation, one export
    def loss_of(params: dict, batch: AnswerBatch | KTOBatch) -> Mean:
        metrics = fetch(evaluate(params, batch))
        return (metrics if unpaired else with_total_loss(metrics, config))["loss"]

    def measure(params: dict, held_out: Loader) -> dict[str, Any]:
        sums: dict[str, Any] = {}
        for batch in held_out_batches(held_out):
            metrics = evaluate(params, place_held_out(batch))
            sums = add_metrics(sums, metrics) if sums else metrics
        return with_margins(sums) if unpaired else with_total_loss(sums, config)

    stop_ids = stop_ids_of(start, template, config.stop_ids)
    generation = generation_settings(config.sampling if config.online else None, stop_ids, tokenizer)

    def export(folder: Path, params: dict, metrics: dict[str, float]) -> None:
        export_model(
            folder, start.cfg, params, "lm",
            tokenizer=tokenizer, generation_config=generation,
            model_card=card(config, template, total, metrics),
        )  # fmt: skip

    model = SavedModel("lm", start.cfg, "params", tokenizer, generation, dtype=dtype)
    method: Method[Any]
    if pairs is not None:
        method = Method(
            name=config.method, place=pairs.place, update=pairs.step(update),
            loss_of=None,  # the pairs of a bad step would be judged anew: no sample by itself can be shown to be bad
            measure=pairs.measure, export=export, model=model,
            bar={"reward": "env/reward_mean", "KL": "objective/kl", "loss": "loss", "eval": "eval/reward_mean"},
            best_by="reward_mean", measured_by=measured,
            memories={"online": pairs}, faults=pairs.faults, samples=pairs.samples,
            hooks=[nothing_learnt_hook(lambda metrics: metrics["online/told_share"] > 0, NO_PAIR)],
        )  # fmt: skip
    else:
        alarm = ChosenFalls()
        method = Method(
            name=config.method, place=place, update=update, loss_of=loss_of,
            measure=measure, export=export, model=model,
            bar={"loss": "loss", "margin": "rewards/margins", "eval": "eval/loss", "tok/s": "tokens_per_second"},
            measured_by=measured, hooks=[chosen_falls_hook(alarm)], memories={"chosen_falls": alarm},
        )  # fmt: skip
    train(config, run_dir, checkpoints, state, loader, held_out, method, total)


# ---------------------------------------------------------------- small parts


def card(config: Config, template: Template, total: int, metrics: dict[str, float]) -> ModelCard:
    """What the README.md of the exported model says."""
    drawn: dict[str, Any] = {}
    if config.online:
        drawn = vars(config.sampling) | {"responses_per_prompt": EACH, "missing_eos": config.missing_eos}
    return dataclasses.replace(
        model_card(config, config.method, template, total, metrics, **config.facts, **drawn),
        reference_model=config.load_checkpoint_reference.partition("::")[2],
        reward_model=named_sources(config),
    )


def measured_by(config: Config, frozen: Mapping[str, str]) -> str:
    """A name of what decides how the same weights do on the same held-out data: the loss with its reference, or with
    --online how answers are drawn and scored. `frozen` has a digest of the models that say so, by flag.
    """
    if not config.online:
        return digest(config.facts, config.load_checkpoint_reference, sorted(frozen.items()))
    names = [spec.name for spec in flag_specs(OnlineConfig) if not spec.may_change]
    settings = {name: getattr(config, name) for name in names}
    return digest(settings, config.seed, frozen.get("load_checkpoint_reward"))


def online_pairs(
    config: Config,
    start: Start,
    prompts: PromptDataset,
    sources: FoundSources,
    reference: ReferenceModel | None,
    mesh: Mesh,
    shapes: tuple[Shape, ...],
    *,
    equal_start: bool,
    measured_by: str,
) -> OnlinePairs:
    """The policy's own answers as pairs; `equal_start`: the policy still has the reference's weights."""
    dtype = DTYPES[config.dtype]
    sample = Sampler(
        start.model.cfg, config.sampling, stop_ids=stop_ids_of(start.model, start.template, config.stop_ids),
        pad_id=pad_id(start.tokenizer), logprob_space="model", num_samples=EACH,
        decode_rows=config.decode_rows, mesh=mesh, rows=config.micro_batch_size,
    )  # fmt: skip
    num_responses = EACH * config.train_dataset.batch_size
    judges = sources.load(mesh, dtype=dtype, batch_size=num_responses, rows=config.micro_batch_size)
    share = config.train_dataset.share_prompts and sees_stems(config.attention, mesh.devices.flat[0])
    return OnlinePairs(
        config, prompts, sample, judges, sources.weights,
        None if reference is None else reference.logprobs, start.tokenizer, mesh,
        seed=config.seed, shapes=shapes, share_prompts=share, check_in=dtype if equal_start else "",
        measured_by=measured_by,
    )  # fmt: skip


def pair_shapes(config: Config, mesh: Mesh) -> tuple[Shape, ...]:
    """The groups of packed rows that --online learns from.

    Raises UserError for prompts, rows or a length of rows that the devices cannot share or that cannot hold a response.
    """
    data = config.train_dataset
    check_batch(data.batch_size, mesh, config.mesh_dim)
    check_batch(config.decode_rows, mesh, config.mesh_dim, "--decode_rows")
    _, longest = config.longest
    if data.row_length and data.row_length < longest:
        found = f"expected at least {longest}, a response with its prompt"
        raise UserError(f"--train_dataset.row_length={data.row_length}: {found}")
    return find_shapes(config, mesh, data.row_length or longest, together=EACH, sequences=EACH * data.batch_size)


def balance(config: Config, labels: np.ndarray) -> str:
    """How many answers are good and bad, and whether the weights of KTO make up for it (eq. 8 of its paper)."""
    good = int((labels > 0.5).sum())
    bad = len(labels) - good
    found = f"labels: {good:,} good, {bad:,} bad"
    if not (good and bad):
        return f"{found}: expected some of both"
    advised = config.desirable_weight * good / bad
    if 1 <= advised / max(config.undesirable_weight, 1e-9) <= 4 / 3:
        return found
    return f"{found}: advised is --undesirable_weight={advised:.3g}, or down to a quarter less"


def find_reference(config: Config, start: FoundModel, tokenizer: Tokenizer) -> FoundModel:
    """The model that --load_checkpoint_reference names, checked; the policy's own start when it names none."""
    if not config.load_checkpoint_reference:
        return start
    name = "--load_checkpoint_reference"
    compute = {"dtype": DTYPES[config.dtype], "attention": config.attention}
    found = find_model(config.load_checkpoint_reference, compute=compute, flag=name)
    flags, longest = config.longest
    check_length(found, f"{name}={config.load_checkpoint_reference}", longest, flags)
    check_vocabulary(tokenizer, found.cfg.vocab_size, f"{name}={config.load_checkpoint_reference}")
    return found


if __name__ == "__main__":
    run(main, Config)
