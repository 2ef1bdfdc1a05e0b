"""SIGTERM and SIGINT during training: the step under way is finished and saved; a second SIGINT leaves at once.

A preempted machine says so by SIGTERM, Cloud TPUs before maintenance too.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from easyrl.core.distributed import is_first

SAME = 0.5  # seconds in which signals are one: launchers pass on what the terminal has sent to everybody


@contextlib.contextmanager
def stopping_at_signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Within the block a first SIGTERM or SIGINT calls `request_stop` with its name, from another thread.

    Any further SIGTERM does nothing, a second SIGINT ends the process with status 130. Does nothing outside the main
    thread, which alone may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python calls a handler once the main thread is back from whatever it waits for, which may take a step. The byte
    # that C writes here at the signal itself is read by a thread, which need not wait.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, request_stop), daemon=True)
    watcher.start()
    earlier_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    earlier = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not one of Python's
        signal.set_wakeup_fd(earlier_writer)
        os.close(writer)  # the thread reads the end, and ends
        watcher.join()


def _watch(reader: int, request_stop: Callable[[str], None]) -> None:
    first: float | None = None  # when the first SIGINT came
    told = False
    while byte := os.read(reader, 1):
        number = byte[0]
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        if number == signal.SIGINT and first is not None and time.monotonic() - first > SAME:
            _say("interrupted")
            os._exit(130)
        if number == signal.SIGINT:
            first = first or time.monotonic()
        name = signal.Signals(number).name
        request_stop(name)
        if not told and is_first():
            leaving = "a second SIGINT leaves" if number == signal.SIGINT else "two SIGINTs leave"
            _say(f"{name}: the step under way is finished and saved; {leaving} at once")
        told = True
    os.close(reader)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the Ctrl-C may have ended who reads this
        print(f"\neasyrl: {text}", file=sys.stderr, flush=True)
