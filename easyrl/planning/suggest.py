"""The fastest settings that fit: mesh, micro-batch and remat, estimated for all, compiled for the most promising."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from easyrl.core.errors import UserError
from easyrl.core.groups import GROUPS
from easyrl.core.sharding import make_mesh, num_data_shards
from easyrl.planning.phases import Phase, ScriptPlan
from easyrl.planning.report import Report
from easyrl.planning.topology import GIB, Topology
from easyrl.sampling.loops import DECODE
from easyrl.sampling.refill import REFILLS

COMPILED = 4  # candidates that are compiled
# What the backward pass keeps of a layer, about, in residual streams: whole on every device, and split over mp.
KEPT = {"full": (0, 1), "dots": (2, 10), "none": (8, 16)}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of a script, with what they are estimated to take."""

    config: Any
    mesh: Mesh
    plan: ScriptPlan
    bytes: float
    seconds: float

    @property
    def flags(self) -> str:
        return (
            f"--mesh_dim={self.config.mesh_dim} --micro_batch_size={self.config.micro_batch_size} "
            f"--remat={self.config.remat}"
        )


def candidates(
    config: Any, devices: list[jax.Device], topology: Topology, plan_of: Callable[[Any, Mesh], ScriptPlan]
) -> list[Candidate]:
    """All settings that the shapes allow, those first that are estimated to fit, and of them the fastest."""
    found = []
    for changed in _settings(config, topology):
        try:
            mesh = make_mesh(changed.mesh_dim, devices)
            plan = plan_of(changed, mesh)
        except UserError:  # heads, layers or batch do not divide
            continue
        found.append(Candidate(changed, mesh, plan, *_estimate(changed, plan, mesh, topology)))
    return sorted(found, key=lambda c: (c.bytes > topology.memory, c.seconds))


def _settings(config: Any, topology: Topology) -> Iterator[Any]:
    dp, rest = topology.slices, topology.num_devices // topology.slices
    for mp in (1, 2, 4, 8, 16):
        if rest % mp:
            continue
        for share in (1, 2, 4):
            for remat in KEPT:
                mesh_dim, rows = f"{dp},{rest // mp},{mp}", dp * (rest // mp) * share
                yield dataclasses.replace(config, mesh_dim=mesh_dim, micro_batch_size=rows, remat=remat)


def _estimate(config: Any, plan: ScriptPlan, mesh: Mesh, topology: Topology) -> tuple[float, float]:
    """(bytes, seconds) of a device, roughly: enough to say what is worth compiling."""
    resident = sum(plan.resident_bytes().values())
    mp = mesh.shape["mp"]
    peak, seconds = 0.0, 0.0
    for phase in plan.phases:
        weights = jax.tree.leaves(_weights(phase))
        matrices = 2 * sum(leaf.size for leaf in weights) / mp  # bfloat16, gathered over fsdp
        rows, length = _rows(phase)
        width, layers = _stream(phase)
        stream = 2 * width * length * rows / num_data_shards(mesh)
        layer, head = matrices / max(layers, 1), 2 * _head_size(phase) / mp
        if phase.layers:
            whole, split = KEPT[config.remat]
            # What compiled plans need besides: gathered weights and their float32 gradients, and what a layer makes.
            inside = (whole + split / mp) * layers * stream + 4 * layer + 6 * head + 32 * stream
        else:
            inside = 4 * stream + layer + head
        peak = max(peak, resident + sum(phase.parts.values()) + inside)
        groups, steps = phase.loops.get(GROUPS, 0.0), _decoding_steps(phase)
        gathered = (3 if phase.layers else 1) * (mesh.shape["fsdp"] > 1)  # forwards, backwards, and the gradient back
        passes = (3 if config.remat == "full" else 2) if phase.layers else 1
        sent = groups * (gathered * matrices + (4 * passes * layers * stream if mp > 1 else 0))
        read = groups * passes * matrices + steps * sum(phase.parts.values())  # decoding: its weights and its cache
        busy = (phase.necessary + phase.recomputed) / topology.num_devices
        if topology.chip is None:
            seconds += phase.runs * (busy / 1e11 + sent / 1e10)
            continue
        link = topology.chip.link / topology.chip.cores
        rates = (busy / topology.flops, read / topology.memory_rate, sent / link)  # type: ignore[operator]
        seconds += phase.runs * max(rates)
    return peak, seconds


def _decoding_steps(phase: Phase) -> float:
    """Steps of decoding; they are inside the loop of refills, if there is one."""
    steps = sum(trips for name, trips in phase.loops.items() if name.startswith(DECODE))
    return steps * phase.loops.get(REFILLS, 1.0)


def _weights(phase: Phase) -> Any:
    """The parameters among a phase's arguments: its first one, or those of the models in a state."""
    first = phase.arguments[0]
    models = [getattr(first, name) for name in ("policy", "value") if hasattr(first, name)] or [first]
    return [getattr(model, "params", model) for model in models]


def _rows(phase: Phase) -> tuple[int, int]:
    """Rows of a group and their length; 0 for a phase without groups."""
    for leaf in jax.tree.leaves(phase.arguments):
        if len(leaf.shape) == 3 and leaf.dtype == "int32":
            return leaf.shape[1], leaf.shape[2]
    return 0, 0


def _first_model(phase: Phase) -> dict:
    """The parameters of the first model that has layers; {} without one."""
    return next((params for params in _weights(phase) if isinstance(params, dict) and "layers" in params), {})


def _stream(phase: Phase) -> tuple[int, int]:
    """Width and layers of the first model."""
    if not (params := _first_model(phase)):
        return 0, 0
    layers, width = jax.tree.leaves(params["layers"]["attn_norm"])[0].shape
    return width, layers


def _head_size(phase: Phase) -> int:
    """The numbers of the head that the first model's logits come from; 0 without one."""
    params = _first_model(phase)
    head = params["head"].get("kernel") if "head" in params else params.get("embed", {}).get("tokens")
    return 0 if head is None else head.size


def table(tried: list[tuple[Candidate, Report]]) -> str:
    """What was compiled, and the settings to take: the fastest that fit."""
    lines = ["settings that were compiled:"]
    for candidate, report in tried:
        seconds = "" if report.seconds is None else f", {report.seconds:.4g} s a step"
        verdict = "fits" if report.fits else "does not fit"
        memory = "" if report.peak is None else f", {report.peak / GIB:.2f} GiB"
        lines.append(f"  {candidate.flags}: {verdict}{memory}{seconds}")
    best = fastest(tried)
    lines.append(f"suggested: {best[0].flags}" if best else "none of them fits: more devices, or a smaller batch")
    return "\n".join(lines)


def fastest(tried: list[tuple[Candidate, Report]]) -> tuple[Candidate, Report] | None:
    """The fastest that fits; without known peaks, the one that takes the least memory."""
    fitting = [pair for pair in tried if pair[1].fits]
    return min(fitting, key=lambda pair: pair[1].seconds or pair[1].peak or 0, default=None)
