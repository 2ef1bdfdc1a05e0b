"""JSON lines that survive a kill and a resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easyrl.core.errors import UserError
from easyrl.core.files import set_aside, write_atomic
from easyrl.runtime.troubles import Troubles


class JsonlWriter:
    """Appends objects to a JSON lines file, one line each, flushed at once; every object has its `step` first.

    `start` is the step a run goes on from in its folder (0: it is new there). A file from before the stop may hold
    steps after it, which the run will do again, and a torn last line: both are dropped, so every step stands in the
    file once. A run that is new never drops anything: a file that is there already is renamed to the first free
    `NAME.1.jsonl`, `NAME.2.jsonl`, ...

    A disk that is full or gone does not stop a run: `troubles` is told, rows that could not be written are kept and go
    before the next one, and a file or folder that vanished is made again with all it held.

    JSON has no NaN and no infinity: both are written as null. Raises UserError when a file to go on with is damaged.
    """

    def __init__(self, path: str | Path, start: int = 0, troubles: Troubles | None = None):
        self.path = Path(path)
        self._troubles = troubles or Troubles()
        if self.path.exists():
            if start == 0:
                set_aside(self.path)
            else:
                text = "".join(to_line(row) for row in read_jsonl(self.path) if row["step"] <= start)
                kept = text.encode("utf-8", errors="backslashreplace")
                if kept != self.path.read_bytes():
                    with write_atomic(self.path) as part:
                        part.write_bytes(kept)
        self._unwritten = b""
        self._open()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append `row` under `step`."""
        # A lone surrogate has no UTF-8 form; written as a backslash escape it is what JSON calls it.
        self._unwritten += to_line({"step": step} | row).encode("utf-8", errors="backslashreplace")
        self._write_out()

    def close(self) -> None:
        self._write_out()
        try:
            self._file.close()
        except OSError as error:  # some file systems write no sooner
            self._troubles.add(self.path.name, error, "without its last rows")

    def _open(self) -> None:
        self._file = self.path.open("a+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def _write_out(self) -> None:
        with self._troubles.attempt(self.path.name, "keeping the rows until they can be written"):
            if not self._in_place():
                self._bring_back()
            try:
                done = 0
                while done < len(self._unwritten):
                    done += self._file.write(self._unwritten[done:])
            except OSError:
                self._file.truncate(self._size)  # a torn line is worse than none
                raise
            self._size += len(self._unwritten)
            self._unwritten = b""

    def _in_place(self) -> bool:
        """Whether the open file is still the one of this name: a removed file can be written to without an error."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _bring_back(self) -> None:
        """Opens the file of this name; when there is none, makes one of what the open file holds."""
        if not self.path.exists():
            self._file.seek(0)
            rows = self._file.read(self._size)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomic(self.path) as part:
                part.write_bytes(rows)
        old = self._file
        self._open()
        old.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file written by `JsonlWriter`; a last line cut short by a kill is left out.

    Raises UserError naming the file and the line that is not a JSON object with a `step`.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")  # bytes: a kill may also cut in the middle of a character
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is not a whole line
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            found = line.decode("utf-8", errors="replace")[:60]
            raise UserError(f"{path}, line {number}: expected a JSON object with a step, found {found!r}")
        rows.append(row)
    return rows


def to_line(row: Mapping[str, Any]) -> str:
    """A row as a line of a JSON lines file: NaN and infinities as null, what JSON has no form for (a date) as text."""
    return json.dumps(_writable(dict(row)), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _writable(value: Any) -> Any:
    """`value` as JSON can write it: numpy scalars as Python numbers, NaN and infinities as None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(item) for item in value]
    return value
