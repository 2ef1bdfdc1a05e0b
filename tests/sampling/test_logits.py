"""Filters against transformers' processors, and the choice against the distribution it draws from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.sampling.logits import BLOCK, choose, keep_top_k, keep_top_p, penalise_repetition, suppress

rng = np.random.default_rng(0)
LOGITS = rng.normal(scale=3, size=(4, 300)).astype(np.float32)


@pytest.fixture(scope="module")
def processors():
    pytest.importorskip("torch", reason="the filters are measured against transformers on torch")
    return pytest.importorskip("transformers.generation.logits_process", reason="see above")


def process(processor, logits, ids=None):
    import torch

    ids = torch.zeros((len(logits), 1), dtype=torch.long) if ids is None else torch.tensor(ids)
    return processor(ids, torch.tensor(logits)).numpy()


@pytest.mark.parametrize("k", [1, 2, 50, 299, 300, 1000])
def test_top_k_is_transformers(k, processors):
    expected = process(processors.TopKLogitsWarper(k), LOGITS)
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(LOGITS), k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_top_p_is_transformers(p, processors):
    expected = process(processors.TopPLogitsWarper(p), LOGITS)
    np.testing.assert_array_equal(keep_top_p(jnp.asarray(LOGITS), p), expected)


def test_top_p_after_top_k_counts_the_mass_that_top_k_left(processors):
    expected = process(processors.TopPLogitsWarper(0.8), process(processors.TopKLogitsWarper(20), LOGITS))
    np.testing.assert_array_equal(keep_top_p(keep_top_k(jnp.asarray(LOGITS), 20), 0.8), expected)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers(penalty, processors):
    ids = rng.integers(0, 300, (4, 12))
    seen = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    expected = process(processors.RepetitionPenaltyLogitsProcessor(penalty), LOGITS, ids)
    np.testing.assert_allclose(
        penalise_repetition(jnp.asarray(LOGITS), jnp.asarray(seen), penalty), expected, rtol=1e-6
    )


@pytest.mark.parametrize(("new", "when"), [(0, True), (4, True), (5, False)])
def test_suppression_of_ends_is_transformers(new, when, processors):
    processor = processors.MinNewTokensLengthLogitsProcessor(3, 5, [2, 7], device="cpu")
    expected = process(processor, LOGITS, np.zeros((4, 3 + new), int))
    np.testing.assert_array_equal(suppress(jnp.asarray(LOGITS), (2, 7), jnp.asarray(when)), expected)


def test_suppression_row_by_row():
    out = np.asarray(suppress(jnp.zeros((2, 4)), (1,), jnp.asarray([True, False])))
    assert np.isneginf(out).tolist() == [[False, True, False, False], [False] * 4]
    np.testing.assert_array_equal(suppress(jnp.zeros((2, 4)), (), jnp.asarray(True)), 0)


def test_the_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for p, kept in ((0.4, 1), (0.5, 1), (0.55, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        assert int(jnp.isfinite(keep_top_p(logits, p)).sum()) == kept, p


def test_the_last_token_is_never_filtered_away():
    logits = jnp.full((1, 5), -jnp.inf).at[0, 3].set(2.0)
    for out in (keep_top_k(logits, 1), keep_top_p(logits, 1e-9), keep_top_k(logits, 4)):
        assert jnp.isfinite(out).tolist() == [[False, False, False, True, False]]


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.array([[1.0, 0.0, 0.0, -1.0]])
    assert jnp.isfinite(keep_top_k(logits, 2)).tolist() == [[True, True, True, False]]
    assert jnp.isfinite(keep_top_p(logits, 0.6)).tolist() == [[True, True, True, False]]


def chi_square(counts, probs):
    """Pearson's statistic, centred and scaled: about normal(0, 1)."""
    expected = counts.sum() * probs
    degrees = (probs > 0).sum() - 1
    return (np.sum((counts - expected)[probs > 0] ** 2 / expected[probs > 0]) - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("V", [7, BLOCK, 3 * BLOCK + 5])
def test_choices_follow_the_softmax(V):
    n = 40_000
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32)
    logits[1] = -np.inf
    keys = jax.random.split(jax.random.key(0), n)
    counts = np.bincount(jax.jit(choose)(keys, jnp.broadcast_to(logits, (n, V))), minlength=V)
    probs = np.exp(logits - np.logaddexp.reduce(logits))
    assert counts[1] == 0
    assert abs(chi_square(counts, probs)) < 4


def test_a_choice_is_its_rows_alone():
    keys = jax.random.split(jax.random.key(0), 4)
    together = choose(keys, jnp.asarray(LOGITS))
    for row in range(4):
        assert choose(keys[row : row + 1], jnp.asarray(LOGITS[row : row + 1]))[0] == together[row]


def test_rounding_moves_a_choice_next_to_never():
    """Under the noise of a float32 forward pass, so that meshes and batch sizes give the same samples."""
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    logits = jnp.broadcast_to(LOGITS[0] / 3, (n, 300))
    noise = 1e-6 * jax.random.normal(jax.random.key(1), logits.shape)
    assert int(jnp.sum(choose(keys, logits) != choose(keys, logits + noise))) <= 2
