"""The exceptions that a user is meant to see, and the line in which they are told."""

import contextlib
import os
import signal
import sys


class UserError(Exception):
    """Something the user can put right, said in one line.

    The message names the flag, file and row, what was found and what was expected. Scripts print it as
    `easyrl: error: <message>` without a traceback and exit with status 2 (`tell`).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunFailed(Exception):
    """A run that started well and could not go on, or not do all it was to do, said in one line.

    Not the user's mistake, at least not one that could have been found beforehand. Scripts print it as
    `easyrl: error: <message>` without a traceback and exit with status 1.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunStopped(Exception):
    """A run ends here, in good order: it was asked to stop and has saved what it had.

    Scripts print `easyrl: <message>` and exit with status 0. Several processes have one message, for process 0.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def tell(error: BaseException, show: bool = True) -> int:
    """Says in one line on stderr, below whatever was being printed, what ended a script; returns its exit status.

    2 for a UserError, 1 for a RunFailed, 0 for a RunStopped, 130 when interrupted, 1 and no line for anything else.
    """
    with contextlib.suppress(OSError):  # nobody reads it any more
        if sys.stdout is not None:  # as it is where it was closed before the start (`>&-`)
            sys.stdout.flush()
        if tqdm := sys.modules.get("tqdm"):
            for bar in list(getattr(tqdm.tqdm, "_instances", ())):
                bar.close()
    known: dict[type, tuple[str, int]] = {
        UserError: (f"error: {error}", 2),
        RunFailed: (f"error: {error}", 1),
        RunStopped: (str(error), 0),
        KeyboardInterrupt: ("interrupted", 130),
    }
    message, status = known.get(type(error), ("", 1))
    if message and show:
        with contextlib.suppress(OSError):
            print(f"easyrl: {message}", file=sys.stderr)
    return status


def leave_at_sigint() -> None:
    """Until `raise_at_sigint` Ctrl-C ends this process at once, in one line: an exception in the middle of an import
    would leave a traceback, or end in a crash of the library that was being imported.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in the background
        signal.signal(signal.SIGINT, _leave)


def raise_at_sigint() -> None:
    """Undoes `leave_at_sigint`: Ctrl-C is an exception again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    os._exit(tell(KeyboardInterrupt()))
