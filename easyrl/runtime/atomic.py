"""Folders that are either whole or absent; `easyrl.core.files` does the same for one file.

For one writer at a time: with several processes, process 0 writes and the others do not call.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from easyrl.core.files import sync


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to `path` once the block ends and its files are on the disk.

    An earlier folder at `path` is replaced. No file system swaps two folders in one portable operation, so it is first
    renamed to `.NAME.old` and removed after the swap: a kill between the two renames leaves `path` absent, never half
    written. When the block raises, `path` is as it was.
    """
    path = Path(path)
    part, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(part, ignore_errors=True)  # left by a writer that was killed
    part.mkdir(parents=True)
    try:
        yield part
        for item in [*part.rglob("*"), part]:
            sync(item)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        part.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
