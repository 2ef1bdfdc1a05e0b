"""What a script prints, also where nobody can read it any more."""

import io
import os
import sys
from typing import Any


def print_come_what_may() -> None:
    """From here on no print, warning or progress bar raises an OSError: what cannot be written is dropped.

    A reader may leave first (`| head`; `| tee`, which a Ctrl-C ends too; a terminal that is closed), and a log may fill
    its disk: none of that is to end a script. A stream that was closed before the start (`>&-`), which Python has as
    None, becomes one that drops everything. Does nothing where something else has replaced stdout and stderr.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (open to the end)
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, _like(stream))


def _like(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream once more, on a file that takes everything."""
    raw = _Patient(stream.fileno(), "w", closefd=False)
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)  # that is PYTHONUNBUFFERED
    return io.TextIOWrapper(
        buffer, stream.encoding, stream.errors, newline=os.linesep, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


class _Patient(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)
