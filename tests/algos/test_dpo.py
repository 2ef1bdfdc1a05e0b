"""Every loss of the table against numpy, a hand-worked pair, its gradients, its limits, and filler and splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from easyrl.algos import dpo
from easyrl.algos.dpo import LOSSES, REFERENCE_FREE, Pairs, dpo_loss, implicit_rewards, loss_options, nll

NAN = float("nan")


def softplus(x):  # -log sigmoid(-x)
    return np.logaddexp(0.0, x)


def s(x):
    return 1 / (1 + np.exp(-x))


def smoothed(x, e):
    return (1 - e) * softplus(-x) + e * softplus(x)


def log_odds(a):
    return a - np.log(1 - np.exp(a))


# The same losses in float64 numpy, from the papers: w and l are log-probs, v and m the reference's, n and k lengths.
NUMPY = {
    "sigmoid": lambda w, l, v, m, n, k, b, e=0.0: smoothed(b * ((w - l) - (v - m)), e),
    "robust": lambda w, l, v, m, n, k, b, e=0.0: (
        ((1 - e) * softplus(-b * (w - l - v + m)) - e * softplus(b * (w - l - v + m))) / (1 - 2 * e)
    ),
    "ipo": lambda w, l, v, m, n, k, b, a=True: (
        ((w - v) / (n if a else 1) - (l - m) / (k if a else 1) - 1 / (2 * b)) ** 2
    ),
    "hinge": lambda w, l, v, m, n, k, b: np.maximum(0, 1 - b * (w - l - v + m)),
    "sigmoid_norm": lambda w, l, v, m, n, k, b, e=0.0: smoothed(b * ((w - v) / n - (l - m) / k), e),
    "simpo": lambda w, l, v, m, n, k, b, g=0.5, e=0.0: smoothed(b * (w / n - l / k) - g, e),
    "orpo": lambda w, l, v, m, n, k, b: b * softplus(log_odds(l / k) - log_odds(w / n)),
    "apo_zero": lambda w, l, v, m, n, k, b: 1 - s(b * (w - v)) + s(b * (l - m)),
    "apo_down": lambda w, l, v, m, n, k, b: s(b * (w - v)) + 1 - s(b * (w - v - l + m)),
    "dpop": lambda w, l, v, m, n, k, b, d=50.0, e=0.0: smoothed(b * (w - v - l + m - d * np.maximum(0, v - w)), e),
}
SHORT = {"e": "label_smoothing", "a": "ipo_average", "g": "simpo_gamma", "d": "dpop_lambda"}
CASES = [(name, {}) for name in NUMPY] + [
    ("sigmoid", {"e": 0.1}),
    ("robust", {"e": 0.2}),
    ("ipo", {"a": False}),
    ("sigmoid_norm", {"e": 0.1}),
    ("simpo", {"g": 1.4, "e": 0.1}),
    ("dpop", {"d": 3.0, "e": 0.1}),
]


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 12, size=(2, 8))
    logprobs = -lengths * rng.uniform(0.3, 2.0, size=(2, 8))
    ref = logprobs + rng.normal(size=(2, 8))
    pairs = Pairs(*[jnp.asarray(x, jnp.float32) for x in (*logprobs, *ref)], *map(jnp.asarray, lengths))
    return pairs, np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)


def one_pair(chosen=-8.0, rejected=-9.0, ref_chosen=-8.5, ref_rejected=-8.0, chosen_length=4, rejected_length=6):
    fields = (chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length)
    return Pairs(*[jnp.array([x], jnp.float32) for x in fields])


def test_the_table_is_complete():
    assert LOSSES.keys() == NUMPY.keys()
    assert LOSSES.keys() >= REFERENCE_FREE and LOSSES.keys() >= dpo.NLL_COEF.keys()


@pytest.mark.parametrize(("name", "short"), CASES)
def test_each_loss_equals_numpy(batch, name, short):
    pairs, mask = batch
    expected = NUMPY[name](*[np.asarray(x, np.float64) for x in pairs], 0.3, **short)
    options = {SHORT[key]: value for key, value in short.items()}
    np.testing.assert_allclose(LOSSES[name](pairs, beta=0.3, **options), expected, rtol=2e-5, atol=1e-6)
    loss, _ = dpo_loss(name, pairs, mask, beta=0.3, **options)
    np.testing.assert_allclose(loss.value, expected[mask].mean(), rtol=2e-5)
    assert loss.count == mask.sum()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # r_w = 0.5, r_l = -1, lengths 4 and 6, beta 0.1: beta (r_w - r_l) = 0.15.
        ("sigmoid", 0.620957),  # ln(1 + exp(-0.15))
        ("robust", 0.620957),
        ("ipo", 22.168403),  # (0.5 / 4 + 1 / 6 - 5)^2 = (-4.7083333)^2
        ("hinge", 0.85),  # 1 - 0.15
        ("apo_zero", 0.9625234),  # 1 - s(0.05) + s(-0.1) = 1 - 0.5124974 + 0.4750208
        ("apo_down", 0.9750676),  # s(0.05) + 1 - s(0.15) = 0.5124974 + 1 - 0.5374298
        ("dpop", 0.620957),  # r_w > 0: no charge
        ("sigmoid_norm", 0.678670),  # ln(1 + exp(-0.1 (0.5 / 4 + 1 / 6))) = ln(1 + exp(-0.0291667))
        ("simpo", 1.005492),  # averages -2 and -1.5: ln(1 + exp(-(0.1 * -0.5 - 0.5))) = ln(1 + exp(0.55))
        ("orpo", 0.104206),  # log odds -1.854587 and -1.247518: 0.1 ln(1 + exp(0.607069))
    ],
)
def test_a_pair_by_hand(name, expected):
    np.testing.assert_allclose(LOSSES[name](one_pair(), beta=0.1), [expected], rtol=1e-5)


GRADIENT_SIGNS = {  # of the chosen and the rejected log-prob, at the pair above
    **dict.fromkeys(LOSSES, (-1, 1)),
    "apo_down": (1, 1),  # both fall
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(batch, name):
    pairs, _ = batch

    def loss(chosen, rejected):
        return jnp.mean(LOSSES[name](pairs._replace(chosen=chosen, rejected=rejected), beta=0.3))

    check_grads(loss, pairs[:2], order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=1e-2)
    pair = one_pair()
    signs = [
        np.sign(jax.grad(lambda x, field=field: LOSSES[name](pair._replace(**{field: x}), beta=0.3)[0])(value))
        for field, value in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    assert tuple(float(x[0]) for x in signs) == GRADIENT_SIGNS[name]


@pytest.mark.parametrize("name", LOSSES)
def test_reference_free_losses_do_not_read_the_reference(batch, name):
    pairs, _ = batch
    other = pairs._replace(ref_chosen=0 * pairs.chosen, ref_rejected=0 * pairs.rejected)
    same = np.allclose(LOSSES[name](pairs, beta=0.3), LOSSES[name](other, beta=0.3))
    assert same == (name in REFERENCE_FREE)


def test_limits_and_relations(batch):
    pairs, _ = batch
    plain = dpo.sigmoid(pairs, beta=0.3)
    np.testing.assert_allclose(dpo.robust(pairs, beta=0.3, label_smoothing=0.0), plain, rtol=1e-6)
    np.testing.assert_allclose(dpo.dpop(pairs, beta=0.3, dpop_lambda=0.0), plain, rtol=1e-6)
    ones = pairs._replace(chosen_lengths=jnp.ones(8), rejected_lengths=jnp.ones(8))
    np.testing.assert_allclose(dpo.sigmoid_norm(ones, beta=0.3), plain, rtol=1e-6)
    np.testing.assert_allclose(dpo.ipo(ones, beta=0.3), dpo.ipo(pairs, beta=0.3, ipo_average=False), rtol=1e-6)
    zero_ref = ones._replace(ref_chosen=jnp.zeros(8), ref_rejected=jnp.zeros(8))
    np.testing.assert_allclose(dpo.simpo(ones, beta=0.3, simpo_gamma=0.0), dpo.sigmoid(zero_ref, beta=0.3), rtol=1e-6)
    # At the reference, every margin is 0.
    equal = pairs._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)
    for name in ("sigmoid", "robust", "sigmoid_norm", "dpop"):
        np.testing.assert_allclose(LOSSES[name](equal, beta=0.3), np.log(2), rtol=1e-6)
    for name in ("hinge", "apo_zero", "apo_down"):
        np.testing.assert_allclose(LOSSES[name](equal, beta=0.3), 1.0, rtol=1e-6)


def test_robust_undoes_the_flips(batch):
    """The mean over flips of the robust loss on flipped labels is the plain loss on the true ones."""
    pairs, _ = batch
    w, l, v, m, n, k = pairs
    flipped = Pairs(l, w, m, v, k, n)
    right, wrong = (dpo.robust(x, beta=0.3, label_smoothing=0.2) for x in (pairs, flipped))
    np.testing.assert_allclose(0.8 * right + 0.2 * wrong, dpo.sigmoid(pairs, beta=0.3), rtol=1e-5)


def test_ipo_stops_at_its_target():
    # Average log-ratios 4 / 4 and -3 / 2 differ by 2.5 = 1 / (2 * 0.2).
    pair = one_pair(chosen=-4.0, ref_chosen=-8.0, rejected=-11.0, ref_rejected=-8.0, rejected_length=2)
    np.testing.assert_allclose(dpo.ipo(pair, beta=0.2), [0.0], atol=1e-10)
    further = pair._replace(chosen=pair.chosen + 1)
    assert jax.grad(lambda x: dpo.ipo(further._replace(chosen=x), beta=0.2)[0])(further.chosen)[0] > 0


def test_hinge_has_a_dead_zone():
    pair = one_pair(chosen=-2.0, ref_chosen=-8.0, rejected=-12.5)  # r_w - r_l = 6 + 4.5 = 10.5 > 1 / 0.1
    loss, grad = jax.value_and_grad(lambda x: dpo.hinge(pair._replace(chosen=x), beta=0.1)[0])(pair.chosen)
    assert loss == 0 and grad[0] == 0


def test_dpop_charges_a_falling_chosen_answer():
    # r_w = -0.5, r_l = -3: DPO is content (margin 2.5), DPOP is not: 2.5 - 50 * 0.5 = -22.5.
    pair = one_pair(chosen=-9.0, rejected=-11.0)
    np.testing.assert_allclose(dpo.dpop(pair, beta=1.0), [22.5], rtol=1e-5)
    grads = [
        jax.grad(lambda x, loss=loss: loss(pair._replace(chosen=x), beta=1.0)[0])(pair.chosen)[0]
        for loss in (dpo.sigmoid, dpo.dpop)
    ]
    assert grads[1] < 100 * grads[0] < 0  # a push up, hundreds of times stronger


def test_simpo_margin_moves_the_centre():
    # Averages -1 and -1.5, beta 2: 1 - gamma = 0 at gamma 1.
    pair = one_pair(chosen=-4.0, rejected=-9.0)
    np.testing.assert_allclose(dpo.simpo(pair, beta=2.0, simpo_gamma=1.0), [np.log(2)], rtol=1e-6)


def test_orpo_of_certain_and_impossible_answers_is_finite():
    for chosen, rejected in ((0.0, 0.0), (0.0, -600.0), (-600.0, 0.0), (-600.0, -600.0)):
        pair = one_pair(chosen=chosen, rejected=rejected)
        loss, grads = jax.value_and_grad(lambda p: dpo.orpo(p, beta=0.1)[0])(pair)
        assert np.isfinite(loss) and np.isfinite(jnp.stack(grads)).all()


def test_metrics_by_hand():
    # beta 0.1. Pair 0: r = 0.5, -1. Pair 1: r = 0, 0 (a tie). The third is filler.
    fields = [[-8.0, -2.0, NAN], [-9.0, -3.0, NAN], [-8.5, -2.0, NAN], [-8.0, -3.0, NAN], [4, 1, 0], [6, 2, 0]]
    pairs, mask = Pairs(*map(jnp.array, fields)), jnp.array([True, True, False])
    _, metrics = dpo_loss("sigmoid", pairs, mask, beta=0.1)
    expected = {
        "rewards/chosen": 0.025,
        "rewards/rejected": -0.05,
        "rewards/margins": 0.075,
        "rewards/accuracies": 0.5,
        "logps/chosen": -5.0,
        "logps/rejected": -6.0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name].value, value, rtol=1e-5, err_msg=name)
    # Without a reference, rewards and log-probs are averages per token: -2 and -2; -1.5 and -1.5.
    _, metrics = dpo_loss("simpo", pairs, mask, beta=0.1)
    np.testing.assert_allclose(metrics["rewards/chosen"].value, -0.2, rtol=1e-6)
    np.testing.assert_allclose(metrics["logps/rejected"].value, -1.5, rtol=1e-6)


def test_rewards_carry_no_gradient(batch):
    pairs, mask = batch
    grads = jax.grad(lambda p: sum(jnp.sum(x) for x in implicit_rewards("sigmoid", p, beta=0.1)))(
        Pairs(*[x.astype(jnp.float32) for x in pairs])
    )
    assert not np.any(jnp.stack(grads))
    assert not np.any(
        jax.grad(lambda x: dpo_loss("ipo", pairs._replace(chosen=x), mask, beta=0.1)[1]["rewards/margins"].total)(
            pairs.chosen
        )
    )


@pytest.mark.parametrize("name", LOSSES)
def test_filler_order_and_splits(batch, name):
    pairs, mask = batch
    expected = jax.tree.leaves(dpo_loss(name, pairs, mask, beta=0.3))
    poisoned = Pairs(*[jnp.where(mask, x, NAN) for x in pairs[:4]], *[jnp.where(mask, x, 0) for x in pairs[4:]])
    np.testing.assert_array_equal(jax.tree.leaves(dpo_loss(name, poisoned, mask, beta=0.3)), expected)
    grads = jax.grad(lambda x: dpo_loss(name, poisoned._replace(chosen=x), mask, beta=0.3)[0].total)(poisoned.chosen)
    assert np.isfinite(grads).all() and not np.any(grads[~mask])
    order = np.array([3, 7, 0, 1, 6, 2, 5, 4])
    shuffled = dpo_loss(name, Pairs(*[x[order] for x in pairs]), mask[order], beta=0.3)
    np.testing.assert_allclose(jax.tree.leaves(shuffled), expected, rtol=1e-5, atol=1e-6)
    parts = [dpo_loss(name, Pairs(*[x[i] for x in pairs]), mask[i], beta=0.3) for i in (slice(0, 3), slice(3, 8))]
    total = jax.tree.leaves(jax.tree.map(lambda a, b: a + b, *parts))
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)


def test_loss_options():
    assert loss_options("hinge") == {"beta"}
    assert loss_options("simpo") == {"beta", "simpo_gamma", "label_smoothing"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {}, "unknown loss 'dpo', expected one of sigmoid, robust,"),
        ("hinge", {"label_smoothing": 0.1}, "loss hinge does not read label_smoothing"),
        ("sigmoid", {"dpop_lambda": 5.0, "ipo_average": True}, "does not read dpop_lambda, ipo_average"),
        ("sigmoid", {"beta": 0.0}, "beta must be positive, found 0.0"),
        ("sigmoid", {"beta": NAN}, "beta must be positive"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing must be"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing must be"),
        ("simpo", {"simpo_gamma": -1.0}, "simpo_gamma must not be negative"),
        ("dpop", {"dpop_lambda": -1.0}, "dpop_lambda must not be negative"),
    ],
)
def test_refusals(batch, name, options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(name, *batch, **({"beta": 0.1} | options))


def test_nll_by_hand():
    # Answers of 2 and 6 tokens with log-probs -4 and -3: 7 / 8 per token, (2 + 0.5) / 2 per answer.
    logprobs, lengths, mask = jnp.array([-4.0, -3.0, NAN]), jnp.array([2, 6, 0]), jnp.array([True, True, False])
    np.testing.assert_allclose(nll(logprobs, lengths, mask), [7.0, 8.0], rtol=1e-6)
    np.testing.assert_allclose(nll(logprobs, lengths, mask, per_token=False), [2.5, 2.0], rtol=1e-6)
    for per_token, expected in ((True, [-1, -1, 0]), (False, [-1 / 2, -1 / 6, 0])):
        grads = jax.grad(lambda x, per=per_token: nll(x, lengths, mask, per_token=per).total)(logprobs)
        np.testing.assert_allclose(grads, expected, rtol=1e-6)
