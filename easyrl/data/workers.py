"""Turns rows into samples, in this process or in several at a time."""

import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from easyrl.core.errors import UserError
from easyrl.data.messages import BadRow
from easyrl.data.readers import OnBad, Row
from easyrl.data.sequences import Encoder, Sample

CHUNK = 256  # rows handed over at a time

Outcome = list[Sample] | BadRow


def encode_rows(rows: Iterable[Row], encoder: Encoder, on_bad: OnBad, processes: int = 1) -> Iterator[Sample]:
    """The samples of `rows`, in their order however many processes work on them.

    A row that cannot be used goes to `on_bad`, which may raise it. No more than a chunk of rows for each process is in
    memory at a time.
    """
    outcomes = _encode_here(rows, encoder) if processes <= 1 else _encode_elsewhere(rows, encoder, processes)
    for outcome in outcomes:
        if isinstance(outcome, BadRow):
            on_bad(outcome)
        else:
            yield from outcome


def _encode_here(rows: Iterable[Row], encoder: Encoder) -> Iterator[Outcome]:
    for row in rows:
        yield _outcome(row, encoder)


def _outcome(row: Row, encoder: Encoder) -> Outcome:
    try:
        return encoder.encode(row)
    except BadRow as error:
        return error.at(row.where)


def _encode_elsewhere(rows: Iterable[Row], encoder: Encoder, processes: int) -> Iterator[Outcome]:
    # Started afresh rather than forked: JAX and the tokenizers have threads, which a fork would cut off in mid-work.
    context = multiprocessing.get_context("spawn")
    workers: list[Any] = []
    ends: list[Connection] = []
    try:
        with _uninterrupted():
            for _ in range(processes):
                here, there = context.Pipe()
                ends.append(here)
                worker = context.Process(target=_work, args=(there,), daemon=True)
                worker.start()
                workers.append(worker)
                there.close()
        # Not among the arguments of the process: to start one would then take until it reads them, at the end of all
        # that it imports, and for ever if it ends before.
        for end in ends:
            with _alive():
                end.send(encoder)
        # Chunk k goes to process k mod n, once its last one is back: order is kept, and no pipe is ever full both ways.
        rows = iter(rows)
        busy = [False] * processes
        for turn in itertools.cycle(range(processes)):
            if busy[turn]:
                yield from _receive(ends[turn])
                busy[turn] = False
            if chunk := list(itertools.islice(rows, CHUNK)):
                with _alive():
                    ends[turn].send(chunk)
                busy[turn] = True
            elif not any(busy):
                return
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
        for end in ends:
            end.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes that are started meanwhile never see Ctrl-C: this one does, and ends them."""
    resource_tracker.ensure_running()  # which would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _alive() -> Iterator[None]:
    """Raises UserError where the other end of a connection is gone."""
    try:
        yield
    except (EOFError, OSError):
        raise UserError(
            "num_workers: a tokenising process ended early (out of memory?), expected fewer of them"
        ) from None


def _receive(end: Connection) -> list[Outcome]:
    with _alive():
        outcomes = end.recv()
    if isinstance(outcomes, Exception):
        raise outcomes
    return outcomes


def _work(end: Connection) -> None:
    """What a tokenising process does until it is ended, or the process that started it has ended."""
    with contextlib.suppress(EOFError, OSError):
        encoder = end.recv()
        while True:
            _answer(encoder, end)


def _answer(encoder: Encoder, end: Connection) -> None:
    rows = end.recv()
    try:
        outcomes: Any = [_outcome(row, encoder) for row in rows]
    except Exception as error:  # raised again by the process that waits for the outcomes
        outcomes = error
    end.send(outcomes)
