import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from easyrl.runtime.interrupt import stopping_at_signals


def send(number, requested, count):
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while len(requested) < count and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "leaving"), [(signal.SIGTERM, "two SIGINTs leave"), (signal.SIGINT, "a second SIGINT leaves")]
)
def test_a_signal_asks_for_the_run_to_stop(number, leaving, capfd):
    requested, before = [], signal.getsignal(number)
    with stopping_at_signals(requested.append):
        send(number, requested, 1)
    assert requested == [number.name]
    line = f"easyrl: {number.name}: the step under way is finished and saved; {leaving} at once\n"
    assert line in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_two_sigterms_and_one_sigint_end_nothing(capfd):
    requested = []
    with stopping_at_signals(requested.append):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number, requested, len(requested) + 1)
    assert requested == ["SIGTERM", "SIGTERM", "SIGINT"]
    assert capfd.readouterr().err.count("two SIGINTs leave at once") == 1


def test_a_run_of_which_nobody_reads_what_it_says_is_asked_to_stop(monkeypatch):
    class Left(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    requested = []
    with stopping_at_signals(requested.append):
        monkeypatch.setattr(sys, "stderr", Left())
        send(signal.SIGINT, requested, 1)
        send(signal.SIGTERM, requested, 2)
    assert requested == ["SIGINT", "SIGTERM"]


BUSY = """
import time
from easyrl.runtime.interrupt import stopping_at_signals
with stopping_at_signals(lambda name: print(name, flush=True)):
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize("first", [[], [signal.SIGTERM]], ids=["", "after a SIGTERM"])
def test_a_second_sigint_leaves_at_once(first):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for number in [*first, signal.SIGINT]:
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.name}\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # the same, passed on by a launcher
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read().splitlines()[-1] == "easyrl: interrupted"
    finally:
        process.kill()


def test_another_thread_than_the_main_one_is_left_alone():
    handlers = []

    def elsewhere():
        with stopping_at_signals(handlers.append):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
