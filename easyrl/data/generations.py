"""Generations: a model's answers to prompts as rows of a file, and two sets of them side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from easyrl.core.errors import UserError
from easyrl.data.formats import Prompt, parse_row
from easyrl.data.messages import BadRow, Message, Messages, as_dicts, names, read_messages, wrong
from easyrl.data.prompts import PromptRow
from easyrl.data.readers import open_source

ANSWERS = ("response", "completion", "output")
ANSWERED = ("response", "ended", "sample", "score", "candidates")  # columns that generate writes
# Columns by which trainers know an example: a row made from an answer has its own and cannot keep another's.
TRAINED_ON = ("messages", "conversations", "prompt", "chosen", "rejected", "margin", "label", "text", *ANSWERS)


class Generation(NamedTuple):
    """One answer. It may be empty: a model that says nothing is compared like any other."""

    messages: Messages  # the conversation that it answers
    answer: str
    columns: dict[str, Any]  # the row's other columns

    @property
    def ended(self) -> bool:
        """Whether the model ended it by itself, which it is taken to have where the row does not say (`ended`)."""
        return self.columns.get("ended") is not False


def read_generations(path: str, flag: str) -> list[Generation]:
    """The rows of a file: a prompt as trainers read it (`messages`, `prompt`, `instruction`) with the answer beside it.

    The answer is the string `response`, `completion` or `output`, or else the last of `messages`. Raises UserError
    naming `flag`, file and row.
    """
    try:
        found = []
        for row in open_source(path).rows():
            try:
                found.append(_generation(row.value))
            except BadRow as error:
                raise error.at(row.where) from None
        if not found:
            raise UserError(f"{path}: found no row, expected answers to prompts")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    return found


def _generation(row: Any) -> Generation:
    column = next((name for name in ANSWERS if isinstance(row, dict) and row.get(name) is not None), None)
    prompt_row = row if column is None else {name: value for name, value in row.items() if name != column}
    (prompt,) = parse_row(prompt_row, "prompt")
    assert isinstance(prompt, Prompt)
    if column is not None:
        if not isinstance(row[column], str):
            raise wrong(column, row[column], "a string")
        return Generation(prompt.messages, row[column], prompt.columns)
    last = read_messages(row["messages"], "messages")[-1] if row.get("messages") else None
    if last is None or last.role != "assistant":
        raise BadRow(
            f"found no answer in {names(row)}, expected `response`, or `messages` that end with one", "columns"
        )
    return Generation(prompt.messages, last.content, prompt.columns)


def side_by_side(
    ours: list[Generation], theirs: list[Generation], flags: tuple[str, str]
) -> list[tuple[Generation, Generation]]:
    """The two answers to each prompt: matched by `id` where every row of both files has one of its own, else by order.

    Raises UserError naming one of `flags` when the files do not answer the same prompts.
    """
    our_ids, their_ids = _ids(ours), _ids(theirs)
    if our_ids and their_ids:
        for name, wanted, found in ((flags[1], our_ids, their_ids), (flags[0], their_ids, our_ids)):
            if missing := [identity for identity in wanted if identity not in found]:
                raise UserError(f"{name}: no row with the id {missing[0]!r}, expected the ids of the other file")
        theirs = [their_ids[identity] for identity in our_ids]
    if len(ours) != len(theirs):
        raise UserError(f"{flags[1]}: found {len(theirs)} rows, expected {len(ours)}, as in {flags[0]}")
    pairs = list(zip(ours, theirs, strict=True))
    for number, (one, other) in enumerate(pairs, 1):
        if one.messages != other.messages:
            raise UserError(f"{flags[1]}: row {number} of {flags[0]} answers another prompt, expected the same")
    return pairs


def _ids(rows: list[Generation]) -> dict[str | int, Generation]:
    """The rows by `id`, empty unless every row has one of its own."""
    by_id = {row.columns["id"]: row for row in rows if isinstance(row.columns.get("id"), str | int)}
    return by_id if len(by_id) == len(rows) else {}


class Candidate(NamedTuple):
    """One of the answers to a prompt. `score` is None where nothing scores."""

    response: str
    ended: bool  # False: cut off at the most tokens
    score: float | None = None

    def columns(self) -> dict[str, Any]:
        """As columns of a row."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def generation_rows(prompt: PromptRow, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """One row for each answer: the columns of the prompt's row, with `response`, `ended` and, if known, `score`.

    Of several answers, `sample` says which one it is, from 0.
    """
    numbers = [{"sample": number} for number in range(len(candidates))] if len(candidates) > 1 else [{}]
    return [_asked(prompt) | number | one.columns() for number, one in zip(numbers, candidates, strict=True)]


def best_row(prompt: PromptRow, candidates: Sequence[Candidate], chosen: int) -> dict[str, Any]:
    """The row of the answer `chosen` among several, which are all kept in `candidates`."""
    return _asked(prompt) | candidates[chosen].columns() | {"candidates": [one.columns() for one in candidates]}


def demonstration_row(prompt: PromptRow, answer: Candidate) -> dict[str, Any]:
    """The row that train_sft learns the answer from, with the prompt's other columns."""
    messages = as_dicts((*prompt.messages, Message("assistant", answer.response)))
    return {"messages": messages, **_others(prompt), "score": answer.score}


def preference_row(prompt: PromptRow, chosen: Candidate, rejected: Candidate) -> dict[str, Any]:
    """The row that train_rm and train_dpo learn the preference from, with the prompt's other columns.

    `margin` is the difference of the scores.
    """
    assert chosen.score is not None and rejected.score is not None
    sides = {
        name: as_dicts((*prompt.messages, Message("assistant", one.response)))
        for name, one in (("chosen", chosen), ("rejected", rejected))
    }
    scores = {"chosen_score": chosen.score, "rejected_score": rejected.score}
    return {**sides, "margin": chosen.score - rejected.score, **_others(prompt), **scores}


def _asked(prompt: PromptRow) -> dict[str, Any]:
    """The prompt's row without what it says of an earlier answer."""
    return {name: value for name, value in prompt.row.items() if name not in ANSWERED}


def _others(prompt: PromptRow) -> dict[str, Any]:
    return {name: value for name, value in prompt.columns.items() if name not in (*TRAINED_ON, *ANSWERED)}
