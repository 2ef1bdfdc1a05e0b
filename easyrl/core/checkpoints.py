"""Arrays and facts by step in a folder, each step either whole or absent, on a disk or in a store (gs://).

    checkpoints/40/state/      the arrays, by orbax: every process writes the parts that its devices hold
    checkpoints/40/run.json    everything else; written last, so a step that has it is whole
    checkpoints/models/        how the models in them are built (easyrl.hf.saved)

What a killed process left behind has no `run.json`: readers pass it over, and the next writer removes it.
"""

import contextlib
import json
import logging
import os
import textwrap
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import orbax.checkpoint as ocp
from etils import epath

from easyrl.core.distributed import from_first, is_first
from easyrl.core.errors import UserError
from easyrl.core.files import sync, write_atomic
from easyrl.core.params import path_str

T = TypeVar("T")

STATE, FACTS, MODELS = "state", "run.json", "models"
FORMAT = 1  # of all this; a reader refuses any other
ANSWER = 60  # seconds that a store has for its first answer
REASON = 200  # letters of a store's complaint, which can be a page
TIMEOUT = 1200  # seconds that processes wait for each other's parts of a checkpoint


def is_remote(folder: epath.Path) -> bool:
    """Whether a folder is the address of a store."""
    return "://" in str(folder)


def whole_steps(folder: epath.Path) -> list[int]:
    """The steps that are whole, in order; none where there is no such folder. OSError when the place cannot be read:
    a store that does not answer must not pass for an empty one.
    """
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and (path / FACTS).exists())


def newest_step(folder: epath.Path, flag: str) -> int | None:
    """The newest whole step, the same on every process, or None. Raises UserError naming `flag` for a place that cannot
    be read.
    """

    def look() -> int | None:
        try:
            if not is_remote(folder):
                return max(whole_steps(folder), default=None)
            logging.getLogger("gcsfs").setLevel(logging.ERROR)  # its warnings tell nothing that the error does not
            return max(_answer(lambda: whole_steps(folder)), default=None)
        except Exception as error:  # every store has errors of its own
            raise UserError(f"{flag}: cannot read {folder}: {error}") from None

    return from_first(look)


def _answer(ask: Callable[[], T]) -> T:
    """What `ask` returns or raises; TimeoutError when a store takes its time: their libraries try for many minutes."""
    found: list[tuple[T | None, Exception | None]] = []

    def call() -> None:
        try:
            found.append((ask(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(ANSWER)
    if not found:
        raise TimeoutError(f"no answer within {ANSWER} s")
    answer, error = found[0]
    if error is not None:
        raise error
    return cast(T, answer)


def find_checkpoint(target: str, flag: str) -> tuple[epath.Path, int]:
    """The folder and the step that `easyrl::TARGET` names: a run's folder or its checkpoints folder (the newest step),
    or one step of the latter. Raises UserError naming `flag` when there is no whole checkpoint.
    """
    path, flag = epath.Path(target).expanduser(), f"{flag}=easyrl::{target}"
    if path.name.isdecimal() and (path / FACTS).exists():  # a run's folder may have a number for a name, too
        return path.parent, int(path.name)
    for folder in (path, path / "checkpoints"):
        if (step := newest_step(folder, flag)) is not None:
            return folder, step
    raise UserError(f"{flag}: found no whole checkpoint there, expected a run's checkpoints folder or one step of it")


def _for_orbax(path: epath.Path) -> epath.Path:
    """An absolute path, as orbax demands: checkpoints may be named relative to the folder one works in."""
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def read_facts(folder: epath.Path, step: int) -> dict[str, Any]:
    """What was written beside the arrays of a step. Raises UserError naming the file when it is damaged."""
    path = folder / str(step) / FACTS
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path}: expected a checkpoint of format {FORMAT}")
    return facts


def read_arrays(folder: epath.Path, step: int, abstract: Any) -> Any:
    """The arrays of a step in the structure of `abstract`, a tree of ShapeDtypeStruct with shardings.

    They go from the files straight into these shardings, whatever mesh, process count or device kind wrote them, and
    are cast where the dtype differs. Leaves that `abstract` leaves out are not read. Raises UserError naming the folder
    when they are not there, damaged, or of other shapes.
    """
    path = folder / str(step) / STATE
    arguments = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(_for_orbax(path), args=arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = textwrap.shorten(str(error), REASON)
        raise UserError(
            f"{path}: cannot be restored: {reason}; an earlier step may be whole: remove {path.parent}, or name one"
        ) from error
    for place, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if isinstance(leaf, jax.ShapeDtypeStruct):  # what orbax gives for an array that is not there
            raise UserError(f"{path}: cannot be restored: has no {path_str(place)}, expected {list(leaf.shape)}")
    return arrays


class Writer:
    """Writes checkpoints into `folder` in the background, one at a time, and removes those that are no longer wanted.

    Every process makes one and calls it for the same steps; process 0 alone writes facts and removes anything.

    Args:
      spare: `spare(facts by step) -> steps` says which of the whole steps may go, after each one that was written.
      describe: called on process 0 when the folder has no `models` any more, to write them.
    """

    def __init__(
        self, folder: epath.Path, spare: Callable[[Mapping[int, dict]], list[int]], describe: Callable[[], None]
    ):
        self._folder, self._spare, self._describe = folder, spare, describe
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._facts: dict[int, dict] = {}
        # A save that fails is reported by whoever waits for it, in one line; orbax would print a traceback besides.
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=TIMEOUT)
        if is_first():
            self._facts = {step: read_facts(folder, step) for step in whole_steps(folder)}
            self._remove_halves()

    def start(self, step: int, arrays: Any, facts: dict[str, Any]) -> None:
        """Copies the arrays to the host and returns; the rest goes on while the caller computes.

        The arrays may be donated to a computation right afterwards. Waits for the save before, whose errors it raises.
        """
        self.wait()
        path = _for_orbax(self._folder / str(step) / STATE)
        self._orbax.save(path, args=ocp.args.PyTreeSave(arrays), force=True)
        self._thread = threading.Thread(
            target=self._finish, args=(step, facts | {"format": FORMAT}), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong with the last save, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Lets the save that is under way end, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
        self._orbax.close()

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            if is_first():
                if not (self._folder / MODELS).exists():  # the folder vanished
                    self._describe()
                self._make_whole(step, facts)
        except Exception as error:
            self._error = error
            if is_first():
                self._remove_halves()  # a full disk wants the room back

    def _make_whole(self, step: int, facts: dict[str, Any]) -> None:
        folder, text = self._folder / str(step), json.dumps(facts)
        if is_remote(folder):
            (folder / FACTS).write_text(text)
        else:
            for path in [*Path(folder).rglob("*"), Path(folder), Path(folder).parent]:
                sync(path)
            with write_atomic(Path(folder) / FACTS) as part:
                part.write_text(text, encoding="utf-8")
        self._facts[step] = facts
        for spare in self._spare(self._facts):
            self._facts.pop(spare)
            (self._folder / str(spare) / FACTS).unlink(missing_ok=True)  # from here on it is not whole
        self._remove_halves()

    def _remove_halves(self) -> None:
        """Removes the folders of steps that are not whole; what cannot be removed now is removed next time."""
        with contextlib.suppress(Exception):  # stores have errors of their own
            for path in self._folder.iterdir() if self._folder.exists() else ():
                ours = path.name.isdecimal() and all(
                    STATE in part.name or FACTS in part.name for part in path.iterdir()
                )
                if ours and int(path.name) not in self._facts:
                    path.rmtree()


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
