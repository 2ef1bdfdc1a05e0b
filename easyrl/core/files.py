"""Files that are either whole or absent."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from easyrl.core.errors import UserError


@contextlib.contextmanager
def write_atomic(path: str | Path) -> Iterator[Path]:
    """A path to write a file to, renamed to `path` once the block ends and the bytes are on the disk.

    A reader, also after a kill or a power cut, finds the earlier file or the whole new one. When the block raises,
    `path` is as it was and the part written so far is removed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.tmp")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def cache_folder(named: str = "", flag: str = "") -> Path:
    """The folder for caches: `named`, which `flag` gives, else $EASYRL_CACHE, else ~/.cache/easyrl.

    Raises UserError naming them where a home is needed and there is none, as in some containers.
    """
    try:
        return Path(named or os.environ.get("EASYRL_CACHE") or "~/.cache/easyrl").expanduser()
    except RuntimeError:
        names = f"--{flag} or EASYRL_CACHE" if flag else "EASYRL_CACHE"
        raise UserError(f"{names}: expected a folder for the cache, since there is no home folder here") from None


def check_writable(path: str, flag: str) -> None:
    """Raises UserError naming `flag`, before hours of work, when a file could not be written to `path`."""
    file = Path(path).expanduser()
    check_folder(file.parent, f"{flag}={path}")
    if file.is_dir():
        raise UserError(f"{flag}={path}: cannot be written, expected a file, found a folder")


def check_folder(folder: Path, named: str) -> None:
    """Makes a folder if need be. Raises UserError that begins with `named` when nothing could be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone say nothing to root, nor of /proc
            pass
    except OSError as error:
        raise UserError(f"{named}: cannot be written ({error.strerror})") from None


def set_aside(path: Path) -> Path:
    """Renames a file to the first free `NAME.1.SUFFIX`, `NAME.2.SUFFIX`, ..., to make room for another; returns that.

    A folder has no suffix: the 8b of llama-3.1-8b is none.
    """
    number = 1
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    while (free := path.with_name(f"{stem}.{number}{suffix}")).exists():
        number += 1
    return path.rename(free)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
