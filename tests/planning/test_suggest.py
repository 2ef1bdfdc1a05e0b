"""--suggest: what it tries, in which order, and what it chooses of what it tried."""

import types

import jax
import pytest

from easyrl import plan
from easyrl.core.errors import UserError
from easyrl.planning import suggest
from easyrl.planning.topology import GIB, parse_topology
from tests.test_plan import MODEL, OFFLINE, PPO

pytestmark = pytest.mark.usefixtures("started")

TPU = "v3:2x2"  # eight devices, whose peaks are known


def candidates(*arguments, topology=TPU, devices=8):
    """The settings for a script, nothing compiled; virtual CPU devices stand for the TPU's."""
    request = plan.parse(arguments)
    plan_of = lambda script, mesh: plan.script_plan(request.config.script, script, mesh, 1.0)
    return suggest.candidates(request.script, jax.devices()[:devices], parse_topology(topology), plan_of)


def test_every_mesh_micro_batch_and_remat_that_the_shapes_allow():
    found = candidates("--script=train_ppo", *PPO)
    # Two key/value heads divide by no more than 2. Flags that are searched for are not kept, all others are.
    assert {c.config.mesh_dim for c in found} == {"1,8,1", "1,4,2"}
    assert {c.config.remat for c in found} == {"none", "dots", "full"}
    assert {c.config.micro_batch_size for c in found if c.config.mesh_dim == "1,4,2"} == {4, 8, 16}
    assert len({c.flags for c in found}) == len(found) == 2 * 3 * 3
    assert {c.config.mini_batch_size for c in found} == {8}


def test_the_fastest_that_fit_come_first():
    topology = parse_topology(TPU)
    large = ("--script=train_sft", "--load_checkpoint=random::llama2-7b", "--train_dataset.batch_size=32")
    found = candidates(*large, "--train_dataset.seq_length=2048")
    fits = [c.bytes <= topology.memory for c in found]
    assert fits == sorted(fits, reverse=True) and set(fits) == {True, False}
    times = [c.seconds for c in found[: sum(fits)]]
    assert times == sorted(times)
    # What is kept for the backward pass: more, the less is computed again.
    by_flags = {(c.config.mesh_dim, c.config.micro_batch_size, c.config.remat): c.bytes for c in found}
    assert by_flags["1,8,1", 8, "full"] < by_flags["1,8,1", 8, "dots"] < by_flags["1,8,1", 8, "none"]
    assert by_flags["1,8,1", 8, "full"] < by_flags["1,8,1", 16, "full"]


def test_what_is_sent_is_counted_by_groups():
    """Weights are gathered for each group of rows, not for each chunk of logits inside."""
    short = ("--load_checkpoint=random::llama2-7b", "--train_dataset.batch_size=32", "--train_dataset.seq_length=128")
    found = candidates("--script=train_sft", *short)
    by_rows = {c.config.micro_batch_size: c.seconds for c in found if c.flags.startswith("--mesh_dim=1,8,1 ")}
    assert by_rows[8] == pytest.approx(2 * by_rows[16], rel=0.01)  # bound by links
    topology = parse_topology(TPU)
    weights = 2 * 6.74e9 * 3 * (32 / 8) / (topology.chip.link / topology.chip.cores)
    assert by_rows[8] == pytest.approx(weights, rel=0.01)


def test_slices_are_joined_by_dp():
    found = candidates("--script=train_dpo", *OFFLINE, topology="2xv3:1x2")
    assert {c.config.mesh_dim for c in found} == {"2,4,1", "2,2,2"}


def test_the_fastest_of_what_was_compiled_is_suggested():
    def tried(name, seconds, gib, fits):
        report = types.SimpleNamespace(seconds=seconds, peak=gib * GIB, fits=fits)
        return types.SimpleNamespace(flags=f"--remat={name}"), report

    some = [tried("none", 1.0, 20, False), tried("dots", 3.0, 9, True), tried("full", 2.0, 8, True)]
    assert suggest.fastest(some) == some[2]
    assert suggest.table(some).splitlines()[-1] == "suggested: --remat=full"
    assert suggest.fastest(some[:1]) is None
    assert suggest.table(some[:1]).splitlines()[1:] == [
        "  --remat=none: does not fit, 20.00 GiB, 1 s a step",
        "none of them fits: more devices, or a smaller batch",
    ]


def test_what_the_compiler_refused_without_a_number_has_none():
    report = types.SimpleNamespace(seconds=None, peak=None, fits=False)
    table = suggest.table([(types.SimpleNamespace(flags="--remat=none"), report)])
    assert table.splitlines()[1] == "  --remat=none: does not fit"


@pytest.mark.slow
def test_the_command(capsys):
    arguments = ("--load_checkpoint=" + MODEL, "--train_dataset.seq_length=32", "--train_dataset.batch_size=4")
    plan.main(plan.parse(["--script=train_sft", "--topology=cpu:2", "--suggest", *arguments]))
    out = capsys.readouterr().out
    assert out.startswith("settings that were compiled:\n  --mesh_dim=")
    assert out.count(": fits, ") == suggest.COMPILED
    (suggested,) = [line for line in out.splitlines() if line.startswith("suggested: --mesh_dim=1,")]
    mesh = suggested.split()[1].removeprefix("--mesh_dim=").split(",")
    assert f"mesh dp:{mesh[0]},fsdp:{mesh[1]},mp:{mesh[2]}" in out  # the plan that follows is of these settings


def test_no_mesh_is_one_line():
    with pytest.raises(UserError, match=r"--suggest: .*does not divide over the 7 devices of cpu:7"):
        plan.main(plan.parse(["--script=train_sft", "--topology=cpu:7", "--suggest", *OFFLINE]))
