"""PPO with a shared frozen bottom is ordinary PPO whose bottom layers get no gradient, and holds the bottom once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.core.params import abstract, map_specs, path_str, shardings
from easyrl.core.sharding import make_mesh
from easyrl.models.branch import cut, trained_layers
from easyrl.models.families import param_specs
from easyrl.models.gpt2 import GPT2Config
from easyrl.steps.optimizer import OptimizerConfig, make_optimizer, make_schedule
from easyrl.steps.ppo import PPOState, branch_specs, make_update
from easyrl.steps.ppo_config import PPOConfig
from easyrl.steps.scoring import make_finish, make_forward
from easyrl.steps.state import create_train_state
from tests.steps.conftest import everywhere, plan_shapes, rollout_shapes, state_shapes

SCORES = np.random.default_rng(1).normal(size=8).astype(np.float32)
UPDATES = 3


@pytest.fixture(scope="module")
def configs(cfg):
    """A Llama, and a GPT-2, whose head is tied to the frozen embeddings; three layers each."""
    sizes = {name: getattr(cfg, name) for name in ("vocab_size", "width", "head_size", "mlp_size", "max_positions")}
    gpt2 = GPT2Config(**sizes, num_layers=3, num_heads=8, num_kv_heads=8)
    return {"llama": dataclasses.replace(cfg, num_layers=3), "gpt2": gpt2}


def ppo_config(num_unfrozen):
    return PPOConfig(kl_coef=0.3, entropy_coef=0.01, num_layers_unfrozen=num_unfrozen)


def optimizer(only=None):
    """AdamW with weight decay and clipping; with `only`, a range, no other layer gets a gradient or moves."""
    # Epsilon is above rounding: the bias of a GPT-2's keys has a gradient of 0, and Adam would make steps of its noise.
    adamw = OptimizerConfig(eps=1e-6, weight_decay=0.01, clip_gradient=0.5)
    whole = make_optimizer(adamw, make_schedule("constant", 3e-4, 10))
    if only is None:
        return whole

    def mask(path, x):
        if path_str(path).startswith("embed/"):
            return jnp.zeros_like(x)
        if path_str(path).startswith("layers/"):
            trains = jnp.isin(jnp.arange(len(x)), jnp.arange(only.start, only.stop))
            return jnp.where(trains.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)
        return x

    masked = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(mask, updates))
    return optax.chain(masked, whole, masked)


def three_models(cfg, layers):
    """Whole policy, reference and value model that differ in their tops alone."""
    rng, start = np.random.default_rng(0), layers.start
    draw = lambda name, spec: np.ones(spec.shape) if "norm" in name else rng.normal(0, 0.1, spec.shape)
    policy, reference, value = (map_specs(draw, param_specs(cfg, head)) for head in ("lm", "lm", "value"))
    merge = lambda bottom, top: np.concatenate([bottom[:start], top[start:]])
    on_top_of_policy = lambda other: {
        **other, "embed": policy["embed"], "layers": jax.tree.map(merge, policy["layers"], other["layers"])
    }  # fmt: skip
    return policy, on_top_of_policy(reference), on_top_of_policy(value)


def place(params, specs, mesh):
    return jax.device_put(jax.tree.map(np.float32, params), shardings(specs, mesh))


def run_iteration(cfg, ppo, mesh, ragged, models, bottom, transformation):
    """A rollout scored, then `UPDATES` updates on it; everything on the host."""
    specs = [branch_specs(cfg, head, ppo) for head in ("lm", "lm", "value")]
    policy, reference, value = (place(params, spec, mesh) for params, spec in zip(models, specs, strict=True))
    tokens, mask, scores = everywhere((ragged.tokens, ragged.mask, SCORES), mesh)
    plan, another = ragged.packed_plan(mesh, rows=8, groups=1, length=48), ragged.rows_plan(mesh, 8, 1)
    passes = make_forward(cfg, cfg, cfg, ppo, mesh)(policy, reference, value, tokens, mask, plan, bottom)
    rollout, _, metrics = make_finish(ppo, mesh)(tokens, mask, passes, scores, np.float32(ppo.kl_coef))
    rollout = rollout.replace(hidden=passes.hidden)
    states = (
        create_train_state(params, spec, transformation, mesh)
        for params, spec in ((policy, specs[0]), (value, specs[2]))
    )
    state = PPOState(*states, everywhere(np.float32(ppo.kl_coef), mesh))
    update = make_update(cfg, cfg, ppo, transformation, transformation, mesh)
    stopped = everywhere(np.zeros((), bool), mesh)
    for number in range(UPDATES):
        state, stopped, update_metrics = update(state, rollout, another if number % 2 else plan, stopped, bottom)
    metrics |= update_metrics
    values = {name: float(metric.value) for name, metric in metrics.items() if "grad_norm" not in name}
    return jax.device_get((rollout.replace(hidden=None), values, state.policy.params, state.value.params))


@pytest.mark.parametrize(("name", "num_unfrozen", "mesh_dim"), [("llama", 1, "1,1,1"), ("gpt2", 2, "2,2,2")])
def test_equals_ordinary_ppo_whose_bottom_gets_no_gradient(name, num_unfrozen, mesh_dim, configs, ragged):
    cfg, layers = configs[name], trained_layers(3, num_unfrozen)
    num_devices = np.prod([int(size) for size in mesh_dim.split(",")])
    mesh = make_mesh(mesh_dim, jax.devices()[:num_devices])
    whole = three_models(cfg, layers)
    ordinary = run_iteration(cfg, ppo_config(0), mesh, ragged, whole, None, optimizer(only=layers))
    below = range(layers.start)
    bottom = place(cut(whole[0], below), param_specs(cfg, "lm", below), mesh)
    hydra = run_iteration(
        cfg, ppo_config(num_unfrozen), mesh, ragged, [cut(p, layers) for p in whole], bottom, optimizer()
    )

    assert abs(ordinary[1]["objective/kl"]) > 1e-3 and abs(ordinary[1]["ppo/policy/ratios_mean"] - 1) > 1e-4
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, hydra[0], ordinary[0])
    for mine, masked, start in zip(hydra[2:], ordinary[2:], (whole[0], whole[2]), strict=True):
        jax.tree.map(close, mine, cut(masked, layers))
        jax.tree.map(np.testing.assert_array_equal, cut(masked, below), jax.tree.map(np.float32, cut(start, below)))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), mine, cut(start, layers))
        assert min(jax.tree.leaves(moved | {"layers": moved["layers"]["mlp"]})) > 1e-5
    assert hydra[1].keys() == ordinary[1].keys()
    for metric, value in ordinary[1].items():
        np.testing.assert_allclose(hydra[1][metric], value, atol=1e-5, rtol=1e-5, err_msg=metric)


def num_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_frozen_bottom_is_held_once(name, configs, one_device):
    """What the programs take, counted by the compiler: no second copy of a frozen layer, no optimizer state for one."""
    cfg, ppo, (B, T), k = dataclasses.replace(configs[name], mlp_size=1024), ppo_config(1), (4, 8), 1
    state, plan = state_shapes(cfg, ppo, optimizer(), one_device), plan_shapes(B, 2, T)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert "embed/" not in path_str(path), path_str(path)
        assert "/layers/" not in path_str(path) or leaf.shape[0] == k, path_str(path)

    bottom = abstract(param_specs(cfg, "lm", range(2)), jnp.float32)
    reference = abstract(branch_specs(cfg, "lm", ppo), jnp.float32)
    rollout = rollout_shapes(B, T, jax.ShapeDtypeStruct((B, T, cfg.width), jnp.float32))
    tokens = (rollout.tokens, rollout.mask)
    forward = make_forward(cfg, cfg, cfg, ppo, one_device).lower(
        state.policy.params, reference, state.value.params, *tokens, plan, bottom
    )
    update = make_update(cfg, cfg, ppo, optimizer(), optimizer(), one_device).lower(
        state, rollout, plan, jax.ShapeDtypeStruct((), bool), bottom
    )
    for_update = bottom["embed"]["tokens"] if cfg.tied_embeddings else None
    data = num_bytes((rollout, plan))
    assert data < num_bytes(bottom["layers"]) / 8  # so that a copy of a layer would show
    for lowered, weights in (
        (forward, (state.policy.params, reference, state.value.params, bottom)),
        (update, (state, for_update)),
    ):
        taken = lowered.compile().memory_analysis().argument_size_in_bytes
        assert num_bytes(weights) <= taken <= num_bytes(weights) + data
    whole = state_shapes(cfg, ppo_config(0), optimizer(), one_device)
    assert num_bytes(state) < num_bytes(whole) / 2
