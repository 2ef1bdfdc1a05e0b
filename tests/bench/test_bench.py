"""The benchmarks run at the smallest sizes, and their arithmetic is right."""

import importlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from easyrl.bench.__main__ import KINDS, main
from easyrl.bench.measure import Lap, Work, trace_lap
from easyrl.bench.report import figures
from easyrl.bench.shapes import SHAPES
from easyrl.core.command_line import load_config
from easyrl.core.errors import UserError
from easyrl.core.params import num_params
from easyrl.models.families import param_specs
from easyrl.planning.necessary import ForwardFlops
from easyrl.steps.rollout import SampledBatch

SMALL = ["--model=debug", "--warmup=1", "--repeats=1", "--mesh_dim=1,1,1"]
SIZES = {
    "decode": ["--rows=2", "--prompt_length=8", "--new_tokens=4"],
    "ppo": ["--workload=fixed", "--prompts=2", "--prompt_length=8", "--new_tokens=4", "--mini_batch_size=2"],
    "dpo": ["--workload=fixed", "--seq_length=16", "--batch_size=2"],
    "rm": ["--workload=fixed", "--seq_length=16", "--batch_size=2"],
    "sft": ["--workload=fixed", "--seq_length=16", "--batch_size=2"],
}


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """The machine's limits take seconds to measure, and are of no matter here."""
    limits = {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    monkeypatch.setattr("easyrl.bench.report.measure_limits", lambda dtype: limits)
    monkeypatch.setattr("easyrl.bench.load.measure_limits", lambda dtype: limits)


@pytest.mark.parametrize(
    ("kind", "more"), [*((kind, []) for kind in SIZES), ("decode", ["--lengths=real", "--decode_rows=1"])]
)
def test_a_benchmark_writes_its_figures(kind, more, tmp_path, monkeypatch):
    module = importlib.import_module(f"easyrl.bench.{kind}")
    # One of the virtual devices, as a user's machine has one.
    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    module.main(load_config(module.Config, [*SMALL, *SIZES[kind], *more, f"--json={tmp_path / 'figures.json'}"]))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["benchmark"] == kind
    assert found["seconds"]["total"]["median"] > 0
    assert found["tokens_per_second"] > 0 and found["peak_bytes"] > 0 and found["mfu"] > 0
    assert found["flags"]["model"] == "debug" and found["where"]["jax"]


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_rows_that_devices_cannot_share_are_one_line(kind):
    module = importlib.import_module(f"easyrl.bench.{kind}")
    wrong = ["--mesh_dim=2,-1,1", "--micro_batch_size=3"]
    with pytest.raises(
        UserError, match=r"^--micro_batch_size=3: expected a multiple of 8: dp x fsdp = 8 of --mesh_dim=2,-1,1"
    ):
        module.main(load_config(module.Config, [*SMALL, *SIZES[kind], *wrong]))


@pytest.mark.parametrize(
    ("kind", "flags", "complaint"),
    [
        ("dpo", ["--batch_size=65"], "--batch_size=65: --workload=w2 has 64 samples, expected at most as many"),
        ("dpo", ["--json=/dev/null/figures.json"], "--json=/dev/null/figures.json: cannot be written"),
        ("dpo", ["--profile=/dev/null/trace"], "--profile=/dev/null/trace: cannot be written"),
        ("decode", ["--micro_batch_size=3"], "--micro_batch_size=3: does not divide by dp x fsdp = 8"),
        ("decode", ["--model=1b", "--lengths=real"], "--model: only models up to 34m sample responses of real lengths"),
        ("ppo", ["--mini_batch_size=5"], "--mini_batch_size=5: expected a divisor of 16"),
    ],
)
def test_what_is_wrong_is_one_line(kind, flags, complaint):
    module = importlib.import_module(f"easyrl.bench.{kind}")
    with pytest.raises(UserError, match=f"^{complaint}"):
        module.main(load_config(module.Config, ["--model=debug", *flags]))


def test_an_unknown_benchmark_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "foo"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("easyrl: error: unknown benchmark 'foo', expected one of decode, ")


@pytest.mark.parametrize("cold", [False, True])
def test_loading_writes_its_figures(cold, tmp_path):
    if cold and not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot drop a file from its page cache")
    module = importlib.import_module("easyrl.bench.load")
    flags = ["--model=debug", "--repeats=1", f"--cold={cold}", f"--json={tmp_path / 'figures.json'}"]
    module.main(load_config(module.Config, flags))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["bytes"] > 4 * num_params(param_specs(SHAPES["debug"], "lm"))
    assert set(found["seconds"]) == {"loading", "reading the file", "reading into memory"}


def test_measuring_what_saving_costs_leaves_the_folder_as_it_was(tmp_path, capsys):
    saving = importlib.import_module("easyrl.bench.saving")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("mine")
    saving.main(load_config(saving.Config, ["--megabytes=4", "--steps=2", f"--output_dir={tmp_path}"]))
    assert "the loop waits" in capsys.readouterr().out
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "checkpoints" / "thesis.txt"]
    with pytest.raises(UserError, match=r"^--output_dir=.*thesis.txt: cannot write there"):
        saving.main(load_config(saving.Config, [f"--output_dir={tmp_path / 'checkpoints' / 'thesis.txt'}"]))


