"""The loops of decoding: more slots in the cache as responses grow, fewer rows as they end.

A compiled loop has one shape. One for all steps would attend to slots that are not filled yet, and compute rows whose
responses have long ended, until the longest has. So decoding runs through a few, each compiled once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

Array = jax.Array

# The cache starts with room for the prompt and grows this many times at most, so that attention reads little more than
# what is filled. Every size compiles the step once more, so short completions get fewer.
MAX_CACHE_SIZES = 3
MIN_GROWTH = 64
SLOT_MULTIPLE = 64  # of all sizes but the last: a TPU handles other numbers of slots with copies

# When no more than a quarter of the rows go on, no more than a quarter is decoded.
NARROWING = 4

DECODE = "decode_"  # what the scopes of the loops begin with


@dataclasses.dataclass(frozen=True)
class Loop:
    """Decoding of `rows` rows with a cache of `size` slots, until that is full or no device has more than `until` rows
    that go on.
    """

    rows: int
    size: int
    until: int

    @property
    def name(self) -> str:
        """The scope of the loop, by which programs can be told how often it runs."""
        return f"{DECODE}{self.rows}_rows_to_{self.size}"


def cache_sizes(prompt_size: int, max_new_tokens: int) -> list[int]:
    """The sizes through which the cache grows: the prompt's with a quarter, half, and all of the completion.

    Most of the steps are early ones where responses may end, so these read least.
    """
    whole = prompt_size + max_new_tokens
    halved = [max_new_tokens / 2**times for times in range(1, MAX_CACHE_SIZES)]
    less = (prompt_size + share for share in halved if share >= MIN_GROWTH)
    return sorted({whole, *(min(whole, math.ceil(size / SLOT_MULTIPLE) * SLOT_MULTIPLE) for size in less)})


def decode_loops(
    rows: int, shards: int, prompt_size: int, max_new_tokens: int, *, may_end: bool, at_once: int = 0
) -> list[Loop]:
    """The loops for `rows` rows, split over `shards` devices, in the order in which they run.

    Rows become fewer on every device by itself, so nothing moves between them. Where no response can end early, or all
    are short, they stay as many. If rows are more than `at_once`, and that is not 0, the first loop has that many, and
    all slots from the start: `sampling.refill` lets the others wait.
    """
    sizes = cache_sizes(prompt_size, max_new_tokens)
    if 0 < at_once < rows:
        rows, sizes = at_once, sizes[-1:]
    fewer = -(-rows // shards // NARROWING)
    if not may_end or max_new_tokens < MIN_GROWTH or fewer == rows // shards:
        return [Loop(rows, size, until=0) for size in sizes]
    return [*(Loop(rows, size, until=fewer) for size in sizes), Loop(shards * fewer, sizes[-1], until=0)]


def most_unfinished(over_B: Array, shards: int) -> Array:
    """How many rows go on, on the device where most do; int32 scalar."""
    return jnp.max(jnp.sum(~over_B.reshape(shards, -1), axis=1))


def unfinished_first(over_B: Array, shards: int, rows: int) -> Array:
    """Places [shards, rows / shards] of rows within their device's, those that go on before the others."""
    return jnp.argsort(over_B.reshape(shards, -1), axis=1, stable=True)[:, : rows // shards]


def take_rows(tree, places_SN: Array):
    """The rows of all arrays in `tree` at these places of each device's; scalars stay."""

    def take(x: Array) -> Array:
        if x.ndim == 0:
            return x
        shards, n = places_SN.shape
        taken = jax.vmap(lambda part, places: part[places])(x.reshape(shards, -1, *x.shape[1:]), places_SN)
        return taken.reshape(shards * n, *x.shape[1:])

    return jax.tree.map(take, tree)


def put_rows(tree, some, places_SN: Array):
    """`tree` with the rows of `some` put back where `take_rows` took them from; scalars are those of `some`.

    A row whose place is behind a device's last is left out.
    """

    def put(x: Array, new: Array) -> Array:
        if x.ndim == 0:
            return new
        parts, rows = (a.reshape(len(places_SN), -1, *a.shape[1:]) for a in (x, new))
        return jax.vmap(lambda part, rows, places: part.at[places].set(rows, mode="drop"))(
            parts, rows, places_SN
        ).reshape(x.shape)

    return jax.tree.map(put, tree, some)


def overwrite_rows(tree, some, places_SN: Array):
    """The same as `put_rows`, by reading and writing all of `tree` as it lies in memory.

    For arrays so large that nothing may turn them around, as TPUs do for a scatter, which has an order of its own.
    """

    def overwrite(x: Array, new: Array) -> Array:
        if x.ndim == 0:
            return new
        parts, rows = (a.reshape(len(places_SN), -1, *a.shape[1:]) for a in (x, new))
        comes_SRN = jnp.arange(parts.shape[1])[:, None] == places_SN[:, None]
        spread = jax.vmap(lambda row, places: row[places])(rows, jnp.argmax(comes_SRN, axis=2))
        comes_SR = jnp.any(comes_SRN, axis=2).reshape(*parts.shape[:2], *[1] * (x.ndim - 1))
        return jnp.where(comes_SR, spread, parts).reshape(x.shape)

    return jax.tree.map(overwrite, tree, some)
