"""The time of a phase at the chip's peaks, with compute, memory and links perfectly overlapped.

Compute and memory allow no less. Links might, where a collective is carried over more than one torus dimension, which
`Topology.link_rate` leaves out of account.
"""

import dataclasses

from jax.sharding import Mesh

from easyrl.planning.cost import Cost
from easyrl.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds, each for itself; the longest of them is the phase's time. None: no peaks are known."""

    compute: float | None
    memory: float | None
    links: float | None

    @property
    def seconds(self) -> float | None:
        known = [time for time in (self.compute, self.memory, self.links) if time is not None]
        return max(known) if known else None

    @property
    def bound(self) -> str:
        """What binds: compute, memory or links."""
        times = {name: time for name, time in vars(self).items() if time is not None}
        return max(times, key=times.__getitem__) if times else ""


def roofline(cost: Cost, topology: Topology, mesh: Mesh) -> Roofline:
    """The roofline of what one device does."""
    if topology.flops is None or topology.memory_rate is None:
        return Roofline(None, None, None)
    links = 0.0
    for collective in cost.collectives:
        rate = topology.link_rate(mesh, collective.members)
        assert rate is not None, topology
        links += collective.sent * collective.count / rate if collective.group > 1 else 0.0
    return Roofline(cost.flops / topology.flops, cost.bytes / topology.memory_rate, links)
