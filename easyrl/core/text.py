"""Text for people to read."""

from collections.abc import Sequence


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, the first to the left and the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    pads = [str.ljust, *[str.rjust] * (len(head) - 1)]
    lines = [[pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)
