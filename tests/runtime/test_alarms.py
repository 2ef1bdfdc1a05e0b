"""The alarm for chosen answers that fall while margins rise."""

import jax
import numpy as np
import pytest

from easyrl.core import distributed
from easyrl.runtime.alarms import ChosenFalls, chosen_falls_hook, nothing_learnt_hook
from easyrl.runtime.loop import StepInfo


def run(chosen, margins, window=5, noise=0.1, bad=None):
    """The alarm after each of 40 steps whose rewards go from 0 to `chosen` and `margins`, with noise; NaN at `bad`."""
    rng = np.random.default_rng(0)
    alarm = ChosenFalls(window)
    way = np.linspace(0, 1, 40)
    steps = zip(chosen * way + noise * rng.normal(size=40), margins * way + noise * rng.normal(size=40), strict=True)
    rewards = [(np.nan, np.nan) if step == bad else both for step, both in enumerate(steps)]
    return [alarm({"rewards/chosen": c, "rewards/margins": m}) for c, m in rewards]


def test_it_rings_when_chosen_answers_fall_and_margins_rise():
    rang = run(chosen=-3.0, margins=3.0)
    assert rang[-1] and not any(rang[:9])


@pytest.mark.parametrize("bad", [2, 30])
def test_a_step_that_is_not_finite_is_passed_over(bad):
    rang, in_peace = run(chosen=-3.0, margins=3.0, bad=bad), run(chosen=-3.0, margins=3.0)
    assert rang[-1] and sum(rang) >= sum(in_peace) - 1


@pytest.mark.parametrize(("chosen", "margins"), [(3, 3), (-3, -3), (3, -3), (0, 3), (-3, 0)])
def test_it_is_silent_otherwise(chosen, margins):
    assert not run(chosen, margins)[-1]


def test_it_is_silent_about_noise():
    assert not any(run(0.0, 0.0, window=20))


@pytest.mark.parametrize("process", [0, 1])
def test_the_hook_adds_the_metric_and_process_0_warns_once(process, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    hook = chosen_falls_hook(ChosenFalls(window=2))
    rows = [{"rewards/chosen": -float(i), "rewards/margins": float(i)} for i in range(8)]
    for step, metrics in enumerate(rows, 1):
        hook.on_step(StepInfo(step, metrics))
    assert [row["alarms/chosen_falls"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    warning = "easyrl: warning: step 4: chosen answers become less likely while margins grow (alarms/chosen_falls)"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (process == 0) and all(line.startswith(warning) for line in lines)


def test_steps_with_nothing_to_learn_from_are_told_once_and_counted(capsys):
    hook = nothing_learnt_hook(lambda metrics: metrics["pairs"] > 0, "no answer ended")
    for step, pairs in enumerate([1, 0, 0, 2], 1):
        hook.on_step(StepInfo(step, {"pairs": pairs}))
    assert capsys.readouterr().err == "easyrl: warning: step 2: nothing to learn from: no answer ended\n"
    hook.on_end(StepInfo(4, {}))
    assert capsys.readouterr().err == "easyrl: warning: 2 of 4 steps had nothing to learn from: no answer ended\n"


def test_a_run_that_always_learns_says_nothing(capsys):
    hook = nothing_learnt_hook(lambda metrics: True, "")
    hook.on_step(StepInfo(1, {}))
    hook.on_end(StepInfo(1, {}))
    assert not capsys.readouterr().err
