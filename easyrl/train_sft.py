"""Supervised fine-tuning: a language model learns to give the answers it is shown.

    python -m easyrl.train_sft --load_checkpoint=hf::DIR --train_dataset.path=FILE.jsonl --output_dir=DIR ...

One step of the loop is one batch of answered prompts, packed into rows. docs/sft.md explains flags and metrics.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.dtypes import DTYPES
from easyrl.core.masking import Mean, add_metrics
from easyrl.core.sharding import make_mesh
from easyrl.data.loader import Batch, Loader
from easyrl.hf.export import export_model, generation_settings
from easyrl.hf.refs import load_weights, stop_ids_of
from easyrl.hf.saved import SavedModel
from easyrl.models.families import param_specs
from easyrl.runtime.offline import (
    OfflineConfig,
    count_steps,
    find_start,
    held_out_batches,
    learning_rate,
    load_data,
    model_card,
    open_run,
)
from easyrl.runtime.offline_run import Method, train
from easyrl.runtime.resume import continue_named
from easyrl.steps.optimizer import make_optimizer
from easyrl.steps.sft import SFTBatch, make_sft_eval, make_sft_step, perplexity, place_sft_batch
from easyrl.steps.state import TrainState, abstract_train_state, create_train_state

SCRIPT, NAME = "train_sft", "SFT"


@dataclasses.dataclass(frozen=True)
class Config(OfflineConfig):
    """Fine-tune a language model on answered prompts, or on plain text."""

    loss_on: str = flag(
        "answers",
        "The tokens to learn: those that the assistant writes (of plain text all), or all but the first of a sequence.",
        choices=("answers", "all"),
    )


def main(config: Config) -> None:
    config = continue_named(config, SCRIPT)
    # ------------------------------------------------------------ what there is: everything but the weights
    mesh = make_mesh(config.mesh_dim)
    start, tokenizer, template = find_start(config)
    loader, held_out = load_data(config, "sft", template, mesh)
    run_dir, checkpoints = open_run(config, SCRIPT, loader)

    # ------------------------------------------------------------ weights, schedule, device programs
    total = count_steps(config, loader)
    optimizer = make_optimizer(config.optimizer, learning_rate(config, total))
    dtype, specs = DTYPES[config.param_dtype], param_specs(start.cfg, "lm")

    def first_state() -> TrainState:
        params = load_weights(start, mesh, head="lm", dtype=dtype, seed=config.seed, trained=True)
        return create_train_state(params, specs, optimizer, mesh)

    state = checkpoints.restore(abstract_train_state(specs, dtype, optimizer, mesh), first_state)
    update = make_sft_step(start.cfg, optimizer, mesh)
    evaluate = make_sft_eval(start.cfg, mesh)

    # ------------------------------------------------------------ one step, one evaluation, one export
    def place(batch: Batch) -> SFTBatch:
        mask = batch.mask
        if config.loss_on == "all":
            mask = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None] - 1
        return place_sft_batch(batch.tokens, mask, batch.packing, mesh)

    def loss_of(params: dict, batch: SFTBatch) -> Mean:
        return evaluate(params, batch)["loss"]

    def measure(params: dict, held_out: Loader) -> dict[str, Any]:
        sums: dict[str, Any] = {}
        for batch in held_out_batches(held_out):
            metrics = evaluate(params, place(batch))
            sums = add_metrics(sums, metrics) if sums else metrics
        return sums | {"perplexity": perplexity(sums["loss"])}

    generation = generation_settings(None, stop_ids_of(start, template), tokenizer)

    def export(folder: Path, params: dict, metrics: dict[str, float]) -> None:
        export_model(
            folder, start.cfg, params, "lm",
            tokenizer=tokenizer, generation_config=generation,
            model_card=model_card(config, NAME, template, total, metrics, loss_on=config.loss_on),
        )  # fmt: skip

    method = Method(
        name=NAME, place=place, update=update, loss_of=loss_of, measure=measure, export=export,
        model=SavedModel("lm", start.cfg, "params", tokenizer, generation, dtype=dtype),
        bar={"loss": "loss", "perplexity": "eval/perplexity", "tok/s": "tokens_per_second"},
        measured_by=config.loss_on,
    )  # fmt: skip
    train(config, run_dir, checkpoints, state, loader, held_out, method, total)


if __name__ == "__main__":
    run(main, Config)
