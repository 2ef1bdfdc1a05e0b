"""Numbers that are not finite: when a run warns, when it ends, and what it says."""

import errno

import numpy as np
import pytest

from easyrl.core.errors import RunFailed
from easyrl.runtime.guard import Guard, bad_weights, culprits, listed
from easyrl.runtime.loop import Hook, run_loop


def run(bad, most_in_a_row, on_device=False):
    """(steps made, the guard) of a run of 8 steps, those in `bad` with a skipped update."""
    made = []

    def explain(step, metrics, state):
        return f"step {step} is bad" if state is None else f"state {state} is bad"

    def step_fn(state, step):
        made.append(step)
        return state + 1, {"skipped": float(step in bad), "loss": np.nan if step in bad else 1.0}

    guard = Guard(most_in_a_row, explain, lambda step, metrics: f"step-{step}.safetensors")
    run_loop(0, range(1, 9), step_fn, start=0, total=8, hooks=[guard.hook()])
    return made, guard


def test_single_bad_steps_are_told_and_survived(capsys):
    made, guard = run({2, 4, 5}, most_in_a_row=2)
    guard.check()
    lines = capsys.readouterr().err.splitlines()
    assert made == [*range(1, 9)]
    told = [f"easyrl: warning: step {k}: an update was left out: step {k} is bad" for k in (2, 4, 5)]
    assert [line for line in lines if line] == [
        *told,
        "easyrl: warning: 3 of the run's steps left out an update because a number was not finite",
    ]


@pytest.mark.parametrize(("most", "last"), [(0, 3), (1, 4), (2, 5)])
def test_one_too_many_in_a_row_ends_the_run(most, last):
    made, guard = run({1, 3, 4, 5, 6, 7, 8}, most) if most else run({3}, most)
    assert made == [*range(1, last + 1)]
    with pytest.raises(RunFailed) as caught:
        guard.check()
    assert str(caught.value) == (
        f"step {last}: stopped, as more steps in a row than --max_bad_steps={most} had a number that is not finite: "
        f"state {last} is bad. The batch: step-{last}.safetensors"
    )


def test_a_run_whose_last_step_is_one_too_many_has_failed_too():
    made, guard = run({7, 8}, 1)
    assert len(made) == 8
    with pytest.raises(RunFailed, match="step 8"):
        guard.check()


def test_a_batch_that_cannot_be_kept_costs_neither_the_reason_nor_what_follows():
    def full(step, metrics):
        raise OSError(errno.ENOSPC, "No space left on device", "batches")

    guard, saved = Guard(0, lambda *_: "the loss", full), []
    run_loop(
        0, [1, 2], lambda state, step: (state, {"skipped": 1.0}), start=0, total=2,
        hooks=[guard.hook(), Hook(on_stop=saved.append)],
    )  # fmt: skip
    assert len(saved) == 1
    with pytest.raises(RunFailed, match=r"the loss\. The batch could not be kept: No space left on device: batches$"):
        guard.check()


def test_started_again_it_has_failed_too_and_nothing_that_follows_is_done():
    _, guard = run({7, 8}, 1)
    again = Guard(1, lambda *_: "", lambda *_: "")
    again.recall(guard.remember())
    exports = []
    with pytest.raises(RunFailed, match=r"step 8: nothing is exported, as the last 2 steps.*--max_bad_steps=1, had"):
        run_loop(0, [], None, start=8, total=8, hooks=[again.hook(), Hook(on_end=exports.append)])
    assert not exports
    more = Guard(2, lambda *_: "", lambda *_: "")  # --max_bad_steps may change
    more.recall(guard.remember())
    run_loop(0, [], None, start=8, total=8, hooks=[more.hook(), Hook(on_end=exports.append)])
    assert len(exports) == 1


def test_culprits_are_found_by_halving():
    asked = []

    def is_bad(some):
        asked.append(len(some))
        return not {3, 17, 90}.isdisjoint(some.tolist())

    assert culprits(np.arange(100), is_bad) == [3, 17, 90]
    assert len(asked) < 50
    assert culprits(np.arange(100), is_bad, most=2) == [3, 17]
    assert culprits(np.arange(4, 10), is_bad) == []


def test_weights_that_are_not_finite_are_named():
    params = {"embed": np.ones((3, 2), np.float32), "layers": {"q": np.array([1.0, np.inf], np.float32)}}
    assert bad_weights(params) == ["layers/q"]


def test_long_lists_are_cut():
    assert listed([1, 2]) == "1, 2" and listed(range(9)) == "0, 1, 2, 3, 4 and 4 more"
