"""Text for people to read, and names that may be used."""

import re
from collections.abc import Sequence


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, the first to the left and the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    pads = [str.ljust, *[str.rjust] * (len(head) - 1)]
    lines = [[pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)] for row in (head, *rows)]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hub id, `name` or `owner/name`; no path that leads out of a folder has."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None and ".." not in text


def is_file_name(text: str) -> bool:
    """Whether a text names a file of the folder that it stands for, and none elsewhere."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0")
