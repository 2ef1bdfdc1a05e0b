"""Steps compiled for TPU pods that are not there: no device ever holds a stack of weights that is to be split."""

import json

import jax
import pytest

from easyrl import plan
from easyrl.core.sharding import make_mesh
from easyrl.planning.hlo import parse_module
from easyrl.planning.topology import find_devices, parse_topology

pytest.importorskip("libtpu", reason="needs libtpu, which compiles for TPUs on any Linux machine: pip install libtpu")

L, D, F, MP = 6, 256, 1024, 2
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODEL = f"random::{json.dumps(CONFIG)}"
ARGUMENTS = {
    "train_ppo": (
        f"--load_checkpoint_policy={MODEL}", "--train_dataset.seq_length=64", "--max_continuation_len=64",
        "--train_dataset.batch_size=8", "--mini_batch_size=8",
    ),
    "train_dpo": (f"--load_checkpoint={MODEL}", "--train_dataset.seq_length=64", "--train_dataset.batch_size=8"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def flags_that_libtpu_knows():
    """It reads XLA_FLAGS, too, and where its version does not know one of the tests' flags it ends the process.

    JAX has read them for the CPU by then.
    """
    jax.devices("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")
        yield


@pytest.fixture(scope="module", params=["v3:2x2", "v5e:2x4", "v5p:2x2x2"])
def mesh(request):
    return make_mesh(f"1,-1,{MP}", find_devices(parse_topology(request.param)))


@pytest.mark.parametrize(("script", "phase"), [("train_ppo", "update"), ("train_dpo", "step")])
def test_no_stack_of_weights_is_ever_whole_on_a_device(mesh, script, phase):
    request = plan.parse([f"--script={script}", "--remat=full", *ARGUMENTS[script]])
    phases = {phase.name: phase for phase in plan.script_plan(script, request.script, mesh, 1.0).phases}
    module = parse_module(phases[phase].program.lower(*phases[phase].arguments).compile().as_text())
    gathered = L * D * F // MP  # elements of a stack of weights that is split over mp alone
    shapes = {shape for part in module for instruction in part.values() for shape in instruction.shapes}
    assert max(shape.size for shape in shapes) < gathered
    assert any(shape.dims == (L, D // mesh.shape["fsdp"], F // MP) for shape in shapes), "where are the weights?"


def test_decoding_gathers_no_weight(mesh):
    topology = parse_topology("v3:2x2")
    if mesh.devices.flat[0].device_kind != "TPU v3":
        pytest.skip("compiled for one kind of chip: the layout is the same on all")
    request = plan.parse(["--script=train_ppo", *ARGUMENTS["train_ppo"]])
    whole = plan.script_plan("train_ppo", request.script, mesh, 1.0)
    measured = plan.measure(whole.phases[0], 0, mesh, topology)
    decoding = [part for part in measured.parts if part.name.startswith("decode")]
    assert decoding
    smallest = D * D // MP * 2  # bytes of the smallest matrix
    for part in decoding:
        assert all(c.payload < smallest for c in part.cost.collectives), part.cost.collectives