def test_every_kind_has_a_module():
    for kind in KINDS:
        assert importlib.import_module(f"easyrl.bench.{kind}").Config


def test_benchmarks_import_no_data_library():
    """But for that of checkpoints, which orbax writes."""
    code = """
import sys, importlib
for kind in {kinds}: importlib.import_module("easyrl.bench." + kind)
heavy = {{"transformers", "datasets", "grain", "wandb", "torch", "tokenizers", "orbax", "pyarrow", "matplotlib"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import jax; assert not jax._src.xla_bridge._backends, "importing started a device"
"""
    subprocess.run([sys.executable, "-c", code.format(kinds=sorted({*KINDS} - {"saving"}))], check=True, timeout=120)


def test_figures_leave_the_warm_up_out():
    config = load_config(importlib.import_module("easyrl.bench.ppo").Config, ["--warmup=1"])
    work = Work(samples=2, tokens=10, flops=4e9, packed=15, places=20)
    laps = [Lap(9.0, {"update": 9.0}, work), Lap(1.0, {"update": 0.5}, work), Lap(3.0, {"update": 1.5}, work)]
    found = figures(laps, config, compile_seconds=5.0)
    assert found["first_seconds"] == 9.0
    assert found["seconds"]["total"] == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 2}
    assert found["seconds"]["update"]["median"] == 1.0
    assert found["tokens_per_second"] == 20 / 4 and found["samples_per_second"] == 4 / 4
    assert found["padding_share"] == 0.25


def test_what_a_device_does_is_held_against_what_one_can_do(monkeypatch):
    """On a CPU all virtual devices share what one of them reaches."""
    config = load_config(importlib.import_module("easyrl.bench.decode").Config, ["--warmup=1"])
    laps = [Lap(2.0, {}, Work(samples=2, tokens=10, flops=4e9, read_bytes=8e8))] * 2

    def shares():
        found = figures(laps, config, compile_seconds=5.0)
        return found["flops_per_second"], found["mfu"], found["bandwidth_share"]

    assert shares() == (2e9 / 8, 2.0, 0.4)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert shares() == (2e9 / 8, 2.0 / 8, 0.4 / 8)


def test_each_copy_of_the_weights_is_read():
    decode = importlib.import_module("easyrl.bench.decode")
    cfg, lengths = SHAPES["debug"], np.array([8, 8])
    read = lambda copies, tokens: decode._work(cfg, 2, lengths, np.array([tokens, tokens]), copies=copies).read_bytes
    flops = ForwardFlops(cfg)
    weights = 4 * (flops.per_token + flops.head) / 2
    assert read(2, 5) - read(1, 5) == 5 * weights


def test_log_probs_of_the_sampler_spare_a_pass_of_the_policy():
    ppo = importlib.import_module("easyrl.bench.ppo")
    tokens, logprobs = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.float32)
    lengths = np.array([8, 8]), np.array([4, 1])
    sampled = SampledBatch(tokens, tokens > 0, logprobs, logprobs, *lengths, np.ones(2, bool))
    flops = ForwardFlops(SHAPES["debug"])
    done = [ppo._work(SHAPES["debug"], sampled, from_sampler=known).flops for known in (False, True)]
    assert done[0] - done[1] == flops.sequence(12, logits=4) + flops.sequence(9, logits=1)


def test_a_trace_that_fails_costs_no_figures(tmp_path, monkeypatch):
    module = importlib.import_module("easyrl.bench.sft")

    def fail(step, number, folder):
        assert number == 2 and folder == tmp_path / "trace"
        raise OSError("the disk is full")

    monkeypatch.setattr("easyrl.bench.report.trace_lap", fail)
    flags = [*SMALL, *SIZES["sft"], f"--json={tmp_path / 'figures.json'}", f"--profile={tmp_path / 'trace'}"]
    monkeypatch.setattr("jax.devices", lambda *_: jax.local_devices()[:1])
    with pytest.raises(OSError, match="the disk is full"):
        module.main(load_config(module.Config, flags))
    assert json.loads((tmp_path / "figures.json").read_text())["mfu"] > 0


def test_a_lap_is_traced(tmp_path):
    laps = []
    trace_lap(lambda number, timer: laps.append(number), 3, tmp_path)
    assert laps == [3] and any(path.name.endswith("trace.json.gz") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", ["ppo", "limits"])
def test_help_shows_how_a_benchmark_is_started(monkeypatch, capsys, kind):
    monkeypatch.setattr("sys.argv", ["bench", kind, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.startswith(f"usage: python -m easyrl.bench {kind} [--config=FILE.yaml]")
