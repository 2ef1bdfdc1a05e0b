"""Where a run writes."""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from easyrl.core.config import save_yaml
from easyrl.core.errors import UserError


@dataclass(frozen=True)
class RunDir:
    """The folder of one run and the places in it, the same for every script."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; given back as --config it repeats the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Prompts and responses with their rewards, by step."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def hf(self) -> Path:
        """The final export."""
        return self.path / "hf"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def make_run_dir(output_dir: str, script: str, config: Any) -> RunDir:
    """Creates the folder of a run and writes the resolved `config` into it.

    `output_dir` empty: `runs/<script>-<date>-<time>` under the working directory. Process 0 creates and writes; the
    other processes only learn the place. Raises UserError naming --output_dir when it is not a local folder that can
    be written to, or is empty with several processes (their clocks would give different names).
    """
    if "://" in output_dir:
        raise UserError(f"--output_dir={output_dir}: expected a local folder, found the address of a store")
    if not output_dir:
        if jax.process_count() > 1:
            raise UserError("--output_dir is empty: with several processes give the folder by name, the same for all")
        output_dir = f"runs/{script}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    run = RunDir(Path(output_dir).expanduser())
    if jax.process_index() == 0:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            save_yaml(config, run.config)
        except FileExistsError:
            raise UserError(f"--output_dir={output_dir}: expected a folder, found a file of that name") from None
        except OSError as error:
            raise UserError(f"--output_dir={output_dir}: cannot write there: {error.strerror}") from error
    return run
