"""The sampler: its relations to the uncached model, to the softmax, and of every row to itself alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easyrl.core.errors import UserError
from easyrl.core.params import shardings
from easyrl.core.sharding import DATA_AXES, make_mesh
from easyrl.models.families import param_specs
from easyrl.models.heads import lm_logits, token_logprobs
from easyrl.models.trunk import trunk
from easyrl.sampling.decode import SamplingConfig, make_sampling, sample_ids
from easyrl.steps.sampling import Sampler, lay_out_for_decoding, plan_prompts
from tests.tiny import draw_params, tiny_config

CFG = tiny_config(num_heads=16, num_kv_heads=8)  # divides by 8 devices
PARAMS = draw_params(CFG)
KEY = jax.random.key(7)
PAD = 39
STOPS = (5, 17, 30)
LENGTHS = np.array([3, 9, 1, 6, 9, 2, 5, 8])
PROMPTS = np.random.default_rng(0).integers(0, 39, (8, 9)).astype(np.int32)
IDS = np.arange(8) + 100


@functools.cache
def sampler(stop_ids=(), mesh=None, logprob_space="sampling", num_samples=1, **settings):
    config = SamplingConfig(**{"max_new_tokens": 12, **settings})
    options = {"pad_id": PAD, "logprob_space": logprob_space, "num_samples": num_samples, "mesh": mesh}
    return Sampler(CFG, config, stop_ids=stop_ids, **options)


def sample(prompts=PROMPTS, lengths=LENGTHS, ids=IDS, key=KEY, params=PARAMS, **options):
    return jax.tree.map(np.asarray, sampler(**options)(params, prompts, lengths, key, ids))


@jax.jit
def forward(tokens_BT):
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden, _ = trunk(PARAMS, CFG, tokens_BT, positions, jnp.ones_like(tokens_BT))
    return lm_logits(PARAMS, CFG, hidden)


def uncached_logits(responses):
    """Logits [8, C, V] that each token of the responses to PROMPTS was drawn from, by whole sequences at once."""
    C = responses.shape[1]
    rows = [np.append(p[:n], r) for p, n, r in zip(PROMPTS, LENGTHS, responses, strict=True)]
    tokens = np.stack([np.pad(row, (0, PROMPTS.shape[1] + C - len(row))) for row in rows])
    logits = np.asarray(forward(tokens))
    return np.stack([logits[row, n - 1 : n - 1 + C] for row, n in enumerate(LENGTHS)])


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        ("sampling", {"temperature": 0.7}),
        ("model", {"temperature": 0.7}),
        ("sampling", {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}),
        ("sampling", {"temperature": 0.0}),
    ],
)
def test_logprobs_and_entropies_are_those_of_an_uncached_forward_pass(space, settings):
    out = sample(logprob_space=space, **settings)
    temperature = settings["temperature"] if space == "sampling" else 1.0
    expected, entropies = token_logprobs(uncached_logits(out.tokens_BC), out.tokens_BC, temperature)
    np.testing.assert_allclose(out.logprobs_BC, expected, atol=1e-5)
    np.testing.assert_allclose(out.entropies_BC, entropies, atol=1e-5)


def test_greedy_takes_the_most_likely_token_every_time():
    out = sample(temperature=0.0)
    np.testing.assert_array_equal(out.tokens_BC, np.argmax(uncached_logits(out.tokens_BC), -1))


def test_filters_and_penalty_act_on_every_token():
    """Over prompt and response: once a token is seen its logit is driven far below every other."""
    out = sample(temperature=1.5, top_k=3, repetition_penalty=1e6)
    logits = uncached_logits(out.tokens_BC)
    for row, t in np.ndindex(out.tokens_BC.shape):
        seen = np.append(PROMPTS[row, : LENGTHS[row]], out.tokens_BC[row, :t])
        penalised = logits[row, t].copy()
        penalised[seen] = np.where(penalised[seen] < 0, penalised[seen] * 1e6, penalised[seen] / 1e6)
        assert out.tokens_BC[row, t] in np.argsort(penalised)[-3:]


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7, "temperature": 2.0}]
)
def test_samples_follow_the_distribution(settings):
    """Two tokens from one prompt, many times: the pair's frequencies against the filtered softmax, chi-square."""
    n, V, length = 4096, CFG.vocab_size, 6
    out = sample(PROMPTS[3:4], LENGTHS[3:4], np.arange(n), num_samples=n, max_new_tokens=2, **settings)

    def probs_after(tokens):
        row = np.concatenate([PROMPTS[3, :length], tokens, np.zeros(2 - len(tokens), int)])
        logits = np.asarray(forward(row[None])[0, length - 1 + len(tokens)], np.float64)
        logits = logits / settings.get("temperature", 1.0)
        order = np.argsort(-logits)
        kept = order[: settings.get("top_k", V)]
        probs = np.exp(logits[kept] - np.logaddexp.reduce(logits[kept]))
        kept = kept[: 1 + np.searchsorted(np.cumsum(probs), settings.get("top_p", 1.0 + 1e-9))]
        full = np.zeros(V)
        full[kept] = np.exp(logits[kept] - np.logaddexp.reduce(logits[kept]))
        return full

    first = probs_after(np.array([], int))
    counts = np.bincount(out.tokens_BC[:, 0], minlength=V)
    assert chi_square_p(counts, first) > 1e-3
    most = int(np.argmax(counts))
    second = np.bincount(out.tokens_BC[out.tokens_BC[:, 0] == most, 1], minlength=V)
    assert chi_square_p(second, probs_after(np.array([most]))) > 1e-3


