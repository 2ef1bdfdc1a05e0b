"""A very small Llama whose weights numpy draws: compiling an initialiser would take most of a quick test's time."""

import zlib

import jax.numpy as jnp
import numpy as np

from easyrl.core.params import map_specs
from easyrl.models.families import param_specs
from easyrl.models.llama import LlamaConfig


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, two query heads for each key head. `changes` replace fields."""
    settings = {
        "vocab_size": 40,
        "width": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "mlp_size": 24,
        "max_positions": 128,
    }
    return LlamaConfig(**{**settings, **changes})


def draw_params(cfg: LlamaConfig, head: str = "lm", scale: float = 0.4) -> dict:
    """Normal weights of standard deviation `scale`: large enough for every part of the model to matter."""

    def draw(name, spec):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return jnp.asarray(rng.normal(scale=scale, size=spec.shape), jnp.float32)

    return map_specs(draw, param_specs(cfg, head))
