"""Several processes: each reads its own devices' part, and together they write one folder."""

import json
import socket
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from easyrl.hf.safetensors_io import WEIGHTS

PROGRAM = """
import json, sys, jax
port, process, source, target = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from easyrl.core.sharding import make_mesh
from easyrl.hf.export import export_model
from easyrl.hf.families import read_config
from easyrl.hf.load import load_params
from easyrl.hf.safetensors_io import Checkpoint

reads, read = {}, Checkpoint.read
def counting_read(self, name, slices):
    array = read(self, name, slices)
    reads[name] = reads.get(name, 0) + array.nbytes
    return array
Checkpoint.read = counting_read

cfg = read_config(source)
params = load_params(source, cfg, "lm", make_mesh("1,2,2"), "float32")
assert not params["layers"]["attn"]["q"].is_fully_addressable
export_model(target, cfg, params, max_shard_bytes=8000)
with open(f"{target}.{process}.json", "w") as file:
    json.dump(reads, file)
"""


@pytest.mark.slow
def test_two_processes(folder, tmp_path):
    directory, target = folder(), tmp_path / "target"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(i), str(directory), str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs

    original = load_file(directory / WEIGHTS)
    written = {}
    for path in target.glob("*.safetensors"):
        written |= load_file(path)
    assert {name: x.tobytes() for name, x in written.items()} == {name: x.tobytes() for name, x in original.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    for i in range(2):
        reads = json.loads((tmp_path / f"target.{i}.json").read_text())
        assert reads[name] == original[name].nbytes // 2
