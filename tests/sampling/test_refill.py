"""Slot refill: whatever waits for a row of decoding, responses are those of all rows at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.core.params import shardings
from easyrl.core.sharding import make_mesh
from easyrl.models.families import param_specs
from easyrl.sampling import decode
from easyrl.sampling.decode import SamplingConfig
from easyrl.sampling.refill import Queue
from easyrl.steps.sampling import Sampler
from tests.tiny import draw_params, tiny_bloom, tiny_config, tiny_gpt2

CFG = tiny_config(num_heads=4, num_kv_heads=2)
PARAMS = draw_params(CFG)
PAD = 39
LENGTHS = (3, 9, 1, 6, 9, 2, 0, 8, 4, 9, 7, 1, 5, 5, 2, 3)
PROMPTS = np.random.default_rng(0).integers(0, PAD, (16, 9)).astype(np.int32)
STOPS = (5, 17, 30)


@functools.cache
def sample(
    mesh_dim="1,1,1", *, decode_rows=0, stop_ids=STOPS, num_samples=1, cfg=CFG, lengths=LENGTHS, tokens=48, **settings
):
    mesh = make_mesh(mesh_dim, jax.devices()[: np.prod([int(size) for size in mesh_dim.split(",")])])
    params = jax.device_put(PARAMS if cfg is CFG else draw_params(cfg), shardings(param_specs(cfg, "lm"), mesh))
    settings = SamplingConfig(max_new_tokens=tokens, temperature=1.5, **settings)
    options = {"stop_ids": stop_ids, "num_samples": num_samples, "decode_rows": decode_rows}
    sampler = Sampler(cfg, settings, pad_id=PAD, mesh=mesh, **options)
    samples = sampler(params, PROMPTS, np.array(lengths), jax.random.key(7), np.arange(16 * num_samples))
    jax.effects_barrier()
    return jax.tree.map(np.asarray, samples)


def assert_same(some, every):
    np.testing.assert_array_equal(some.tokens_BC, every.tokens_BC)
    np.testing.assert_array_equal(some.lengths_B, every.lengths_B)
    np.testing.assert_array_equal(some.ended_B, every.ended_B)
    np.testing.assert_allclose(some.logprobs_BC, every.logprobs_BC, atol=1e-5)
    np.testing.assert_allclose(some.entropies_BC, every.entropies_BC, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_waiting_changes_no_response(rows):
    every = sample()
    assert every.lengths_B.min() == 0 and 1 in every.lengths_B and len(np.unique(every.lengths_B)) > 6
    assert_same(sample(decode_rows=rows), every)


@pytest.mark.parametrize(
    ("mesh_dim", "rows"), [("2,2,2", 4), ("2,1,1", 6), ("4,1,2", 8)]
)  # one, three and two rows of each device that shares the batch
def test_nor_on_any_mesh(mesh_dim, rows):
    assert_same(sample(mesh_dim, decode_rows=rows), sample())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 4, "decode_rows": 16},  # two rows are refilled at once
        {"repetition_penalty": 1.3, "min_new_tokens": 5},
        {"stop_ids": (), "tokens": 7},
        {"tokens": 1},
        {"lengths": (9,) * 2 + (0,) * 14},
        {"tokens": 80, "num_samples": 2},  # long enough for fewer rows at the end
    ],
    ids=str,
)
def test_nor_with_any_settings(changes):
    every = {name: value for name, value in changes.items() if name != "decode_rows"}
    assert_same(sample(**{"decode_rows": 4} | changes), sample(**every))


@pytest.mark.parametrize("cfg", [tiny_bloom(), tiny_gpt2()], ids=["bloom", "gpt2"])
def test_nor_of_a_model_that_sees_distances_or_numbers_places(cfg):
    assert_same(sample(cfg=cfg, decode_rows=4), sample(cfg=cfg))


def test_nor_with_a_window_of_attention():
    cfg = tiny_config(sliding_window=4, sliding_layers=(True, False))
    assert_same(sample(cfg=cfg, decode_rows=4), sample(cfg=cfg))


def test_as_many_rows_as_responses_or_more_are_all_at_once():
    assert sample(decode_rows=16).steps == sample(decode_rows=100).steps == sample().steps


def test_rows_stand_still_for_few_steps(monkeypatch):
    """The cache is as many rows of prompt and response as were asked for, and these are mostly at work."""
    computed, trunk = [], decode.trunk

    def watched(params, cfg, tokens, *rest, cache, **options):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: computed.append(cache.positions_BS.shape))
        return trunk(params, cfg, tokens, *rest, cache=cache, **options)

    every = sample(num_samples=4)
    monkeypatch.setattr(decode, "trunk", watched)
    needed = int(np.maximum(every.lengths_B - 1, 0).sum())  # the first token is the prefill's
    sample(num_samples=4, decode_rows=8)
    assert set(computed) == {(8, 9 + 48)}
    # At the end, when nobody waits, rows do stand still: as long as the longest response at most.
    assert needed <= 8 * len(computed) <= needed + 8 * 48


def test_a_queue_leaves_out_what_only_fills_the_batch():
    filler = jnp.array([True, False, False, False, True, True, True, False])
    queue = Queue.start(filler, 2, 4)
    np.testing.assert_array_equal(queue.held_SR, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(queue.waits_S, [True, False])
    assert not queue.can_refill(jnp.array([False, False, False, True]))  # where a row is free, nobody waits
    over = jnp.array([False, True, False, True])
    assert queue.can_refill(over)
    queue, refill = queue.refill(over)
    np.testing.assert_array_equal(refill.rows_SG, [[1], [1]])
    np.testing.assert_array_equal(refill.left_SG, [[2], [4]])  # 4: none
    np.testing.assert_array_equal(refill.refilled_SG, [[1], [2]])  # 2: none
    assert refill.next_SG[0, 0] == 3
    np.testing.assert_array_equal(queue.held_SR, [[1, 3], [3, 0]])
    assert not queue.waits_S.any() and not queue.can_refill(jnp.ones(4, bool))


def test_devices_refill_once_an_eighth_of_their_rows_is_free_on_average():
    queue = Queue.start(jnp.zeros(64, bool), 2, 32)
    over = lambda *free: jnp.concatenate([jnp.arange(16) < n for n in free])
    assert not queue.can_refill(over(2, 1)) and not queue.can_refill(over(0, 3))
    assert queue.can_refill(over(2, 2)) and queue.can_refill(over(0, 4))


def test_rows_that_the_devices_cannot_share_are_refused():
    with pytest.raises(UserError, match=r"decode_rows: found 6, expected 0 or a multiple of dp x fsdp = 4"):
        sample("2,2,1", decode_rows=6)
    with pytest.raises(UserError, match=r"decode_rows: found -1, expected 0 or a multiple"):
        sample(decode_rows=-1)
