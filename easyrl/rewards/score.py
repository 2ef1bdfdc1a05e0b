"""The reward of a batch of responses: every source, weighted, shaped, and measured."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from easyrl.rewards.shaping import RewardConfig, RunningMoments, apply_missing_eos, shape_rewards
from easyrl.rewards.sources import ResponseBatch, Source


class Scored(NamedTuple):
    """What the responses of a batch are paid.

    - rewards: float32 [B], the number on the response's last token
    - scores: float64 [B], the weighted sum of the sources after the rule for a missing end of text, in their units
    - keep: bool [B], False for responses that are not to be learnt from (--missing_eos=mask)
    - metrics: by name, over the kept responses
    - faults: a sentence for each response whose reward is not finite, naming the sources; none if it is masked or its
      score replaced
    """

    rewards: np.ndarray
    scores: np.ndarray
    keep: np.ndarray
    metrics: dict[str, float]
    faults: tuple[str, ...] = ()


class Judged(NamedTuple):
    """What the sources say of the responses of a batch.

    - scores: float64 [B], the weighted sum after the rule for a missing end of text, in the units of the sources
    - keep: bool [B], False for responses that are not to be learnt from (--missing_eos=mask, or no finite score)
    - metrics: by name, over the kept responses
    - faults: a sentence for each response whose score is not finite, as in `Scored`
    """

    scores: np.ndarray
    keep: np.ndarray
    metrics: dict[str, float]
    faults: tuple[str, ...] = ()


def judge_responses(
    batch: ResponseBatch, sources: Sequence[Source], weights: Sequence[float], missing_eos: str
) -> Judged:
    """The scores of a batch, for whoever ranks responses and pays nothing: steps 1 and 2 of `shaping`.

    Metrics: `env/reward_mean`, `env/reward_std`, `env/reward_min`, `env/reward_max` of the scores; with several sources
    `env/reward/<name>`, the mean of each before its weight; and what the sources report. Statistics are of the kept
    responses, and missing where there is none.
    """
    total, each, metrics = _ask(batch, sources, weights)
    scores, keep = apply_missing_eos(total, batch.ended, missing_eos)
    finite = np.isfinite(scores)
    return Judged(
        scores, keep & finite, metrics | _statistics(scores, keep & finite, each), _faults(each, keep, scores)
    )


def score_responses(
    batch: ResponseBatch,
    sources: Sequence[Source],
    weights: Sequence[float],
    config: RewardConfig,
    moments: RunningMoments,
) -> tuple[Scored, RunningMoments]:
    """Scores a batch and returns it with the running moments to hand to the next call. The order is that of `shaping`.

    Metrics are those of `judge_responses`, and with --normalize_rewards `env/reward_running_mean` and
    `env/reward_running_std`.
    """
    total, each, metrics = _ask(batch, sources, weights)
    shaped, moments = shape_rewards(total, batch.ended, config, moments)
    metrics |= _statistics(shaped.scores, shaped.keep, each)
    if config.normalize_rewards:
        metrics |= {"env/reward_running_mean": moments.mean, "env/reward_running_std": moments.std}
    faults = _faults(each, shaped.keep, shaped.rewards)
    return Scored(shaped.rewards, shaped.scores, shaped.keep, metrics, faults), moments


def _ask(
    batch: ResponseBatch, sources: Sequence[Source], weights: Sequence[float]
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """(weighted sum float64 [B], scores of each source by name, what the sources report)."""
    total = np.zeros(len(batch), np.float64)
    each: dict[str, np.ndarray] = {}
    metrics: dict[str, float] = {}
    for source, weight in zip(sources, weights, strict=True):
        raw, own = source.score(batch)
        total += weight * raw
        each[_unused(source.name, each)] = raw
        metrics |= own
    return total, each, metrics


def _statistics(scores: np.ndarray, keep: np.ndarray, each: dict[str, np.ndarray]) -> dict[str, float]:
    if not keep.any():
        return {}
    kept = scores[keep]
    metrics = {
        "env/reward_mean": float(kept.mean()),
        "env/reward_std": float(kept.std()),
        "env/reward_min": float(kept.min()),
        "env/reward_max": float(kept.max()),
    }
    if len(each) > 1:
        metrics |= {f"env/reward/{name}": float(raw[keep].mean()) for name, raw in each.items()}
    return metrics


def _faults(each: dict[str, np.ndarray], keep: np.ndarray, rewards: np.ndarray) -> tuple[str, ...]:
    """What is to be said of the rewards that are not finite, each once, however many sources it comes from."""

    def told(row: int) -> str:
        causes = [
            f"reward {name} of response {row} is {raw[row]:g}"
            for name, raw in each.items()
            if not np.abs(raw[row]) <= np.finfo(np.float32).max
        ]
        # Else each source is finite, and yet their weighted sum or what --reward_gain makes of it is not.
        return " and ".join(causes) or f"the sum of rewards of response {row} is not finite"

    return tuple(told(row) for row in np.flatnonzero(keep & ~np.isfinite(rewards)).tolist())


def _unused(name: str, taken: dict[str, np.ndarray]) -> str:
    """`name`, with a number if another source has it already."""
    number = 1
    unused = name
    while unused in taken:
        number += 1
        unused = f"{name}{number}"
    return unused
