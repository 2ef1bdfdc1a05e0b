"""Recognises a row of a data file by its columns and turns it into a typed example.

A row maps column names to values, as a JSON line or a parquet row gives it; a null counts as an absent column. What
comes out depends on the `kind` a trainer asks for:

    sft       Demonstration  `messages` | `prompt` + `completion` | `instruction` + `output` | `text` | `chosen` of a
                             pair
    pair      Pair           `chosen` + `rejected`, with a column for the prompt where they hold the answers alone;
                             optional `margin`
    labelled  Labelled       `label` with `messages` | `prompt` + `completion` | `text`; a pair gives one of each label
    prompt    Prompt         `messages` | `turns` | `instruction` | `prompt` | `question` | the common start of a pair

`conversations` (ShareGPT) is another name for `messages`, and `question`, where nothing else asks, for `prompt`.
`input` (Alpaca) continues `instruction`, and `system` goes before messages that have no system message. Columns that
say different things about the same text are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from easyrl.data.messages import (
    BadRow,
    Message,
    Messages,
    check_turns,
    is_transcript,
    names,
    read_messages,
    read_transcript,
    show,
    wrong,
)

KINDS = ("sft", "pair", "labelled", "prompt")
EXPECTED = {
    "sft": "`messages`, `prompt` + `completion`, `instruction` + `output`, `text`, or `chosen` + `rejected`",
    "pair": "`chosen` + `rejected`",
    "labelled": "`label` with `messages`, `prompt` + `completion` or `text`, or else `chosen` + `rejected`",
    "prompt": "`messages`, `turns`, `instruction`, `prompt`, `question`, or `chosen` + `rejected`",
}
CONTRADICTION = "contradicting columns"
ASKING = ("prompt", "messages", "conversations", "instruction", "question")  # where a pair of answers has its prompt
UNLEARNT = {"sft": ("rejected",), "prompt": ("chosen", "rejected")}  # sides of a pair, by kind
EMPTY: tuple = (None, "", [])
LARGEST = (2 - 2**-23) * 2.0**127  # float32, which margins are kept as

Row = dict[str, Any]


@dataclass(frozen=True)
class Demonstration:
    """An answer to imitate. With an empty prompt it is raw text: no template, every token is trained on."""

    prompt: Messages
    completion: Messages
    columns: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. `margin` says by how much `chosen` is better, 0 where the row does not say."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    columns: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Labelled:
    """One answer, the last of its conversation, and whether it is a good one. With an empty prompt it is raw text."""

    prompt: Messages
    completion: Messages
    label: bool
    columns: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Messages that await an answer. `columns` are the row's other columns, handed to reward functions."""

    messages: Messages
    columns: Row = field(default_factory=dict)


Example = Demonstration | Pair | Labelled | Prompt


