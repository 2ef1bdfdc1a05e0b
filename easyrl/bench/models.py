"""Models with random weights on a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easyrl.bench.shapes import SHAPES
from easyrl.bench.workloads import make_weights
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.params import init_params, shardings
from easyrl.models.families import param_specs
from easyrl.models.llama import LlamaConfig

COMPARED = "34m"  # the shape whose weights are the same in the comparison with other trainers


def place_model(cfg: LlamaConfig, head: str, mesh: Mesh, dtype: str, *, ends: bool = False, head_seed: int = 1) -> dict:
    """Random parameters of `param_specs(cfg, head)` on `mesh`; a small model's are those of `workloads.make_weights`.

    A large model's are drawn on the devices, and its samples do not end: raises UserError where they are to.
    """
    specs = param_specs(cfg, head)
    if cfg.tied_embeddings or cfg.width > SHAPES[COMPARED].width:
        if ends:
            raise UserError(f"--model: only models up to {COMPARED} sample responses of real lengths")
        return init_params(specs, jax.random.key(head_seed), DTYPES[dtype], mesh)
    weights = make_weights(cfg, head, ends=ends, head_seed=head_seed)
    place = lambda array, sharding: jax.device_put(jnp.asarray(array, DTYPES[dtype]), sharding)
    return jax.tree.map(place, weights, shardings(specs, mesh))
