"""Kills runs at random moments and starts them again until they are done; what they leave must be that of a whole run.

    python -m tests.torture --trainers=sft,rm,dpo,ppo --runs=20 --seed=0 --folder=build/torture

For each trainer one run is left in peace. Every other one is killed by SIGKILL up to --kills times: at any moment of
its life, in the middle of its steps, or while a checkpoint is being written; and started again with the same flags each
time. Then its weights, best step, samples and metrics (but for times) are compared with those of the first, bit for
bit.

Runs are children forked from this process, which has imported everything and computed nothing, so that a start takes
the time of loading weights and programs and not that of Python.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlxu  # noqa: F401  (imported by load_config, in every child otherwise)
import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaConfig  # noqa: F401  (they import most of what a start would take)

from easyrl import train_dpo, train_ppo, train_rm, train_sft
from easyrl.core.command_line import load_config
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.runtime import training
from easyrl.runtime.jsonl import read_jsonl
from easyrl.runtime.metrics import timeless
from tests.offline import TINY, write_rows
from tests.train_ppo.conftest import TINY as TINY_PPO
from tests.train_ppo.conftest import write_model
from tests.xla import QUICK

WORDS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on"]
SCRIPTS = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo}
KINDS = ("at any moment", "between steps", "while saving")
GENEROUS = 300.0  # seconds after which a run hangs


@dataclass(frozen=True)
class Config:
    """Kill runs and compare what they leave with what a whole run leaves."""

    trainers: str = flag("sft,rm,dpo,ppo", "Which, separated by commas.")
    runs: int = flag(20, "Runs of each trainer that are killed.", least=1)
    kills: int = flag(6, "Kills of a run at most.", least=1)
    seed: int = flag(0, "Of the moments.")
    steps: int = flag(24, "Steps of a run.", least=4)
    folder: str = flag("build/torture", "Where the runs go; emptied first.")


def main(config: Config) -> None:
    folder = Path(config.folder).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # One device, and no time spent on optimising programs that run for a second; JAX starts in the children only.
    os.environ |= {"EASYRL_CACHE": str(folder / "cache"), "XLA_FLAGS": QUICK}
    wait(start(lambda: write_materials(folder), folder / "materials.log"))
    chance, failures = random.Random(config.seed), 0
    for name in config.trainers.split(","):
        begun = time.monotonic()
        flags = flags_of(name, folder, config.steps)
        whole = folder / name / "whole"
        status, seconds = wait(start_run(name, flags, whole))
        assert status == 0, f"{whole}.log"
        kills = dict.fromkeys(KINDS, 0)
        for number in range(config.runs):
            run = folder / name / str(number)
            for kind in torment(partial(start_run, name, flags, run), run, seconds, config, chance):
                kills[kind] += 1
            if found := difference(run, whole):
                failures += 1
                print(f"{name}, run {number}: {found}", flush=True)
            else:
                shutil.rmtree(run)
        told = ", ".join(f"{count} {kind}" for kind, count in kills.items())
        print(
            f"{name}: {config.runs} runs, {sum(kills.values())} kills ({told}), {time.monotonic() - begun:.0f} s",
            flush=True,
        )
    if failures:
        raise UserError(f"{failures} runs differ from the one that was left in peace")
    print("every run that was killed is bit for bit the run that was not")


def torment(
    begin: Callable[[], int], run: Path, seconds: float, config: Config, chance: random.Random
) -> Iterator[str]:
    """Kills a run once to `config.kills` times and lets it end; yields what the moments were."""
    killed = 0
    while killed < config.kills:
        kind = chance.choice(KINDS)
        if kind == KINDS[0]:
            moment = after(chance.uniform(0, seconds))
        elif kind == KINDS[1]:
            moment = grown(run / "metrics.jsonl", chance.randint(1, config.steps // 3))
        else:
            moment = saving(run / "checkpoints", chance.randint(1, 3))
        child = begin()
        alive = until(child, moment)
        time.sleep(chance.uniform(0, 0.03) * (kind != KINDS[0]))
        if alive and kill(child):
            killed += 1
            yield kind
        elif killed:
            return  # it was quicker than the moment chosen, and is done
        else:
            shutil.rmtree(run)
    status, _ = wait(begin())
    assert status == 0, f"{run}.log"


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def grown(path: Path, rows: int) -> Callable[[], bool]:
    """Whether a file has that many lines more than this start, which may have dropped some first, found or left."""
    least = path.read_bytes().count(b"\n") if path.exists() else 0

    def moment() -> bool:
        nonlocal least
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        least = min(least, lines)
        return lines >= least + rows

    return moment


def saving(checkpoints: Path, number: int) -> Callable[[], bool]:
    """Whether the `number`-th checkpoint of this start is being written."""
    old = {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
    seen: set[str] = set()

    def moment() -> bool:
        if checkpoints.exists():
            seen.update(path.name for path in checkpoints.iterdir() if path.name.isdecimal() and path.name not in old)
        return len(seen) >= number

    return moment


# ---------------------------------------------------------------- processes


def start(work: Callable[[], None], log: Path) -> int:
    """A child that does `work`; its output goes to `log`."""
    sys.stdout.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_run(name: str, flags: dict, run: Path) -> int:
    def work() -> None:
        # The report takes longer than all else, and is drawn from what is compared.
        training.write_report = lambda *_: None
        script = SCRIPTS[name]
        script.main(
            load_config(script.Config, [f"--{key}={value}" for key, value in (flags | {"output_dir": run}).items()])
        )

    return start(work, run.with_name(f"{run.name}.log"))


def until(child: int, moment: Callable[[], bool]) -> bool:
    """Waits for a moment in the life of a child; False when it ended before, and well."""
    end = time.monotonic() + GENEROUS
    while not moment():
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"a run ended by itself, with status {status}"
            return False
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("a run hangs")
        time.sleep(0.001)
    return True


def kill(child: int) -> bool:
    """Kills a child; False when it had ended well by itself."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, f"a run ended by itself, with status {status}"
    return os.WIFSIGNALED(status)


