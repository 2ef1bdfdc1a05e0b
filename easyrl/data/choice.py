"""Which data flags choose: the datasets of a mixture with their weights, and a part of the rows of each."""

import os
import re
from typing import NamedTuple

from easyrl.core.errors import UserError

SPLIT = re.compile(r"(?P<name>[\w.\-]*)(\[(?P<start>\d{0,18}):(?P<stop>\d{0,18})\])?")


class Split(NamedTuple):
    """A part of a dataset: the rows [start, stop) of the split `name` (empty: the only one there is)."""

    name: str
    start: int = 0
    stop: int | None = None


WHOLE = Split("")


def parse_split(text: str) -> Split:
    """Reads `train`, `train[:2048]` or `[2048:]`, the slice being of rows counted from 0."""
    match = SPLIT.fullmatch(text.strip())
    if match is None:
        expected = "a name, a slice of rows, or both, as in train, [2048:] or train[:2048]"
        raise UserError(f"split={text}: expected {expected}")
    start, stop = match["start"], match["stop"]
    return Split(match["name"], int(start or 0), int(stop) if stop else None)


def parse_mixture(text: str) -> list[tuple[str, float | None]]:
    """Reads `a.jsonl:0.7,b.jsonl:0.3` into paths and weights that sum to 1, or None for each if no weight is given."""
    items = [text] if os.path.exists(text) else [item.strip() for item in text.split(",")]
    paths, weights = [], []
    for item in items:
        head, colon, tail = item.rpartition(":")
        weighted = bool(colon and re.fullmatch(r"[\d.]+(e-?\d+)?", tail)) and not os.path.exists(item)
        paths.append(head if weighted else item)
        weights.append(_weight(item, tail) if weighted else None)
    if not all(paths):
        raise UserError(f"{text!r}: found an empty path, expected FILE,FILE or FILE:WEIGHT,FILE:WEIGHT")
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [(path, None) for path in paths]
    if len(given) < len(paths):
        raise UserError(f"{text!r}: found weights for {len(given)} of {len(paths)} datasets, expected all or none")
    return [(path, weight / sum(given)) for path, weight in zip(paths, given, strict=True)]


def _weight(item: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if weight <= 0:
        raise UserError(f"{item!r}: found weight {text}, expected a number above 0")
    return weight
