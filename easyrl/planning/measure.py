"""Compiling a phase, and what its compiled program says: memory, FLOPs, traffic, collectives."""

import dataclasses
import re
import time

import jax
from jax.sharding import Mesh

from easyrl.planning.cost import Cost, Loops, program_cost
from easyrl.planning.hlo import Module, parse_module
from easyrl.planning.kernels import kernel_cost
from easyrl.planning.memory import device_bytes
from easyrl.planning.phases import Phase
from easyrl.planning.roofline import Roofline, roofline
from easyrl.planning.topology import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Part:
    """What one device does in a part of a phase: a loop, or all that is outside the named loops."""

    name: str
    cost: Cost
    roofline: Roofline


@dataclasses.dataclass(frozen=True)
class Measured:
    """A phase as compiled. Bytes are those of one device.

    beside: resident bytes that are not among its arguments. inside: what it makes, by kind. `refused` is what the
    compiler said, when it found that the program cannot fit; nothing else is known then.
    """

    phase: Phase
    compile_seconds: float
    arguments: int = 0
    beside: int = 0
    inside: dict[str, int] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    refused: str = ""

    @property
    def peak(self) -> int:
        """Bytes in use while it runs, resident ones included."""
        return self.arguments + self.beside + sum(self.inside.values())

    @property
    def cost(self) -> Cost:
        total = Cost()
        for part in self.parts:
            total += part.cost
        return total

    @property
    def seconds(self) -> float | None:
        """The roofline time of one run: its parts run one after the other."""
        times = [part.roofline.seconds for part in self.parts]
        return None if self.refused or None in times else float(sum(t for t in times if t is not None))


def measure(phase: Phase, resident: int, mesh: Mesh, topology: Topology) -> Measured:
    """Compiles a phase, beside which `resident` bytes lie on each device, its own arguments among them."""
    started = time.perf_counter()
    # An earlier run's program would make the time that compiling takes a matter of chance.
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        compiled = phase.program.lower(*phase.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Measured(phase, time.perf_counter() - started, refused=" ".join(str(error).split())[:300])
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    seconds = time.perf_counter() - started
    module = parse_module(compiled.as_text())
    costs = program_cost(module, dict(mesh.shape), Loops(phase.loops), kernel_cost)
    parts = tuple(Part(name, cost, roofline(cost, topology, mesh)) for name, cost in costs.items())
    analysis = compiled.memory_analysis()
    inside = divide(phase, module, analysis.temp_size_in_bytes)
    inside["results"] = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    inside["program"] = analysis.generated_code_size_in_bytes
    held = device_bytes(phase.arguments)
    return Measured(
        phase,
        seconds,
        arguments=analysis.argument_size_in_bytes,
        beside=max(resident - held, 0),
        inside={kind: int(size) for kind, size in inside.items() if size > 0},
        parts=parts,
    )


def divide(phase: Phase, module: Module, temporary: float) -> dict[str, float]:
    """A program's temporary memory by kind: what the phase is known to make, activations saved for the backward pass
    as the program shows them, and the rest.
    """
    kinds: dict[str, float] = {}
    for kind, size in (*phase.parts.items(), ("activations", saved_activations(phase, module))):
        kinds[kind] = min(size, temporary)
        temporary -= kinds[kind]
    return kinds | {"temporaries": temporary}


def saved_activations(phase: Phase, module: Module) -> int:
    """Bytes that a loop over layers carries stacked for all layers, weights and gradients apart; the most of any."""
    if not phase.layers:
        return 0
    weights = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(phase.arguments) if leaf.sharding}
    most = 0
    for computation in module:
        for instruction in computation.values():
            if instruction.opcode == "while":
                stacked = [
                    shape.bytes
                    for shape in instruction.shapes
                    if len(shape.dims) > 2 and shape.dims[0] == phase.layers and shape.dims not in weights
                ]
                most = max(most, sum(stacked))
    return most


def excess(refused: str) -> float | None:
    """By how many bytes a program that the compiler refused does not fit; None when it does not say."""
    sizes = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", refused)
    if sizes:
        return (float(sizes.group(1)) - float(sizes.group(2))) * GIB
    by = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)G", refused)
    return float(by.group(1)) * GIB if by else None
