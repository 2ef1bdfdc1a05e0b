"""Numbers that are not finite: told when they appear, and the end of a run that does not get rid of them.

The compiled steps leave out every update that would be made from such a number, and count it (`COUNTS`). Here the
counts are watched on the host, where nothing has to wait for them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easyrl.core.errors import RunFailed
from easyrl.core.params import path_str
from easyrl.core.sharding import fetch
from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.progress import warn
from easyrl.runtime.troubles import is_of_the_disk, reason_of

# Metrics above 0 where an update was left out because a number was not finite.
COUNTS = ("skipped", "ppo/not_finite", "ppo/policy/not_finite", "ppo/val/not_finite")
SHOWN = 5  # samples, or parameters, that a message names

Metrics = Mapping[str, float]


class Guard:
    """Warns of every step that left out an update because of a bad number, and ends a run after too many in a row.

    Args:
      most_in_a_row: such steps in a row that a run survives; one more ends it.
      explain: `explain(step, metrics, state)` says what was not finite, and in which samples. The state is None when
        the step has just been made, and the run's last one when that is the end.
      keep: `keep(step, metrics)` writes the step's batch to a file for replay and gives its path.

    The script calls `check` once the loop has ended, and all checkpoints are written. Started again, a run that has
    no step left fails as it did, before anything is exported.
    """

    def __init__(
        self,
        most_in_a_row: int,
        explain: Callable[[int, Metrics, Any], str],
        keep: Callable[[int, Metrics], Path],
    ):
        self._most, self._explain, self._keep = most_in_a_row, explain, keep
        self._in_a_row = self._steps = 0
        self._last: StepInfo | None = None  # the step that was one too many
        self._message = ""

    def hook(self) -> Hook:
        """What `run_loop` is to call."""
        return Hook(on_step=self._on_step, on_stop=self._on_stop, on_end=self._on_end)

    def remember(self) -> list[int]:
        """How many such steps there were in a row, and in all, for a checkpoint."""
        return [self._in_a_row, self._steps]

    def recall(self, remembered: list[int]) -> None:
        """Goes on from what `remember` gave."""
        self._in_a_row, self._steps = remembered

    def check(self) -> None:
        """Raises RunFailed if numbers that were not finite have ended the run."""
        if self._message:
            raise RunFailed(self._message)

    def _on_step(self, info: StepInfo) -> bool:
        if not any(info.metrics.get(name, 0.0) > 0 for name in COUNTS):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        self._steps += 1
        warn(f"step {info.step}: an update was left out: {self._explain(info.step, info.metrics, None)}")
        if self._last is None and self._in_a_row > self._most:
            self._last = info
        return self._last is not None

    def _on_stop(self, info: StepInfo) -> None:
        if self._last is None:  # the run was stopped for another reason
            return
        step, metrics = self._last.step, self._last.metrics
        self._message = (
            f"step {step}: stopped, as more steps in a row than --max_bad_steps={self._most} had a number that is not "
            f"finite: {self._explain(step, metrics, info.state)}. "
        )
        try:
            self._message += f"The batch: {self._keep(step, metrics)}"
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            self._message += f"The batch could not be kept: {reason_of(error)}"

    def _on_end(self, info: StepInfo) -> None:
        if self._steps:
            warn(f"{self._steps} of the run's steps left out an update because a number was not finite")
        if self._in_a_row > self._most:  # the batches are gone with the process that made them
            raise RunFailed(
                f"step {info.step}: nothing is exported, as the last {self._in_a_row} steps, more than "
                f"--max_bad_steps={self._most}, had a number that is not finite"
            )


def terms_of(metrics: Metrics, names: Mapping[str, str]) -> str:
    """Those of `names` (metric to words) that are not finite, as in `the loss and the gradient`."""
    return " and ".join(words for name, words in names.items() if not np.isfinite(metrics.get(name, 0.0)))


def listed(items: Sequence) -> str:
    """The first few of `items`, and how many more there are."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


@jax.jit
def _finite_leaves(params: dict) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]


def bad_weights(params: dict) -> list[str]:
    """The names of the parameters that hold a number that is not finite."""
    names = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [name for name, fine in zip(names, fetch(_finite_leaves(params)), strict=True) if not fine]


def check_weights(folder: Path, params: dict) -> None:
    """Raises RunFailed where `params`, about to be exported to `folder`, are not finite: they are no model, and never
    will be.
    """
    if bad := bad_weights(params):
        raise RunFailed(f"{folder}: not exported, as these weights are not finite: {listed(bad)}")


def culprits(samples: np.ndarray, is_bad: Callable[[np.ndarray], bool], most: int = SHOWN) -> list[int]:
    """Up to `most` of the `samples` that are bad by themselves, found by halving: `is_bad(some of them)`."""
    if most <= 0 or not len(samples) or not is_bad(samples):
        return []
    if len(samples) == 1:
        return [int(samples[0])]
    half = len(samples) // 2
    found = culprits(samples[:half], is_bad, most)
    return found + culprits(samples[half:], is_bad, most - len(found))
