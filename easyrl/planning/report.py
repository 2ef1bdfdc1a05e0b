"""A plan as data for JSON, and as a table for people."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from easyrl.core.groups import GROUPS
from easyrl.core.text import columns
from easyrl.planning.cost import Cost
from easyrl.planning.measure import Measured, excess
from easyrl.planning.phases import ScriptPlan
from easyrl.planning.topology import GIB, Topology


@dataclasses.dataclass(frozen=True)
class Report:
    """The phases of a script on a topology, measured."""

    script: str
    topology: Topology
    mesh: Mesh
    plan: ScriptPlan
    measured: list[Measured]

    @property
    def fits(self) -> bool:
        return all(self.fits_phase(m) for m in self.measured)

    def fits_phase(self, measured: Measured) -> bool:
        return not measured.refused and measured.peak <= self.topology.memory

    def peak_of(self, measured: Measured) -> int | None:
        """Bytes in use while a phase runs; None where the compiler refused it and did not say."""
        if not measured.refused:
            return measured.peak
        over = excess(measured.refused)
        return None if over is None else int(self.topology.memory + over)

    @property
    def peak(self) -> int | None:
        """The most bytes in use; None where a phase's are not known."""
        peaks = [self.peak_of(m) for m in self.measured]
        return None if None in peaks else max(peak for peak in peaks if peak is not None)

    @property
    def seconds(self) -> float | None:
        """The roofline time of one step, its phases one after the other."""
        times = [None if m.seconds is None else m.seconds * m.phase.runs for m in self.measured]
        return None if None in times else float(sum(t for t in times if t is not None))

    def waste(self, measured: Measured) -> float | None:
        """Compiled FLOPs over necessary ones; None for a phase without a model."""
        needed = measured.phase.necessary / self.topology.num_devices
        return measured.cost.flops / needed if needed and not measured.refused else None

    def to_dict(self) -> dict[str, Any]:
        refused = any(m.refused for m in self.measured)
        return {
            "script": self.script,
            "topology": self.topology.text,
            "devices": self.topology.num_devices,
            "mesh": dict(self.mesh.shape),
            "memory_limit": self.topology.memory,
            "resident": self.plan.resident_bytes(),
            "phases": [self._phase(m) for m in self.measured],
            "peak": self.peak,
            "fits": self.fits,
            "condition": self.plan.condition,
            "seconds": self.seconds,
            "tokens": self.plan.tokens,
            "tokens_per_second": self.plan.tokens / self.seconds if self.seconds else None,
            "flops": None if refused else sum(m.cost.flops * m.phase.runs for m in self.measured),
            "necessary_flops": sum(m.phase.necessary * m.phase.runs for m in self.measured) / self.topology.num_devices,
            "sent": None if refused else sum(m.cost.sent * m.phase.runs for m in self.measured),
            "compile_seconds": sum(m.compile_seconds for m in self.measured),
        }

    def _phase(self, m: Measured) -> dict[str, Any]:
        phase = m.phase
        known = lambda number: None if m.refused else number
        return {
            "name": phase.name,
            "runs": phase.runs,
            "loops": dict(phase.loops),
            "fits": self.fits_phase(m),
            "refused": m.refused,
            "peak": self.peak_of(m),
            "arguments": known(m.arguments),
            "beside": known(m.beside),
            "inside": m.inside,
            "flops": known(m.cost.flops),
            "necessary_flops": phase.necessary / self.topology.num_devices,
            "recomputed_flops": phase.recomputed / self.topology.num_devices,
            "waste": self.waste(m),
            "bytes": known(m.cost.bytes),
            "sent": known(m.cost.sent),
            "collectives": collectives(m.cost),
            "seconds": m.seconds,
            "parts": [
                {
                    "name": part.name or "all else",
                    "trips": phase.loops.get(part.name),
                    "flops": part.cost.flops,
                    "bytes": part.cost.bytes,
                    "collectives": collectives(part.cost),
                    **{f"{name}_seconds": value for name, value in vars(part.roofline).items()},
                    "bound": part.roofline.bound,
                }
                for part in m.parts
            ],
            "compile_seconds": m.compile_seconds,
        }


def collectives(cost: Cost) -> list[dict[str, Any]]:
    """Collectives summed by kind, mesh axes and size of the group; `largest` is the greatest array of any one."""
    rows: dict[tuple, dict[str, Any]] = {}
    for c in cost.collectives:
        row = rows.setdefault(
            (c.kind, c.axes, c.group),
            {"kind": c.kind, "axes": list(c.axes), "group": c.group, "count": 0.0, "sent": 0.0, "largest": 0},
        )
        row["count"] += c.count
        row["sent"] += c.count * c.sent
        row["largest"] = max(row["largest"], c.payload)
    return sorted(rows.values(), key=lambda row: -row["sent"])


