"""What a run could not write: it goes on, says so in one line, and does not end as if nothing had been."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

from tqdm import tqdm

from easyrl.core.errors import RunFailed
from easyrl.runtime.loop import Hook, StepInfo


class Troubles:
    """The things that a run failed to write when it last tried, each with the reason.

    A thing is known by its name for people ("checkpoints", "metrics.jsonl"). It is reported in one line when it begins
    to fail, or fails for another reason, and when it succeeds again.
    """

    def __init__(self) -> None:
        self._open: dict[str, str] = {}

    def add(self, thing: str, error: Exception, then: str = "trying again next time") -> None:
        """`thing` could not be written because of `error`; `then` says what happens next."""
        reason = reason_of(error)
        if self._open.get(thing) != reason:
            _say(f"warning: could not write {thing}: {reason}; the run goes on, {then}")
        self._open[thing] = reason

    def mend(self, thing: str) -> None:
        """`thing` was written."""
        if self._open.pop(thing, None) is not None:
            _say(f"{thing}: written again")

    def __contains__(self, thing: str) -> bool:
        return thing in self._open

    @contextlib.contextmanager
    def attempt(self, thing: str, then: str = "trying again next time", *, any_error: bool = False) -> Iterator[None]:
        """A block that writes `thing`. When a disk or store fails it, or with `any_error` anything does, that is noted
        and the block left.
        """
        try:
            yield
        except Exception as error:
            if not (any_error or is_of_the_disk(error)):
                raise
            self.add(thing, error, then)
        else:
            self.mend(thing)

    def tolerate(self, hook: Hook, thing: str) -> Hook:
        """The hook, whose `on_step` writes `thing`, as one that does not stop the run when it cannot."""
        call = hook.on_step
        assert call is not None

        def on_step(info: StepInfo) -> bool | None:
            answer = None
            with self.attempt(thing):
                answer = call(info)
            return answer

        return dataclasses.replace(hook, on_step=on_step)

    def end(self) -> None:
        """Raises RunFailed when something remained unwritten."""
        if self._open:
            found = "; ".join(f"{thing} ({reason})" for thing, reason in self._open.items())
            raise RunFailed(f"the run is at its end, but could not write {found}")


def is_of_the_disk(error: Exception) -> bool:
    """Whether the system refused to read or write: libraries in Rust and C++ only say so in their text."""
    return isinstance(error, OSError) or "os error" in str(error).lower()


def reason_of(error: Exception) -> str:
    """An error in one short line: what the system says, if it is from there."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = str(error).split("\n")
    for line in lines:
        if "os error" in line.lower():  # tensorstore quotes its source code before and after
            return line.strip()[:300]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _say(text: str) -> None:
    """On every process: a disk may fail one alone, and nobody else knows of it."""
    tqdm.write(f"easyrl: {text}", file=sys.stderr)
