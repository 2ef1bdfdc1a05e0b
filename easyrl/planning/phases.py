"""What a script runs on its devices: its programs, with abstract arguments, and how often each of them runs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easyrl.core.groups import GROUPS
from easyrl.data.packing import Shape
from easyrl.models.config import ModelConfig
from easyrl.models.families import param_specs
from easyrl.planning.memory import device_bytes
from easyrl.steps.logprobs import CHUNKS, most_chunks
from easyrl.steps.state import TrainState, abstract_train_state


@dataclasses.dataclass(frozen=True)
class Phase:
    """One jitted program of a script.

    runs: in one step of the script. loops: how often its loops run whose trip count is data, by the name of their
    scope. necessary: FLOPs of one run, over all devices (`planning.necessary`), and `recomputed` those that the remat
    policy adds. parts: bytes on one device of what it is known to make inside, by kind.
    """

    name: str
    program: Any  # what jax.jit returns
    arguments: tuple
    runs: float
    loops: Mapping[str, float]
    necessary: float
    recomputed: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    layers: int = 0  # of the model that it differentiates; 0: none
    before: bool = False  # it runs before training, when nothing but its arguments is in memory


@dataclasses.dataclass(frozen=True)
class ScriptPlan:
    """The phases of one step, and what lies in memory through all of them: (kind, abstract tree) by name."""

    phases: list[Phase]
    resident: dict[str, tuple[str, Any]]
    tokens: float  # that one step works on
    condition: str = ""  # what the plan takes for granted and the data may make otherwise; empty: nothing

    def resident_bytes(self) -> dict[str, int]:
        """Bytes on one device by kind: weights, frozen weights, optimizer."""
        total: dict[str, int] = {}
        for kind, tree in self.resident.values():
            total[kind] = total.get(kind, 0) + device_bytes(tree)
        return total


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model in training, abstractly."""

    cfg: ModelConfig
    state: TrainState

    def resident(self, name: str) -> dict[str, tuple[str, Any]]:
        """Its parts, as `ScriptPlan.resident` has them."""
        return {
            name: ("weights", self.state.params),
            f"{name}'s moments": ("optimizer", (self.state.opt_state, self.state.updates)),
        }

    def gradients(self) -> int:
        """Bytes of its float32 gradients on one device."""
        shaped = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), self.state.params
        )
        return device_bytes(shaped)


def trained(
    cfg: ModelConfig,
    head: str,
    dtype: str,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    layers: range | None = None,
) -> Trained:
    """A model in training, or its part with these `layers`, as `steps.state.create_train_state` makes it."""
    return Trained(cfg, abstract_train_state(param_specs(cfg, head, layers), dtype, optimizer, mesh))


def groups(most: int, rows: int, fill: float) -> int:
    """Groups in use when sequences take `fill` of the places that the longest ones would."""
    return max(math.ceil(math.ceil(most * fill) / rows), 1)


def packed_loops(most: int, shape: Shape, fill: float) -> dict[str, float]:
    """How often the loops of a packed pass run: those over chunks of logits, inside those over groups."""
    return {CHUNKS: most_chunks(*shape), GROUPS: groups(most, shape.rows, fill)}


def remat_share(cfg: ModelConfig) -> float:
    """The part of a forward pass that the backward pass computes again: all of a layer, or next to nothing."""
    return 1.0 if cfg.remat == "full" else 0.0
