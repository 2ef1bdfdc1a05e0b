"""KTO's step: loss and gradient against plain code in every layout, and its reference point over the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyrl.core.masking import Mean, add_metrics
from easyrl.core.sharding import make_mesh, put, replicated
from easyrl.data.packing import Shape, pack
from easyrl.models.families import param_specs
from easyrl.runtime.metrics import fetch
from easyrl.steps.dpo import DPOConfig, place_answers
from easyrl.steps.kto import KTOBatch, make_kto_eval, make_kto_step, with_margins
from easyrl.steps.state import create_train_state
from tests.steps.conftest import make_params
from tests.steps.test_dpo import plain_answers, sigmoid

# mesh, rows per group, lengths of packed rows (none: one sequence a row)
LAYOUTS = [("1,1,1", 1, ()), ("1,1,1", 2, (36, 24)), ("2,2,2", 4, (24,))]
CONFIG = DPOConfig("kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.8)
DESIRABLE = np.array([True, False, False, True])


@pytest.fixture
def reference(ragged):
    """Log-probs under a reference that likes the mismatched answers less, so that the reference point is above 0."""
    rng = np.random.default_rng(3)
    return (-4.6 * ragged.mask.sum(axis=1) + rng.normal(size=8) - 2.0 * (np.arange(8) % 2)).astype(np.float32)


def place(ragged, ref_logprobs, mesh, rows, choices, extra=0):
    """The ragged batch, its odd rows taken as mismatches, with `extra` fillers behind each half."""
    T = ragged.tokens.shape[1]

    def half(first):
        tokens, mask = (np.pad(x[first::2], ((0, extra), (0, 0))) for x in (ragged.tokens, ragged.mask))
        lengths = np.pad(ragged.lengths[first::2], (0, extra))
        packing = pack(lengths, T, [Shape(rows, length) for length in choices or (T,)], packed=bool(choices))
        ref = np.pad(ref_logprobs[first::2], (0, extra), constant_values=7.0)
        return place_answers(tokens, mask, ref, packing, mesh, paired=False)

    desirable = put(np.pad(DESIRABLE, (0, extra), constant_values=True), replicated(mesh))
    return KTOBatch(half(0), half(1), desirable)


def test_loss_and_gradient_are_those_of_single_sequences_in_every_layout(cfg, ragged, reference, one_device):
    @jax.jit
    def plain(params):
        def loss(params):
            logprobs, _ = plain_answers(params, cfg, ragged)
            ratios = logprobs - reference
            baseline = jax.lax.stop_gradient(jnp.maximum(jnp.mean(ratios[1::2]), 0.0))
            gap = CONFIG.beta * (ratios[::2] - baseline)
            losses = jnp.where(DESIRABLE, 1.3 * (1 - sigmoid(gap)), 0.8 * (1 - sigmoid(-gap)))
            return jnp.mean(losses), (logprobs, baseline)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logprobs, baseline)), grads = jax.device_get(plain(make_params(cfg, "lm", one_device)))
    rewards = CONFIG.beta * (logprobs - reference)[::2]
    assert baseline > 0.1
    for mesh_dim, rows, choices in LAYOUTS:
        mesh = make_mesh(mesh_dim, jax.devices()[: 1 if mesh_dim == "1,1,1" else 8])
        optimizer = optax.sgd(1.0)  # the update is the gradient
        params = make_params(cfg, "lm", mesh)
        before = jax.device_get(params)
        state = create_train_state(params, param_specs(cfg, "lm"), optimizer, mesh)
        batch = place(ragged, reference, mesh, rows, choices, extra=2 if choices else 0)

        state, metrics = make_kto_step(cfg, optimizer, mesh, CONFIG)(state, batch)

        np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-5)
        after = jax.device_get(state.params)
        jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, g, atol=1e-5), before, after, grads)
        np.testing.assert_allclose(metrics["kl"].value, baseline, rtol=1e-5)
        np.testing.assert_allclose(metrics["rewards/chosen"].value, rewards[DESIRABLE].mean(), rtol=1e-4)
        np.testing.assert_allclose(metrics["rewards/rejected"].value, rewards[~DESIRABLE].mean(), rtol=1e-4)
        margin = rewards[DESIRABLE].mean() - rewards[~DESIRABLE].mean()
        np.testing.assert_allclose(metrics["rewards/margins"].value, margin, rtol=1e-4)
        assert metrics["tokens"].value == ragged.lengths.sum()
    # The last layout also serves for the evaluation; the step has taken its parameters.
    evaluated = with_margins(make_kto_eval(cfg, mesh, CONFIG)(make_params(cfg, "lm", mesh), batch))
    assert evaluated.keys() == metrics.keys() - {"grad_norm", "skipped", "tokens"}
    for name, mean in evaluated.items():
        np.testing.assert_allclose(mean.value, metrics[name].value, atol=1e-5, err_msg=name)


def test_what_no_answer_has_the_label_for_is_not_a_number():
    good = {"rewards/chosen": Mean(3.0, 2.0), "rewards/rejected": Mean(0.0, 0.0), "loss": Mean(0.0, 0.0)}
    logps = {"logps/chosen": Mean(-9.0, 2.0), "logps/rejected": Mean(0.0, 0.0)}
    found = fetch(with_margins(good | logps))
    assert found["rewards/chosen"] == 1.5 and found["logps/chosen"] == -4.5 and found["loss"] == 0
    assert np.isnan([found[name] for name in ("rewards/rejected", "logps/rejected", "rewards/margins")]).all()
    # Over a data set the batches that lack a label weigh nothing in its means.
    bad = {"rewards/chosen": Mean(0.0, 0.0), "rewards/rejected": Mean(-2.0, 4.0), "loss": Mean(1.0, 4.0)}
    found = fetch(with_margins(add_metrics(good | logps, bad | logps)))
    assert (found["rewards/chosen"], found["rewards/rejected"], found["rewards/margins"]) == (1.5, -0.5, 2.0)
