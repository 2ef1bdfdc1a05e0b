"""Sampled responses as reward sources read them, and as samples.jsonl keeps them."""

from typing import Any

from easyrl.data.prompts import PromptBatch
from easyrl.data.tokenizer import Tokenizer
from easyrl.rewards.score import Judged, Scored
from easyrl.rewards.sources import ResponseBatch
from easyrl.steps.rollout import SampledBatch


def response_batch(batch: PromptBatch, sampled: SampledBatch, tokenizer: Tokenizer) -> ResponseBatch:
    """The responses to a batch of prompts as tokens and text; sample b * n + j is the j-th response to prompt b."""
    count, each = len(sampled.tokens), len(sampled.tokens) // len(batch.tokens)

    def repeat(values: list) -> list:
        return [value for value in values for _ in range(each)]

    return ResponseBatch(
        sequences=[sampled.tokens[row, : sampled.lengths[row]] for row in range(count)],
        prompts=repeat(batch.texts),
        responses=tokenizer.batch_decode([sampled.response(row) for row in range(count)], skip_special_tokens=True),
        messages=repeat(batch.messages),
        ended=sampled.ended,
        columns={name: repeat(values) for name, values in batch.columns.items()},
    )


def sample_rows(phase: str, responses: ResponseBatch, scored: Scored | Judged, count: int) -> list[dict[str, Any]]:
    """The first `count` responses as rows of samples.jsonl."""
    return [
        {
            "phase": phase,
            "prompt": responses.prompts[row],
            "response": responses.responses[row],
            "reward": float(scored.scores[row]),
            "ended": bool(responses.ended[row]),
        }
        for row in range(min(count, len(responses)))
    ]
