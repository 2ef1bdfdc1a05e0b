"""The hash of weights: the same on every mesh, another one for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.fingerprint import fingerprint_params
from easyrl.core.sharding import make_mesh, sharding_for

MATRIX = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def digest(matrix=MATRIX, dtype="float32", bias=0.5, name="q"):
    return fingerprint_params({"attn": {name: jnp.asarray(matrix, dtype)}, "bias": jnp.float32(bias)})


def changed(row, column, to):
    copy = MATRIX.copy()
    copy[row, column] = to
    return copy


def swapped():
    copy = MATRIX.copy()
    copy[[0, 1]] = copy[[1, 0]]
    return copy


def test_equal_weights_have_equal_fingerprints():
    assert digest() == digest(MATRIX.copy())
    assert len(digest()) == 64


@pytest.mark.parametrize(
    "other",
    [
        {"matrix": changed(7, 15, np.nextafter(MATRIX[7, 15], np.float32(9)))},  # one bit of one number
        {"matrix": changed(0, 0, -MATRIX[0, 0])},
        {"matrix": swapped()},
        {"matrix": MATRIX.T},
        {"matrix": MATRIX.reshape(16, 8)},
        {"dtype": "bfloat16"},
        {"bias": -0.5},
        {"name": "k"},
    ],
    ids=["a bit", "a sign", "places", "transposed", "shape", "type", "a scalar", "a name"],
)
def test_any_change_shows(other):
    assert digest(**other) != digest()


def test_the_mesh_does_not_matter():
    mesh = make_mesh("1,2,4", jax.devices()[:8])
    sharding = sharding_for(("embed", "mlp"), MATRIX.shape, mesh, "q")
    assert digest(jax.device_put(MATRIX, sharding)) == digest()
