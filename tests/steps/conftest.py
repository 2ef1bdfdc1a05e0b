"""Small models and ragged batches for the tests of the steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.groups import PackPlan, Plans
from easyrl.core.params import abstract, init_params, shardings
from easyrl.core.sharding import make_mesh, put, replicated
from easyrl.data.packing import Packing, Plan, Shape
from easyrl.models.families import param_specs
from easyrl.models.llama import LlamaConfig
from easyrl.steps.packed import place_plans
from easyrl.steps.ppo import PPOState, branch_specs
from easyrl.steps.scoring import Rollout
from easyrl.steps.state import TrainState


@pytest.fixture(scope="package")
def cfg() -> LlamaConfig:
    """A tiny Llama whose dimensions divide by 8, so that every mesh of 8 devices takes it."""
    return LlamaConfig(
        vocab_size=96, width=32, num_layers=2, num_heads=16, num_kv_heads=8, head_size=8, mlp_size=48, max_positions=64
    )


@pytest.fixture(scope="package")
def value_cfg(cfg) -> LlamaConfig:
    return dataclasses.replace(cfg, num_layers=1, mlp_size=40)


def placed(plan: Plan, mesh, rows: int, groups: int) -> Plans:
    """The plan as the only one of a batch, on the devices, with room for so many groups."""
    return place_plans(Packing((Shape(rows, plan.source.shape[1]),), (plan,)), rows * groups, mesh)


@dataclasses.dataclass
class Ragged:
    """Right-padded rows: tokens [B, T], the number of real tokens of each, and which tokens are responses."""

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray

    def rows_plan(self, mesh, rows: int, groups: int):
        """A plan with one sample a row: no packing."""
        B, T = self.tokens.shape
        real = np.arange(T) < self.lengths[:, None]
        source = np.where(real, np.arange(B * T).reshape(B, T), -1)
        return placed(Plan(source, np.where(real, np.arange(T), 0), real.astype(np.int32)), mesh, rows, groups)

    def packed_plan(self, mesh, rows: int, groups: int, length: int):
        """A plan that fills rows of `length` greedily with whole samples, last sample first."""
        T = self.tokens.shape[1]
        packed: list[list[int]] = []
        for sample in reversed(range(len(self.lengths))):
            fits = [row for row in packed if sum(self.lengths[row]) + self.lengths[sample] <= length]
            fits[0].append(sample) if fits else packed.append([sample])
        source, positions, segments = np.full((3, len(packed), length), -1)
        positions[:], segments[:] = 0, 0
        for row, samples in enumerate(packed):
            start = 0
            for number, sample in enumerate(samples, 1):
                end = start + self.lengths[sample]
                source[row, start:end] = sample * T + np.arange(end - start)
                positions[row, start:end] = np.arange(end - start)
                segments[row, start:end] = number
                start = end
        return placed(Plan(source, positions, segments), mesh, rows, groups)


@pytest.fixture(scope="package")
def ragged() -> Ragged:
    """Eight samples of a prompt and a response, of all sorts of lengths, with garbage in the padding."""
    rng = np.random.default_rng(0)
    B, T = 8, 24
    prompts, responses = rng.integers(2, 10, B), rng.integers(1, 14, B)
    tokens = rng.integers(0, 96, (B, T)).astype(np.int32)
    at = np.arange(T)
    mask = (at >= prompts[:, None] - 1) & (at < (prompts + responses)[:, None] - 1)
    return Ragged(tokens, prompts + responses, mask)


@pytest.fixture(scope="package")
def begun_alike(ragged) -> Ragged:
    """The same as pairs of answers to prompts that begin alike, in three tokens or in all that they can."""
    tokens = ragged.tokens.copy()
    for b in range(0, len(tokens), 2):
        same = 3 if b == 4 else ragged.mask[b : b + 2].argmax(axis=1).min() + 1
        tokens[b + 1, :same] = tokens[b, :same]
    return dataclasses.replace(ragged, tokens=tokens)


@pytest.fixture(scope="package")
def one_device():
    return make_mesh("1,1,1", jax.devices()[:1])


@functools.cache
def drawn(cfg, head, seed):
    """Initial values on the host, where they are drawn once: no mesh changes them, and each compiles the draws anew."""
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    return jax.device_get(init_params(param_specs(cfg, head), jax.random.key(seed), jnp.float32, mesh))


def make_params(cfg, head, mesh, seed=0):
    """Parameters of their own for every caller, who may give them away to a step."""
    mine = jax.tree.map(np.copy, drawn(cfg, head, seed))
    return jax.device_put(mine, shardings(param_specs(cfg, head), mesh))


def everywhere(tree, mesh):
    """Host arrays on every device of the mesh."""
    return put(tree, replicated(mesh))


def rollout_shapes(batch: int, length: int, hidden: jax.ShapeDtypeStruct | None = None) -> Rollout:
    """A rollout's shapes, to compile on; `hidden` of a shared bottom."""
    fields = dict.fromkeys([field.name for field in dataclasses.fields(Rollout)], ((batch, length), jnp.float32))
    fields |= {"tokens": ((batch, length), jnp.int32), "mask": ((batch, length), bool)}
    fields |= {"scores": ((batch,), jnp.float32), "finite": ((), bool)}
    return Rollout(**{name: jax.ShapeDtypeStruct(*field) for name, field in fields.items()}).replace(hidden=hidden)


def plan_shapes(batch: int, rows: int, length: int) -> Plans:
    """The shapes of a plan of one row a sample in groups of `rows`, the only one."""
    packed = jax.ShapeDtypeStruct((batch // rows, rows, length), jnp.int32)
    return (PackPlan(packed, packed, packed, jax.ShapeDtypeStruct((), jnp.int32)),)


def state_shapes(cfg, ppo, optimizer, mesh) -> PPOState:
    """The state's shapes, policy and value model being alike but for their heads."""
    new = lambda params: TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    models = [abstract(branch_specs(cfg, head, ppo), jnp.float32, mesh) for head in ("lm", "value")]
    return PPOState(*(jax.eval_shape(new, params) for params in models), jax.ShapeDtypeStruct((), "float32"))
