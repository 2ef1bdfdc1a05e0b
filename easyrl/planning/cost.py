"""What one device does in a compiled program: matrix FLOPs, main-memory traffic and collectives, loops multiplied out.

FLOPs are those of matrix products (`dot`, `convolution`) and of Pallas kernels, which XLA does not look into. Traffic
is what every instruction outside a fusion reads and writes in main memory: an upper bound on what must move, and close
to what does. A collective's bytes are what one device sends when rings carry it.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from easyrl.planning.hlo import (
    Computation,
    Instruction,
    Module,
    convolution_flops,
    dot_flops,
    trip_count,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
SLICES = ("dynamic-slice", "slice", "gather")
# Instructions that move nothing by themselves: names for what others make, or loops and calls, whose bodies count.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "partition-id", "replica-id", "iota", "add-dependency", "opt-barrier", "domain", "get-dimension-size",
}  # fmt: skip
PALLAS = "tpu_custom_call"
# Groups by names of axes, of devices in order or in that of a transposed array.
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction: `count` runs, each sending `sent` bytes from every device.

    `axes` are the mesh axes that its groups of `group` devices span; `payload` is the size of the whole array that it
    gathers or reduces.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    payload: int
    sent: float
    count: float
    members: tuple[int, ...]  # of the first group, as positions in the mesh
    source: str


@dataclasses.dataclass
class Cost:
    """The sum of what instructions do."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def __iadd__(self, other: "Cost") -> "Cost":
        self.flops += other.flops
        self.bytes += other.bytes
        self.collectives += other.collectives
        return self

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all."""
        return sum(c.sent * c.count for c in self.collectives)


# (a Pallas call, the computation it stands in) -> its FLOPs and bytes.
KernelCost = Callable[[Instruction, Computation], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Loops:
    """How often loops run whose trip count is data: the first name found in a loop's path of scopes decides."""

    trips: Mapping[str, float]

    def find(self, loop: Instruction) -> str:
        """The name of the loop. Raises ValueError for a loop that nothing is known of."""
        # A scope entered under a derivative is wrapped, as in transpose(jvp(NAME)).
        scopes = re.split(r"[/()]", loop.op_name)
        for name in self.trips:
            if name in scopes:
                return name
        raise ValueError(f"nothing is known of how often the loop {loop.name} ({loop.op_name}) runs")


def program_cost(module: Module, mesh_shape: dict[str, int], loops: Loops, kernel_cost: KernelCost) -> dict[str, Cost]:
    """What one device does in a run of the program: by the name of the data-dependent loop, "" for all the rest."""
    return _Walk(module, mesh_shape, loops, kernel_cost).total


class _Walk:
    def __init__(self, module: Module, mesh_shape: dict[str, int], loops: Loops, kernel_cost: KernelCost):
        self.module, self.mesh_shape, self.loops, self.kernel_cost = module, mesh_shape, loops, kernel_cost
        self.total: dict[str, Cost] = {"": Cost()}
        self.seen: set[tuple[str, float]] = set()
        self.computation(module.entry, 1.0, "", counts_bytes=True)

    def computation(self, part: Computation, times: float, label: str, *, counts_bytes: bool) -> None:
        for instruction in part.values():
            self.instruction(part, instruction, times, label, counts_bytes)

    def instruction(
        self, part: Computation, instruction: Instruction, times: float, label: str, counts_bytes: bool
    ) -> None:
        cost = self.total.setdefault(label, Cost())
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            trips: float | None = trip_count(self.module, part, instruction)
            if trips is None:
                name = self.loops.find(instruction)
                trips, label = self.loops.trips[name], label or name
            body = self.module.computations[called["body"]]
            self.computation(body, times * trips, label, counts_bytes=counts_bytes)
            return
        if opcode == "conditional":
            self.dearest([name for role, name in called.items() if role != "to_apply"], times, label, counts_bytes)
            return
        kind, carrier = collective_kind(instruction, self.module)
        if kind:
            # A collective that runs beside computation is written once for each fusion it runs beside.
            channel = re.search(r"channel_id=(\d+)", carrier.attributes)
            key = (channel.group(1) if channel else carrier.name, times)
            if key not in self.seen:
                self.seen.add(key)
                cost.collectives.append(self.collective(kind, part, instruction, carrier, times))
        if opcode == "convolution":
            cost.flops += times * convolution_flops(part, instruction)
        elif opcode == "dot":
            cost.flops += times * dot_flops(part, instruction)
        elif opcode == "custom-call" and PALLAS in instruction.attributes:
            flops, moved = self.kernel_cost(instruction, part)
            cost.flops += times * flops
            cost.bytes += times * moved
            return
        elif "calls" in called or opcode == "call":
            inner = self.module.computations[called.get("calls") or called["to_apply"]]
            # What is inside a fusion stays on the chip; an asynchronous or plain call is as if written out.
            if not kind:
                self.computation(inner, times, label, counts_bytes=counts_bytes and opcode != "fusion")
            if opcode != "fusion":
                return
        if counts_bytes and opcode not in FREE and not opcode.endswith("-done"):
            cost.bytes += times * moved_bytes(self.module, part, instruction)

    def dearest(self, branches: list[str], times: float, label: str, counts_bytes: bool) -> None:
        """Of several branches the one that costs most."""
        costs = []
        for name in branches:
            walk = copy.copy(self)
            walk.total, walk.seen = {}, set()
            walk.computation(self.module.computations[name], times, label, counts_bytes=counts_bytes)
            costs.append(walk.total)
        most = max(
            costs, key=lambda total: (sum(c.flops for c in total.values()), sum(c.bytes for c in total.values()))
        )
        for name, cost in most.items():
            if name in self.total:
                self.total[name] += cost
            else:
                self.total[name] = cost

    def collective(
        self, kind: str, part: Computation, instruction: Instruction, carrier: Instruction, times: float
    ) -> Collective:
        members = first_group(carrier.attributes, self.mesh_shape)
        axes = varying_axes(members, self.mesh_shape)
        size = len(members)
        operands = sum(shape.bytes for name in instruction.operands if name in part for shape in part[name].shapes)
        share = (size - 1) / size
        payload = operands * size if kind == "all-gather" else operands
        sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * payload
        return Collective(kind, axes, size, payload, sent, times, members, instruction.op_name)


