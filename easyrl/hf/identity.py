"""Whether a model is the one it was: a digest of its files that costs next to nothing.

A run that goes on compares the models that it holds frozen with those it began with, at every start and before a weight
is read. A digest of the arrays (`core.fingerprint`) would be exact, but has to wait for them, takes seconds to compile
and, on a CPU, as long again as loading them. So of every file its size and evenly spread pieces count: training changes
every layer, and so some piece of it. The same weights in other files count as another model.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from easyrl.core.checkpoints import FACTS, STATE, is_remote
from easyrl.core.distributed import from_first
from easyrl.core.errors import UserError
from easyrl.hf.refs import FoundModel

PIECE, PIECES = 1 << 16, 64  # bytes, and how many of a file: of one up to 4 MiB all


def digest_models(models: Iterable[FoundModel]) -> dict[str, str]:
    """A digest of the weights of the models that each flag names, by the flag's name without dashes.

    Process 0 reads for all. Raises UserError naming the flag when a file cannot be read.
    """
    digests: dict[str, str] = {}
    for found in models:
        name = found.flag.removeprefix("--")
        digests[name] = digests.get(name, "") + from_first(partial(_digest, found))
    return digests


def _digest(found: FoundModel) -> str:
    digest = hashlib.sha256()
    try:
        if found.saved is not None:
            step = found.saved.folder / str(found.saved.step)
            digest.update((step / FACTS).read_bytes())  # a store's arrays are not asked for besides
            files = [] if is_remote(step) else [path for path in Path(step / STATE).rglob("*") if path.is_file()]
        elif found.easylm is not None:
            files = [found.easylm.path]
        else:  # a random model has no files: its flags say all
            files = [] if found.directory is None else [*found.directory.glob("*.safetensors")]
        for path in sorted(files):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(PIECE, size // PIECES)):
                    file.seek(start)
                    digest.update(file.read(PIECE))
    except OSError as error:
        raise UserError(f"{found.flag}: {error.filename or ''}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:32]
