"""PPO's host side: rows, minibatches, and a self-check that notices every fault it is there for."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.data.packing import Shape, pack
from easyrl.sampling.decode import SamplingConfig
from easyrl.steps.packed import place_plans
from easyrl.steps.ppo_config import PPOConfig
from easyrl.steps.rollout import SampledBatch, join_samples, lengths_of, minibatches, self_check
from easyrl.steps.sampling import Sampler
from easyrl.steps.scoring import Passes, Rollout, make_finish, make_forward
from tests.steps.conftest import everywhere, make_params

B, P, C = 8, 6, 8
STOP_IDS = tuple(range(0, 96, 8))  # an end within 8 tokens is as likely as not
PPO = PPOConfig(temperature=0.7, kl_coef=0.3)


@dataclasses.dataclass(frozen=True)
class Parts:
    """One batch, through sampler, passes and finish."""

    batch: SampledBatch
    rollout: Rollout
    passes: Passes
    again: Passes

    def check(self, *, same_start=True, **changes):
        parts = {**vars(self), **changes}
        self_check(*parts.values(), same_start=same_start, dtype="float32", stop_ids=STOP_IDS)


@pytest.fixture(scope="module")
def parts_of(cfg, value_cfg, one_device):
    """`parts_of(sampler_temperature, reference_seed) -> Parts`; the policy's own seed is 0."""
    params, value = make_params(cfg, "lm", one_device, 0), make_params(value_cfg, "value", one_device, 1)
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(0, 96, (B, P)).astype(np.int32), rng.integers(1, P + 1, B).astype(np.int32)
    forward, finish = make_forward(cfg, cfg, value_cfg, PPO, one_device), make_finish(PPO, one_device)
    shapes = [Shape(2, P + C)]
    place = lambda lengths, packed: place_plans(pack(lengths, P + C, shapes, packed=packed), B, one_device)

    def build(temperature, reference_seed):
        sample = Sampler(cfg, SamplingConfig(max_new_tokens=C, temperature=temperature), stop_ids=STOP_IDS)
        samples = sample(params, prompts, lengths, jax.random.key(3), np.arange(B))
        batch = join_samples(prompts, lengths, samples, pad_id=0)
        tokens, mask = everywhere((batch.tokens, batch.mask), one_device)
        scores, kl_coef = everywhere((np.linspace(-1, 2, B, dtype=np.float32), np.float32(0.3)), one_device)
        models = (params, make_params(cfg, "lm", one_device, reference_seed), value)
        passes, again = (forward(*models, tokens, mask, place(batch.lengths, packed)) for packed in (True, False))
        rollout, _, _ = finish(tokens, mask, passes, scores, kl_coef)
        return Parts(*jax.device_get((batch, rollout, passes, again)))

    return build


@pytest.fixture(scope="module")
def parts(parts_of):
    """A batch without a fault."""
    parts = parts_of(PPO.temperature, 0)
    assert 0 < parts.batch.ended.sum() < B
    return parts


def change(record, **fields):
    """A record with some arrays replaced by what the given functions make of copies of them."""
    return dataclasses.replace(record, **{name: make(np.array(getattr(record, name))) for name, make in fields.items()})


def put_at(row, column, value):
    def make(array):
        array[row, column] = value
        return array

    return make


def test_a_batch_without_a_fault_passes(parts):
    parts.check()


def test_the_samplers_log_probs_stand_for_a_pass_of_the_policy(cfg, value_cfg, one_device, parts):
    """The policy's weights are not even looked at: here they are another model's."""
    models = [
        make_params(c, head, one_device, seed)
        for c, head, seed in ((cfg, "lm", 7), (cfg, "lm", 0), (value_cfg, "value", 1))
    ]
    batch, plans = parts.batch, place_plans(pack(parts.batch.lengths, P + C, [Shape(2, P + C)]), B, one_device)
    known = everywhere((batch.sampler_logprobs, batch.sampler_entropies), one_device)
    forward = make_forward(cfg, cfg, value_cfg, PPO, one_device)
    passes = forward(*models, *everywhere((batch.tokens, batch.mask), one_device), plans, sampler=known)
    for field in dataclasses.fields(Passes)[:-1]:
        np.testing.assert_allclose(getattr(passes, field.name), getattr(parts.passes, field.name), atol=1e-5)


def test_a_response_that_is_not_to_be_learnt_from_is_paid_nothing(parts):
    drop = lambda mask: mask & (np.arange(B) != 2)[:, None]
    unpaid = change(parts.rollout, mask=drop, rewards=lambda x: np.where(np.arange(B)[:, None] == 2, 0, x))
    parts.check(rollout=unpaid)
    with pytest.raises(UserError, match="the score of sample 2 is not paid at its last token"):
        parts.check(rollout=change(parts.rollout, mask=drop))