def chi_square_p(counts, probs):
    """The p-value of Pearson's test by the Wilson-Hilferty approximation; rare tokens are counted together."""
    assert counts[probs == 0].sum() == 0
    expected = counts.sum() * probs
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = np.sum((observed - expected) ** 2 / expected)
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_a_row_depends_on_nothing_but_itself():
    """Neighbours, their order, the batch size, the padding's length and content, and the company's longest response."""
    expected = sample(stop_ids=STOPS)
    order = np.array([6, 1, 3])
    fewer = sample(PROMPTS[order], LENGTHS[order], IDS[order], stop_ids=STOPS)
    padded = np.pad(PROMPTS, ((0, 0), (0, 4)), constant_values=23)
    padded = np.where(np.arange(13) < LENGTHS[:, None], padded, 31)
    wider = sample(padded, stop_ids=STOPS)
    for field in ("tokens_BC", "lengths_B", "ended_B"):
        np.testing.assert_array_equal(getattr(fewer, field), getattr(expected, field)[order])
        np.testing.assert_array_equal(getattr(wider, field), getattr(expected, field))
    np.testing.assert_allclose(wider.logprobs_BC, expected.logprobs_BC, atol=1e-5)


@pytest.mark.parametrize("mesh_dim", ["1,1,8", "2,2,2", "1,8,1"])
def test_every_mesh_draws_the_same_samples(mesh_dim):
    expected = sample(stop_ids=STOPS)
    mesh = make_mesh(mesh_dim)
    params = jax.device_put(PARAMS, shardings(param_specs(CFG, "lm"), mesh))
    prompts, lengths = jax.device_put((PROMPTS, LENGTHS), NamedSharding(mesh, PartitionSpec(DATA_AXES)))
    out = sample(prompts, lengths, params=params, stop_ids=STOPS, mesh=mesh)
    np.testing.assert_array_equal(out.tokens_BC, expected.tokens_BC)
    np.testing.assert_allclose(out.logprobs_BC, expected.logprobs_BC, atol=1e-5)


@pytest.mark.parametrize(("mesh_dim", "tied"), [("1,1,1", True), ("2,2,2", False)])
def test_weights_may_be_laid_out_once_for_all_batches(mesh_dim, tied):
    """The same samples, and no program that copies the weights."""
    cfg = tiny_config(width=128, num_heads=8, num_kv_heads=4, tied_embeddings=tied)
    mesh = make_mesh(mesh_dim, jax.devices()[: 8 if mesh_dim == "2,2,2" else 1])
    params = jax.device_put(jax.device_get(draw_params(cfg, scale=0.1)), shardings(param_specs(cfg, "lm"), mesh))
    layers = jax.tree.leaves(params["layers"])
    size = sum(x.nbytes for x in layers) // mesh.shape["mp"]
    options = {"stop_ids": STOPS, "num_samples": 1, "mesh": mesh}
    found, memory = [], []
    for unstacked in (False, True):
        if unstacked:
            params = lay_out_for_decoding(params, cfg, mesh)
            assert all(x.is_deleted() for x in layers)
        sampler = Sampler(cfg, SamplingConfig(max_new_tokens=8), unstacked=unstacked, **options)
        call = sampler.call(params, PROMPTS, LENGTHS, KEY, IDS)
        memory.append(call.lower().compile().memory_analysis().temp_size_in_bytes)
        found.append(jax.device_get(call.run()))
    np.testing.assert_array_equal(found[0].tokens_BC, found[1].tokens_BC)
    np.testing.assert_allclose(found[0].logprobs_BC, found[1].logprobs_BC, atol=1e-5)
    assert memory[0] - memory[1] > 0.9 * size


def test_ids_and_key_make_the_difference():
    rows = np.zeros(8, int)
    one_prompt = sample(PROMPTS[rows], LENGTHS[rows])
    assert len(np.unique(one_prompt.tokens_BC, axis=0)) == 8
    same_id = sample(PROMPTS[rows], LENGTHS[rows], np.full(8, 3))
    assert len(np.unique(same_id.tokens_BC, axis=0)) == 1
    assert not np.array_equal(sample(key=jax.random.key(8)).tokens_BC, sample().tokens_BC)


def test_several_samples_of_a_prompt_are_what_its_rows_alone_would_be():
    np.testing.assert_array_equal(sample_ids(np.array([4, 9]), 3), [12, 13, 14, 27, 28, 29])
    ids = np.asarray(sample_ids(np.array([4, 9]), 3))
    rows = np.array([0, 0, 0, 1, 1, 1])
    together = sample(PROMPTS[:2], LENGTHS[:2], ids, num_samples=3, stop_ids=STOPS)
    apart = sample(PROMPTS[rows], LENGTHS[rows], ids, stop_ids=STOPS)
    np.testing.assert_array_equal(together.tokens_BC, apart.tokens_BC)
    np.testing.assert_allclose(together.logprobs_BC, apart.logprobs_BC, atol=1e-5)


