"""Evaluation during training, and the step that did best."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyrl.core.distributed import is_first, say
from easyrl.core.files import write_atomic
from easyrl.runtime.metrics import PhaseTimer, fetch
from easyrl.runtime.progress import warn
from easyrl.runtime.troubles import Troubles

LATER = "trying again when an evaluation is better still"
Measure = Callable[[Any], dict[str, Any]]


def direction(metric: str) -> float:
    """1 for a metric of which more is better, -1 for a loss."""
    return -1.0 if metric.endswith("loss") else 1.0


def digest(*parts: Any) -> str:
    """A short name of what evaluations measure, from the data and settings that decide it."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Evaluation:
    """Measures a model on held-out data every so many steps and after the last one, and remembers the best step.

    Args:
      path: the file that tells the best step so far: its number, and the metric that decided.
      measure: `measure(params) -> metrics` (scalars or `Mean` pairs) on held-out data; None: there is no such data, and
        every evaluation is empty.
      every: steps between evaluations; 0: only after the last step, and whenever it is called.
      total: the last step.
      best_by: the metric that decides. Of a loss the lowest is best, of anything else the highest; a later step must be
        better to take the place of an earlier one.
      on_best: called with the parameters and the evaluation's metrics when a step of the training is the best so far.
        A warning says so if none ever was.
      measured: a name of what is measured. The best of a run that measured something else is no measure of this one's.
      troubles: told when `path` or what `on_best` writes cannot be written.
    """

    def __init__(
        self,
        path: Path,
        measure: Measure | None,
        *,
        every: int,
        total: int,
        best_by: str,
        on_best: Callable[[Any, dict[str, float]], None] | None = None,
        measured: str = "",
        troubles: Troubles | None = None,
    ):
        self._troubles = troubles or Troubles()
        self._path, self._measure, self._every, self._total, self._on_best = path, measure, every, total, on_best
        self._best_by, self._measured = f"eval/{best_by}", measured
        self._sign = direction(best_by)
        self._best: tuple[int, float] | None = None  # its step and its value

    def remember(self) -> list[Any] | None:
        """The best step so far, its value and what was measured, for a checkpoint."""
        return None if self._best is None else [*self._best, self._measured]

    def recall(self, remembered: list[Any] | None) -> None:
        """Goes on from what `remember` gave, as far as the same was measured then."""
        if remembered is None:
            self._best = None
            return
        step, value, *measured = remembered  # checkpoints from before this was kept do not say what
        self._best = (int(step), float(value))
        if measured and measured != [self._measured]:
            self._best = None
            say(f"step {step}, the best so far by {self._best_by}, was measured otherwise: the best is found anew")

    def check_export(self, folder: Path, checkpoints: Any) -> None:
        """At the end of a run that is to have the export of its best step in `folder`: says so where it is not there,
        because the step had passed before the run was asked for it. Its weights may be in `checkpoints`.
        """
        if is_first() and self._best is not None and self._best[0] > 0 and not folder.exists():
            step = self._best[0]
            warn(
                f"the best step by {self._best_by} was {step}, and there is no {folder.name} of it; if its checkpoint "
                f"was kept, python -m easyrl.convert --load_checkpoint=easyrl::{checkpoints}/{step} exports it"
            )

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step, counted from 1."""
        return step == self._total or (self._every > 0 and step % self._every == 0)

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """The metrics of `params`, which have seen `step` steps: `eval/<name>`, `eval/best_step` and `time/eval`."""
        if self._measure is None:
            return {}
        timer = PhaseTimer()
        with timer.phase("eval"):
            metrics = {f"eval/{name}": value for name, value in fetch(self._measure(params)).items()}
        value = metrics[self._best_by]
        if math.isfinite(value) and (self._best is None or self._sign * value > self._sign * self._best[1]):
            self._best = (step, value)
            if is_first():
                with self._troubles.attempt(self._path.name, LATER), write_atomic(self._path) as part:
                    part.write_text(json.dumps({"step": step, self._best_by: value}) + "\n", encoding="utf-8")
            if self._on_best is not None and step > 0:
                with self._troubles.attempt("the export of the best step", LATER):
                    self._on_best(params, metrics)
        if self._on_best is not None and step == self._total and (self._best is None or self._best[0] == 0):
            warn(f"no step beat the start by {self._best_by}, so that none is exported as the best")
        best = {} if self._best is None else {"eval/best_step": self._best[0]}
        return metrics | best | timer.metrics()
