"""Programs compiled before their first call."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.ahead import Call, compile_ahead
from easyrl.core.sharding import make_mesh, put, replicated
from tests.lowered import names_of_lowered


def test_first_calls_find_their_programs():
    """With stand-ins for arrays, arrays of the host and of the device, keywords, and some given by a partial."""
    whole = replicated(make_mesh("2,2,2"))

    @jax.jit
    def double(x):
        return 2 * x

    @functools.partial(jax.jit, donate_argnums=0)
    def add(x, y, *, scale, shift=None):
        return scale * x + y

    add = functools.partial(add, shift=None)
    placed = put(np.ones(3, np.float32), whole)
    like = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=whole)
    told = []
    with names_of_lowered() as names:
        calls = [Call("a", add, (like, like), {"scale": placed}), Call("b", double, (np.arange(3),))]
        seconds = compile_ahead(calls, told.append)
    assert names == ["jit(add)", "jit(double)"]
    assert sorted(told) == sorted(seconds) == ["a", "b"] and min(seconds.values()) > 0
    with names_of_lowered() as names:
        summed = Call("a", add, (put(np.arange(3, dtype=np.float32), whole), placed), {"scale": placed}).run()
        doubled = double(np.array([4, 5, 6]))
    assert names == []
    np.testing.assert_array_equal(summed, [1, 2, 3])
    np.testing.assert_array_equal(doubled, [8, 10, 12])


def test_nothing_to_compile():
    assert compile_ahead([]) == {}


@pytest.mark.parametrize("often", [700, 0])
def test_garbage_is_looked_for_as_often_as_before_once_all_is_traced(often):
    before, meanwhile = gc.get_threshold(), []

    def traced(x):
        meanwhile.append(gc.get_threshold())
        return x

    gc.set_threshold(often, 10, 10)
    try:
        compile_ahead([Call("a", jax.jit(traced), (1.0,))])
        after = gc.get_threshold()
    finally:
        gc.set_threshold(*before)
    assert meanwhile == [(100 * often, 10, 10)] and after == (often, 10, 10)


def test_what_a_program_raises_is_raised():
    def broken(x):
        raise ValueError("cannot be traced")

    with pytest.raises(ValueError, match="cannot be traced"):
        compile_ahead([Call("fine", jax.jit(jnp.sin), (1.0,)), Call("broken", jax.jit(broken), (1.0,))])
