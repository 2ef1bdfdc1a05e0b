"""The mesh, and the one table that says which logical axis lives on which mesh axis.

A mesh has three axes, with EasyLM's names and order: `dp` (replicated weights, split batch), `fsdp` (split weights,
split batch) and `mp` (split heads, hidden units and vocabulary). Parameters and activations name their dimensions
logically; `RULES` is the only place where those names meet the mesh.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easyrl.core.errors import UserError

MESH_AXES = ("dp", "fsdp", "mp")
DATA_AXES = ("dp", "fsdp")

# Logical axis -> mesh axes. None: never split.
Rules = dict[str, tuple[str, ...] | None]
RULES: Rules = {
    # parameters
    "layers": None,
    "vocab": ("mp",),
    "embed": ("fsdp",),
    "qkv": None,
    "heads": ("mp",),
    "kv_heads": ("mp",),
    "head_size": None,
    "mlp": ("mp",),
    "positions": None,
    "norm": None,
    # activations
    "batch": DATA_AXES,
    "shared_batch": ("dp",),  # of what all devices that share a weight need, each for its part of the width
    "time": None,
    "sequence": ("mp",),  # time, where what is kept of it for the backward pass is split
    "width": None,
    "kept_width": MESH_AXES,  # of hidden states that are kept: any device may want any row, so rows stay whole
    "picked_width": DATA_AXES,  # of rows picked from them, on the way to being split by batch
}

# While responses are decoded, every device group that shares `mp` holds the whole model: a weight split over fsdp would
# have to be gathered for every token. Only the batch is split over fsdp then.
DECODE_RULES = RULES | {"embed": None, "shared_batch": DATA_AXES}


def parse_mesh_dim(text: str, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes from `1,-1,1` or `dp:1,fsdp:-1,mp:1`; one -1 takes the devices that are left.

    Raises UserError naming --mesh_dim for an unknown or repeated axis, a size that is not an integer, more than one -1,
    or sizes whose product is not `num_devices`.
    """
    parts = [part.strip() for part in text.split(",")]
    named = [":" in part for part in parts]
    if len(parts) != len(MESH_AXES) or any(named) != all(named):
        raise UserError(f"--mesh_dim={text}: expected three sizes as in 1,-1,1 or names as in dp:1,fsdp:-1,mp:1")
    pairs = [tuple(part.split(":", 1)) for part in parts] if all(named) else list(zip(MESH_AXES, parts, strict=True))
    sizes: dict[str, int] = {}
    for axis, size in pairs:
        axis = axis.strip()
        if axis not in MESH_AXES or axis in sizes:
            raise UserError(f"--mesh_dim={text}: {axis!r} is not one of {', '.join(MESH_AXES)}, each given once")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"--mesh_dim={text}: the size of {axis} is {size!r}, expected an integer") from None
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise UserError(f"--mesh_dim={text}: the size of {axis} is {size}, expected 1 or more, or -1 for the rest")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"--mesh_dim={text}: -1 may be given once, found it for {' and '.join(free)}")
    if free:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices or num_devices == 0:
        raise UserError(f"--mesh_dim={text}: the sizes do not make up the {num_devices} devices there are")
    return {axis: sizes[axis] for axis in MESH_AXES}


