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

LOCK, RUN_ID = ".lock", "run_id.txt"
# What a run writes besides config.yaml, metrics.jsonl, samples.jsonl and checkpoints, each set aside by who writes it.
OTHERS = re.compile(r"hf|hf_best|hf_value|hf-\d+|best\.json|report\.html|rollouts|batches|tensorboard|wandb_id\.txt")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run and the places in it, the same for every script."""

    path: Path
    # While these are open, this folder and that of the checkpoints are this run's.
    locks: tuple[IO[bytes], ...] = field(default=(), repr=False, compare=False)

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

    @property
    def run_id(self) -> str:
        """Of the run whose files are here, the same on every process; "" of none, and of one from before runs had any.

        Raises UserError where the place cannot be read.
        """

        def read() -> str:
            try:
                return (self.path / RUN_ID).read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return ""
            except (OSError, ValueError) as error:
                raise UserError(f"--output_dir={self.path}: cannot read {RUN_ID}: {error}") from None

        return from_first(read)

    def begin(self, config: Any, *, start: int, run_id: str) -> None:
        """The first thing that a run does once nothing is wrong with it: writes the resolved `config`, on process 0.

        `start` is the step that it goes on from in this folder. A run that is new there (0) leaves an earlier one's
        files under other names, and its `run_id`, with which its checkpoints know this folder again.
        """
        if is_first() and start == 0:
            with self.writing():
                # First, so that what a run that is killed here has not moved yet is moved by the next one.
                with write_atomic(self.path / RUN_ID) as part:
                    part.write_text(run_id, encoding="utf-8")
                kept = [set_aside(path).name for path in sorted(self.path.iterdir()) if OTHERS.fullmatch(path.name)]
            if kept:
                say(f"files of an earlier run in {self.path} have other names now: {', '.join(kept)}")
        self.save_config(config)

    def close(self) -> None:
        """Leaves the folders to other runs."""
        for lock in self.locks:
            lock.close()

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


def make_run_dir(output_dir: str, script: str, checkpoint_dir: str = "") -> RunDir:
    """Creates the folder of a run, and keeps other runs out of it until the run is closed or its process ends; likewise
    out of that of its checkpoints, which others may name, too. A `checkpoint_dir` in a store knows no locks.

    Nothing else is written: a run that turns out not to start leaves an earlier one alone. `output_dir` empty:
    `runs/<script>-<date>-<time>` under the working directory, with a number behind it if that is taken. Process 0
    creates; the other processes only learn the place. Raises UserError naming the flag when --output_dir is not a local
    folder or --checkpoint_dir holds it, when one of them cannot be written to, and when another run is writing there.
    """
    if "://" in output_dir:
        raise UserError(f"--output_dir={output_dir}: expected a local folder, found the address of a store")

    locks: list[IO[bytes]] = []

    def create() -> str:
        path = Path(output_dir).expanduser() if output_dir else _new_folder(script)
        folders = [(path, f"--output_dir={output_dir or path}")]
        if not checkpoint_dir:
            folders.append((RunDir(path).checkpoints, f"--output_dir={output_dir or path}, checkpoints"))
        elif "://" not in checkpoint_dir:
            place, named = Path(checkpoint_dir).expanduser(), f"--checkpoint_dir={checkpoint_dir}"
            if path.resolve().is_relative_to(place.resolve()):  # which a run that starts anew sets aside as a whole
                raise UserError(f"{named}: holds --output_dir={path}, expected a folder for checkpoints alone")
            folders.append((place, named))
        for folder, named in folders:
            locks.extend(filter(None, [_take(folder, named)]))
        return str(path)

    return RunDir(Path(from_first(create)), tuple(locks))


def _new_folder(script: str) -> Path:
    """A new folder that is named after the script and the time, with -1, -2, ... behind it if that is taken: several
    runs may start in one second.
    """
    name = f"runs/{script}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count():
        path = Path(f"{name}-{number}" if number else name)
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--output_dir={path}: cannot write there: {error.strerror}") from None
    return path


def _take(folder: Path, named: str) -> IO[bytes] | None:
    """Makes a folder if need be, and takes it for this process until the file is closed or the process is gone, however
    it died. Raises UserError that begins with `named`, the flag and its value, where that cannot be.

    None on a file system that knows no locks. The lock is the process's own (POSIX): no child inherits it, so none that
    outlives a killed run keeps the next one out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        file = (folder / LOCK).open("ab")
    except FileExistsError:
        raise UserError(f"{named}: expected a folder, found a file of that name") from None
    except OSError as error:
        raise UserError(f"{named}: cannot write there: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{named}: another run is writing there") from None
        return None
    return file