def wait(child: int) -> tuple[int, float]:
    """The exit status of a child and the seconds it took."""
    begun = time.monotonic()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begun


# ---------------------------------------------------------------- runs and what they leave


def write_materials(folder: Path) -> None:
    write_model(folder / "model")
    write_model(folder / "reward", "reward", seed=1)
    write_rows(folder / "prompts.jsonl", [{"prompt": word} for word in WORDS * 4])
    write_rows(folder / "rows.jsonl", [{"prompt": word, "completion": f" {word} is good"} for word in WORDS * 2])
    pairs = [{"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad"} for word in WORDS * 2]
    write_rows(folder / "pairs.jsonl", pairs)


def flags_of(name: str, folder: Path, steps: int) -> dict:
    """Flags of a run that uses whatever a run may remember: schedules, both optimizers, moments, the best step."""
    common = {"save_model_freq": 2, "eval_freq": 5, "lr_schedule": "linear", "keep_checkpoint_every": 10}
    if name == "ppo":
        return TINY_PPO | common | {
            "load_checkpoint_policy": f"hf::{folder / 'model'}", "load_checkpoint_reward": f"hf::{folder / 'reward'}",
            "train_dataset.path": folder / "prompts.jsonl", "eval_dataset.path": folder / "prompts.jsonl",
            "eval_dataset.split": "[:8]", "max_steps_per_epoch": 4, "num_epochs": steps // 4, "kl_target": 0.5,
            "kl_horizon": 16, "normalize_rewards": True,
        }  # fmt: skip
    data = folder / ("rows.jsonl" if name == "sft" else "pairs.jsonl")
    return TINY | common | {
        "load_checkpoint": f"hf::{folder / 'model'}", "train_dataset.path": data, "eval_dataset.path": data,
        "total_steps": steps, "save_best": True,
    }  # fmt: skip


def difference(run: Path, whole: Path) -> str:
    """What of a run is not as it is in the whole one, or nothing."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = ([timeless(row) for row in read_jsonl(path / name)] for path in (run, whole))
        if ours != theirs:
            row = next((k for k, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), "count")
            return f"{name} differs at row {row}"
    for folder in sorted(path.parent.relative_to(whole) for path in whole.glob("hf*/model.safetensors")):
        ours, theirs = (load_file(path / folder / "model.safetensors") for path in (run, whole))
        for name in theirs:
            if not np.array_equal(ours[name], theirs[name]):
                return f"{folder}: {name} differs"
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    if steps != (expected := sorted(path.name for path in (whole / "checkpoints").iterdir())):
        return f"the checkpoints are {steps}, expected {expected}"
    if (whole / "best.json").exists() and json.loads((run / "best.json").read_text()) != json.loads(
        (whole / "best.json").read_text()
    ):
        return "best.json differs"
    return ""


if __name__ == "__main__":
    try:
        main(load_config(Config, sys.argv[1:]))
    except UserError as error:
        raise SystemExit(f"torture: {error}") from None
