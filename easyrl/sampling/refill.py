"""Slot refill: more responses than are decoded at once, each row taking the next when its own has ended.

All prompts are prefilled first, side by side, and their keys and values kept, once for all samples of a prompt. Rows of
decoding have a cache that is a ring: every row writes the slot that all write, around and around, and a prompt is put
into the slots just before it. So rows begin at different times in one program, whose cache has a few rows' size.

Axes: S shards (devices that share the batch; nothing moves between them), B responses and R rows of decoding of a
device, G rows that are refilled at once.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from easyrl.models.cache import Cache, grow_cache, roll_cache
from easyrl.sampling.loops import take_rows, unfinished_first
from easyrl.sampling.prefill import Prompts

Array = jax.Array

REFILLS = "refills"  # the scope of the loop in which rows take other responses


def num_refilled(rows: int) -> int:
    """G: how many of a device's rows are refilled at once, so that few stand still and the cache is moved seldom."""
    return max(1, rows // 8)


class Refill(NamedTuple):
    """Rows that take other responses: places in a device's part of rows and responses, [S, G].

    A place behind the last one stands for a row that is not refilled, and is left out by `put_rows`.
    """

    rows_SG: Array  # rows, refilled or not
    left_SG: Array  # the responses that they had
    next_SG: Array  # those that they get
    refilled_SG: Array  # rows again


class Queue(flax.struct.PyTreeNode):
    """Which responses are decoded, by their places in each device's part of the batch."""

    order_SB: Array  # all; those that only fill the batch come last
    count_S: Array  # how many do not
    taken_S: Array  # how many of these have had a row
    held_SR: Array  # the response that each row has

    @classmethod
    def start(cls, filler_B: Array, shards: int, rows: int) -> "Queue":
        """The first responses in the rows, the others waiting."""
        order_SB, R = unfinished_first(filler_B, shards, len(filler_B)), rows // shards
        count_S = jnp.sum(~filler_B.reshape(shards, -1), axis=1)
        return cls(order_SB, count_S, jnp.minimum(count_S, R), order_SB[:, :R])

    @property
    def waits_S(self) -> Array:
        """Whether any response of a device waits."""
        return self.taken_S < self.count_S

    def can_refill(self, over_R: Array) -> Array:
        """bool scalar: whether devices with responses that wait have G free rows on average.

        If each had to, all would stand still for the slowest; if one were enough, many would refill all the time.
        """
        shards, R = self.held_SR.shape
        free_S = jnp.sum(over_R.reshape(shards, R), axis=1)
        waiting = jnp.sum(self.waits_S)
        return (waiting > 0) & (jnp.sum(jnp.where(self.waits_S, free_S, 0)) >= num_refilled(R) * waiting)

    def refill(self, over_R: Array) -> tuple["Queue", Refill]:
        """The queue once rows that are over, G of each device at most, have the next responses; and which those are."""
        (shards, R), B = self.held_SR.shape, self.order_SB.shape[1]
        G = num_refilled(R)
        at = lambda x_SN, places_SG: jnp.take_along_axis(x_SN, places_SG, axis=1)
        rows_SG = unfinished_first(~over_R, shards, shards * G)
        turn_SG = self.taken_S[:, None] + jnp.arange(G)
        refills_SG = at(over_R.reshape(shards, R), rows_SG) & (turn_SG < self.count_S[:, None])
        next_SG = at(self.order_SB, jnp.minimum(turn_SG, B - 1))
        left_SG = jnp.where(refills_SG, at(self.held_SR, rows_SG), B)
        refilled_SG = jnp.where(refills_SG, rows_SG, R)
        put = jax.vmap(lambda held, places, new: held.at[places].set(new, mode="drop"))
        queue = self.replace(
            taken_S=self.taken_S + jnp.sum(refills_SG, axis=1), held_SR=put(self.held_SR, refilled_SG, next_SG)
        )
        return queue, Refill(rows_SG, left_SG, next_SG, refilled_SG)


def ring_of(prompts: Prompts, places_SN: Array, size: int, index: Array | None = None) -> Cache:
    """A ring of `size` slots with these prompts, in front of slot `index`, or from slot 0 on."""
    cache = grow_cache(take_rows(prompts, places_SN).cache(), size)
    return cache if index is None else roll_cache(cache, index)
