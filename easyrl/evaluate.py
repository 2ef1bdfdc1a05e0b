"""How good is a reward model, and which of two models answers better?

    python -m easyrl.evaluate --load_checkpoint_reward=REF --dataset=PAIRS.jsonl
    python -m easyrl.evaluate --load_checkpoint_reward=REF --generations=OURS.jsonl --baseline=THEIRS.jsonl
    python -m easyrl.evaluate --judge=COMMAND --generations=OURS.jsonl --baseline=THEIRS.jsonl

The first gives the accuracy of a reward model on preference pairs, by subset, beside that of "the longer answer wins".
The others give the share of prompts on which one set of answers beats another, by category, as a reward model or an
external judge sees it. docs/reward_models.md shows them at work.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.distributed import DistributedConfig, from_first, is_first, quiet
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.files import check_writable, write_atomic
from easyrl.core.sharding import make_mesh
from easyrl.data.dataset import PackedDatasetConfig, load_dataset
from easyrl.data.generations import Generation, read_generations, side_by_side
from easyrl.data.messages import BadRow
from easyrl.data.sequences import cut_left
from easyrl.data.templates import Template, load_template
from easyrl.data.tokenizer import check_vocabulary, load_tokenizer
from easyrl.hf.refs import find_model, load_weights
from easyrl.rewards.accuracy import accuracy_table, pair_accuracies, subset_names
from easyrl.rewards.judge import judge_both_orders
from easyrl.rewards.sources import encode_conversation
from easyrl.rewards.win_rate import win_rate_table, win_rates
from easyrl.steps.reward import SequenceScorer

REWARD = "--load_checkpoint_reward"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure a reward model on preference pairs, or one set of answers against another."""

    load_checkpoint_reward: str = flag(
        "",
        "The reward model: hf::DIR_OR_HUB_ID, easyrl::DIR, params::FILE@CONFIG (EasyLM's) or "
        "random::PRESET_OR_CONFIG_JSON.",
    )
    judge: str = flag("", "Command of an external judge (docs/reward_models.md), instead of a reward model.")
    dataset: str = flag("", "Preference pairs to measure the reward model on: a file, folder or hub id.")
    split: str = flag("", "Part of the pairs: a split's name, a slice of rows, or both, as in [2048:] or test[:100].")
    skip_bad_rows: bool = flag(False, "Leave out and count rows that cannot be used, instead of stopping at the first.")
    cache_dir: str = flag("", "Folder for tokenised data; empty: $EASYRL_CACHE, or else ~/.cache/easyrl.")
    generations: str = flag("", "Answers to compare, a file of rows with a prompt and a `response`.")
    baseline: str = flag("", "Answers to the same prompts, which they are compared with.")
    subset_column: str = flag("subset", "Column of the pairs that names subsets.")
    category_column: str = flag("category", "Column of the answers that names the category of the prompt.")
    exclude_category: str = flag(
        "", "Categories, separated by commas, without which the mean over categories is given once more."
    )
    output: str = flag("", "JSON file for the results. Empty: printed behind the table.")

    tokenizer: str = flag("", "Folder or hub id of the reward model's tokenizer. Empty: that of its folder.")
    template: str = flag(
        "tokenizer", "Chat format: tulu, vicuna, chatml, llama3, none, a Jinja file, or the tokenizer's own."
    )
    seq_length: int = flag(
        1024, "Tokens of a conversation that are read, at most those the model can read; longer ones are cut.", least=1
    )
    batch_size: int = flag(32, "Conversations scored at a time, over all devices.", least=1)
    mesh_dim: str = flag("1,-1,1", "Sizes of the mesh axes dp,fsdp,mp; also dp:1,fsdp:-1,mp:1. -1: what is left, once.")
    dtype: str = flag("bf16", "Format of the reward model.", choices=tuple(DTYPES))
    jax_distributed: DistributedConfig = flag(DistributedConfig(), "Several processes (docs/reliability.md).")

    def __post_init__(self) -> None:
        given = {name for name in ("dataset", "generations", "baseline") if getattr(self, name)}
        if given not in ({"dataset"}, {"generations", "baseline"}):
            found = ", ".join(f"--{name}" for name in sorted(given)) or "nothing"
            raise UserError(f"found {found}, expected --dataset, or --generations and --baseline")
        if bool(self.load_checkpoint_reward) == bool(self.judge):
            found = "both" if self.judge else "neither"
            raise UserError(f"found {found} of {REWARD} and --judge, expected one of them")
        if self.dataset and self.judge:
            raise UserError(f"--judge={self.judge}: does not judge a --dataset, expected {REWARD}")


