"""Compares what both sides wrote: the table of docs/parity.md. `python -m tests.parity.compare DIR [--record]`

Exits with 1 when a metric of any case is further off than `TOLERANCE` at any step. `--record` puts the table into the
page.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tests.parity.cases import CASES, METRICS, STEPS, TOLERANCE, Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
RESULTS = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)


class Worst(NamedTuple):
    """The largest relative difference of a curve, at which step, and of which metric."""

    error: float
    step: int
    metric: str


def relative(ours: float, theirs: float) -> float:
    """|ours - theirs| / |theirs|; 0 when both are 0, infinite when only theirs is or either is no number."""
    if ours == theirs:
        return 0.0
    error = abs(ours - theirs) / abs(theirs) if theirs else math.inf
    return error if math.isfinite(error) else math.inf


def worst(metrics: tuple[str, ...], ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> Worst:
    """The worst of some curves. Raises ValueError for a curve that has not a value for each step."""
    errors = []
    for metric in metrics:
        if not len(ours[metric]) == len(theirs[metric]) == STEPS:
            raise ValueError(f"{metric}: {len(ours[metric])} and {len(theirs[metric])} values, expected {STEPS}")
        pairs = zip(ours[metric], theirs[metric], strict=True)
        errors += [Worst(relative(*pair), step, metric) for step, pair in enumerate(pairs, start=1)]
    return max(errors)


def settings(values: dict) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in values.items())


def row(case: Case, ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> tuple[bool, str]:
    """(whether the case passes, its line of the table)."""
    others = METRICS[case.trainer][1:]
    loss, rest = worst(("loss",), ours, theirs), worst(others, ours, theirs)
    passed = max(loss.error, rest.error) <= TOLERANCE
    cells = (
        case.name,
        f"{case.trainer}Trainer" + (f": {settings(case.theirs)}" if case.theirs else ""),
        f"{theirs['loss'][0]:.4f}, {theirs['loss'][-1]:.4f}",
        f"{loss.error:.1e}",
        f"{rest.error:.1e} (`{rest.metric}`, step {rest.step})" if rest.error else "0",
        "yes" if passed else "**no**",
    )
    return passed, f"| {' | '.join(cells)} |"


def main(folder: Path, record: bool) -> int:
    ours, theirs = (json.loads((folder / f"{side}.json").read_text(encoding="utf-8")) for side in ("easyrl", "trl"))
    rows = [row(case, ours["curves"][case.name], theirs["curves"][case.name]) for case in CASES]
    versions = ", ".join(f"{name} {version}" for name, version in (ours["versions"] | theirs["versions"]).items())
    table = "\n".join((
        f"With {versions}: {sum(passed for passed, _ in rows)} of {len(rows)} cases agree.",
        "",
        "| case | TRL | loss at step 1, 30 | worst difference: of the loss | of the other metrics | within 1e-4 |",
        "| --- | --- | --- | --- | --- | --- |",
        *(line for _, line in rows),
        "",
        *(f"- {case.name}: {case.note}." for case in CASES if case.note),
        "",
    ))  # fmt: skip
    print(table)
    if record:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(RESULTS.sub(lambda found: found[1] + table + found[2], page), encoding="utf-8")
    return int(not all(passed for passed, _ in rows))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--record" in sys.argv[2:]))