def collective_kind(instruction: Instruction, module: Module) -> tuple[str, Instruction]:
    """The kind of collective that an instruction starts, or nothing, and the instruction that states its groups.

    TPU programs hold reduce-scatters as fusions of an all-reduce and a slice.
    """
    name = instruction.opcode.removesuffix("-start")
    if name in COLLECTIVES:
        return name, instruction
    if instruction.opcode == "fusion" and "reduce-scatter" in instruction.called["calls"]:
        inner = module.computations[instruction.called["calls"]]
        for carrier in inner.values():
            if carrier.opcode == "all-reduce":
                return "reduce-scatter", carrier
    return "", instruction


def first_group(attributes: str, mesh_shape: dict[str, int]) -> tuple[int, ...]:
    """The devices of a collective's first group, as positions in the mesh."""
    total = int(np.prod(list(mesh_shape.values())))
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(sorted({int(pairs.group(1)), int(pairs.group(2))}))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, sizes_of_axes, permutation = (_ints(text) for text in iota.groups())
        ids = np.arange(total).reshape(sizes_of_axes)
        ids = ids.transpose(permutation) if permutation else ids
        return tuple(ids.reshape(shape)[0].tolist())
    if named := _NAMED_GROUPS.search(attributes):
        axes, dims, order, chosen = named.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        ids = np.arange(total)
        if dims:
            ids = ids.reshape(_ints(dims)).transpose(_ints(order) or None).reshape(-1)
        ids = ids.reshape(list(sizes.values()))
        within = re.findall(r"'(\w+)'", chosen)
        return tuple(sorted(ids[tuple(slice(None) if name in within else 0 for name in sizes)].reshape(-1).tolist()))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(_ints(listed.group(1)))
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"nothing is known of these groups of devices: {attributes[:200]}")
    return tuple(range(total))


def _ints(text: str | None) -> list[int]:
    return [int(part) for part in text.split(",")] if text else []


def varying_axes(members: tuple[int, ...], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members differ."""
    coordinates = np.array(np.unravel_index(np.array(members), tuple(mesh_shape.values())))
    return tuple(axis for axis, row in zip(mesh_shape, coordinates, strict=True) if np.ptp(row) > 0)


def moved_bytes(module: Module, part: Computation, instruction: Instruction) -> float:
    """What an instruction reads and writes in main memory. Of what it slices, or writes a slice of, the slice alone."""
    if instruction.opcode == "fusion":
        return _moved_by_fusion(module.computations[instruction.called["calls"]], part, instruction)
    out = _main_bytes(instruction.shapes)
    if instruction.opcode in SLICES:
        return 2 * out
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        update = instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else -1]
        return 2 * _main_bytes(part[update].shapes)
    if instruction.opcode in ("copy-start", "slice-start", "async-start"):
        return _main_bytes(instruction.shapes[:1]) + _main_bytes(instruction.shapes[1:2])
    return out + sum(_main_bytes(part[name].shapes) for name in instruction.operands if name in part)


def _moved_by_fusion(inner: Computation, part: Computation, instruction: Instruction) -> float:
    users: dict[str, list[Instruction]] = {}
    for user in inner.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)

    def read(name: str) -> float | None:
        """What is read of a parameter of the fusion, in its element type; None: all of it."""
        total = 0.0
        for user in users.get(name, ()):
            if user.opcode == "bitcast":
                below = read(user.name)
                if below is None:
                    return None
                total += below
            elif user.opcode in SLICES and user.operands[0] == name:
                total += user.shape.bytes
            elif not (user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and user.operands[0] == name)):
                return None
        return total

    moved = 0.0
    for parameter in inner.values():
        if parameter.opcode != "parameter":
            continue
        given = part[instruction.operands[int(parameter.literal)]]
        if all(shape.in_main_memory for shape in given.shapes):
            whole = _main_bytes(given.shapes)
            sliced = read(parameter.name)
            moved += whole if sliced is None else min(sliced, whole)
    roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
    for name, shape in zip(roots, instruction.shapes, strict=False):
        written = inner.resolve(name)
        if shape.in_main_memory and written.opcode != "parameter":
            is_update = written.opcode == "dynamic-update-slice"
            moved += inner[written.operands[1]].shape.bytes if is_update else shape.bytes
    return moved


def _main_bytes(shapes) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.in_main_memory))
