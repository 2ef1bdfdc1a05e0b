"""Masked sums, and means that stay (total, count) pairs until the very end.

A mean over tokens must not depend on how the tokens are split over micro-batches, packed rows, devices or processes. So
nothing here divides until every part has been added up: a `Mean` carries its numerator and its denominator.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Mean(NamedTuple):
    """A mean as its numerator and denominator, both float32 scalars."""

    total: Array
    count: Array  # type: ignore[assignment]  # NamedTuple: shadows tuple.count, on purpose

    @property
    def value(self) -> Array:
        """total / count, and 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.maximum(self.count, 1e-30), 0.0)


def add_means(a: Mean, b: Mean) -> Mean:
    """The mean over the union of two disjoint sets."""
    return Mean(a.total + b.total, a.count + b.count)


def masked_sum(x: Array, mask: Array) -> Array:
    """Sum of `x` where the boolean `mask` is True. `where`, not a product: a NaN outside the mask must not leak in."""
    return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0))


def mean_of(x: Array, mask: Array) -> Mean:
    """The mean of `x` over the True entries of `mask` (same shape), as a pair."""
    return Mean(masked_sum(x, mask), jnp.sum(mask, dtype=jnp.float32))


def all_finite(mask: Array, *arrays: Array) -> Array:
    """bool scalar: whether no array holds a NaN or an infinity where the boolean `mask`, of the same shape, is True."""
    return jnp.stack([jnp.all(jnp.isfinite(x) | ~mask) for x in arrays]).all()


def constant_mean(x: Array | float) -> Mean:
    """A quantity that is already global (a coefficient, a norm), as a mean of one entry."""
    return Mean(jnp.asarray(x, jnp.float32), jnp.ones((), jnp.float32))


@jax.jit
def add_metrics(a: dict[str, Mean], b: dict[str, Mean]) -> dict[str, Mean]:
    """Two dicts of means with the same names, over the union of what they were taken over."""
    return {name: add_means(a[name], b[name]) for name in a}


def nan_where_empty(metrics: dict[str, Mean], names: Collection[str]) -> dict[str, Mean]:
    """The metrics when all parts have been added up, with NaN for those of the `names` that nothing was counted for.

    These are means over some of the samples, of which a batch may have none; 0 would pass for what they are there.
    """

    def known(mean: Mean) -> Mean:
        empty = mean.count == 0
        return Mean(jnp.where(empty, jnp.nan, mean.total), jnp.where(empty, 1.0, mean.count))

    return {name: known(mean) if name in names else mean for name, mean in metrics.items()}
