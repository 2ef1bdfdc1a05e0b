"""Segment ids: which tokens of a packed row belong together.

0 is padding, 1, 2, ... are sequences. Sequences that begin alike may lie in a row with that beginning once, the stem:
it has an id like any sequence, and each goes on in a branch, whose tokens see the stem besides their own.
"""

from typing import TypeVar

BRANCH = 1 << 16  # the ids of a stem's branches are its own, plus one, two, ... times this

Ids = TypeVar("Ids")  # an integer, or an array of them


def branch(stem: int, number: int) -> int:
    """The id of a stem's branch with this number, from 1."""
    return stem + number * BRANCH


def stem_of(ids: Ids) -> Ids:
    """The id of the stem of each token's segment; that of a sequence on its own is its own."""
    return ids % BRANCH  # type: ignore[operator, return-value]
