import itertools

import jax
import jax.numpy as jnp
import pytest

from easyrl.core.masking import Mean
from easyrl.runtime.loop import Hook, run_loop


@pytest.fixture
def device_step():
    """A step whose metrics stay on the device and whose state is donated, as in training."""

    @jax.jit
    def metrics_of(state, batch):
        return {"loss": Mean(state * batch, jnp.float32(2)), "tokens": batch}

    add = jax.jit(lambda state, batch: state + batch, donate_argnums=0)

    def step_fn(state, batch):
        metrics = metrics_of(state, batch)
        return add(state, batch), metrics

    return step_fn


def host_step(state, batch):
    return state + batch, {"loss": float(state)}


def recorder(seen, **options):
    return Hook(on_step=lambda info: seen.append((info.step, info.metrics.get("loss"), info.state)), **options)


def test_steps_are_counted_from_one_and_metrics_belong_to_their_step(device_step):
    seen = []
    state = run_loop(jnp.float32(0), [1.0, 2.0, 3.0], device_step, start=0, total=3, hooks=[recorder(seen)])
    assert float(state) == 6.0
    # The state before each step is 0, 1, 3; loss = state * batch / 2.
    assert seen == [(1, 0.0, None), (2, 1.0, None), (3, 4.5, None)]


def test_going_on_counts_from_start_and_draws_only_what_it_needs():
    batches, seen = iter(range(100)), []
    run_loop(0, batches, host_step, start=7, total=9, hooks=[recorder(seen)])
    assert [step for step, *_ in seen] == [8, 9]
    assert next(batches) == 2


def test_device_metrics_come_after_the_next_step_was_handed_over(device_step):
    events = []

    def step_fn(state, batch):
        events.append(f"call {batch:.0f}")
        return device_step(state, batch)

    hook = Hook(on_step=lambda info: events.append(f"hook {info.step}"))
    run_loop(jnp.float32(0), [1.0, 2.0, 3.0], step_fn, start=0, total=3, hooks=[hook])
    assert events == ["call 1", "call 2", "hook 1", "call 3", "hook 2", "hook 3"]


def test_host_metrics_come_at_once():
    events = []

    def step_fn(state, batch):
        events.append(f"call {batch}")
        return state, {"loss": 1.0}

    hook = Hook(on_step=lambda info: events.append(f"hook {info.step}"))
    run_loop(0, [1, 2], step_fn, start=0, total=2, hooks=[hook])
    assert events == ["call 1", "hook 1", "call 2", "hook 2"]


def test_a_hook_gets_the_state_of_its_own_step_before_the_next_batch_is_drawn(device_step):
    drawn, seen = [], []

    def batches():
        for batch in (1.0, 2.0, 3.0, 4.0):
            drawn.append(batch)
            yield batch

    def save(info):
        seen.append((info.step, float(info.state), len(drawn)))  # a donated state could not be read

    hooks = [Hook(on_step=save, every=2, needs_state=True), recorder(others := [])]
    run_loop(jnp.float32(0), batches(), device_step, start=0, total=4, hooks=hooks)
    assert seen == [(2, 3.0, 2), (4, 10.0, 4)]
    assert [(step, state) for step, _, state in others] == [(1, None), (2, None), (3, None), (4, None)]


@pytest.mark.parametrize(("every", "expected"), [(1, [5, 6, 7, 8, 9]), (3, [6, 9]), (0, []), (100, [])])
def test_every_counts_the_run_not_this_start(every, expected):
    seen = []
    run_loop(0, itertools.count(), host_step, start=4, total=9, hooks=[recorder(seen, every=every)])
    assert [step for step, *_ in seen] == expected


def test_the_end_has_the_last_state_and_metrics_and_everything_is_closed(device_step):
    events = []
    hooks = [
        Hook(on_end=lambda info: events.append((info.step, float(info.state), info.metrics["loss"]))),
        Hook(close=lambda: events.append("closed")),
    ]
    run_loop(jnp.float32(0), [1.0, 2.0], device_step, start=0, total=2, hooks=hooks)
    assert events == [(2, 3.0, 1.0), "closed"]


def test_a_finished_run_started_again_only_ends():
    ends = []
    metrics = {"loss": 2.0}
    assert run_loop(5, iter([]), host_step, start=3, total=3, hooks=[Hook(on_end=ends.append)], metrics=metrics) == 5
    assert [(info.step, info.state, info.metrics) for info in ends] == [(3, 5, metrics)]


@pytest.mark.parametrize("on_host", [True, False])
def test_a_hook_may_say_itself_at_which_steps_it_is_called(device_step, on_host):
    asked, seen = [], []

    def wanted(step):
        asked.append(step)
        return step in (2, 3)

    hook = Hook(on_step=lambda info: seen.append((info.step, float(info.state))), every=wanted, needs_state=True)
    run_loop(jnp.float32(0), [1.0] * 4, host_step if on_host else device_step, start=0, total=4, hooks=[hook])
    assert asked == [1, 2, 3, 4]
    assert seen == [(2, 2.0), (3, 3.0)]


def test_what_comes_while_a_step_is_computed_is_heard_at_the_next(device_step):
    asked_in, seen = [], []
    signal = Hook(on_step=lambda info: asked_in.append(info.step) if info.step == 2 else None)
    save = Hook(on_step=lambda info: not seen.append(info.step), every=lambda step: bool(asked_in), needs_state=True)
    run_loop(jnp.float32(0), [1.0] * 6, device_step, start=0, total=6, hooks=[signal, save])
    assert seen == [3]


