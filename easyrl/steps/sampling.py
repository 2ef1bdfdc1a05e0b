"""The sampler's host side: how prompts are packed for the prefill, from their lengths alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from easyrl.core.ahead import Call
from easyrl.core.groups import PackPlan, Plans
from easyrl.core.sharding import DECODE_RULES, Shard, fetch, num_data_shards, spec_for
from easyrl.data.packing import Shape, group_shapes, pack_parts
from easyrl.models.families import ModelConfig
from easyrl.models.trunk import unstack_layers
from easyrl.sampling.decode import Samples, SamplingConfig, make_sampling
from easyrl.steps.packed import fill_plans


class Sampler:
    """`sample(params, prompts_BP, prompt_lengths_B, key, sample_ids) -> Samples`: what `sampling.decode.make_sampling`
    with these arguments makes, given the plans of the prompts.

    `rows` packed rows of prompts, over all devices, go through the model at once; 0: enough for 1,024 tokens a device.
    Raises UserError as `make_sampling` does, and for B that the mesh's dp x fsdp does not divide.
    """

    def __init__(
        self, cfg: ModelConfig, sampling: SamplingConfig, *, mesh: Mesh | None = None, rows: int = 0, **options: Any
    ):
        self._mesh, self._program = mesh, make_sampling(cfg, sampling, mesh=mesh, **options)
        self._rows = rows

    def __call__(self, params: dict, prompts: Any, lengths: Any, key: jax.Array, sample_ids: Any) -> Samples:
        return self.call(params, prompts, lengths, key, sample_ids).run()

    def call(self, params: dict, prompts: Any, lengths: Any, key: jax.Array, sample_ids: Any) -> Call:
        """The call of the device program. Which program that is depends on no array's values."""
        if self._mesh is not None:
            spec_for(("batch", "time"), prompts.shape, self._mesh, "prompts")
        shards = 1 if self._mesh is None else num_data_shards(self._mesh)
        plans = plan_prompts(fetch(lengths), prompts.shape[1], shards, self._rows)
        return Call("sampling", self._program, (params, prompts, lengths, plans, key, sample_ids))


def lay_out_for_decoding(params: dict, cfg: ModelConfig, mesh: Mesh) -> dict:
    """`params` as a Sampler with `unstacked` takes them, in their place: for weights that never change.

    Each array is given up as soon as it is laid out, so that no more than one is there twice.
    """

    def run(function: Callable, w: jax.Array, n: int) -> list:
        program = jax.jit(function)
        made = jax.block_until_ready([program(w, i) for i in range(n)])
        w.delete()
        return made

    return unstack_layers(params, cfg, Shard(mesh, DECODE_RULES), run)


def prompt_shapes(prompts: int, width: int, rows: int = 0) -> tuple[Shape, ...]:
    """The shapes of groups for the prompts of one device, so many of up to `width` tokens; arguments as there."""
    return group_shapes(width, sequences=prompts, rows=rows)


def plan_prompts(lengths: np.ndarray, width: int, shards: int, rows: int = 0) -> Plans:
    """The plans, on the host, of prompts with these lengths [B], a batch padded to `width`.

    Groups have up to `rows` rows over all devices; 0: enough for 1,024 tokens a device. The batch is in `shards` equal
    parts, one for each device that has its share of it. Each is packed by itself, and its rows are the same part of
    every group: see `sampling.prefill`.
    """
    parts = np.asarray(lengths).reshape(shards, -1)
    packings = pack_parts(parts, width, prompt_shapes(parts.shape[1], width, rows // shards))
    plans = (fill_plans(packing, parts.shape[1]) for packing in packings)
    return tuple(_side_by_side(of_shape) for of_shape in zip(*plans, strict=True))


def _side_by_side(plans: Sequence[PackPlan]) -> PackPlan:
    """One plan whose groups have the rows of all of these plans' groups, in as many groups as the largest has."""

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts, axis=1) if parts[0].ndim else np.max(parts)

    return jax.tree.map(join, *plans)
