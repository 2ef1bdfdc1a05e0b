"""Small checkpoints for the tests of easyrl.hf, written by easyrl itself: no torch is needed."""

import zlib

import jax
import numpy as np
import pytest

from easyrl.core.params import map_specs
from easyrl.core.sharding import make_mesh
from easyrl.hf.export import export_model
from easyrl.hf.families import config_from_hf
from easyrl.models.families import param_specs

TINY = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def mesh():
    """One device."""
    return make_mesh("1,1,1", jax.devices()[:1])


@pytest.fixture
def tiny():
    """`tiny(**changes)`: the config.json of a very small Llama, with some fields changed."""
    return lambda **changes: {**TINY, **changes}


@pytest.fixture
def make(mesh, tiny):
    """`make(head, dtype, **changes) -> (cfg, params)`: a very small model with random weights."""

    def build(head="lm", dtype="float32", **changes):
        cfg = config_from_hf(tiny(**changes), "tiny")

        def draw(name, spec):  # by numpy: compiling an initialiser would take most of these tests' time
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            return jax.device_put(rng.normal(size=spec.shape).astype(np.dtype(dtype)), mesh.devices.item())

        return cfg, map_specs(draw, param_specs(cfg, head))

    return build


@pytest.fixture
def folder(tmp_path, make):
    """`folder(head, max_shard_bytes=..., **changes)`: a very small model's folder on disk."""

    def write(head="lm", *, max_shard_bytes=5e9, **changes):
        cfg, params = make(head, **changes)
        return export_model(tmp_path / "model", cfg, params, head, max_shard_bytes=max_shard_bytes)

    return write
