"""What several processes agree on, and how they end; tests/test_processes.py runs whole trainers in them."""

import os
import socket
import subprocess
import sys
import types

import jax
import pytest

from easyrl.core import distributed
from easyrl.core.command_line import load_config
from easyrl.core.config import to_yaml
from easyrl.core.distributed import DistributedConfig, check_same, from_first, gather_texts, is_first, several
from easyrl.core.errors import UserError
from easyrl.runtime.run_config import RunConfig
from tests.processes import Processes, told

GROUP = "--jax_distributed"
SCRIPT = """
import dataclasses, time
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.distributed import (
    DistributedConfig, broadcast, check_same, check_same_flags, from_first, gather_texts, meet, say
)
from easyrl.core.errors import RunStopped, UserError
from easyrl.core.sharding import fetch, make_mesh, put

@dataclasses.dataclass(frozen=True)
class Config:
    end: str = flag("stopped", "How to end.")
    lr: float = flag(0.1, "A number.")
    jax_distributed: DistributedConfig = flag(DistributedConfig(), "Processes.")

def refuse():
    raise UserError("the folder is full")

def caught(f, *args):
    try:
        f(*args)
    except UserError as error:
        print(error)

def main(config):
    me = jax.process_index()
    if config.end == "refused":
        time.sleep(2 * me)
        refuse()
    if config.end == "alone":
        if me == 1:
            refuse()
        time.sleep(200)
    print([text[-1] for text in gather_texts("x" * 300 * me + str(me))], from_first(lambda: [me, 0.1, "é"]))
    print(broadcast((np.int32(me), np.full(2, me + 0.5)))[1].tolist())
    x = put(np.arange(8.0), NamedSharding(make_mesh("-1,1,1"), PartitionSpec("dp")))
    assert not x.is_fully_addressable
    print(fetch({"x": x, "n": 1}))
    say("said once")
    caught(from_first, refuse)
    caught(check_same, "--data", str(me))
    caught(check_same_flags, dataclasses.replace(config, lr=me))
    meet("here")
    raise RunStopped("stopped in good order")

if __name__ == "__main__":
    run(main, Config)
"""


def talk(folder, seconds, **flags):
    (folder / "talks.py").write_text(SCRIPT)
    env = {"PYTHONPATH": os.pathsep.join((str(folder), os.environ["PYTHONPATH"]))}
    with Processes("talks", flags, 2, 2, folder / "logs", env) as processes:
        return processes.wait(seconds)


def test_processes_agree(tmp_path):
    first, second = talk(tmp_path, 100)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    heard = [
        "['0', '1'] [0, 0.1, 'é']",
        "[0.5, 0.5]",
        "{'n': 1, 'x': array([0., 1., 2., 3., 4., 5., 6., 7.], dtype=float32)}",
        "the folder is full",
        "--data: process 1 reads something else than process 0, expected the same",
        "--lr: process 0 has 0, process 1 has 1, expected the same",
    ]
    assert told(second.out) == heard
    assert told(first.out) == [*heard[:3], "said once", *heard[3:]]
    assert told(first.err) == ["easyrl: stopped in good order"] and told(second.err) == []


def test_an_error_that_all_have_is_one_line_each_and_their_status(tmp_path):
    for process in talk(tmp_path, 60, end="refused"):
        assert (process.status, told(process.err)) == (2, ["easyrl: error: the folder is full"])


@pytest.mark.slow  # it takes as long as JAX takes to miss a process: a minute
def test_a_process_that_ends_alone_takes_the_others_down(tmp_path):
    first, second = talk(tmp_path, 120, end="alone")
    assert second.status == 2
    assert told(second.err) == ["easyrl: error: the folder is full", "easyrl: process 1 of 2 ends before the others"]
    assert first.status != 0 and "another task died" in first.err


def test_alone_nothing_is_asked_of_anybody():
    assert is_first() and not several()
    assert from_first(lambda: {"any": object}) == {"any": object}
    assert gather_texts("x") == ["x"]
    check_same("anything", "x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["num_processes=2"], "num_processes=2: needs --jax_distributed.initialize_jax_distributed"),
        (["initialize_jax_distributed", "num_processes=2", "process_id=2"], "process_id=2: expected 0 to 1"),
        (["initialize_jax_distributed", "coordinator_address=here"], "coordinator_address=here: expected ADDRESS:PORT"),
        (["initialize_jax_distributed", "local_device_ids=0;1"], "local_device_ids=0;1: expected numbers"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message):
    with pytest.raises(UserError, match=f"{GROUP}.{message}"):
        load_config(RunConfig, [f"{GROUP}.{flag}" for flag in flags])


def test_nobody_to_be_found_is_one_line():
    # A process of its own: once there are devices, as in other tests, JAX joins nothing.
    arguments = ["-m", "easyrl.train_sft", f"{GROUP}.initialize_jax_distributed"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "coordinator_address" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("port", ["0", "99999", "²", "-1"])
def test_a_port_that_cannot_be_is_named(port):
    with pytest.raises(UserError, match=f"{GROUP}.coordinator_address=here:{port}: expected .* a port from 1 to 65535"):
        DistributedConfig(True, f"here:{port}")


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_port_that_is_taken_is_named(address, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("JAX would crash"))
    with socket.create_server((address, 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        first = DistributedConfig(True, place, num_processes=2, process_id=0)
        with (
            pytest.raises(UserError, match=f"_address={place}: expected a free port: Address"),
            first.joined(RunConfig()),
        ):
            pass


def test_a_port_that_is_free_is_left_to_jax(monkeypatch):
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    started = []

    def initialize(coordinator_address, **_):
        started.append(coordinator_address)
        socket.create_server(("", port)).close()

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with DistributedConfig(True, f"127.0.0.1:{port}", num_processes=1, process_id=0).joined(RunConfig()):
        pass
    assert started == [f"127.0.0.1:{port}"]


@pytest.mark.parametrize(
    ("tasks", "platforms", "joins"),
    [(None, "cpu", False), ("1", "cpu", False), ("2", "cpu", True), (None, "tpu,cpu", True)],
)
def test_on_pods_and_under_srun_processes_join_without_a_flag(tasks, platforms, joins, monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: started.append(arguments))
    monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
    monkeypatch.setattr(distributed, "jax", FakePlatforms(platforms))
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    with DistributedConfig().joined(RunConfig()):
        pass
    assert bool(started) == joins
    assert all(arguments["coordinator_address"] is arguments["process_id"] is None for arguments in started)


class FakePlatforms:
    """The module jax, where these platforms have been chosen."""

    def __init__(self, platforms):
        self.config = types.SimpleNamespace(jax_platforms=platforms)

    def __getattr__(self, name):
        return getattr(jax, name)


def test_a_pod_that_cannot_be_found_is_one_process(monkeypatch):
    def nothing_there(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing_there)
    monkeypatch.setattr(distributed, "jax", FakePlatforms("tpu,cpu"))
    with DistributedConfig().joined(RunConfig()):
        pass


def test_a_saved_config_does_not_say_who_wrote_it():
    config = load_config(RunConfig, [f"{GROUP}.initialize_jax_distributed", f"{GROUP}.process_id=3", "--seed=7"])
    assert "jax_distributed" not in to_yaml(config) and "seed: 7" in to_yaml(config)
