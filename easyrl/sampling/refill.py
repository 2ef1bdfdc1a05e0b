"""Slot refill: more responses than are decoded at once, each row taking the next when its own has ended.

All prompts are prefilled first, side by side, and their keys and values kept, once for all samples of a prompt. Rows of
decoding have a cache that is a ring: every row writes the slot that all write, around and around, and a prompt is put
into the slots just before it. So rows begin at different times in one program, whose cache has a few rows' size.

Axes: S shards (devices that share the batch; nothing moves between them), B responses, R rows of decoding, G rows that
are refilled at once.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from easyrl.models.cache import Cache, grow_cache, roll_cache
from easyrl.sampling.loops import put_rows, take_rows, unfinished_first
from easyrl.sampling.prefill import Prompts

Array = jax.Array

REFILLS = "refills"  # the scope of the loop in which rows take other responses


def refilled_at_once(rows: int) -> int:
    """Of so many rows of a device how many are refilled at once: few moves of the cache, few rows that stand still."""
    return max(1, rows // 8)


class Queue(flax.struct.PyTreeNode):
    """Which responses are decoded, by their places in each device's part of the batch."""

    order_SB: Array  # all, those that are to be decoded first
    count_S: Array  # how many those are
    taken_S: Array  # how many of them have had a row
    held_SR: Array  # the response that each row has

    @classmethod
    def start(cls, over_B: Array, shards: int, rows: int) -> "Queue":
        """The first responses that go on in the rows, the others waiting."""
        order_SB, R = unfinished_first(over_B, shards, len(over_B)), rows // shards
        count_S = jnp.sum(~over_B.reshape(shards, -1), axis=1)
        return cls(order_SB, count_S, jnp.minimum(count_S, R), order_SB[:, :R])

    @property
    def at_once(self) -> int:
        """G: how many rows of a device are refilled at once."""
        return refilled_at_once(self.held_SR.shape[1])

    @property
    def waits_S(self) -> Array:
        """Whether any response of a device waits."""
        return self.taken_S < self.count_S

    def can_refill(self, over_R: Array) -> Array:
        """bool scalar: whether some device has enough rows that are over, and a response that waits."""
        free_S = jnp.sum(over_R.reshape(len(self.held_SR), -1), axis=1)
        return jnp.any(self.waits_S & (free_S >= self.at_once))


def fill_rows(queue: Queue, every: Any, prompts: Prompts, size: int) -> tuple[Any, Cache]:
    """(rows with the first responses, their cache: a ring of `size` slots that holds their prompts)."""
    return take_rows(every, queue.held_SR), _prompts_of(queue.held_SR, every, prompts, size)


def refill(queue: Queue, every: Any, prompts: Prompts, rows: Any, cache: Cache) -> tuple[Queue, Any, Any, Cache]:
    """(queue, every, rows, cache) once rows that are over, G of each device at most, have the next responses.

    `every` has what there is of all B responses, `rows` of those in the rows, both with an `over_B` of their own; what
    a row leaves goes back to `every`. `prompts` has the B / n prompts of n samples each.
    """
    shards, R = queue.held_SR.shape
    B = queue.order_SB.shape[1]
    free_SG = unfinished_first(~rows.over_B, shards, shards * queue.at_once)
    at = lambda x_SN, places_SG: jnp.take_along_axis(x_SN, places_SG, axis=1)
    turn_SG = queue.taken_S[:, None] + jnp.arange(queue.at_once)
    refills_SG = at(rows.over_B.reshape(shards, R), free_SG) & (turn_SG < queue.count_S[:, None])
    next_SG = at(queue.order_SB, jnp.minimum(turn_SG, B - 1))
    into_SG = jnp.where(refills_SG, free_SG, R)  # no place: left out

    every = put_rows(every, take_rows(rows, free_SG), jnp.where(refills_SG, at(queue.held_SR, free_SG), B))
    rows = put_rows(rows, take_rows(every, next_SG), into_SG)
    cache = put_rows(cache, _prompts_of(next_SG, every, prompts, cache.size, cache.index), into_SG)
    held_SR = put_rows(queue.held_SR.reshape(-1), next_SG.reshape(-1), into_SG).reshape(shards, R)
    taken_S = queue.taken_S + jnp.sum(refills_SG, axis=1)
    return queue.replace(taken_S=taken_S, held_SR=held_SR), every, rows, cache


def put_back(queue: Queue, every: Any, rows: Any) -> Any:
    """`every` with what there is of the responses in the rows."""
    return put_rows(every, rows, queue.held_SR)


def _prompts_of(places_SN: Array, every: Any, prompts: Prompts, size: int, index: Array | None = None) -> Cache:
    """A ring of `size` slots for these responses, their prompts in front of slot `index`, if not from slot 0 on."""
    each = len(every.over_B) // len(prompts.lengths_B)
    cache = grow_cache(take_rows(prompts, places_SN // each).cache(), size)
    return cache if index is None else roll_cache(cache, index)