def test_a_step_that_raises_loses_no_metrics_and_closes_without_ending(device_step):
    seen, events = [], []

    def step_fn(state, batch):
        if batch == 3.0:
            raise RuntimeError("bad reward")
        return device_step(state, batch)

    hooks = [recorder(seen), Hook(on_end=lambda info: events.append("end"), close=lambda: events.append("closed"))]
    with pytest.raises(RuntimeError, match="bad reward"):
        run_loop(jnp.float32(0), [1.0, 2.0, 3.0], step_fn, start=0, total=3, hooks=hooks)
    assert [step for step, *_ in seen] == [1, 2]
    assert events == ["closed"]


def test_a_hook_that_raises_is_not_called_again(device_step):
    calls = []

    def full_disk(info):
        calls.append(info.step)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        run_loop(jnp.float32(0), [1.0, 2.0, 3.0], device_step, start=0, total=3, hooks=[Hook(on_step=full_disk)])
    assert calls == [1]


def test_too_few_batches_are_an_error_that_names_the_step(device_step):
    seen = []
    with pytest.raises(ValueError, match="before step 2 of 5"):
        run_loop(jnp.float32(0), [1.0], device_step, start=0, total=5, hooks=[recorder(seen)])
    assert [step for step, *_ in seen] == [1]


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.mark.parametrize("on_host", [True, False])
def test_a_steps_time_and_speed(on_host):
    clock, seen = Clock(), []

    def step_fn(state, batch):
        clock.spend(batch)
        return state, {"tokens": 100.0 if on_host else jnp.float32(100)}

    slow_save = Hook(on_step=lambda info: clock.spend(1000.0), every=2, needs_state=True)
    names = ("time/step", "tokens_per_second", "time/save")
    record = Hook(on_step=lambda info: seen.append(tuple(info.metrics.get(name) for name in names)))
    run_loop(0, [4.0, 2.0, 5.0], step_fn, start=0, total=3, hooks=[record, slow_save], clock=clock)
    # The saving after step 2 is nobody's step time, and stands with the step after it.
    assert seen == [(4.0, 25.0, None), (2.0, 50.0, None), (5.0, 20.0, 1000.0)]


@pytest.mark.parametrize("waits", [(), (2,), (1, 2), (2, 3)])
@pytest.mark.parametrize("saves", [(), (2,), (2, 3), (1, 3)])
def test_a_step_takes_as_long_whatever_surrounds_it(saves, waits, monkeypatch):
    """A device that needs 10 for a step and works while the host goes on; an evaluation is 5 more for its own step."""
    clock, seen, busy_until = Clock(), [], 0.0

    def wait(until):
        clock.now = max(clock.now, until)

    def step_fn(state, batch):
        nonlocal busy_until
        clock.spend(1.0)
        busy_until = max(busy_until, clock.now) + 10
        return state, {"done": busy_until}

    def evaluate(state, step):
        nonlocal busy_until
        if step not in waits:
            return {}
        busy_until += 5
        wait(busy_until)
        return {"eval/loss": 1.0}

    def fetch(metrics):
        wait(metrics["done"])
        return dict(metrics)

    monkeypatch.setattr("easyrl.runtime.loop.fetch", fetch)
    monkeypatch.setattr("easyrl.runtime.loop.on_device", lambda metrics: True)
    save = Hook(on_step=lambda info: clock.spend(1000.0), every=lambda step: step in saves, needs_state=True)
    record = Hook(on_step=lambda info: seen.append(info.metrics["time/step"] - 5 * ("eval/loss" in info.metrics)))
    run_loop(0, range(5), step_fn, start=0, total=5, hooks=[record, save], evaluate=evaluate, clock=clock)
    assert seen == pytest.approx([10] * 5, abs=2)


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_hook_can_end_the_run(asked, device_step):
    """Metrics come one step late, so the step after the one that made a hook ask is under way, and is made whole."""
    seen, ended = [], []
    ask = Hook(on_step=lambda info: info.step == asked)
    last = Hook(on_end=lambda info: ended.append("complete"), on_stop=lambda info: ended.append(info))
    state = run_loop(jnp.float32(0), [1.0, 2.0, 3.0], device_step, start=0, total=3, hooks=[ask, recorder(seen), last])
    made = min(asked + 1, 3)
    assert [step for step, *_ in seen] == list(range(1, made + 1))
    assert [(info.step, float(info.state)) for info in ended] == [(made, float(state))]


def test_a_hook_that_answers_anything_else_than_true_ends_nothing():
    ended = []
    last = Hook(on_end=lambda info: ended.append(info.step), on_stop=lambda info: ended.append("stopped"))
    run_loop(0, [1, 2], host_step, start=0, total=2, hooks=[Hook(on_step=lambda info: 1), last])
    assert ended == [2]


def test_a_hook_that_cannot_end_or_close_keeps_no_other_from_it():
    done = []

    def fail(*_):
        raise OSError("no room")

    def hook(name, stop):
        return Hook(
            lambda info: stop, on_stop=lambda info: done.append(f"{name} stopped"), close=lambda: done.append(name)
        )

    with pytest.raises(OSError, match="no room"):
        run_loop(
            0, [1, 2], host_step, start=0, total=2,
            hooks=[hook("first", False), Hook(on_stop=fail, close=fail), hook("second", True)],
        )  # fmt: skip
    assert done == ["first stopped", "second stopped", "first", "second"]