def text(report: Report) -> str:
    """The table that is printed."""
    topology, mesh = report.topology, report.mesh
    axes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    limit = topology.memory / GIB
    lines = [
        f"{report.script} on {topology.text}: {topology.num_devices} devices of {limit:.2f} GiB, mesh {axes}",
        "",
        "memory of one device, GiB",
        _memory(report),
        "",
        "one step, of one device",
        _times(report),
        "",
        "collectives of one step, GiB sent by one device",
        _collectives(report),
        "",
    ]
    step = "" if report.seconds is None else f"; a step takes {report.seconds:.3g} s at the chip's peaks"
    if report.fits and report.peak is not None:
        lines.append(f"fits: {report.peak / GIB:.2f} of {limit:.2f} GiB{step}")
    else:
        lines.append(f"does not fit: {' '.join(advice(report))}")
    if report.plan.condition:
        lines.append(f"planned for {report.plan.condition}")
    return "\n".join(lines)


def _memory(report: Report) -> str:
    resident = report.plan.resident_bytes()
    inside = list(dict.fromkeys(kind for m in report.measured for kind in m.inside))
    rows = []
    for m in report.measured:
        kept = [f"{size / GIB:.3f}" for size in resident.values()]
        made = [f"{m.inside[kind] / GIB:.3f}" if kind in m.inside else "" for kind in inside]
        verdict = "" if report.fits_phase(m) else "does not fit"
        peak = report.peak_of(m)
        rows.append([m.phase.name, *kept, *made, "" if peak is None else f"{peak / GIB:.3f}", verdict])
    return columns(["phase", *resident, *inside, "in all", ""], rows)


def _times(report: Report) -> str:
    head = ["phase", "runs", "TFLOP", "necessary", "ratio", "GB moved", "GB sent", "s", "bound by", "compiled in"]
    rows = []
    for m in report.measured:
        runs, waste = m.phase.runs, report.waste(m)
        longest = max(m.parts, key=lambda part: part.roofline.seconds or 0.0, default=None)
        rows.append(
            [
                m.phase.name,
                f"{runs:g}",
                "" if m.refused else f"{runs * m.cost.flops / 1e12:.4g}",
                f"{runs * m.phase.necessary / report.topology.num_devices / 1e12:.4g}",
                "" if waste is None else f"{waste:.3f}",
                "" if m.refused else f"{runs * m.cost.bytes / 1e9:.4g}",
                "" if m.refused else f"{runs * m.cost.sent / 1e9:.4g}",
                "" if m.seconds is None else f"{runs * m.seconds:.4g}",
                longest.roofline.bound if longest else "",
                f"{m.compile_seconds:.0f} s",
            ]
        )
        if len(m.parts) > 1 and m.seconds is not None and any(part.name.startswith("decode") for part in m.parts):
            for part in m.parts:
                done = (part.cost.flops / 1e12, part.cost.bytes / 1e9, part.cost.sent / 1e9, part.roofline.seconds)
                flops, moved, sent, seconds = (f"{number:.4g}" for number in done)
                name = {GROUPS: "prefill", "": "the rest"}.get(part.name, part.name)
                rows.append([f"  {name}", "", flops, "", "", moved, sent, seconds, part.roofline.bound, ""])
    return columns(head, rows)


def _collectives(report: Report) -> str:
    head = ["phase", "kind", "over", "devices", "count", "GiB", "largest MiB"]
    rows = []
    for m in report.measured:
        for row in collectives(m.cost):
            sent = m.phase.runs * row["sent"] / GIB
            if sent >= 0.0005:
                rows.append(
                    [m.phase.name, row["kind"], ",".join(row["axes"]), str(row["group"]),
                     f"{m.phase.runs * row['count']:g}", f"{sent:.3f}", f"{row['largest'] / 2**20:.2f}"]
                )  # fmt: skip
    return columns(head, rows) if rows else "none to speak of"


def advice(report: Report) -> list[str]:
    """What would make the phases fit that do not: the largest contributions, and the flags that make them smaller."""
    found = []
    resident = report.plan.resident_bytes()
    kept, limit = sum(resident.values()), report.topology.memory
    worst = max(report.measured, key=lambda m: (bool(m.refused), report.peak_of(m) or 0.0))
    peak = report.peak_of(worst)
    if peak is None:
        found.append(f"{worst.phase.name} needs more than a device has; the compiler says {worst.refused!r}.")
    else:
        found.append(f"{worst.phase.name} needs {(peak - limit) / GIB:.2f} GiB more than a device has.")
    if kept > 0.5 * limit:
        needed = max(2, -(-int(report.topology.num_devices * kept) // int(0.5 * limit)))
        found.append(
            f"weights and optimizer alone take {kept / GIB:.2f} GiB: more devices (about {needed}) under fsdp or mp, "
            "or --optimizer.bf16_momentum."
        )
    inside = dict(worst.inside)
    largest = max(inside, key=lambda kind: inside[kind]) if inside else ""
    advices = {
        "activations": "--remat=full, a smaller --micro_batch_size, or a larger mp in --mesh_dim.",
        "temporaries": "--remat=full, a smaller --micro_batch_size, or a larger mp in --mesh_dim.",
        "cache": "a larger mp in --mesh_dim, or fewer responses in a step or (--decode_rows) at once.",
        "decoding weights": "a larger mp in --mesh_dim: decoding keeps the model whole over fsdp.",
        "gradients": "more devices under fsdp or mp.",
    }
    if worst.refused or largest in advices:
        size = f"{largest} take {inside[largest] / GIB:.2f} GiB: " if largest in advices else "try "
        found.append(size + advices.get(largest, advices["temporaries"]))
    return found
