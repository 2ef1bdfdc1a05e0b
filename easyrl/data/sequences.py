"""From a row to token sequences of bounded length: parse, apply the template, cut."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from easyrl.core.errors import UserError
from easyrl.data.formats import Demonstration, Example, Labelled, Pair, Prompt, parse_row
from easyrl.data.messages import as_dicts
from easyrl.data.readers import Row
from easyrl.data.templates import Answered, Template

# Why a sample is left out.
TOO_LONG = "too long"  # under remove_truncated_samples
LABELLED_BAD = "answer labelled bad"  # `label` false, where answers are learnt (sft); a 0 may be a class of something
ALIKE = "answers alike"  # of a pair, once a template has trimmed them or the end in which they differ is cut off


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. A sequence is a prompt with its answer, or in the kind `prompt` a prompt alone."""

    seq_length: int
    max_prompt_length: int = 0  # 0: no limit but that the answer keeps its share, see `fit`
    remove_truncated: bool = False  # leave out what would have to be cut


class TokenSequence(NamedTuple):
    """A prompt with its answer. `is_answer[t]` says whether the assistant writes `tokens[t]`."""

    tokens: np.ndarray  # int32 [T]
    is_answer: np.ndarray  # bool [T]
    prompt_length: int  # tokens before the first answer


class Sample(NamedTuple):
    """One sample, tokenised: one sequence, or two for a pair (chosen, rejected), or none if it is left out."""

    sequences: tuple[TokenSequence, ...]
    value: float = 0.0  # a pair's margin, or 1.0 or 0.0 for a label
    columns: str = "{}"  # JSON of the columns that the trainer, its reports or reward functions may want
    prompt_cut: bool = False
    answer_cut: bool = False
    rewritten: int = 0
    left_out: str = ""  # why, as the report has it


def fit(prompt: int, completions: list[int], limits: Limits) -> tuple[int, list[int]]:
    """How many tokens of a prompt (its last ones) and of each completion (their first ones) to keep.

    Nothing is cut when all fits. Otherwise the prompt may keep `max_prompt_length` tokens, or, without that limit, what
    the longest completion leaves it but at least half of `seq_length`; a completion keeps what the prompt leaves it.
    Both sides of a pair see the same prompt.
    """
    room = limits.max_prompt_length
    if not room:
        room = max(limits.seq_length - max(completions, default=0), limits.seq_length // 2)
    kept = min(prompt, room)
    return kept, [min(length, limits.seq_length - kept) for length in completions]


@dataclass(frozen=True)
class Encoder:
    """Turns rows of one kind into samples. It can be sent to another process."""

    kind: str  # sft, pair, labelled or prompt
    template: Template
    limits: Limits

    def __post_init__(self) -> None:
        limits, tag = self.limits, self.template.tag_length
        room = limits.seq_length if self.kind == "prompt" else limits.max_prompt_length or limits.seq_length // 2
        if room < tag + 2:
            found = f"room for a prompt of {room} tokens, the assistant's tag alone takes {tag}"
            raise UserError(
                f"seq_length={limits.seq_length}, max_prompt_length={limits.max_prompt_length}: found {found}"
            )
        if self.kind != "prompt" and limits.max_prompt_length >= limits.seq_length:
            found = f"expected less than seq_length={limits.seq_length}, to leave room for an answer"
            raise UserError(f"max_prompt_length={limits.max_prompt_length}: {found}")

    def encode(self, row: Row) -> list[Sample]:
        """The samples of a row. Raises BadRow, without the row's place, when it cannot be used."""
        return [self._sample(example) for example in parse_row(row.value, self.kind)]

    def _sample(self, example: Example) -> Sample:
        if isinstance(example, Prompt):
            return self._prompt(example)
        if isinstance(example, Demonstration) and example.columns.get("label") is False:
            return Sample((), left_out=LABELLED_BAD)
        if isinstance(example, Pair):
            answers, value = [example.chosen, example.rejected], example.margin
        else:
            answers = [example.completion]
            value = float(example.label) if isinstance(example, Labelled) else 0.0
        encoded = self.template.encode_answered(example.prompt, *answers)
        # Both sides of a pair have the same prompt; it may take different ids only where a template looks at the
        # answer.
        prompt_length = max(len(one.prompt) for one in encoded)
        kept, kept_completions = fit(prompt_length, [len(one.completion) for one in encoded], self.limits)
        prompt_cut = kept < prompt_length
        answer_cut = any(kept < len(one.completion) for kept, one in zip(kept_completions, encoded, strict=True))
        if self.limits.remove_truncated and (prompt_cut or answer_cut):
            return Sample((), left_out=TOO_LONG)
        if isinstance(example, Labelled) and not example.prompt:
            # A whole text is judged at its end: it loses its beginning, as a long prompt does.
            encoded = [_last(one, length) for one, length in zip(encoded, kept_completions, strict=True)]
        sequences = tuple(self._join(one, kept, length) for one, length in zip(encoded, kept_completions, strict=True))
        if isinstance(example, Pair) and np.array_equal(sequences[0].tokens, sequences[1].tokens):
            return Sample((), left_out=ALIKE)  # no preference, and which scores higher would be a matter of rounding
        rewritten = sum(one.rewritten for one in encoded)
        return Sample(sequences, value, _json(example.columns), prompt_cut, answer_cut, rewritten)

    def _prompt(self, example: Prompt) -> Sample:
        tokens = self.template.encode_prompt(example.messages)
        prompt_cut = len(tokens) > self.limits.seq_length
        if prompt_cut and self.limits.remove_truncated:
            return Sample((), left_out=TOO_LONG)
        tokens = cut_left(tokens, self.limits.seq_length, self.template.bos_id)
        sequence = TokenSequence(tokens, np.zeros(len(tokens), bool), len(tokens))
        columns = {"messages": as_dicts(example.messages), "columns": example.columns}
        return Sample((sequence,), columns=_json(columns), prompt_cut=prompt_cut)

    def _join(self, encoded: Answered, prompt_length: int, completion_length: int) -> TokenSequence:
        prompt = cut_left(encoded.prompt, prompt_length, self.template.bos_id)
        is_answer = encoded.is_answer[:completion_length]
        # What a cut leaves of a later prompt, without an answer behind it, teaches nothing.
        completion_length = int(np.flatnonzero(is_answer)[-1]) + 1
        tokens = np.concatenate([prompt, encoded.completion[:completion_length]])
        marks = np.concatenate([np.zeros(len(prompt), bool), is_answer[:completion_length]])
        return TokenSequence(tokens, marks, len(prompt))


def cut_left(tokens: np.ndarray, length: int, bos_id: int | None) -> np.ndarray:
    """The last `length` (1 or more) of `tokens`, but still beginning with the beginning-of-text token if they did."""
    if len(tokens) <= length:
        return tokens
    if tokens[0] == bos_id:
        return np.concatenate([tokens[:1], tokens[len(tokens) - length + 1 :]])
    return tokens[len(tokens) - length :]


def _last(encoded: Answered, length: int) -> Answered:
    """With the last `length` tokens of the completion only."""
    start = len(encoded.completion) - length
    return encoded._replace(completion=encoded.completion[start:], is_answer=encoded.is_answer[start:])


def _json(columns: dict[str, Any]) -> str:
    return json.dumps(columns, ensure_ascii=False, default=str)
