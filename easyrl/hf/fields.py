"""Typed reading of JSON files: a wrong or missing field is one line that names the file and the field."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyrl.core.errors import UserError
from easyrl.models.config import ModelConfig

REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def check_read_back(cfg: ModelConfig, config_from_hf: Callable[..., ModelConfig], raw: dict[str, Any]) -> None:
    """Raise UserError unless the config.json `raw`, made for `cfg`, describes `cfg` in all but how to compute it."""
    read_back = config_from_hf(raw, "the exported config.json")
    compute: dict[str, Any] = {"dtype": cfg.dtype, "remat": cfg.remat, "attention": cfg.attention}
    if dataclasses.replace(read_back, **compute) != cfg:
        raise UserError(f"no {cfg.hf_type} class of transformers computes {cfg}")


class Fields:
    """The fields of one JSON object that came from `source`. A field that is null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw = raw
        self.source = source

    def fail(self, key: str, expected: str) -> UserError:
        """The error for a field that cannot be used; the caller raises it."""
        found = f"is {self.raw[key]!r}" if key in self.raw else "is missing"
        return UserError(f"{self.source}: {key} {found}, expected {expected}")

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.fail(key, expected)
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.fail(key, expected)
        return value

    def spelled(self, *keys: str) -> str:
        """Which of a field's names is used here; the first when none is."""
        return next((key for key in keys if self.raw.get(key) is not None), keys[0])

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """A whole number of 1 or more."""
        value = self._get(key, default, (int,), "a whole number of 1 or more")
        if value < 1:
            raise self.fail(key, "a whole number of 1 or more")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A number above 0."""
        value = self._get(key, default, (int, float), "a number above 0")
        if not 0 < value <= sys.float_info.max:  # JSON knows Infinity, and whole numbers that no float holds
            raise self.fail(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> str:
        return self._get(key, default, (str,), "a string")

    def object(self, key: str) -> "Fields | None":
        """A nested object, None when absent."""
        value = self._get(key, None, (Mapping,), "an object")
        return None if value is None else Fields(value, f"{self.source}: {key}")

    def choice(self, key: str, choices: Sequence[str], default: Any = REQUIRED) -> str:
        """One of a few strings."""
        value = self.text(key, default)
        if value not in choices:
            raise self.fail(key, " or ".join(choices))
        return value
