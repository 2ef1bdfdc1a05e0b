"""How often one set of answers beats another, by category of prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from easyrl.core.errors import UserError
from easyrl.core.text import columns

ALL, MEAN = "all", "mean_of_categories"


class WinRate(NamedTuple):
    """Over the prompts of one category. A comparison gives 1 point for a win, 0.5 for a tie and 0 for a loss.

    `win_rate` is the mean of the points. A mean over categories counts each category once, however many prompts it has.
    """

    category: str
    prompts: int
    wins: int
    ties: int
    losses: int
    win_rate: float


def win_rates(points: np.ndarray, categories: Sequence[str], excluded: Sequence[str] = ()) -> list[WinRate]:
    """Over all prompts, each category by name, and the means of the categories with and without the `excluded` ones.

    Args:
      points: float [n], in [0, 1]; two verdicts on one prompt may give 0.25 or 0.75, a win above 0.5 and a loss below.
      categories: n names; prompts of the name "" belong to none.

    Raises UserError naming --exclude_category for a name that no prompt has, or when none is left.
    """
    of = np.asarray(categories)
    names = sorted(set(categories) - {""})
    if unknown := [name for name in excluded if name not in names]:
        raise UserError(f"--exclude_category={unknown[0]}: no such category, found {', '.join(names) or 'none'}")

    def over(name: str, chosen: np.ndarray) -> WinRate:
        part = points[chosen]
        wins, losses = int(np.sum(part > 0.5)), int(np.sum(part < 0.5))
        return WinRate(name, len(part), wins, len(part) - wins - losses, losses, float(part.mean()))

    found = [over(ALL, np.ones(len(points), bool)), *(over(name, of == name) for name in names)]
    each = found[1:]
    if len(each) > 1:
        found.append(_mean(MEAN, each))
    if excluded:
        left = [row for row in each if row.category not in excluded]
        if not left:
            raise UserError(f"--exclude_category={','.join(excluded)}: no category is left")
        found.append(_mean(f"{MEAN}_without_{'_'.join(excluded)}", left))
    return found


def _mean(title: str, rows: Sequence[WinRate]) -> WinRate:
    """The sums of the counts, and the mean of the win rates."""
    prompts, wins, ties, losses = (sum(counts) for counts in zip(*(row[1:5] for row in rows), strict=True))
    return WinRate(title, prompts, wins, ties, losses, float(np.mean([row.win_rate for row in rows])))


def win_rate_table(rows: Sequence[WinRate]) -> str:
    """The win rates for people to read."""
    cells = [[row.category, *(f"{count:,}" for count in row[1:5]), f"{row.win_rate:.1%}"] for row in rows]
    return columns(["category", "prompts", "wins", "ties", "losses", "win rate"], cells)