def main(config: Config) -> None:
    if config.output:
        from_first(lambda: check_writable(config.output, "--output"))
    table, results = measure_accuracy(config) if config.dataset else measure_win_rate(config)
    if not is_first():
        return
    print(table, flush=True)
    text = json.dumps(results, ensure_ascii=False) + "\n"
    if config.output:
        with write_atomic(Path(config.output).expanduser()) as part:
            part.write_text(text, encoding="utf-8")
    else:
        print(text, end="", flush=True)


# ---------------------------------------------------------------- a reward model on preference pairs


def measure_accuracy(config: Config) -> tuple[str, dict[str, Any]]:
    """(table, results) of the reward model on the pairs of --dataset."""
    score, template, max_length = load_scorer(config)
    data = PackedDatasetConfig(
        path=config.dataset, split=config.split, seq_length=max_length, skip_bad_rows=config.skip_bad_rows,
        cache_dir=config.cache_dir,
    )  # fmt: skip
    try:
        dataset = load_dataset(data, "pair", template, "dataset")
    except UserError as error:  # what trainers group under a name are plain flags here
        raise UserError(str(error).replace("--dataset.path", "--dataset").replace("--dataset.", "--")) from None
    sequences = [sequence for pair in range(len(dataset)) for sequence in dataset.sequences(pair)]
    scores = score([sequence.tokens for sequence in sequences]).reshape(-1, 2)
    lengths = np.array([len(sequence.tokens) - sequence.prompt_length for sequence in sequences]).reshape(-1, 2)
    subsets = subset_names(dataset, range(len(dataset)), config.subset_column)
    rows = pair_accuracies(scores, lengths, subsets)
    results = {
        "reward_model": config.load_checkpoint_reward,
        "dataset": config.dataset,
        "split": config.split,
        "reward_mean": float(scores.mean(dtype=np.float64)),
        "reward_std": float(scores.std(dtype=np.float64)),
        "subsets": [row._asdict() for row in rows],
    }
    return f"{dataset.summary()}\n{accuracy_table(rows)}", results


def load_scorer(config: Config) -> tuple[Callable[[Sequence[np.ndarray]], np.ndarray], Template, int]:
    """(token sequences -> a score for each, the reward model's chat template, the most tokens it reads).

    Sequences 2i and 2i + 1 are the answers of pair i. Scoring raises RunFailed for a score that is not finite.
    """
    mesh = make_mesh(config.mesh_dim)
    dtype = DTYPES[config.dtype]
    found = find_model(config.load_checkpoint_reward, head="reward", compute={"dtype": dtype}, flag=REWARD)
    tokenizer = load_tokenizer(config.tokenizer or str(found.directory or ""))
    check_vocabulary(tokenizer, found.cfg.vocab_size)
    template = load_template(config.template, tokenizer)
    max_length = min(config.seq_length, found.cfg.max_positions)
    params = load_weights(found, mesh, head="reward", dtype=dtype)
    scorer = SequenceScorer(
        params,
        found.cfg,
        mesh,
        max_length=max_length,
        num_sequences=config.batch_size,
        pad_id=found.pad_id,
    )

    def score(sequences: Sequence[np.ndarray]) -> np.ndarray:
        starts = tqdm(range(0, len(sequences), config.batch_size), desc="scoring", disable=quiet())
        scores = np.concatenate([scorer(sequences[start : start + config.batch_size]) for start in starts])
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            pair, answer = divmod(int(wrong[0]), 2)
            raise RunFailed(
                f"{REWARD}={config.load_checkpoint_reward}: {len(wrong)} of {len(scores)} scores are not finite, the "
                f"first of them {scores[wrong[0]]}, of answer {answer + 1} of pair {pair + 1}"
            )
        return scores

    return score, template, max_length


