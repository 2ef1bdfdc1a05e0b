"""Alarms for training that goes wrong without a bad number: what they compare, and the hooks that say so."""

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.progress import warn

WINDOW = 20  # steps whose mean is compared
CHOSEN, MARGINS, ALARM = "rewards/chosen", "rewards/margins", "alarms/chosen_falls"


class ChosenFalls:
    """Whether the chosen answers have become less likely while the margin over the rejected ones has grown.

    Direct preference losses only ask for the difference, and often lower both sides, the rejected one faster (Pal et
    al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847): the margin improves as the policy forgets the
    answers it is shown. Compared are the means of rewards/chosen and of rewards/margins over the first and over the
    last `window` steps, and each must have moved by more than two standard errors of the difference. A reward is beta
    times a log-prob minus the reference's, so that hard and easy batches compare.
    """

    def __init__(self, window: int = WINDOW):
        self._window = window
        self._first: list[tuple[float, float]] = []
        self._last: deque[tuple[float, float]] = deque(maxlen=window)

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Whether the alarm is on after a step with these metrics; never within the first two windows. A step whose
        metrics are not finite is in none: it has taught nothing.
        """
        both = (metrics[CHOSEN], metrics[MARGINS])
        if np.isfinite(both).all():
            (self._first if len(self._first) < self._window else self._last).append(both)
        if len(self._last) < self._window:
            return False
        first, last = np.array(self._first), np.array(self._last)
        change = last.mean(axis=0) - first.mean(axis=0)
        errors = np.sqrt((first.var(axis=0) + last.var(axis=0)) / self._window)
        return bool(change[0] < -2 * errors[0] and change[1] > 2 * errors[1])

    def remember(self) -> list[list[tuple[float, float]]]:
        """Both windows, for a checkpoint."""
        return [self._first, [*self._last]]

    def recall(self, remembered: list[list[tuple[float, float]]]) -> None:
        """Goes on from what `remember` gave."""
        first, last = ([(chosen, margin) for chosen, margin in window] for window in remembered)
        self._first, self._last = first, deque(last, maxlen=self._window)


def chosen_falls_hook(alarm: ChosenFalls) -> Hook:
    """Adds the metric `alarms/chosen_falls` (1 or 0) to every step, and warns in one line when it is first on.

    It must come before the hooks that show or log metrics.
    """
    told = False

    def on_step(info: StepInfo) -> None:
        nonlocal told
        on = alarm(info.metrics)
        info.metrics[ALARM] = float(on)
        if on and not told:
            told = True
            warn(f"step {info.step}: chosen answers become less likely while margins grow ({ALARM}); see docs/dpo.md")

    return Hook(on_step)


def nothing_learnt_hook(learnt: Callable[[Mapping[str, float]], bool], why: str) -> Hook:
    """Warns when a step is the first from whose responses nothing can be learnt, and at the end says how many were.

    `learnt(metrics)` tells of a step whether something could; `why` is what to look at where nothing can.
    """
    steps = nothing = 0

    def on_step(info: StepInfo) -> None:
        nonlocal steps, nothing
        steps += 1
        nothing += (none := not learnt(info.metrics))
        if none and nothing == 1:
            warn(f"step {info.step}: nothing to learn from: {why}")

    def at_end(info: StepInfo) -> None:
        if nothing:
            warn(f"{nothing} of {steps} steps had nothing to learn from: {why}")

    return Hook(on_step, on_end=at_end, on_stop=at_end)
