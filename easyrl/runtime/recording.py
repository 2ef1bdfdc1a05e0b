"""Recorded batches: the arrays that a step's updates were made from, in a safetensors file, with what was known of it.

`python -m easyrl.replay FILE` makes the updates again. The arrays are named as the fields of the tree that they come
from (`plan/0/source_GRS`); everything else (step, flags, metrics) is JSON in the file's metadata. Reading one
runs no code.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from easyrl.core.distributed import is_first
from easyrl.core.errors import UserError
from easyrl.core.files import write_atomic
from easyrl.core.params import path_str
from easyrl.core.sharding import fetch

T = TypeVar("T")
KEY = "easyrl"  # of the metadata


def save_recording(path: Path, batch: Any, facts: Mapping[str, Any]) -> Path:
    """Writes a tree of arrays, which every process holds whole, and `facts` on process 0; all processes call this.

    The class of the tree is kept as the fact `kind`. A number among the facts that is not finite becomes null; an
    infinite flag is kept as text.
    """
    leaves = jax.tree_util.tree_leaves_with_path(fetch(batch))
    arrays = {path_str(name): np.array(leaf, order="C") for name, leaf in leaves}  # numbers stay numbers
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"kind": type(batch).__name__, "jax": jax.__version__, "device": jax.devices()[0].device_kind, **facts}
        with write_atomic(path) as part:
            plain = _plain(about) | {"config": _plain(facts["config"], str)}
            save_file(arrays, part, metadata={KEY: json.dumps(plain, allow_nan=False)})
    return path


def load_recording(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by name, facts). Raises UserError for a file that is not a recording."""
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get(KEY, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a recorded batch ({error})") from None
    if not isinstance(facts, dict) or not {"kind", "step", "config", "metrics"} <= facts.keys():
        raise UserError(f"{path}: expected a batch recorded by easyrl, found another safetensors file")
    return arrays, facts


def as_tree(kind: type[T], arrays: Mapping[str, np.ndarray], prefix: str = "") -> T:
    """The tree of class `kind` (a dataclass of arrays, of such trees and of tuples of them) that was saved.

    Raises UserError for a field that is missing and has no default.
    """
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # flax's classes are dataclasses
        name, hint = f"{prefix}{field.name}", hints[field.name]
        parts = {key.removeprefix(f"{name}/").split("/")[0] for key in arrays if key.startswith(f"{name}/")}
        if dataclasses.is_dataclass(hint):
            fields[field.name] = as_tree(typing.cast(type, hint), arrays, f"{name}/")
        elif typing.get_origin(hint) is tuple and "0" in parts:
            each = typing.get_args(hint)[0]
            fields[field.name] = tuple(as_tree(each, arrays, f"{name}/{part}/") for part in range(len(parts)))
        elif name in arrays:
            fields[field.name] = arrays[name]
        elif field.default is dataclasses.MISSING:
            raise UserError(f"the recording lacks {name}: it is damaged, or from another version of easyrl")
    return kind(**fields)


def _plain(value: Any, unknown: Callable[[float], str | None] = lambda _: None) -> Any:
    """`value` as JSON can hold it; what `unknown` makes of a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item, unknown) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, unknown) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else unknown(float(value))
    return value
