"""Runs every case with easyrl's steps and writes their metrics. `python -m tests.parity.easyrl_side DIR`

TRL pads its rows; here they are packed, several sequences to a row and rows in groups, as the trainers do it.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from easyrl.core.sharding import make_mesh, put, replicated
from easyrl.data.packing import Shape, pack
from easyrl.hf.refs import find_model, load_weights
from easyrl.models.families import ModelConfig, param_specs
from easyrl.steps.dpo import AnswerBatch, DPOConfig, make_answer_logprobs, make_dpo_step, place_answers
from easyrl.steps.kto import KTOBatch, make_kto_step
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.reward import RewardLossConfig, make_reward_step, place_reward_batch
from easyrl.steps.sft import make_sft_step, place_sft_batch
from easyrl.steps.state import create_train_state
from tests.parity.cases import (
    ALL_TOKENS,
    BATCH,
    BETAS,
    CLIP,
    EPSILON,
    MARGINS,
    METRICS,
    STEPS,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Case,
    prompt_of,
    run_all,
)

WIDTH = 32  # of padded batches
SHAPES = (Shape(2, 80), Shape(2, 48), Shape(2, 32))  # of groups of packed rows
Sequences = list[tuple[list[int], list[int]]]  # prompt and answer


def padded(sequences: Sequences) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [B, T], lengths [B], mask [B, T]): mask[b, t] is True where tokens[b, t + 1] is of the answer."""
    tokens, mask = np.zeros((len(sequences), WIDTH), np.int32), np.zeros((len(sequences), WIDTH), bool)
    for row, (prompt, answer) in enumerate(sequences):
        tokens[row, : len(prompt + answer)] = prompt + answer
        mask[row, len(prompt) - 1 : len(prompt + answer) - 1] = True
    return tokens, np.array([len(prompt + answer) for prompt, answer in sequences]), mask


def place_answered(sequences: Sequences, mesh: Mesh, reference: Callable, *, paired: bool) -> AnswerBatch:
    """Answers on the device, with what the reference says of them."""
    tokens, lengths, mask = padded(sequences)
    packing = pack(lengths, WIDTH, SHAPES, together=1 + paired)
    placed = place_answers(tokens, mask, np.zeros(len(tokens)), packing, mesh, paired=paired)
    return placed.replace(ref_logprobs=reference(placed.tokens, placed.mask, placed.plans))


def batches(case: Case, pairs: list[dict], mesh: Mesh, reference: Callable) -> Iterator[Any]:
    """The batch of each step, in TRL's order."""
    for start in range(0, STEPS * BATCH, BATCH):
        batch = pairs[start : start + BATCH]
        prompts = [prompt_of(case, pair["prompt"]) for pair in batch]
        chosen = [(prompt, pair["chosen"]) for prompt, pair in zip(prompts, batch, strict=True)]
        rejected = [(prompt, pair["rejected"]) for prompt, pair in zip(prompts, batch, strict=True)]
        both = [sequence for pair in zip(chosen, rejected, strict=True) for sequence in pair]
        if case.trainer == "SFT":
            tokens, lengths, mask = padded(chosen)
            if case.data == ALL_TOKENS:
                mask = np.arange(WIDTH) < lengths[:, None] - 1
            yield place_sft_batch(tokens, mask, pack(lengths, WIDTH, SHAPES), mesh)
        elif case.trainer == "Reward":
            tokens, lengths, _ = padded(both)
            margins = np.array([pair["margin"] if case.data == MARGINS else 0.0 for pair in batch])
            yield place_reward_batch(tokens, lengths, margins, pack(lengths, WIDTH, SHAPES, together=2), mesh)
        elif case.trainer == "KTO":
            labels = np.array([pair["label"] for pair in batch])
            answers = [good if label else bad for good, bad, label in zip(chosen, rejected, labels, strict=True)]
            # As TRL mismatches them: each prompt before the previous answer of the batch.
            mismatched = [(answer[0], answers[row - 1][1]) for row, answer in enumerate(answers)]
            place = partial(place_answered, mesh=mesh, reference=reference, paired=False)
            yield KTOBatch(place(answers), place(mismatched), put(labels, replicated(mesh)))
        else:
            yield place_answered(both, mesh, reference, paired=True)


def make_step(case: Case, cfg: ModelConfig, optimizer, mesh: Mesh) -> Callable:
    """The step that the case's script takes."""
    if case.trainer == "SFT":
        return make_sft_step(cfg, optimizer, mesh)
    if case.trainer == "Reward":
        return make_reward_step(cfg, optimizer, mesh, RewardLossConfig(**case.ours))
    make = make_kto_step if case.trainer == "KTO" else make_dpo_step
    return make(cfg, optimizer, mesh, DPOConfig(**case.ours))


def run(case: Case, folder: Path, pairs: list[dict], mesh: Mesh, reference: Callable) -> dict[str, list[float]]:
    """metric -> its value at every step."""
    head, name = ("reward", "reward") if case.trainer == "Reward" else ("lm", "policy")
    found = find_model(f"hf::{folder / name}")
    config = OptimizerConfig(*BETAS, EPSILON, WEIGHT_DECAY, CLIP)
    optimizer = make_optimizer(config, make_schedule("linear", case.learning_rate, STEPS, WARMUP_STEPS))
    state = create_train_state(load_weights(found, mesh, head=head), param_specs(found.cfg, head), optimizer, mesh)
    step = make_step(case, found.cfg, optimizer, mesh)
    curves: dict[str, list[float]] = {metric: [] for metric in METRICS[case.trainer]}
    for batch in batches(case, pairs, mesh, reference):
        state, metrics = step(state, batch)
        for metric, curve in curves.items():
            curve.append(float(metrics[metric].value))
    return curves


def main(folder: Path) -> None:
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    found = find_model(f"hf::{folder / 'reference'}")
    reference = partial(make_answer_logprobs(found.cfg, mesh), load_weights(found, mesh, head="lm"))
    versions = {"jax": jax.__version__}
    run_all(folder, "easyrl", versions, lambda case, pairs: run(case, folder, pairs, mesh, reference))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
