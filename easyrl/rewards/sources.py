"""Sources of reward: models with the policy's tokenizer, models with another one, Python functions."""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from easyrl.core.ahead import Call
from easyrl.core.distributed import from_first
from easyrl.core.errors import UserError
from easyrl.data.messages import Message, Messages, as_dicts
from easyrl.data.sequences import cut_left
from easyrl.data.templates import Template

# Token ids of whole conversations, ragged -> one number each. On the device; built by steps/.
ScoreTokens = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class ResponseBatch:
    """The responses of a step, in everything that a source may want of them. Every list has B entries."""

    sequences: Sequence[np.ndarray]  # int32 [length], prompt and response as the policy has them
    prompts: Sequence[str]  # text of the prompt as the policy reads it
    responses: Sequence[str]  # text of the response without special tokens
    messages: Sequence[Messages]  # the conversation that the response answers
    ended: np.ndarray  # bool [B], False where the response was cut off
    columns: Mapping[str, Sequence[Any]]  # the other columns of the data

    def __len__(self) -> int:
        return len(self.responses)


@dataclass(frozen=True)
class Source:
    """`score(batch)` gives one number a response, float64 [B], and metrics of its own. `name` stands in metrics.

    `check(columns)` raises UserError when data with these other columns lack one that the source needs. `calls()` are
    its calls of device programs, for compiling them beforehand.
    """

    name: str
    score: Callable[[ResponseBatch], tuple[np.ndarray, dict[str, float]]]
    check: Callable[[Collection[str]], None] = lambda columns: None
    calls: Callable[[], Sequence[Call]] = tuple


def model_source(name: str, score_tokens: ScoreTokens) -> Source:
    """A reward model with the policy's tokenizer: it reads the very tokens that were sampled, no end token added."""

    def score(batch: ResponseBatch) -> tuple[np.ndarray, dict[str, float]]:
        return _checked(score_tokens(batch.sequences), len(batch), f"reward model {name}"), {}

    return Source(name, score)


def retokenized_source(name: str, template: Template, max_length: int, score_tokens: ScoreTokens) -> Source:
    """A reward model with a tokenizer and chat template of its own.

    The conversation and the response's text are rendered with `template` and encoded anew. The template's end token
    follows a response that ended, and no other: a model with the policy's tokenizer would see the same. A conversation
    that has become longer than `max_length` tokens loses its beginning, all but a beginning-of-text token, as the score
    is read at its end; the share of those is the metric `env/reward/<name>_cut`. Raises UserError when the template
    refuses a conversation.
    """

    def score(batch: ResponseBatch) -> tuple[np.ndarray, dict[str, float]]:
        sequences = []
        for row, (messages, response, ended) in enumerate(
            zip(batch.messages, batch.responses, batch.ended, strict=True)
        ):
            try:
                sequences.append(encode_conversation(template, messages, response, ended=bool(ended)))
            except UserError as error:
                raise UserError(f"reward model {name}: response {row} of the batch: {error}") from error
        cut = sum(len(sequence) > max_length for sequence in sequences) / len(sequences)
        scores = score_tokens([cut_left(sequence, max_length, template.bos_id) for sequence in sequences])
        return _checked(scores, len(batch), f"reward model {name}"), {f"env/reward/{name}_cut": cut}

    return Source(name, score)


def encode_conversation(template: Template, messages: Messages, response: str, *, ended: bool) -> np.ndarray:
    """Token ids, int32 [length], of `messages` answered by `response`, with its end token only if it `ended`.

    They are those that a reward model is trained on. It is trained on no empty answer: one has no token but its end.
    """
    if response.strip():
        (answered,) = template.encode_answered(messages, (Message("assistant", response),))
        ids = np.concatenate([answered.prompt, answered.completion])
    else:
        ids = np.append(template.encode_prompt(messages), np.int32(template.end_id))
    return ids if ended else ids[:-1]


def function_source(spec: str) -> Source:
    """The Python function `package.module:function` as a source of reward.

    It is called, by process 0 alone, as `function(prompts, responses, **columns)` with lists of B entries: the columns
    are those of the data, None where a row lacks one, and `messages`, the conversations as lists of {role, content}. A
    function that does not take `**columns` gets the columns it names. It returns B numbers.

    Raises UserError naming the function here when it cannot be imported, and at a call when it raises or returns
    something else.
    """
    function = _load(spec)
    name = spec.rpartition(":")[2]
    file = getattr(sys.modules[spec.partition(":")[0]], "__file__", None)
    parameters = list(inspect.signature(function).parameters.values())
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_place = {p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD}
    named = [p for p in parameters[2:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [parameter.name for parameter in named if parameter.default is parameter.empty]

    def check(columns: Collection[str]) -> None:
        found = (*columns, "messages")
        for column in needed:
            if column not in found:
                raise UserError(
                    f"--reward_function={spec} needs the column {column!r}, the data have {', '.join(found)}"
                )

    def score(batch: ResponseBatch) -> tuple[np.ndarray, dict[str, float]]:
        columns: dict[str, Any] = {column: [None] * len(batch) for column in needed}
        columns |= {key: list(values) for key, values in batch.columns.items()}
        columns["messages"] = [as_dicts(messages) for messages in batch.messages]
        if takes_all:  # but for what has the name of prompts or responses, which come by place
            columns = {key: values for key, values in columns.items() if key not in by_place}
        else:
            columns = {parameter.name: columns[parameter.name] for parameter in named if parameter.name in columns}

        def call() -> list[float]:
            try:
                scores = function(list(batch.prompts), list(batch.responses), **columns)
            except Exception as error:
                places = traceback.extract_tb(error.__traceback__)
                own = [place for place in places if place.filename == file]
                place = (own or places)[-1]  # rather than in a library that it calls
                raise UserError(
                    f"--reward_function={spec} raised {type(error).__name__}: {error} "
                    f"({place.filename}, line {place.lineno}, in {place.name})"
                ) from error
            return _checked(scores, len(batch), f"--reward_function={spec}").tolist()

        # Asked once: a function may draw random numbers, or ask a service that does.
        return np.array(from_first(call), np.float64), {}

    return Source(name, score, check)


def function_sources(specs: str) -> list[Source]:
    """The sources that --reward_function lists, separated by commas; none when it is empty."""
    return [function_source(spec.strip()) for spec in specs.split(",")] if specs.strip() else []


def _load(spec: str) -> Callable:
    """Import the function named by `spec`; nothing is evaluated but the module's own code."""
    where = f"--reward_function={spec}"
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec):
        raise UserError(f"{where}: expected package.module:function")
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{where}: importing {module_name} failed: {error}") from error
        raise UserError(f"{where}: no module {error.name} in the working directory or on PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"{where}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "no such name" if function is None else f"a {type(function).__name__}"
        raise UserError(f"{where}: found {found} in {module_name}, expected a function")
    try:
        inspect.signature(function)
    except ValueError as error:
        raise UserError(f"{where}: its arguments cannot be inspected, expected a Python function") from error
    return function


def _checked(scores: Any, size: int, who: str) -> np.ndarray:
    """Scores as float64 [size]. Raises UserError naming `who` gave something else than so many numbers.

    A number that is not finite passes: `rewards.score` reports it, and no update is made from it.
    """
    try:
        array = np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{who} returned {type(scores).__name__}, expected {size} numbers: {error}") from error
    if array.shape != (size,):
        found = f"a {type(scores).__name__}" if array.ndim == 0 else f"numbers of shape {array.shape}"
        raise UserError(f"{who} returned {found}, expected one for each of the {size} responses")
    return array
