"""A tiny model and rows on disk, and runs of the scripts that train from files, in this process."""

import contextlib
import functools
import itertools
import json
import re
from pathlib import Path
from types import ModuleType

import jax
import pytest

from easyrl.core.command_line import load_config
from easyrl.core.sharding import make_mesh
from easyrl.runtime import training
from easyrl.runtime.jsonl import read_jsonl
from easyrl.runtime.loop import run_loop
from tests.source import REPO

# One set of flags and shapes for nearly all runs: what one test has compiled the next finds in the cache.
TINY = {
    "mesh_dim": "1,1,1", "dtype": "fp32", "template": "none", "train_dataset.seq_length": 32,
    "train_dataset.batch_size": 8, "train_dataset.row_length": 64, "lr": 1e-2, "warmup_ratio": 0.0,
}  # fmt: skip


# What every model card of a run says, in these words.
CARD = (
    "Base model", "Data", "Chat template", "learning_rate", "total_train_batch_size", "optimizer", "lr_scheduler_type",
    "lr_scheduler_warmup_ratio", "num_epochs",
)  # fmt: skip


def facts_of_card(folder: Path) -> dict[str, str]:
    """The `- name: value` lines of a model card, which must have those of `CARD`."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    facts = dict(re.findall(r"^- ([^:\n]+): (.+)$", text, flags=re.MULTILINE))
    assert set(CARD) <= facts.keys()
    assert "## Metrics at the end of training" in text and "## Input format" in text and "from_pretrained" in text
    return facts


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_script(script: ModuleType, flags: dict, num_devices: int = 1, dies_before: int = 0) -> None:
    """`python -m SCRIPT --NAME=VALUE ...`, with errors raised; `__` in a name stands for the dot.

    With `dies_before` the run breaks off before that step.
    """
    argv = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:num_devices]))
        if dies_before:
            patch.setattr(training, "run_loop", dying_loop(dies_before))
        with contextlib.suppress(Died):
            script.main(load_config(script.Config, argv))


class Died(Exception):
    """A run broke off where a test wanted it to."""


def die(*_, **__) -> None:
    """What breaks a run off in place of the function that it would call there."""
    raise Died


def dying_loop(step: int):
    """`run_loop`, but nothing is left of the run when it is about to draw the batch of `step`."""

    def loop(state, batches, *args, start, **options):
        def some():
            yield from itertools.islice(batches, step - 1 - start)
            raise Died

        return run_loop(state, some(), *args, start=start, **options)

    return loop


def explained(page: str) -> set[str]:
    """The metrics that a page of the docs explains in its table."""
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-z][^`]*)` \|", text, flags=re.MULTILINE))


def metrics_of(run: Path) -> list[dict]:
    return read_jsonl(run / "metrics.jsonl")
