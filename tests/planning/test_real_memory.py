"""The memory of a plan against what a run of the same step takes from the operating system, on eight CPU devices."""

import json
import os
import subprocess
import sys

import pytest

from tests.source import REPO

CONFIG = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
ARGUMENTS = [
    "--script=train_sft", "--topology=cpu:8", f"--load_checkpoint=random::{json.dumps(CONFIG)}", "--dtype=fp32",
    "--train_dataset.seq_length=256", "--train_dataset.batch_size=16", "--mesh_dim=1,8,1", "--remat=full",
]  # fmt: skip

RUN = """
import json, re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from easyrl import plan
from easyrl.core.sharding import make_mesh
from easyrl.planning.measure import measure
from easyrl.planning.topology import find_devices, parse_topology

def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

request = plan.parse(sys.argv[1:])
topology = parse_topology(request.config.topology)
mesh = make_mesh(request.script.mesh_dim, find_devices(topology))
whole = plan.script_plan(request.config.script, request.script, mesh, 1.0)
(phase,) = whole.phases
measured = measure(phase, sum(whole.resident_bytes().values()), mesh, topology)
step = phase.program.lower(*phase.arguments).compile()
fill = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), phase.arguments),
    out_shardings=jax.tree.map(lambda x: x.sharding, phase.arguments),
).lower().compile()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
state, batch = fill()
(rows,) = batch.plans
batch = batch.replace(plans=(rows.replace(count=jax.device_put(jnp.int32(2), rows.count.sharding)),))
for _ in range(2):
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
print(json.dumps({"planned": 8 * measured.peak, "taken": resident("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_takes_the_memory_that_was_planned():
    # Compiled as users' runs are, and with one heap: what each thread's own heap holds back is not the step's.
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", RUN, *ARGUMENTS]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["taken"] == pytest.approx(found["planned"], rel=0.10), found
