"""Reward models: a language model with a head of one number learns which answers people prefer.

    python -m easyrl.train_rm --load_checkpoint=hf::DIR --train_dataset.path=PAIRS.jsonl --output_dir=DIR ...

One step of the loop is one batch of pairs (or of labelled answers, --loss=pointwise), packed into rows.
docs/reward_models.md explains losses, flags and metrics.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.distributed import say
from easyrl.core.dtypes import DTYPES
from easyrl.core.masking import Mean, add_metrics
from easyrl.core.sharding import fetch, make_mesh
from easyrl.data.loader import Batch, Loader
from easyrl.data.tokenizer import classifier_pad_id
from easyrl.hf.export import export_model
from easyrl.hf.refs import load_weights, stored_as
from easyrl.hf.saved import SavedModel, statistics
from easyrl.models.families import param_specs
from easyrl.rewards.accuracy import ALL, Accuracy, accuracy_table, label_accuracies, pair_accuracies, subset_names
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
from easyrl.steps.reward import (
    RewardBatch,
    RewardLossConfig,
    by_label,
    make_reward_eval,
    make_reward_step,
    place_reward_batch,
)
from easyrl.steps.state import TrainState, abstract_train_state, create_train_state

SCRIPT, NAME = "train_rm", "Reward model"


@dataclasses.dataclass(frozen=True)
class Config(RewardLossConfig, OfflineConfig):
    """Train a reward model on preferences, from a language model or from another reward model."""

    lr: float = flag(1e-5, "Peak learning rate.", least=0, below=math.inf)
    subset_column: str = flag("subset", "Column of the held-out data that names subsets to report accuracy for.")

    def __post_init__(self) -> None:
        RewardLossConfig.__post_init__(self)
        OfflineConfig.__post_init__(self)


def main(config: Config) -> None:
    config = continue_named(config, SCRIPT)
    # ------------------------------------------------------------ what there is: everything but the weights
    mesh = make_mesh(config.mesh_dim)
    start, tokenizer, template = find_start(config, "reward")
    # A language model's pad token is a matter of generation, and often its end-of-text token.
    pad_id = start.pad_id if stored_as(start)[0] == "reward" else classifier_pad_id(tokenizer)
    paired = config.loss == "pairwise"
    loader, held_out = load_data(config, "pair" if paired else "labelled", template, mesh)
    run_dir, checkpoints = open_run(config, SCRIPT, loader)

    # ------------------------------------------------------------ weights, schedule, device programs
    total = count_steps(config, loader)
    optimizer = make_optimizer(config.optimizer, learning_rate(config, total))
    dtype, specs = DTYPES[config.param_dtype], param_specs(start.cfg, "reward")

    def first_state() -> TrainState:
        params = load_weights(
            start, mesh, head="reward", dtype=dtype, seed=config.seed, new_head="normal", trained=True
        )
        return create_train_state(params, specs, optimizer, mesh)

    state = checkpoints.restore(abstract_train_state(specs, dtype, optimizer, mesh), first_state)
    update = make_reward_step(start.cfg, optimizer, mesh, config, pad_id=pad_id)
    evaluate = make_reward_eval(start.cfg, mesh, config, pad_id=pad_id)

    # ------------------------------------------------------------ one step, one evaluation, one export
    measured: list[Accuracy] = []  # by the last evaluation

    def place(batch: Batch) -> RewardBatch:
        return place_reward_batch(batch.tokens, batch.lengths, batch.values, batch.packing, mesh)

    def loss_of(params: dict, batch: RewardBatch) -> Mean:
        return evaluate(params, batch)[0]["loss"]

    def measure(params: dict, held_out: Loader) -> dict[str, Any]:
        nonlocal measured
        sums: dict[str, Any] = {}
        samples, scores, lengths = [], [], []
        for batch in held_out_batches(held_out):
            metrics, batch_scores = evaluate(params, place(batch))
            sums = add_metrics(sums, metrics) if sums else metrics
            live = batch.samples >= 0
            samples.append(batch.samples[live])
            scores.append(fetch(batch_scores).reshape(len(live), -1)[live])
            lengths.append((batch.lengths - batch.prompt_lengths).reshape(len(live), -1)[live])
        sample, score, length = (np.concatenate(parts) for parts in (samples, scores, lengths))
        subsets = subset_names(held_out.dataset, sample, config.subset_column)
        if paired:
            measured = pair_accuracies(score, length, subsets)
        else:
            measured = label_accuracies(score[:, 0], held_out.dataset.values[sample], subsets)
        return {
            **by_label(sums),
            **{f"accuracy/{row.subset}": row.accuracy for row in measured if row.subset != ALL},
            **({"longer_wins": measured[0].longer_wins} if paired else {}),
            "reward_std": score.std(dtype=np.float64),
        }

    def export(folder: Path, params: dict, metrics: dict[str, float]) -> None:
        facts = {"loss": config.loss, "label_smoothing": config.label_smoothing, "center_coef": config.center_coef}
        export_model(
            folder, start.cfg, params, "reward",
            tokenizer=tokenizer,
            config_fields={"pad_token_id": pad_id, **statistics(metrics)},
            model_card=model_card(config, NAME, template, total, metrics, **facts),
        )  # fmt: skip

    method = Method(
        name=NAME, place=place, update=update, loss_of=loss_of, measure=measure, export=export,
        model=SavedModel("reward", start.cfg, "params", tokenizer, fields={"pad_token_id": pad_id}, dtype=dtype),
        bar={"loss": "loss", "accuracy": "accuracy", "eval": "eval/accuracy", "tok/s": "tokens_per_second"},
        best_by="accuracy",
    )  # fmt: skip
    train(config, run_dir, checkpoints, state, loader, held_out, method, total)
    if measured:
        say(accuracy_table(measured))


if __name__ == "__main__":
    run(main, Config)
