"""Whatever is wrong with what train_ppo is given is one line that names it, and costs nothing on disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from easyrl.core.errors import UserError
from tests.train_ppo.conftest import Materials, arguments, to_argv, write_model
from tests.train_ppo.wrong_models import MODELS, TEXT
from tests.train_ppo.wrong_settings import DATA, FLAGS, LAYOUT, PLACES, REWARDS
from tests.xla import QUICK

TABLE = MODELS | TEXT | DATA | REWARDS | FLAGS | LAYOUT | PLACES


class Bench:
    """Makes wrong things out of good ones, in a folder of the test's own."""

    def __init__(self, materials: Materials, folder: Path):
        self.materials, self.folder = materials, folder

    def model(self, damage: Callable[[Path], object], source: Path | None = None) -> str:
        """A copy of a model's folder, the policy's if nothing is said, after `damage(folder)`."""
        shutil.copytree(source or self.materials.policy, self.folder / "model")
        damage(self.folder / "model")
        return f"hf::{self.folder / 'model'}"

    def other_model(self, head: str = "lm", **changes) -> str:
        """Another random model, with fields of its configuration changed."""
        return f"hf::{write_model(self.folder / 'model', head, **changes)}"

    def rows(self, *rows: object) -> Path:
        """A file of JSON lines; a string is a line as it is."""
        path = self.folder / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def file(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def function(self, name: str) -> dict:
        return {"load_checkpoint_reward": "", "reward_function": f"{self.materials.functions}:{name}"}


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TABLE)
def test_it_is_one_line_and_nothing_is_lost(name, run, materials, tmp_path):
    change, message = TABLE[name]
    earlier = tmp_path / "run"
    shutil.copytree(materials.policy, earlier / "hf")
    (earlier / "config.yaml").write_text("lr: 1\n")
    (earlier / "metrics.jsonl").write_text('{"step": 1}\n')
    flags = {"output_dir": earlier, **change(Bench(materials, tmp_path))}
    before = contents(tmp_path)

    num_devices = 8 if name in LAYOUT else 1
    message = message.replace("FOLDER", str(tmp_path)).replace("MATERIALS", str(materials.folder))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        run(num_devices=num_devices, **{key.replace(".", "__"): value for key, value in flags.items()})

    assert "\n" not in str(caught.value)
    assert before <= contents(tmp_path)


def test_the_table_is_long_enough():
    assert len(TABLE) >= 25


@pytest.mark.parametrize("name", ["misspelt flag", "a function that raises"])  # found first, and found last
def test_a_process_prints_the_line_and_exits_with_2(name, materials, tmp_path):
    change, message = TABLE[name]
    flags = arguments(materials) | {"output_dir": tmp_path / "run", **change(Bench(materials, tmp_path))}
    path = os.pathsep.join((str(materials.folder), os.environ["PYTHONPATH"]))
    env = {"XLA_FLAGS": QUICK, "PYTHONPATH": path, "EASYRL_CACHE": str(materials.folder / "cache")}
    ended = subprocess.run(
        [sys.executable, "-m", "easyrl.train_ppo", *to_argv(flags)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("easyrl: error: ") and message in line
    assert "Traceback" not in ended.stdout
