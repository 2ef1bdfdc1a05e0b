"""Devices that are not there: the chips of a topology, what they can do, and stand-ins for them to compile against."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from easyrl.core.errors import UserError
from easyrl.core.platform import keep_no_programs

GIB = 2**30
EXPECTED = "expected as v3:8x16, v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16, 2xv5e:16x16, cpu:8 or gpu:8xH100-80GB"


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at best, a chip being `cores` JAX devices.

    flops: bfloat16 matrix FLOP/s. memory: usable bytes. memory_rate: bytes/s. link: bytes/s of one link in one
    direction. full_ring: a torus dimension closes to a ring when it is a multiple of this (0: never). outside: bytes/s
    over the network between slices or hosts. node: chips that the fast links join, for GPUs.
    """

    flops: float
    memory: float
    memory_rate: float
    link: float
    full_ring: int
    outside: float
    cores: int = 1
    node: int = 0


# TPU peaks: "How to Scale Your Model" (Austin et al. 2025), chapter 2, tables of TPU specs and interconnect; v3's FLOPs
# and links from Google Cloud's page on that system (123 TFLOP/s a chip, 656 Gbit/s a link). Usable memory is what the
# compiler gives as the limit for each chip. Rings: chapter 2 (v5e and v6e close at 16, v4 and v5p at multiples of 4),
# and a v3 pod closes at 32. GPUs: NVIDIA's data sheets, dense bfloat16; one 400 Gbit/s adapter a GPU between nodes.
CHIPS = {
    "v3": Chip(123e12, 2 * 15.48 * GIB, 900e9, 82e9, 32, 6.25e9, cores=2),
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 45e9, 4, 6.25e9),
    "v5e": Chip(197e12, 15.75 * GIB, 820e9, 45e9, 16, 3.125e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2800e9, 90e9, 4, 6.25e9),
    "v6e": Chip(920e12, 31.25 * GIB, 1600e9, 90e9, 16, 12.5e9),
    "A100-40GB": Chip(312e12, 37 * GIB, 1555e9, 300e9, 0, 25e9, node=8),
    "A100-80GB": Chip(312e12, 74 * GIB, 2039e9, 300e9, 0, 25e9, node=8),
    "H100-80GB": Chip(989e12, 74 * GIB, 3350e9, 450e9, 0, 50e9, node=8),
    "H200-141GB": Chip(989e12, 131 * GIB, 4800e9, 450e9, 0, 50e9, node=8),
    "B200-180GB": Chip(2250e12, 168 * GIB, 8000e9, 900e9, 0, 50e9, node=8),
}
MEGACORE = ("v4", "v5p")  # two cores that JAX sees as one device


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that a plan is for. `chip` is None for the CPU, of which no peaks are known."""

    text: str
    kind: str  # tpu, cpu or gpu
    name: str  # of the chip
    chip: Chip | None
    dims: tuple[int, ...]  # of a slice, in chips
    slices: int
    num_devices: int

    @property
    def memory(self) -> float:
        """Usable bytes of one device."""
        if self.chip is None:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.num_devices
        return self.chip.memory / self.chip.cores

    @property
    def flops(self) -> float | None:
        """Peak FLOP/s of one device."""
        return self.chip.flops / self.chip.cores if self.chip else None

    @property
    def memory_rate(self) -> float | None:
        """Peak bytes/s of one device's memory."""
        return self.chip.memory_rate / self.chip.cores if self.chip else None

    def link_rate(self, mesh: Mesh, members: tuple[int, ...]) -> float | None:
        """Bytes/s that one device sends to a group, the devices at these places of the mesh.

        One torus dimension carries a collective: both of its links where the group spans a closed ring, one otherwise,
        shared by the cores of a chip. That is cautious: collectives over two dimensions at once are faster.
        """
        if self.chip is None:
            return None
        if self.kind == "gpu":
            nodes = {member // self.chip.node for member in members}
            return self.chip.link if len(nodes) == 1 else self.chip.outside
        devices = [mesh.devices.flat[member] for member in members]
        if len({getattr(device, "slice_index", 0) or 0 for device in devices}) > 1:
            return self.chip.outside / self.chip.cores
        coordinates = np.array([device.coords for device in devices])
        spans = coordinates.max(axis=0) - coordinates.min(axis=0) + 1
        if spans.max() == 1:  # the cores of one chip
            return self.chip.memory_rate / self.chip.cores
        rings = [
            span == size and self.chip.full_ring and size % self.chip.full_ring == 0
            for span, size in zip(spans, (*self.dims, 1, 1), strict=False)
            if span > 1
        ]
        return self.chip.link * (2 if any(rings) else 1) / self.chip.cores


def parse_topology(text: str) -> Topology:
    """Reads --topology. Raises UserError saying what was expected."""
    wrong = UserError(f"--topology={text}: {EXPECTED}")
    kind, separator, rest = text.partition(":")
    if not separator:
        raise wrong
    if kind == "cpu" and rest.isdigit() and int(rest) > 0:
        return Topology(text, "cpu", "cpu", None, (int(rest),), 1, int(rest))
    if kind == "gpu":
        found = re.fullmatch(r"(\d+)x([\w-]+)", rest)
        gpus = [name for name, chip in CHIPS.items() if chip.node]
        if not found or found.group(2) not in gpus or not int(found.group(1)):
            raise UserError(f"--topology={text}: expected gpu:NUMBERxNAME with one of {', '.join(gpus)}")
        number, name = int(found.group(1)), found.group(2)
        return Topology(text, "gpu", name, CHIPS[name], (number,), 1, number)
    found = re.fullmatch(r"(?:(\d+)x)?(v\d\w*)", kind)
    if not found or found.group(2) not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", rest):
        raise wrong
    slices, name = int(found.group(1) or 1), found.group(2)
    dims = tuple(int(size) for size in rest.split("x"))
    if slices < 1 or min(dims) < 1:
        raise wrong
    chip = CHIPS[name]
    return Topology(text, "tpu", name, chip, dims, slices, slices * math.prod(dims) * chip.cores)


def find_devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for: described ones of a TPU, virtual ones of this machine's CPU for the others.

    Call it before JAX has started, or with enough virtual CPU devices in the process. Raises UserError when libtpu,
    which compiles for TPUs, is not installed or does not know the topology.
    """
    if topology.kind != "tpu":
        return cpu_devices(topology.num_devices)
    # Found on a TPU's host by asking its metadata server; here there is none to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")
    try:
        import libtpu  # noqa: F401  (jax would say less clearly that it is missing)
    except ImportError:
        raise UserError(
            f"--topology={topology.text}: compiling for a TPU needs libtpu: pip install -e '.[tpu]' in a clone"
        ) from None
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.name in MEGACORE else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.name}:{'x'.join(map(str, topology.dims))}"
    keep_no_programs()  # those for devices that are not there cannot be read back
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no process that plans takes the TPU from another
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={topology.text}: libtpu does not know it ({reason})") from None
    assert len(described.devices) == topology.num_devices, (len(described.devices), topology)
    return list(described.devices)


def cpu_devices(number: int) -> list[jax.Device]:
    """That many virtual devices of this machine's CPU."""
    with contextlib.suppress(RuntimeError):  # JAX has started: what there is must do
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UserError(
            f"--topology: JAX started with {len(devices)} CPU devices, expected {number}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number}"
        )
    return devices[:number]
