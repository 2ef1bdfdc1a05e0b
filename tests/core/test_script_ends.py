"""How a script ends that is started as one: its lines, its exit status, and what is left of it when it is interrupted
or nobody reads what it prints.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from easyrl.core import errors
from easyrl.core.command_line import run
from easyrl.core.config import flag


@dataclass(frozen=True)
class Config:
    seed: int = flag(0, "Seed.")


SCRIPT = '''
"""A script that ends as its --end says."""
import os, signal
from dataclasses import dataclass

import tqdm

from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.errors import UserError

@dataclass(frozen=True)
class Config:
    end: str = flag("well", "How to end.", choices=("well", "wrong", "interrupted", "fault"))

def main(config):
    print(config.end)
    for i in tqdm.tqdm(range(2)):
        if config.end == "wrong":
            raise UserError("--rows, row 3: found nothing,\\n expected text")
        if config.end == "interrupted":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            os.kill(os.getpid(), signal.SIGINT)
        if config.end == "fault":
            raise ZeroDivisionError("ours")
    return {"not": "an exit status"}

if __name__ == "__main__":
    run(main, Config)
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)

    def run_script(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, unbuffered="", preexec_fn=None):
        return subprocess.run(
            [sys.executable, str(path), *argv], stdout=stdout, stderr=stderr, text=True, timeout=120,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, preexec_fn=preexec_fn,
        )  # fmt: skip

    return run_script


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_a_script_that_ends_well(script):
    done = script("--end=well")
    assert (done.returncode, done.stdout) == (0, "well\n")


def test_a_user_error_in_a_script_is_one_line_below_the_progress_bar(script):
    done = script("--end=wrong")
    assert done.returncode == 2
    *bar, line = done.stderr.splitlines()
    assert line == "easyrl: error: --rows, row 3: found nothing, expected text"
    assert "0/2" in bar[-1]
    assert "Traceback" not in done.stderr


def test_a_bad_flag_in_a_script_is_the_only_line(script):
    done = script("--ends=well")
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "easyrl: error: unknown flag --ends: did you mean --end?\n")


def test_an_interrupted_script(script):
    done = script("--end=interrupted")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "easyrl: interrupted"
    assert "Traceback" not in done.stderr


@pytest.fixture
def sigint_as_in_front():
    """SIGINT is ignored where tests run in the background, and so in their children."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("name", ["train_sft", "train_rm", "train_dpo", "train_ppo", "generate", "plan"])
def test_a_script_that_is_interrupted_among_its_imports(name, tmp_path, sigint_as_in_front):
    (tmp_path / "numpy.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    child = subprocess.Popen(
        [sys.executable, "-m", f"easyrl.{name}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert (child.returncode, said) == (130, "easyrl: interrupted\n")


def test_ctrl_c_is_an_exception_to_whoever_imports_easyrl_and_once_a_script_runs(sigint_as_in_front, monkeypatch):
    code = "import easyrl, signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    errors.leave_at_sigint()
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        run(print, Config)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


THREAD = """
import signal, threading, time
from dataclasses import dataclass
from easyrl.core.command_line import run

@dataclass(frozen=True)
class Config:
    pass

def main(config):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("started", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
run(main, Config)
"""


def test_an_interrupted_script_waits_for_no_thread():
    child = subprocess.Popen([sys.executable, "-c", THREAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "started\n"
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, said) == (130, "easyrl: interrupted\n")


def test_a_fault_keeps_its_traceback(script):
    done = script("--end=fault")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: ours")


def test_help_of_a_script(script):
    done = script("--end=nonsense", "-h")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: script.py [--config=FILE.yaml] [--FLAG=VALUE ...]\n")
    assert "How to end." in done.stdout


@pytest.mark.parametrize(
    ("end", "status", "unbuffered"), [("well", 0, "1"), ("wrong", 2, ""), ("interrupted", 130, "")]
)
def test_a_script_that_nobody_reads_ends_as_it_would(unbuffered, end, status, script, closed_pipe):
    done = script(f"--end={end}", stdout=closed_pipe, stderr=closed_pipe, unbuffered=unbuffered)
    assert done.returncode == status


def test_a_script_whose_log_has_no_room_ends_as_it_would(script):
    with open("/dev/full", "w") as full:
        assert script("--end=well", stdout=full, stderr=full).returncode == 0


@pytest.mark.parametrize(
    ("closed", "end", "status", "line"),
    [
        (1, "wrong", 2, "easyrl: error: --rows, row 3: found nothing, expected text"),
        (1, "interrupted", 130, "easyrl: interrupted"),
        (2, "wrong", 2, ""),
    ],
)
def test_a_script_that_was_started_with_a_closed_stream_ends_as_it_would(closed, end, status, line, script):
    done = script(f"--end={end}", preexec_fn=lambda: os.close(closed))
    assert done.returncode == status and "Traceback" not in done.stderr
    assert done.stderr.endswith(f"{line}\n" if line else "")


def test_an_error_before_the_script_runs_is_told_with_stdout_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert errors.tell(errors.UserError("--rows: found nothing")) == 2
    assert capsys.readouterr().err == "easyrl: error: --rows: found nothing\n"


def test_help_of_which_nobody_reads_the_end(script, closed_pipe):
    done = script("--help", stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (0, "")
