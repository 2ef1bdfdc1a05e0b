r"""An external judge: a command of the user's that says which of two answers is better.

The command is started once, without a shell. It reads one JSON object a line on standard input,

    {"id": 0, "messages": [{"role": "user", "content": "..."}], "answer_1": "...", "answer_2": "...", "category": "..."}

and writes one a line on standard output, in any order, one for each that it has read:

    {"id": 0, "winner": 1}

`winner` is 1 or 2, or 0 for a tie; other fields are ignored. `category` is there where the data have one. Standard
input is closed after the last question, and the command then exits with status 0. What it writes to standard error is
shown.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from easyrl.core.distributed import from_first
from easyrl.core.errors import UserError
from easyrl.data.generations import Generation
from easyrl.data.messages import as_dicts, show

FLAG = "--judge"


class Verdicts(NamedTuple):
    """What the judge said of n pairs of answers.

    - points: float [n], the first set's share of the two verdicts: 1 for a win, 0.5 for a tie, 0 for a loss
    - first_wins: share of verdicts for the answer that was shown first, ties counted half: 0.5 without position bias
    - consistent: share of pairs of which both orders give the same verdict
    """

    points: np.ndarray
    first_wins: float
    consistent: float


def judge_both_orders(
    command: str, pairs: Sequence[tuple[Generation, Generation]], categories: Sequence[str]
) -> Verdicts:
    """Asks about every pair twice, each answer once in front. Raises UserError naming --judge and what went wrong."""
    questions: list[dict[str, Any]] = []
    for (ours, theirs), category in zip(pairs, categories, strict=True):
        for first, second in ((ours, theirs), (theirs, ours)):
            question: dict[str, Any] = {"id": len(questions), "messages": as_dicts(ours.messages)}
            question |= {"answer_1": first.answer, "answer_2": second.answer}
            questions.append(question | ({"category": category} if category else {}))
    winners = from_first(lambda: ask(command, questions))  # a judge may not say the same twice
    shown_first = np.array([{1: 1.0, 2: 0.0, 0: 0.5}[winner] for winner in winners])
    ours_first, theirs_first = shown_first.reshape(-1, 2).T
    return Verdicts(
        points=(ours_first + 1.0 - theirs_first) / 2.0,
        first_wins=float(shown_first.mean()),
        consistent=float((ours_first == 1.0 - theirs_first).mean()),
    )


def ask(command: str, questions: Sequence[dict[str, Any]]) -> list[int]:
    """The winner (1, 2, or 0 for a tie) of each question; question i has the id i."""
    where = f"{FLAG}={command}"
    try:
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{where}: cannot be started ({error})") from None
    assert process.stdin is not None and process.stdout is not None
    # In a thread of its own, because a pipe holds little: a judge that answers as it reads would wait for us to read,
    # and we for it. Nobody waits for the thread: a process that the judge has left behind may hold the pipe.
    threading.Thread(target=_write, args=(process.stdin, questions), daemon=True).start()
    winners: dict[int, int] = {}
    try:
        with tqdm(total=len(questions), desc="judging", disable=None) as bar:
            for number, line in enumerate(process.stdout, 1):
                identity, winner = _reply(line, f"{where}: line {number} of its output", len(questions))
                winners[identity] = winner
                bar.update(len(winners) - bar.n)
        status = process.wait()
    except UnicodeDecodeError:
        raise UserError(f"{where}: its output is not UTF-8 text") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(OSError):  # it has ended, or all of its group has
                os.killpg(process.pid, signal.SIGKILL)  # a wrapper, and what it wraps
            process.wait()
        process.stdout.close()
    if status:
        raise UserError(f"{where}: ended with status {status} after {len(winners)} of {len(questions)} replies")
    if missing := [number for number in range(len(questions)) if number not in winners]:
        raise UserError(f"{where}: no reply to question {missing[0]}, expected one to each of {len(questions)}")
    return [winners[number] for number in range(len(questions))]


def _write(stream: IO[str], questions: Sequence[dict[str, Any]]) -> None:
    # A judge that has ended reads no more; its exit status and its replies tell why.
    with contextlib.suppress(BrokenPipeError), stream:
        for question in questions:
            stream.write(json.dumps(question) + "\n")


def _reply(line: str, where: str, count: int) -> tuple[int, int]:
    expected = f'expected {{"id": 0 to {count - 1}, "winner": 0, 1 or 2}}'
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        raise UserError(f"{where}: found {show(line.strip())}, {expected}")
    identity, winner = reply.get("id"), reply.get("winner")
    if type(identity) is not int or not 0 <= identity < count or type(winner) is not int or winner not in (0, 1, 2):
        raise UserError(f"{where}: found {show(line.strip())}, {expected}")
    return identity, winner
