"""Where a run writes."""

import contextlib
import datetime
import errno
import fcntl
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from easyrl.core.config import to_yaml
from easyrl.core.distributed import from_first, is_first, say
from easyrl.core.errors import UserError
from easyrl.core.files import set_aside, write_atomic

LOCK = ".lock"
# What a run writes besides config.yaml, metrics.jsonl, samples.jsonl and checkpoints, each set aside by who writes it.
OTHERS = re.compile(r"hf|hf_best|hf_value|hf-\d+|best\.json|report\.html|rollouts|batches|tensorboard|wandb_id\.txt")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run and the places in it, the same for every script."""

    path: Path
    # While it is open, the folder is this run's.
    lock: IO[bytes] | None = field(default=None, repr=False, compare=False)

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

    def begin(self, config: Any, *, start: int) -> None:
        """The first thing that a run does once nothing is wrong with it: writes the resolved `config`, on process 0.

        `start` is the step that it goes on from. A new run (0) leaves an earlier one's files under other names.
        """
        if is_first() and start == 0:
            with self.writing():
                kept = [set_aside(path).name for path in sorted(self.path.iterdir()) if OTHERS.fullmatch(path.name)]
            if kept:
                say(f"files of an earlier run in {self.path} have other names now: {', '.join(kept)}")
        self.save_config(config)

    def close(self) -> None:
        """Leaves the folder to other runs."""
        if self.lock is not None:
            self.lock.close()

    def save_config(self, config: Any) -> None:
        """Writes the resolved `config` on process 0.

        The file of an earlier run in this folder is kept as `config.1.yaml` if it says something else.
        """
        if not is_first():
            return
        text = to_yaml(config)
        with self.writing():
            if self.config.exists():
                if self.config.read_text(encoding="utf-8") == text:
                    return
                set_aside(self.config)
            with write_atomic(self.config) as part:
                part.write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A block that writes before the first step, when a disk that fails is an error: UserError names the folder."""
        try:
            yield
        except OSError as error:
            raise UserError(f"--output_dir={self.path}: cannot write there: {error.strerror}") from None


def make_run_dir(output_dir: str, script: str) -> RunDir:
    """Creates the folder of a run, and keeps other runs out of it until the run is closed or its process ends.

    Nothing else is written: a run that turns out not to start leaves an earlier one alone. `output_dir` empty:
    `runs/<script>-<date>-<time>` under the working directory, with a number behind it if that is taken. Process 0
    creates; the other processes only learn the place. Raises UserError naming --output_dir when it is not a local
    folder that can be written to, or another run is writing there.
    """
    if "://" in output_dir:
        raise UserError(f"--output_dir={output_dir}: expected a local folder, found the address of a store")

    lock: IO[bytes] | None = None

    def create() -> str:
        nonlocal lock
        path = Path(output_dir).expanduser()
        try:
            if output_dir:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path = _new_folder(f"runs/{script}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        except FileExistsError:
            raise UserError(f"--output_dir={output_dir}: expected a folder, found a file of that name") from None
        except OSError as error:
            raise UserError(f"--output_dir={output_dir}: cannot write there: {error.strerror}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir={output_dir}: cannot write there: {os.strerror(errno.EACCES)}")
        lock = _lock(path)
        return str(path)

    return RunDir(Path(from_first(create)), lock)


def _new_folder(name: str) -> Path:
    """A new folder of this name, or with -1, -2, ... behind it: several runs may start in one second."""
    for number in itertools.count():
        path = Path(f"{name}-{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    return path


def _lock(folder: Path) -> IO[bytes] | None:
    """Takes the folder for this process, until the file is closed or the process is gone, however it died.

    None on a file system that knows no locks. The lock is the process's own (POSIX): no child inherits it, so none that
    outlives a killed run keeps the next one out.
    """
    try:
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise UserError(f"--output_dir={folder}: cannot write there: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"--output_dir={folder}: another run is writing there") from None
        return None
    return file