def test_a_response_ends_with_the_one_end_token_that_was_drawn():
    free, out = sample(temperature=1.5), sample(temperature=1.5, stop_ids=STOPS)
    assert 0 < out.ended_B.sum() < 8  # else this test shows little
    for row in range(8):
        length, tokens = out.lengths_B[row], out.tokens_BC[row]
        assert out.ended_B[row] == (tokens[length - 1] in STOPS)
        assert not np.isin(tokens[: length - 1], STOPS).any()
        assert out.ended_B[row] or length == 12
        np.testing.assert_array_equal(tokens[:length], free.tokens_BC[row, :length])
        np.testing.assert_array_equal(tokens[length:], PAD)
        np.testing.assert_array_equal(out.logprobs_BC[row, length:], 0)
        np.testing.assert_array_equal(out.entropies_BC[row, length:], 0)
        assert (out.logprobs_BC[row, :length] < 0).all()


def test_the_padding_token_may_be_an_end_token():
    out = sample(temperature=1.5, stop_ids=(*STOPS, PAD))
    lengths = [1 + int(np.argmax(np.isin(row, (*STOPS, PAD)))) for row in out.tokens_BC[out.ended_B]]
    np.testing.assert_array_equal(out.lengths_B[out.ended_B], lengths)


def test_ends_are_ruled_out_before_min_new_tokens():
    out = sample(temperature=1.5, stop_ids=STOPS, min_new_tokens=6)
    assert out.lengths_B.min() >= 7 and out.ended_B.any()
    # The ends stay in the log-probs.
    expected, _ = token_logprobs(uncached_logits(out.tokens_BC), out.tokens_BC, 1.5)
    np.testing.assert_allclose(out.logprobs_BC[:, :6], expected[:, :6], atol=1e-5)


def test_decoding_stops_with_the_longest_row():
    at_once = sample(stop_ids=tuple(range(CFG.vocab_size)))
    assert at_once.steps == 1 and at_once.ended_B.all() and (at_once.lengths_B == 1).all()
    everybody = sample(temperature=1.5, stop_ids=STOPS)
    short = int(np.argmin(everybody.lengths_B))
    alone = sample(temperature=1.5, stop_ids=STOPS, lengths=np.where(np.arange(8) == short, LENGTHS, 0))
    assert alone.steps == everybody.lengths_B[short] < 12 == everybody.steps


def test_rows_that_only_fill_the_batch_get_no_response():
    lengths = np.where(np.arange(8) < 6, LENGTHS, 0)
    expected = sample(temperature=1.5, stop_ids=STOPS)
    out = sample(temperature=1.5, stop_ids=STOPS, lengths=lengths)
    np.testing.assert_array_equal(out.tokens_BC[:6], expected.tokens_BC[:6])
    np.testing.assert_array_equal(out.tokens_BC[6:], PAD)
    assert not out.lengths_B[6:].any() and not out.ended_B[6:].any()


def test_one_token_needs_no_decoding():
    out = sample(max_new_tokens=1)
    np.testing.assert_array_equal(out.tokens_BC[:, 0], sample().tokens_BC[:, 0])
    assert out.steps == 1


def test_the_head_is_computed_at_the_last_prompt_token_only():
    program, lengths = make_sampling(CFG, SamplingConfig(max_new_tokens=4), stop_ids=()), np.full(3, 50)
    plans = plan_prompts(lengths, 50, shards=1)
    text = program.lower(PARAMS, np.zeros((3, 50), np.int32), lengths, plans, KEY, np.arange(3)).as_text()
    assert f"3x{CFG.vocab_size}x" in text
    assert f"3x50x{CFG.vocab_size}x" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected 1 or more"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens: found 5, expected 0 to max_new_tokens=4"),
        ({"temperature": -0.5}, "temperature: found -0.5, expected 0 or more"),
        ({"top_k": -1}, "top_k: found -1, expected 0 or more"),
        ({"top_p": 0.0}, "top_p: found 0.0, expected more than 0, at most 1"),
        ({"top_p": float("nan")}, "top_p: found nan, expected more than 0, at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: found 0.0, expected more than 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**settings)


def test_wrong_arguments_are_refused():
    with pytest.raises(UserError, match="stop_ids: found 40, expected ids below the vocabulary size 40"):
        Sampler(CFG, SamplingConfig(), stop_ids=(2, 40))
    with pytest.raises(UserError, match="logprob_space: found 'raw', expected one of sampling, model"):
        Sampler(CFG, SamplingConfig(), stop_ids=(), logprob_space="raw")
    with pytest.raises(UserError, match="batch=3, which does not divide by dp=8"):
        sample(PROMPTS[:3], LENGTHS[:3], IDS[:3], mesh=make_mesh("8,1,1"))
