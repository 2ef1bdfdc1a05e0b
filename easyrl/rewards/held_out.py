"""How a policy does on held-out prompts."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from easyrl.core.distributed import quiet
from easyrl.data.prompts import PromptBatch, PromptDataset
from easyrl.rewards.score import Judged, Scored
from easyrl.rewards.sources import ResponseBatch
from easyrl.steps.rollout import SampledBatch

Result = TypeVar("Result", Scored, Judged)

EVAL_STEP = 2**31 - 1  # the "step" whose randomness the first batch has, at every evaluation; the next has that before


def score_held_out(
    prompts: PromptDataset,
    batch_size: int,
    score: Callable[[PromptBatch, int], tuple[SampledBatch, ResponseBatch, Result]],
) -> tuple[dict[str, float], ResponseBatch, Result]:
    """Scores responses to every prompt once: metrics over all of them, and the first batch to show.

    `score(batch, step)` samples and scores `batch_size` prompts with the randomness of that step; the last batch is
    filled up with the first prompts, which count once. Several responses to a prompt count alike.
    """
    count = len(prompts)
    scores, lengths, ended = [], [], []
    first: tuple[ResponseBatch, Result] | None = None
    for number, start in enumerate(tqdm(range(0, count, batch_size), desc="evaluating", leave=False, disable=quiet())):
        batch = prompts.take(np.arange(start, start + batch_size) % count)
        sampled, responses, scored = score(batch, EVAL_STEP - number)
        live = min(batch_size, count - start) * len(responses) // batch_size
        scores.append(scored.scores[:live])
        lengths.append(sampled.response_lengths[:live])
        ended.append(sampled.ended[:live])
        first = first or (responses, scored)
    assert first is not None
    metrics = {
        "eval/reward_mean": float(np.concatenate(scores).mean()),
        "eval/reward_std": float(np.concatenate(scores).std()),
        "eval/responses_len_mean": float(np.concatenate(lengths).mean()),
        "eval/ended_share": float(np.concatenate(ended).mean()),
    }
    return metrics, first[0], first[1]
