"""Messages: who said what, read from the spellings that data files use, and checked for turns."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from easyrl.core.errors import UserError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadRow(UserError):
    """One row that cannot be used. `reason` is the heading under which the report counts it."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return BadRow, (str(self), self.reason)

    def at(self, where: str) -> "BadRow":
        """The same complaint, naming the file and the row."""
        return BadRow(f"{where}: {self}", self.reason)


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


Messages = tuple[Message, ...]


def as_dicts(messages: Messages) -> list[dict[str, str]]:
    """The form that chat templates and JSON take."""
    return [{"role": message.role, "content": message.content} for message in messages]


def read_messages(value: Any, column: str, string_role: str | None = None) -> Messages:
    """A column's messages. With `string_role`, a plain string is one message of that role.

    An item is {role, content} or ShareGPT's {from: human|gpt, value}; one by itself is a list of one. An empty system
    message is left out: it says nothing, and many converters write one on every row. Raises BadRow.
    """
    if isinstance(value, str) and string_role is not None:
        return read_prompt_text(value) if string_role == "user" else (Message(string_role, value),)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise wrong(column, value, "a list of messages" if string_role is None else "a string or a list of messages")
    messages = [_message(item, f"{column}[{index}]") for index, item in enumerate(value)]
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    if not messages:
        raise BadRow(f"column `{column}`: found no message, expected some", "empty")
    return tuple(messages)


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise wrong(place, item, "an object with `role` and `content`")
    role, content = (
        next((item[key] for key in spellings if item.get(key) is not None), None)
        for spellings in (("role", "from"), ("content", "value"))
    )
    for name, found in (("role", role), ("content", content)):
        if found is None:
            raise BadRow(f"column `{place}`: `{name}` is missing, found {names(item)}", "columns")
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        raise wrong(f"{place}.role", role, f"one of {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise BadRow(f"column `{place}`: found `tool_calls`, expected messages of text alone", "wrong value")
    if not isinstance(content, str):
        raise wrong(f"{place}.content", content, "a string")
    return Message(role, content)


def check_turns(messages: Messages, column: str, *, last: str) -> None:
    """Requires an optional system message, then user and assistant by turns, none empty, ending with `last`."""
    expected = "user"
    for index, message in enumerate(messages):
        place = f"column `{column}`, message {index + 1}"
        if message.role == "system" and index == 0:
            continue
        if message.role != expected:
            raise BadRow(f"{place}: found role {message.role!r}, expected {expected!r}", "roles out of turn")
        if not message.content.strip():
            raise BadRow(f"{place}: found no text from {message.role!r}, expected some", "empty")
        expected = "assistant" if expected == "user" else "user"
    if not messages or messages[-1].role != last:
        found = repr(messages[-1].role) if messages else "nothing"
        raise BadRow(f"column `{column}` ends with {found}, expected {last!r}", "roles out of turn")


def is_transcript(text: str) -> bool:
    """Whether a string is a Human/Assistant transcript, the layout of HH-RLHF."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def read_transcript(text: str) -> Messages:
    """The turns of a transcript, cut where Human: or Assistant: follows a blank line; white space around is removed."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(TRANSCRIPT_ROLES[who], said.strip()) for who, said in turns)


def read_prompt_text(text: str) -> Messages:
    """A prompt given as one string: a user message, or a transcript (whose open last `Assistant:` is left out)."""
    if not is_transcript(text):
        return (Message("user", text),)
    messages = read_transcript(text)
    return messages[:-1] if messages[-1].role == "assistant" and not messages[-1].content else messages


def wrong(column: str, value: Any, expected: str) -> BadRow:
    """The complaint about a value of the wrong type or range."""
    return BadRow(f"column `{column}`: found {show(value)}, expected {expected}", "wrong value")


def names(row: Mapping) -> str:
    """The names of a row's columns, for a complaint."""
    found = [f"`{name}`" for name in row]
    return ", ".join(found[:8] + ["..."] * (len(found) > 8)) if found else "no column"


def show(value: Any) -> str:
    """A value, short enough for a complaint."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
