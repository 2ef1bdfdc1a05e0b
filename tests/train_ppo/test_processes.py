"""PPO by several real processes: the run of one process, whatever happens to one of them."""

import os
import signal
import time

import numpy as np
import pytest

from tests.processes import Processes, run_processes, told
from tests.train_ppo.conftest import Result, arguments

STEPS = 3
# Counts its calls, and can be made to wait in the first one.
FUNCTION = """
import os, pathlib, time
folder = pathlib.Path(__file__).parent

def vowels(prompts, responses):
    with (folder / "calls").open("a") as calls:
        calls.write("called\\n")
    while "EASYRL_TEST_WAITS" in os.environ and not (folder / "go").exists():
        time.sleep(0.05)
    return [sum(letter in "aeiou" for letter in response) / 4 for response in responses]
"""
LAYOUT = ("tokens/padding_share",)  # the one metric that is about how rows lie on devices


@pytest.fixture
def flags(materials, tmp_path, monkeypatch):
    """Of a run of `STEPS` steps that learns from a function of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"])))
    monkeypatch.setenv("EASYRL_CACHE", str(tmp_path / "cache"))
    name = f"function_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FUNCTION)
    return arguments(materials) | {
        "load_checkpoint_reward": "", "reward_function": f"{name}:vowels", "max_steps_per_epoch": STEPS,
        "ppo_epochs": 1, "logged_samples": 8, "kl_target": 0.5, "kl_horizon": 16,
        # Where a gradient is next to nothing Adam makes steps of its noise: epsilon is above it, and steps are small.
        "optimizer.eps": 1e-6, "value_lr": 0.001,
    }  # fmt: skip


def assert_same(result: Result, expected: Result, steps: int = STEPS) -> None:
    """Samples are equal; metrics up to `steps`, and after all of them the weights, agree to 1e-5."""
    blank = lambda rows: [row | {"reward": None} for row in rows if row["step"] <= steps]
    assert blank(result.samples) == blank(expected.samples)
    assert result.metrics[-1]["step"] == steps
    for row, expected_row in zip(result.metrics, expected.metrics, strict=steps == STEPS):
        assert row.keys() == expected_row.keys()
        for name in row.keys() - LAYOUT:
            np.testing.assert_allclose(row[name], expected_row[name], atol=1e-5, rtol=1e-5, err_msg=name)
    for folder in ("hf", "hf_value") if steps == STEPS else ():
        weights, expected_weights = result.weights(folder), expected.weights(folder)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, expected_weights[name], atol=1e-5, err_msg=f"{folder} {name}")


def start(flags, folder, count, devices):
    env = {"EASYRL_TEST_WAITS": "1"}
    return Processes("easyrl.train_ppo", flags | {"output_dir": folder}, count, devices, folder.parent / "logs", env)


def calls(folder) -> int:
    path = folder / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, processes: Processes, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, processes.told()
        assert all(process.poll() is None for process in processes.started), processes.told()
        time.sleep(0.05)


def stop_by_sigterm(flags, folder, count, devices, mesh_dim):
    """A run of which the last process gets SIGTERM in the first step, and how the processes have ended."""
    with start(flags | {"mesh_dim": mesh_dim}, folder / "run", count, devices) as processes:
        wait_for(lambda: calls(folder) == 1, processes)
        processes.started[-1].send_signal(signal.SIGTERM)
        time.sleep(0.5)
        (folder / "go").touch()
        ended = processes.wait(150)
        assert [process.status for process in ended] == [0] * count, processes.told()
    (folder / "go").unlink()
    # The wish of one process is counted behind the first step, and all know of it behind the second.
    first, *others = ended
    assert told(first.err)[-1] == (
        f"easyrl: SIGTERM: stopped after step 2, saved in {folder / 'run' / 'checkpoints'}; "
        f"the same command with --output_dir={folder / 'run'} goes on"
    )
    assert [told(process.out) + told(process.err) for process in others] == [[]] * (count - 1)
    names = sorted(path.name for path in (folder / "run").iterdir())
    assert names == [".lock", "checkpoints", "config.yaml", "metrics.jsonl", "run_id.txt", "samples.jsonl"]
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == [".lock", "2", "models"]
    return Result(folder / "run")


def test_sigterm_to_one_of_two_stops_both_and_one_process_goes_on(run, flags, tmp_path):
    expected = run(**flags)
    assert calls(tmp_path) == STEPS
    (tmp_path / "calls").unlink()
    stopped = stop_by_sigterm(flags, tmp_path, 2, 1, "2,1,1")
    assert calls(tmp_path) == 2  # by process 0 alone
    assert_same(stopped, expected, steps=2)
    assert_same(run(**flags, output_dir=tmp_path / "run"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices", "mesh_dim"), [(2, 2, "1,4,1"), (4, 2, "2,2,2")])
def test_several_processes_are_one_run(count, devices, mesh_dim, run, flags, materials, tmp_path):
    flags |= {"load_checkpoint_reward": f"hf::{materials.reward}", "normalize_rewards": True}
    flags |= {"eval_dataset.path": materials.prompts, "eval_dataset.split": "[:10]"}
    expected, calls_of_one = run(**flags), calls(tmp_path)
    (tmp_path / "calls").unlink()
    ended = run_processes(
        "easyrl.train_ppo", flags | {"mesh_dim": mesh_dim, "output_dir": tmp_path / "run"}, count, devices, tmp_path
    )
    assert [told(process.out) + told(process.err) for process in ended[1:]] == [[]] * (count - 1)
    assert calls(tmp_path) == calls_of_one
    assert_same(Result(tmp_path / "run"), expected)


@pytest.mark.slow
def test_sigterm_to_one_of_four_and_on_with_one_two_or_four(run, flags, tmp_path):
    expected = run(**flags)
    (tmp_path / "calls").unlink()
    assert_same(stop_by_sigterm(flags, tmp_path, 4, 2, "2,4,1"), expected, steps=2)
    for count, devices, mesh_dim in ((1, 2, "1,2,1"), (2, 2, "2,2,1"), (4, 2, "2,4,1")):
        folder = tmp_path / f"on_{count}"
        more = {"resume": f"easyrl::{tmp_path / 'run'}", "mesh_dim": mesh_dim, "output_dir": folder}
        run_processes("easyrl.train_ppo", flags | more, count, devices, tmp_path / "logs")
        on = Result(folder)
        assert [row["step"] for row in on.metrics] == [STEPS]
        for name in on.metrics[0].keys() - LAYOUT:
            np.testing.assert_allclose(
                on.metrics[0][name], expected.metrics[-1][name], atol=1e-5, rtol=1e-5, err_msg=name
            )
        for name, weight in on.weights().items():
            np.testing.assert_allclose(weight, expected.weights()[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_sigkill_to_one_of_four_ends_the_others_and_the_run_goes_on(victim, run, flags, tmp_path):
    expected = run(**flags)
    (tmp_path / "calls").unlink()
    flags |= {"save_model_freq": 1, "mesh_dim": "2,4,1"}
    with start(flags, tmp_path / "run", 4, 2) as processes:
        wait_for(lambda: calls(tmp_path) == 1, processes)
        processes.started[victim].kill()
        began = time.monotonic()
        (tmp_path / "go").touch()
        ended = processes.wait(120)
        print(f"the others ended {time.monotonic() - began:.0f} s after process {victim}")
    for number, process in enumerate(ended):
        if number != victim:
            assert process.status not in (0, -signal.SIGKILL) and process.err.strip(), (number, process)
    run_processes("easyrl.train_ppo", flags | {"output_dir": tmp_path / "run"}, 4, 2, tmp_path / "logs")
    assert_same(Result(tmp_path / "run"), expected)
