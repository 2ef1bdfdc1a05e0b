"""Schedules against their closed forms, AdamW against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.core.errors import UserError
from easyrl.models.families import param_specs
from easyrl.steps.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule


@pytest.mark.parametrize(
    ("kind", "after_warmup"),
    [
        ("constant", lambda share: 1.0),
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: 0.5 * (1 + np.cos(np.pi * share))),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_a_schedule_rises_from_zero_and_then_follows_its_kind(kind, after_warmup, warmup):
    schedule = make_schedule(kind, 2e-3, 12, warmup)
    expected = [
        2e-3 * (update / warmup if update < warmup else after_warmup((update - warmup) / (12 - warmup)))
        for update in range(13)
    ]
    np.testing.assert_allclose([schedule(update) for update in range(13)], expected, atol=1e-9)


def test_schedules_of_no_length_or_rate_are_defined():
    for kind in ("constant", "linear", "cosine"):
        assert np.isfinite([make_schedule(kind, 1e-3, 2, 5)(update) for update in range(9)]).all()
        assert make_schedule(kind, 0.0, 10)(3) == 0
    with pytest.raises(UserError, match="--lr_schedule=step: expected one of constant, linear, cosine"):
        make_schedule("step", 1e-3, 10)


def test_biases_and_norms_do_not_decay(value_cfg):
    cfg = type(value_cfg)(**vars(value_cfg) | {"qkv_bias": True, "qk_norm": True})
    params = jax.tree.map(
        lambda spec: np.zeros(spec.shape), param_specs(cfg, "value"), is_leaf=lambda x: hasattr(x, "init")
    )
    free = {jax.tree_util.keystr(path) for path, yes in jax.tree_util.tree_leaves_with_path(decayed(params)) if not yes}
    assert {name.rsplit("'", 2)[1] for name in free} == {
        "final_norm", "attn_norm", "mlp_norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "scalar_bias"
    }  # fmt: skip


@pytest.mark.parametrize("bf16_momentum", [False, True])
def test_adamw_against_a_plain_loop(bf16_momentum):
    config = OptimizerConfig(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip_gradient=0.5, bf16_momentum=bf16_momentum)
    optimizer = make_optimizer(config, make_schedule("linear", 0.1, 5))
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "some_bias": rng.normal(size=2)}
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(ours)
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for update in range(4):
        grads = {name: rng.normal(size=value.shape) for name, value in params.items()}
        updates, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, ours)
        ours = optax.apply_updates(ours, updates)

        norm = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1, 0.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            step = first[name] / (1 - 0.8 ** (update + 1))
            step = step / (np.sqrt(second[name] / (1 - 0.9 ** (update + 1))) + 1e-3)
            decay = 0.1 * params[name] if name == "kernel" else 0
            params[name] = params[name] - 0.1 * (1 - update / 5) * (step + decay)
    for name, value in params.items():
        np.testing.assert_allclose(ours[name], value, atol=5e-3 if bf16_momentum else 1e-5)
    momentum = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim and x.dtype == jnp.bfloat16}
    assert momentum == ({"bfloat16"} if bf16_momentum else set())
