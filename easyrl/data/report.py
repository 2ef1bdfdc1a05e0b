"""What became of the rows of a dataset: read, skipped, cut, dropped, kept, and how many tokens they hold."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from easyrl.data.messages import BadRow

COUNTERS = ("skipped", "left_out")


@dataclass
class DataReport:
    """Counts over one dataset. A row is a row of the file; a sample is what a trainer sees (a pair is one sample)."""

    name: str = ""
    rows: int = 0  # read
    skipped: Counter[str] = field(default_factory=Counter)  # bad rows by reason, under skip_bad_rows
    first_skipped: str = ""  # the complaint about the first of them
    left_out: Counter[str] = field(default_factory=Counter)  # samples by reason (see data.sequences)
    samples: int = 0  # kept
    prompts_cut: int = 0  # samples whose prompt lost its start
    answers_cut: int = 0  # samples of which an answer lost its end
    rewritten: int = 0  # earlier answers not trained on, because the template changes them (see Template)
    tokens: int = 0
    answer_tokens: int = 0
    longest: int = 0  # tokens of the longest sequence

    def skip(self, error: BadRow) -> None:
        """Counts a row that cannot be used."""
        self.skipped[error.reason] += 1
        self.first_skipped = self.first_skipped or str(error)

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON takes them."""
        return asdict(self) | {name: dict(getattr(self, name)) for name in COUNTERS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        """The inverse of `to_dict`."""
        return cls(**(values | {name: Counter(values[name]) for name in COUNTERS}))

    def lines(self) -> list[tuple[str, str]]:
        """(what, how many) for every count worth telling."""
        answers = f"{self.answer_tokens:,} in answers, " if self.answer_tokens else ""
        mean = self.tokens / max(self.samples, 1)
        lines = [("rows read", f"{self.rows:,}")]
        lines += [(f"  skipped: {reason}", f"{count:,}") for reason, count in sorted(self.skipped.items())]
        if self.first_skipped:
            lines.append(("  first skipped", self.first_skipped))
        lines += [(f"dropped: {reason}", f"{count:,}") for reason, count in sorted(self.left_out.items())]
        lines.append(("samples", f"{self.samples:,}"))
        counts = (
            ("  prompt cut from the left", self.prompts_cut),
            ("  answer cut from the right", self.answers_cut),
            ("earlier answers not trained on", self.rewritten),
        )
        lines += [(what, f"{count:,} ({count / max(self.samples, 1):.1%})") for what, count in counts]
        if not self.rewritten:
            lines.pop()
        lines.append(("tokens", f"{self.tokens:,} ({answers}{mean:,.0f} a sample, longest sequence {self.longest:,})"))
        return lines


def table(title: str, lines: list[tuple[str, str]]) -> str:
    """Two aligned columns under a title."""
    width = max((len(what) for what, _ in lines), default=0)
    return "\n".join([title, *(f"  {what:<{width}}  {value}" for what, value in lines)])
