"""When to evaluate, and which step was the best."""

import json

import jax.numpy as jnp
import pytest

from easyrl.core.masking import Mean
from easyrl.runtime.evaluation import Evaluation


def evaluation(tmp_path, values, best_by="loss", **more):
    """An evaluation whose parameters are the number of the value that it measures."""
    settings = {"every": 3, "total": 8} | more
    return Evaluation(
        tmp_path / "best.json", lambda params: {best_by: values[params], "other": 1}, best_by=best_by, **settings
    )


def test_it_is_due_every_so_often_and_after_the_last_step(tmp_path):
    assert [step for step in range(1, 9) if evaluation(tmp_path, []).due(step)] == [3, 6, 8]
    assert [step for step in range(1, 9) if evaluation(tmp_path, [], every=0).due(step)] == [8]


@pytest.mark.parametrize(("best_by", "best_steps"), [("loss", [0, 0, 2, 2]), ("accuracy", [0, 1, 1, 3])])
def test_the_best_step_is_the_lowest_loss_or_the_highest_of_anything_else(tmp_path, best_by, best_steps):
    saved = []
    values = [2.0, 3.0, 1.0, 4.0]
    run = evaluation(tmp_path, values, best_by, on_best=lambda params, metrics: saved.append(params))
    found = [run(step, step) for step in range(4)]
    assert [metrics["eval/best_step"] for metrics in found] == best_steps
    assert saved == sorted(set(best_steps) - {0})  # the start is no step of the training
    best = best_steps[-1]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": best, f"eval/{best_by}": values[best]}


@pytest.mark.parametrize(("values", "silent"), [([1.0, 0.5, 2.0], True), ([1.0, 2.0, 2.0], False)])
def test_it_says_when_the_start_stays_the_best(tmp_path, capsys, values, silent):
    run = evaluation(tmp_path, values, total=2, on_best=lambda *_: None)
    for step in range(3):
        assert not capsys.readouterr().err
        run(step, step)
    said = "easyrl: warning: no step beat the start by eval/loss, so that none is exported as the best\n"
    assert capsys.readouterr().err == ("" if silent else said)


@pytest.mark.parametrize(("best_step", "exported", "silent"), [(1, False, False), (1, True, True), (0, False, True)])
def test_it_says_when_the_best_step_passed_before_its_export_was_asked_for(
    tmp_path, capsys, best_step, exported, silent
):
    run = evaluation(tmp_path, [2.0, 1.0 + 2 * (best_step == 0), 3.0])
    for step in range(3):
        run(step, step)
    if exported:
        (tmp_path / "hf_best").mkdir()
    run.check_export(tmp_path / "hf_best", tmp_path / "checkpoints")
    said = (
        "easyrl: warning: the best step by eval/loss was 1, and there is no hf_best of it; if its checkpoint was kept, "
        f"python -m easyrl.convert --load_checkpoint=easyrl::{tmp_path}/checkpoints/1 exports it\n"
    )
    assert capsys.readouterr().err == ("" if silent else said)


def test_a_later_step_must_be_better(tmp_path):
    run = evaluation(tmp_path, [1.0, 1.0])
    assert [run(step, step)["eval/best_step"] for step in range(2)] == [0, 0]


@pytest.mark.parametrize(("then", "best_step"), [("these rows", 1), ("others", 2), (None, 1)])
def test_a_run_that_goes_on_compares_what_was_measured_alike(tmp_path, capsys, then, best_step):
    first = evaluation(tmp_path, [2.0, 1.0], measured=then or "")
    for step in range(2):
        first(step, step)
    remembered = json.loads(json.dumps(first.remember()))
    second = evaluation(tmp_path, [2.0, 1.0, 1.5], measured="these rows")
    second.recall(remembered if then else remembered[:2])  # checkpoints of earlier versions do not say
    assert second(2, 2)["eval/best_step"] == best_step
    said = "step 1, the best so far by eval/loss, was measured otherwise: the best is found anew\n"
    assert capsys.readouterr().out == (said if best_step == 2 else "")


def test_a_value_that_is_not_finite_is_never_the_best(tmp_path):
    run = evaluation(tmp_path, [float("nan"), 2.0, float("nan")])
    assert "eval/best_step" not in run(0, 0)
    assert [run(step, step)["eval/best_step"] for step in (1, 2)] == [1, 1]


def test_means_become_numbers_with_the_time_they_took(tmp_path):
    metrics = evaluation(tmp_path, [Mean(jnp.float32(6.0), jnp.float32(4.0))])(0, 0)
    assert metrics.keys() == {"eval/loss", "eval/other", "eval/best_step", "time/eval"}
    assert metrics["eval/loss"] == 1.5


def test_without_held_out_data_it_is_empty(tmp_path):
    run = Evaluation(tmp_path / "best.json", None, every=1, total=1, best_by="loss")
    assert run(None, 1) == {}
    assert not (tmp_path / "best.json").exists()
