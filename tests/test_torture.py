"""The short form of `make torture`: a run of a trainer is killed, and is at its end the run that was not."""

import os
import subprocess
import sys

import pytest

from tests.source import REPO


# The trainers on data share their loop, so one of them stands for the others.
@pytest.mark.parametrize("trainers", ["dpo,ppo", pytest.param("sft,rm", marks=pytest.mark.slow)])
def test_killed_runs_are_bit_for_bit_those_that_were_not(trainers, tmp_path):
    flags = [f"--trainers={trainers}", "--runs=1", "--kills=1", "--steps=8", f"--folder={tmp_path}"]
    command = [sys.executable, "-m", "tests.torture", *flags]
    # Every start needs the same programs: only the first compiles them.
    cache = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900, env=os.environ | cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "every run that was killed is bit for bit the run that was not"
