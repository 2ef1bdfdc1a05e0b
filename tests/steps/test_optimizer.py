"""AdamW and the schedules against numpy written out: clipping, which parameters decay, the first full rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.core.errors import UserError
from easyrl.steps.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule, updates_in


def plain_schedule(kind, update, lr, total, warmup, end_lr=0.0):
    """The rate of one update, as transformers' schedules have it: full at `warmup`, `end_lr` at `total`."""
    if update < warmup:
        return lr * update / warmup
    done = (update - warmup) / (total - warmup)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + np.cos(np.pi * done))}[kind]
    return end_lr + (lr - end_lr) * share


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("lr", [0.01, 0.0])
def test_the_rate_warms_up_and_goes_to_its_end(kind, warmup, lr):
    end_lr = lr if kind == "constant" else 0.002
    schedule = make_schedule(kind, lr, 10, warmup, end_lr)
    expected = [plain_schedule(kind, update, lr, 10, warmup, end_lr) for update in range(11)]
    np.testing.assert_allclose([schedule(update) for update in range(11)], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("share", "of", "expected"),
    [(0.07, 100, 7), (0.14, 50, 7), (0.03, 100, 3), (0.03, 101, 4), (1.1, 10, 11), (0, 9, 0)],
)
def test_a_share_of_the_updates_is_rounded_up_and_only_then(share, of, expected):
    assert updates_in(share, of) == expected


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="--lr_schedule=step: expected one of constant, linear, cosine"):
        make_schedule("step", 0.01, 10)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_updates_are_those_of_adamw_after_clipping(clip):
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 3), "q_bias": (3,), "attn_norm": (4,), "scalar": (4,)}
    draw = lambda scale: {name: rng.normal(scale=scale, size=shape) for name, shape in shapes.items()}
    single = lambda tree: {name: jnp.asarray(x, jnp.float32) for name, x in tree.items()}
    expected = draw(1.0)
    assert decayed(expected) == {"q": True, "q_bias": False, "attn_norm": False, "scalar": True}
    assert decayed({"attn_norm": {"scale": 1, "bias": 1}}) == {"attn_norm": {"scale": False, "bias": False}}
    optimizer = make_optimizer(OptimizerConfig(0.9, 0.95, 1e-6, 0.1, clip), make_schedule("linear", 0.01, 5, 2))
    params = single(expected)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    m, v = (dict.fromkeys(shapes, 0.0) for _ in range(2))

    for number, scale in enumerate((3.0, 0.01, 1.0, 0.3)):  # the second is below the limit
        grads = draw(scale)
        updates, state = update(single(grads), state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        assert (norm < 1) == (number == 1)
        lr = plain_schedule("linear", number, 0.01, 5, 2)
        for name in shapes:
            g = grads[name] * (min(1.0, clip / norm) if clip else 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            first, second = m[name] / (1 - 0.9 ** (number + 1)), v[name] / (1 - 0.95 ** (number + 1))
            decay = 0.1 * expected[name] if name in ("q", "scalar") else 0.0
            expected[name] = expected[name] - lr * (first / (np.sqrt(second) + 1e-6) + decay)
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_state_has_one_structure_with_a_limit_to_the_gradient_or_without():
    unlimited, limited = (
        make_optimizer(OptimizerConfig(clip_gradient=clip), make_schedule("constant", 0.01, 5)).init({"q": jnp.ones(2)})
        for clip in (0.0, 1.0)
    )
    assert jax.tree.structure(unlimited) == jax.tree.structure(limited)
