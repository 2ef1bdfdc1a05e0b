"""Turns rows into samples, in this process or in several at a time."""

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection

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
    workers, ends = [], []
    try:
        for _ in range(processes):
            here, there = context.Pipe()
            worker = context.Process(target=_work, args=(encoder, there), daemon=True)
            worker.start()
            there.close()
            workers.append(worker)
            ends.append(here)
        # Chunk k goes to process k mod n, once its last one is back: order is kept, and no pipe is ever full both ways.
        rows = iter(rows)
        busy = [False] * processes
        for turn in itertools.cycle(range(processes)):
            if busy[turn]:
                yield from _receive(ends[turn])
                busy[turn] = False
            if chunk := list(itertools.islice(rows, CHUNK)):
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


def _receive(end: Connection) -> list[Outcome]:
    try:
        outcomes = end.recv()
    except (EOFError, OSError):
        raise UserError(
            "num_workers: a tokenising process ended early (out of memory?), expected fewer of them"
        ) from None
    if isinstance(outcomes, Exception):
        raise outcomes
    return outcomes


def _work(encoder: Encoder, end: Connection) -> None:
    """What a tokenising process does until it is ended."""
    while True:
        rows = end.recv()
        try:
            end.send([_outcome(row, encoder) for row in rows])
        except Exception as error:  # raised again by the process that waits for the outcomes
            end.send(error)
