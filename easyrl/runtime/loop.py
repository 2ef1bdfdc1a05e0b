"""The one training loop.

Every trainer calls `run_loop` with its own step function; what surrounds a step (progress bar, trackers, samples,
checkpoints) is a hook. Steps are counted from 1: step k is the k-th update of the run and its state has seen k updates,
so a run of `total` steps ends with step `total`, and a run that goes on from k starts with `start=k`.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from easyrl.runtime.metrics import Metrics, fetch, on_device, start_copy

State = TypeVar("State")
Batch = TypeVar("Batch")

_NO_BATCH: Any = object()


@dataclass(frozen=True)
class StepInfo:
    """What a hook is told. `state` is None unless the hook asked for it (`needs_state`) or the run is over."""

    step: int
    metrics: dict[str, float]
    state: Any = None


@dataclass(frozen=True)
class Hook:
    """Something that happens beside the steps.

    on_step: called with the metrics of every step that `every` divides; never for `every` 0. `every` may also be a
      function of the step, asked once for each, after the step was handed over and the one before is done. The answer
      True ends the run early, after the step that may already be under way.
    needs_state: hand `on_step` the state of that very step. The loop then waits for the device before it goes on, since
      the next step would take over (donate) the state's memory. A batch is drawn only after these hooks, so they also
      find the data loader where the step left it.
    on_end: called once with the last state and metrics when the run is complete (not when it raised).
    on_stop: called instead when the run ends early, also where that of a hook before has raised.
    close: called last in any case, to give back files and terminals.
    """

    on_step: Callable[[StepInfo], bool | None] | None = None
    every: int | Callable[[int], bool] = 1
    needs_state: bool = False
    on_end: Callable[[StepInfo], None] | None = None
    on_stop: Callable[[StepInfo], None] | None = None
    close: Callable[[], None] | None = None

    def due(self, step: int) -> bool:
        """Whether `on_step` is to be called for this step."""
        if self.on_step is None:
            return False
        return self.every(step) if callable(self.every) else self.every > 0 and step % self.every == 0


@dataclass
class _Pending:
    """A step whose metrics have not been handed to the hooks yet."""

    step: int
    metrics: Metrics
    seconds: float  # that the host has spent on it so far
    due: list[Hook]


def run_loop(
    state: State,
    batches: Iterable[Batch],
    step_fn: Callable[[State, Batch], tuple[State, Metrics]],
    *,
    start: int,
    total: int,
    hooks: Iterable[Hook] = (),
    evaluate: Callable[[State, int], Metrics] | None = None,
    metrics: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> State:
    """Runs steps `start + 1 ... total`, each on the next of `batches`, and returns the last state.

    It ends early when a hook asks for it; the hooks' `on_stop` is then told the last step that was made.

    `step_fn(state, batch) -> (state, metrics)`; metrics are scalars or `Mean` pairs by name, on the host or still on
    the device. Metrics on the device are fetched one step late, after the next step has been handed over, so the
    device never waits for the host; hooks then run while it computes. Metrics that are already host numbers (a PPO
    step waits for its samples anyway) go to the hooks at once, and so does every step at which a due hook needs the
    state. `evaluate(state, step)`, which may wait for the device, gives further metrics of a step once those of the
    step before have been handed to the hooks.

    Three metrics are added. `time/step` is the time in seconds that the host spent on this step or waited for it; the
    first step's holds the compilation. Over the steps these add up to the time of the loop, less the hooks that needed
    the state: `time/save` is the time those took after the step before. Where a step reports the number of `tokens` it
    worked on, `tokens_per_second` is that number over `time/step`. `metrics` are those of step `start`, for a run that
    has no step left to do.

    When a step or its batch raises, the metrics of the step before it still reach the hooks. Raises ValueError when
    `batches` end before `total`.
    """
    hooks = tuple(hooks)
    last = dict(metrics or {})
    pending: _Pending | None = None
    stop, step = False, max(start, total)
    held = 0.0  # seconds that hooks with a need for the state took after the step before
    counted = clock()  # up to here all time is some step's

    def lap() -> float:
        """The seconds that have not been counted yet, which now are."""
        nonlocal counted
        before, counted = counted, clock()
        return counted - before

    def deliver(done: _Pending, state: Any = None) -> dict[str, float]:
        nonlocal held, stop
        metrics = fetch(done.metrics)
        seconds = done.seconds + lap()
        metrics["time/step"] = seconds
        if "tokens" in metrics:
            metrics["tokens_per_second"] = metrics["tokens"] / max(seconds, 1e-9)
        for hook in done.due:
            assert hook.on_step is not None
            called = clock()
            stop |= hook.on_step(StepInfo(done.step, metrics, state if hook.needs_state else None)) is True
            held += clock() - called if hook.needs_state else 0.0
        return metrics

    try:
        iterator = iter(batches)
        for step in range(start + 1, total + 1):
            try:
                batch = next(iterator, _NO_BATCH)
                if batch is _NO_BATCH:
                    raise ValueError(f"the batches ended before step {step} of {total}")
                state, step_metrics = step_fn(state, batch)
            except Exception:
                lap()  # nobody's
                if pending is not None:
                    deliver(pending)
                raise
            if held:
                step_metrics, held = {**step_metrics, "time/save": held}, 0.0
            start_copy(step_metrics)
            late, pending = pending, _Pending(step, step_metrics, lap() - step_metrics.get("time/save", 0.0), [])
            if late is not None:
                deliver(late)
            if evaluate is not None:
                pending.metrics = {**step_metrics, **evaluate(state, step)}
                pending.seconds += lap()
            # Not before: a signal that came while the device was at the step before is heard at this one.
            pending.due = [hook for hook in hooks if hook.due(step)]
            needs_state = any(hook.needs_state for hook in pending.due)
            if needs_state or not on_device(step_metrics):
                last = deliver(pending, state)
                pending = None
            if stop:
                break
        if pending is not None:
            last = deliver(pending)
        info = StepInfo(step, last, state)
        if stop:
            _call_all([partial(hook.on_stop, info) for hook in hooks if hook.on_stop])
        for hook in hooks if not stop else ():
            if hook.on_end is not None:
                hook.on_end(info)
    finally:
        _call_all([hook.close for hook in hooks if hook.close])
    return state


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    """Makes every call, in their order, also where one raises."""
    with contextlib.ExitStack() as stack:
        for call in reversed(calls):
            stack.callback(call)