def test_a_score_one_slot_late(parts):
    late = change(
        parts.rollout, rewards=lambda x: parts.rollout.penalties + np.roll(x - parts.rollout.penalties, 1, axis=1)
    )
    with pytest.raises(UserError, match="self-check: the score of sample 0 is not paid at its last token"):
        parts.check(rollout=late)


def test_a_score_cut_to_a_whole_number(parts):
    whole = lambda x: parts.rollout.penalties + np.trunc(x - parts.rollout.penalties)
    with pytest.raises(UserError, match="the score of sample 1 is not paid at its last token, or not in full"):
        parts.check(rollout=change(parts.rollout, rewards=whole))


def test_an_empty_response(parts):
    nothing = change(parts.batch, mask=put_at(4, slice(None), False))
    with pytest.raises(UserError, match="the response to sample 4 is empty; every response must hold a token"):
        parts.check(batch=nothing)


def test_an_end_token_that_was_never_sampled(parts):
    row = int(np.flatnonzero(parts.batch.ended)[0])
    last = parts.batch.lengths[row] - 1
    with pytest.raises(
        UserError, match=f"sample {row} ended, but its last token is 7, expected one of the end tokens \\[0, 8"
    ):
        parts.check(batch=change(parts.batch, tokens=put_at(row, last, 7)))


def test_a_response_that_goes_on_behind_its_end(parts):
    row = int(parts.batch.response_lengths.argmax())
    inside = parts.batch.prompt_lengths[row]
    with pytest.raises(UserError, match=f"the response to sample {row} goes on behind an end token"):
        parts.check(batch=change(parts.batch, tokens=put_at(row, inside, 8)))


def test_a_sampler_with_another_temperature(parts_of):
    message = r"sampler's and the trainer's log-probs differ by .*\(temperature, positions or weights\)"
    with pytest.raises(UserError, match=message):
        parts_of(1.0, 0).check()


def test_log_probs_that_depend_on_packing(parts):
    shaky = change(parts.again, old_logprobs=lambda x: x + 0.01 * parts.batch.mask)
    with pytest.raises(
        UserError, match=r"of the rollout and of the first minibatch differ by 0.01 .*ratio would not start at 1"
    ):
        parts.check(again=shaky)


def test_a_reference_that_is_not_the_policys_start(parts_of):
    parts = parts_of(PPO.temperature, 2)
    parts.check(same_start=False)
    with pytest.raises(UserError, match=r"policy and reference differ by .*so the KL must start at 0"):
        parts.check()


def test_numbers_that_are_not_finite(parts):
    at = np.argwhere(parts.batch.mask)[0]
    broken = change(parts.passes, old_logprobs=put_at(*at, np.nan))
    with pytest.raises(UserError, match="sampler's and the trainer's log-probs differ by nan"):
        parts.check(passes=broken)


def test_numbers_that_are_not_finite_in_a_response_that_is_not_learnt_from(parts):
    at = np.argwhere(parts.batch.mask)[0]
    broken = change(parts.passes, old_logprobs=put_at(*at, np.nan))
    drop = lambda x: x * (np.arange(B) != at[0])[:, None]
    parts.check(passes=broken, rollout=change(parts.rollout, mask=drop, rewards=drop, penalties=drop))


def test_rows_hold_prompt_and_response_side_by_side(parts):
    batch = parts.batch
    for row in range(B):
        start, stop = batch.prompt_lengths[row], batch.lengths[row]
        np.testing.assert_array_equal(np.flatnonzero(batch.mask[row]), np.arange(start - 1, stop - 1))
        np.testing.assert_array_equal(batch.response(row), batch.tokens[row, start:stop])
        assert not batch.tokens[row, stop:].any() and not batch.sampler_logprobs[row][~batch.mask[row]].any()
    chosen = lengths_of(batch.lengths, np.array([5, 1]))
    assert chosen.tolist() == [n if row in (1, 5) else 0 for row, n in enumerate(batch.lengths)]


def test_every_epoch_visits_every_sample_in_an_order_of_its_own():
    draw = functools.partial(minibatches, 12, 4, 3)
    batches = list(draw((7, 0)))
    assert [len(batch) for batch in batches] == [4] * 9
    epochs = [np.concatenate(batches[start : start + 3]).tolist() for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert [batch.tolist() for batch in draw((7, 0))] == [batch.tolist() for batch in batches]
    assert np.concatenate(list(draw((7, 1)))).tolist() != np.concatenate(epochs).tolist()