def parse_row(row: Any, kind: str) -> list[Example]:
    """The examples of one row: one, or two where labelled examples are made from a pair (chosen first).

    A completion may span several turns (assistant, user, assistant): it starts where `messages` first answers, or where
    `chosen` and `rejected` first differ in an answer. `columns` of the example are the columns that were not read.

    Raises BadRow, one line that names the column, what was found and what was expected.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"found {show(row)}, expected an object with named columns", "not an object")
    row = {name: value for name, value in row.items() if value is not None}
    paired = "chosen" in row or "rejected" in row
    if kind == "pair" or (paired and kind != "labelled"):
        pair = _pair(row, kind)
        if kind == "sft":
            return [Demonstration(pair.prompt, pair.chosen, pair.columns)]
        return [Prompt(pair.prompt, pair.columns) if kind == "prompt" else pair]
    if kind == "labelled":
        return _labelled_from_pair(row) if paired else [_labelled(row)]
    if kind == "sft":
        prompt, completion, used = _answered(row, kind)
        return [Demonstration(prompt, completion, _without(row, used))]
    return [_prompt(row)]


def _labelled(row: Row) -> Labelled:
    prompt, completion, used = _answered(row, "labelled")
    if "label" not in row:
        raise BadRow(f"column `label` is missing, found {names(row)}", "columns")
    label = row["label"]
    if not isinstance(label, int | float) or label not in (0, 1):  # a bool is an int
        raise wrong("label", label, "0, 1, true or false")
    return Labelled(prompt, completion, bool(label), _without(row, {*used, "label"}))


def _labelled_from_pair(row: Row) -> list[Example]:
    if "label" in row:
        raise BadRow("found `label` beside `chosen` and `rejected`, expected one or the other", CONTRADICTION)
    pair = _pair(row, "labelled")
    return [
        Labelled(pair.prompt, pair.chosen, True, pair.columns),
        Labelled(pair.prompt, pair.rejected, False, pair.columns),
    ]


def _prompt(row: Row) -> Prompt:
    found: list[str] = [name for name in ("messages", "conversations", "turns", "instruction", "prompt") if name in row]
    if not found and "question" in row:
        found = ["question"]
    if not found:
        raise _no_columns(row, "prompt")
    conversation = next((name for name in ("messages", "conversations") if name in row), None)
    if conversation and "prompt" in row:
        _agree(row, read_messages(row[conversation], conversation), conversation)
        found.remove("prompt")
    questions = {name: _question(row, name) for name in found}
    for name, question in questions.items():
        check_turns(question, name, last="user")
        if question != questions[found[0]]:
            raise _contradict(found[0], name)
    used = {"prompt"}.union(*(_columns_of(name) for name in found)) - {"turns"}
    return Prompt(questions[found[0]], _without(row, used))


def _question(row: Row, name: str) -> Messages:
    """What a column asks: up to the last user message, since an answer at the end is what the policy is to write."""
    messages = _opening(row, name)
    return messages[:-1] if messages[-1].role == "assistant" else messages


def _opening(row: Row, name: str) -> Messages:
    """What a column says, behind the row's system message.

    Of `turns`, questions to be asked one after the other, only the first can be asked before there is an answer.
    """
    if name == "instruction":
        messages: Messages = (Message("user", _instruction(row)),)
    elif name == "turns":
        turns = row[name]
        if not isinstance(turns, list | tuple) or not turns:
            raise wrong(name, turns, "a list of user messages")
        messages = (Message("user", _string(turns[0], "turns[0]")),)
    else:
        messages = read_messages(row[name], name, string_role="user" if name in ("prompt", "question") else None)
    return _with_system(row, messages)


def _columns_of(name: str) -> set[str]:
    """The columns that `_opening` reads for `name`."""
    return {name, "system"} | ({"input"} if name == "instruction" else set())


Parts = tuple[Messages, Messages, set[str]]  # prompt, completion, columns used


def _answered(row: Row, kind: str) -> Parts:
    """What a row with one answered conversation or one text says."""
    alpaca = "instruction" in row and "output" in row  # whose `text` is both in a template
    found = [name for name in LAYOUTS if name in row and name != ("text" if alpaca else "output")]
    if not found:
        raise _no_columns(row, kind)
    if len(found) > 1:
        raise BadRow(f"found both `{found[0]}` and `{found[1]}`, expected one of them", CONTRADICTION)
    return LAYOUTS[found[0]](row, found[0], kind)


def _text(row: Row, name: str, kind: str) -> Parts:
    return (), (Message("assistant", _string(row[name], name)),), {name}


def _conversation(row: Row, name: str, kind: str) -> Parts:
    messages = _opening(row, name)
    check_turns(messages, name, last="assistant")
    _agree(row, messages, name)
    # A label judges the last answer; a demonstration shows all of them.
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    start = answers[-1] if kind == "labelled" else answers[0]
    return messages[:start], messages[start:], {*_columns_of(name), "prompt"}


def _completion(row: Row, name: str, kind: str) -> Parts:
    asking = "instruction" if name == "output" else "prompt"
    if asking not in row:
        raise BadRow(f"column `{asking}` is missing beside `{name}`, found {names(row)}", "columns")
    prompt = _opening(row, asking)
    check_turns(prompt, asking, last="user")
    completion = read_messages(row[name], name, string_role="assistant")
    check_turns((*prompt, *completion), name, last="assistant")
    return prompt, completion, {*_columns_of(asking), name}


LAYOUTS: dict[str, Callable[[Row, str, str], Parts]] = {
    "messages": _conversation,
    "conversations": _conversation,
    "completion": _completion,
    "output": _completion,
    "text": _text,
}


def _pair(row: Row, kind: str) -> Pair:
    """The pair of a row that is read as `kind`.

    Nothing is asked of a side that this kind does not learn from: where it is empty or absent, the other stands for it.
    """
    sides: dict[str, tuple[Messages, set[str]]] = {}
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if name in UNLEARNT.get(kind, ()) and row.get(name) in EMPTY and row.get(other) not in EMPTY:
            continue
        if name not in row:
            found = f"column `{name}` is missing, found {names(row)}, expected {EXPECTED['pair']}"
            raise BadRow(found, "columns")
        sides[name] = _side(row, name)
    (chosen, used), (rejected, more) = (
        sides.get(name) or next(iter(sides.values())) for name in ("chosen", "rejected")
    )
    if kind != "prompt":
        check_turns(chosen, "chosen", last="assistant")
    if kind in ("pair", "labelled"):
        check_turns(rejected, "rejected", last="assistant")
        if chosen == rejected:
            raise BadRow("`chosen` and `rejected` are the same, expected two different answers", CONTRADICTION)
    both = list(zip(chosen, rejected, strict=False))
    same = next((index for index, (a, b) in enumerate(both) if a != b), len(both))
    # The prompt ends at the last place where both sides still agree and both go on with an answer.
    starts = [i for i, (a, b) in enumerate(both[: same + 1]) if a.role == b.role == "assistant"]
    if not starts:
        raise BadRow("`chosen` and `rejected` ask different things, expected two answers to one prompt", CONTRADICTION)
    start = starts[-1]
    check_turns(chosen[:start], "chosen", last="user")
    if "messages" in row and _opening(row, "messages") not in (chosen, chosen[:start]):
        raise _contradict("messages", "chosen")
    margin = _margin(row) if kind == "pair" else 0.0
    used |= more | {"chosen", "rejected", "prompt", "messages", "margin", "system"}
    return Pair(chosen[:start], chosen[start:], rejected[start:], margin, _without(row, used))


def _side(row: Row, name: str) -> tuple[Messages, set[str]]:
    """`chosen` or `rejected` as a whole conversation, and the columns of its prompt where it is an answer alone."""
    value = row[name]
    if isinstance(value, str) and is_transcript(value):
        messages = read_transcript(value)
    else:
        messages = read_messages(value, name, string_role="assistant")
    if messages[0].role != "assistant":
        messages = _with_system(row, messages)
        _agree(row, messages, name)
        return messages, set()
    asking = next((one for one in ASKING if one in row), None)
    if asking is None:
        found = f"column `prompt` is missing, and `{name}` starts with an answer; found {names(row)}"
        raise BadRow(found, "columns")
    prompt = _opening(row, asking)
    check_turns(prompt, asking, last="user")
    return (*prompt, *messages), _columns_of(asking)


def _agree(row: Row, messages: Messages, name: str) -> None:
    """Requires that `prompt`, where there is one, repeats the start of the conversation in column `name`.

    As a string it may be any one of the user's messages: UltraFeedback gives the first, other sets the last.
    """
    if "prompt" not in row:
        return
    prompt = read_messages(row["prompt"], "prompt", string_role="user")
    said = {message.content.strip() for message in messages if message.role == "user"}
    repeats = len(prompt) == 1 and prompt[0].role == "user" and prompt[0].content.strip() in said
    if not repeats and messages[: len(prompt)] != prompt:
        raise _contradict("prompt", name)


def _with_system(row: Row, messages: Messages) -> Messages:
    system = row.get("system", "")
    if not isinstance(system, str):
        raise wrong("system", system, "a string")
    if not system.strip() or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def _instruction(row: Row) -> str:
    """`instruction`, with Alpaca's `input` after a blank line where there is one."""
    instruction, more = _string(row["instruction"], "instruction"), row.get("input", "")
    if not isinstance(more, str):
        raise wrong("input", more, "a string")
    return f"{instruction}\n\n{more}" if more.strip() else instruction


def _margin(row: Row) -> float:
    value = row.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise wrong("margin", value, "a finite number, as a float32")
    if value < 0:
        raise wrong("margin", value, "0 or more, since `chosen` is the better answer")
    return float(value)


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise wrong(column, value, "a string")
    if not value.strip():
        raise BadRow(f"column `{column}`: found no text, expected some", "empty")
    return value


def _without(row: Row, used: set[str]) -> Row:
    return {name: value for name, value in row.items() if name not in used}


def _contradict(name: str, other: str) -> BadRow:
    return BadRow(f"`{name}` and `{other}` contradict each other, expected the same prompt in both", CONTRADICTION)


def _no_columns(row: Row, kind: str) -> BadRow:
    return BadRow(f"found {names(row)}, expected {EXPECTED[kind]}", "columns")