# ---------------------------------------------------------------- one set of answers against another


def measure_win_rate(config: Config) -> tuple[str, dict[str, Any]]:
    """(table, results) of --generations against --baseline."""
    flags = (f"--generations={config.generations}", f"--baseline={config.baseline}")
    ours, theirs = read_generations(config.generations, flags[0]), read_generations(config.baseline, flags[1])
    pairs = side_by_side(ours, theirs, flags)
    categories = [category_of(pair, config.category_column) for pair in pairs]
    excluded = [name.strip() for name in config.exclude_category.split(",") if name.strip()]
    win_rates(np.zeros(len(pairs)), categories, excluded)  # a wrong name is known before hours of judging
    points, facts = judge(config, pairs, categories) if config.judge else score_both(config, pairs)
    rows = win_rates(points, categories, excluded)
    lengths = [float(np.mean([len(row.answer) for row in side])) for side in zip(*pairs, strict=True)]
    facts["mean_characters"] = dict(zip(("generations", "baseline"), lengths, strict=True))
    results = {
        "generations": config.generations,
        "baseline": config.baseline,
        "judge": config.judge or config.load_checkpoint_reward,
        **facts,
        "categories": [row._asdict() for row in rows],
    }
    lines = [f"{name.replace('_', ' ')}: {show(value)}" for name, value in facts.items()]
    return "\n".join([win_rate_table(rows), *lines]), results


def judge(
    config: Config, pairs: list[tuple[Generation, Generation]], categories: list[str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """(points, facts) by the external judge."""
    verdicts = judge_both_orders(config.judge, pairs, categories)
    return verdicts.points, {"first_wins": verdicts.first_wins, "consistent": verdicts.consistent}


def score_both(config: Config, pairs: list[tuple[Generation, Generation]]) -> tuple[np.ndarray, dict[str, Any]]:
    """(points, facts) by the reward model. A conversation that is too long loses its beginning, all but a
    beginning-of-text token. Equal answers tie: their scores may differ by what rounding makes of their places in a row.
    """
    score, template, max_length = load_scorer(config)
    try:
        sequences = [
            encode_conversation(template, row.messages, row.answer, ended=row.ended) for pair in pairs for row in pair
        ]
    except BadRow as error:
        raise UserError(f"--template={config.template}: {error}") from None
    cut = np.mean([len(sequence) > max_length for sequence in sequences])
    kept = [cut_left(sequence, max_length, template.bos_id) for sequence in sequences]
    ours, theirs = score(kept).reshape(-1, 2).astype(np.float64).T
    equal = [np.array_equal(one, other) for one, other in zip(kept[::2], kept[1::2], strict=True)]
    means = {"generations": float(ours.mean()), "baseline": float(theirs.mean())}
    ended = {
        name: float(np.mean([row.ended for row in rows]))
        for name, rows in zip(means, zip(*pairs, strict=True), strict=True)
    }
    return 0.5 + 0.5 * np.where(equal, 0.0, np.sign(ours - theirs)), {
        "reward_mean": means,
        "ended": ended,
        "cut": float(cut),
    }


def category_of(pair: tuple[Generation, Generation], column: str) -> str:
    """What either row says in `column`, "" if neither has it."""
    return next((str(row.columns[column]) for row in pair if row.columns.get(column) is not None), "")


def show(value: Any) -> str:
    """A number, or numbers by name, for people to read."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(part)}" for name, part in value.items())
    return f"{value:.4g}"


if __name__ == "__main__":
    run(main, Config)