def make_mesh(mesh_dim: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that --mesh_dim describes over `devices` (all there are).

    Several TPU slices lie along `dp`, which alone crosses the network between them. Raises UserError when it cannot.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh_dim(mesh_dim, len(devices))
    shape = tuple(sizes.values())
    one_slice = devices[0].platform != "tpu" or not hasattr(devices[0], "slice_index")
    slices = 1 if one_slice else len({device.slice_index for device in devices})
    if sizes["dp"] % slices:
        raise UserError(f"--mesh_dim={mesh_dim}: dp={sizes['dp']} does not divide by the {slices} slices it crosses")
    # An axis may take a part of a torus dimension: mp=4 of an 8x8 slice.
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        grid = create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Explicit is the default axis type of JAX's own meshes; the rules table needs the compiler to propagate (Auto).
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_batch(size: int, mesh: Mesh, mesh_dim: str, flag: str = "--train_dataset.batch_size") -> None:
    """Raises UserError naming `flag` when the devices of a mesh cannot share a batch of `size` evenly."""
    if size % (shards := num_data_shards(mesh)):
        raise UserError(f"{flag}={size}: does not divide by dp x fsdp = {shards} of --mesh_dim={mesh_dim}")


def num_data_shards(mesh: Mesh) -> int:
    """Into how many parts the batch dimension is split."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def spec_for(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str, rules: Rules = RULES
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry the logical `axes`.

    Raises UserError naming the array `name` when an axis has no rule, when two of its axes claim one mesh axis, or when
    a dimension does not divide by the mesh axes that split it.
    """
    if len(axes) != len(shape):
        raise UserError(
            f"{name}: {len(axes)} logical axes {tuple(axes)} for a shape of {len(shape)} dimensions {shape}"
        )
    entries: list[tuple[str, ...] | None] = []
    owner: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is None:
            entries.append(None)
            continue
        if axis not in rules:
            raise UserError(f"{name}: logical axis {axis!r} has no rule in core/sharding.py")
        mesh_axes = rules[axis]
        for mesh_axis in mesh_axes or ():
            if mesh_axis in owner:
                raise UserError(f"{name}: axes {owner[mesh_axis]!r} and {axis!r} both claim the mesh axis {mesh_axis}")
            owner[mesh_axis] = axis
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes or ())
        if size % parts:
            raise UserError(
                f"--mesh_dim: {name} has {axis}={size}, which does not divide by "
                f"{' x '.join(f'{a}={mesh.shape[a]}' for a in mesh_axes or ())}"
            )
        entries.append(mesh_axes)
    return PartitionSpec(*entries)


def sharding_for(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, name: str, rules: Rules = RULES
) -> NamedSharding:
    """`spec_for` bound to the mesh."""
    return NamedSharding(mesh, spec_for(axes, shape, mesh, name, rules))


class Shard:
    """What a model is given to pin its activations: `shard(x, "batch", "time", "width")`.

    A model that gets `shard=None` runs without constraints, so models know logical names and never a mesh. A `sequence`
    that does not divide stays whole: it is a matter of memory alone.
    """

    def __init__(self, mesh: Mesh, rules: Rules = RULES):
        self.mesh, self.rules = mesh, rules

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        if "sequence" in axes and x.shape[axes.index("sequence")] % self.mesh.shape["mp"]:
            axes = tuple("time" if axis == "sequence" else axis for axis in axes)
        sharding = sharding_for(axes, x.shape, self.mesh, f"array {axes}", self.rules)
        return jax.lax.with_sharding_constraint(x, sharding)

    def parts(self, axis: str) -> int:
        """In how many parts an array is split along an axis of this name."""
        return math.prod(self.mesh.shape[name] for name in self.rules[axis] or ())

    def map_devices(self, function: Callable, inputs: Sequence[tuple], output: tuple) -> Callable:
        """`function` run by every device on its own parts of the inputs, whose axes are named, as is the output's.

        For what the compiler cannot split, such as a kernel.
        """
        spec = lambda axes: PartitionSpec(*(self.rules[axis] if axis else None for axis in axes))
        in_specs = tuple(spec(axes) for axes in inputs)
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=spec(output), check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of small things every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def stand_in(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    """For an array that every device holds, where a program is only traced or compiled."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def put(tree, sharding: NamedSharding):
    """Host arrays, the same on every process, as global arrays: each process hands its devices their part."""

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def fetch(tree):
    """Arrays as numpy arrays, whole, on every process; waits for the device. What is no jax array stays as it is.

    The one way from the devices to the host: the parts of a split array that other processes hold come from there, so
    every process must ask for the same arrays in the same order.
    """

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))
