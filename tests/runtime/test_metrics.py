import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.masking import Mean, add_means, mean_of
from easyrl.runtime.metrics import PhaseTimer, fetch, on_device


def test_means_are_divided_once_and_scalars_become_floats():
    x = jnp.array([1.0, 2.0, 4.0, jnp.nan])
    halves = mean_of(x[:1], jnp.array([True])), mean_of(x[1:], jnp.array([True, True, False]))
    metrics = fetch({"a": add_means(*halves), "b": jnp.int32(3), "c": np.float32(0.5), "d": 2, "e": Mean(0.0, 0.0)})
    assert metrics == {"a": pytest.approx(7 / 3), "b": 3.0, "c": 0.5, "d": 2.0, "e": 0.0}
    assert all(type(value) is float for value in metrics.values())


def test_what_is_not_a_scalar_is_named():
    with pytest.raises(ValueError, match=r"metric ppo/ratio has shape \(2,\)"):
        fetch({"fine": 1.0, "ppo/ratio": jnp.zeros(2)})


def test_on_device_sees_into_means():
    assert on_device({"a": 1.0, "b": Mean(jnp.ones(()), jnp.ones(()))})
    assert not on_device({"a": 1.0, "b": np.float32(2), "c": Mean(np.float32(1), 1)})


def test_phases_are_summed():
    times = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
    timer = PhaseTimer(clock=lambda: next(times))
    for name in ("rollout", "update", "rollout"):
        with timer.phase(name):
            pass
    assert timer.metrics() == {"time/rollout": 4.0, "time/update": 2.0}


def test_a_phase_that_raises_is_still_timed():
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer.phase("score"):
        raise RuntimeError
    assert set(timer.metrics()) == {"time/score"}
