"""Configuration: one frozen dataclass a script, whose fields are flags.

    @dataclass(frozen=True)
    class OptimizerConfig:
        eps: float = flag(1e-8, "Added to the root of Adam's second moment.")

    @dataclass(frozen=True)
    class Config:
        '''Trains a model.'''
        total_steps: int = flag(100, "Optimiser steps.")
        optimizer: OptimizerConfig = flag(OptimizerConfig(), "The policy's optimiser.")

gives `--total_steps` and `--optimizer.eps` (`core.command_line` reads them). Text becomes a value in one place
(`parse_value`), wherever it was written, so `1e-8`, which YAML reads as a string, is a number. A config class may check
itself in `__post_init__` and raise UserError.
"""

import dataclasses
import functools
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import yaml

T = TypeVar("T")

EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
BOOLS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True) | dict.fromkeys(
    ("false", "f", "no", "n", "off", "0"), False
)


class Range(NamedTuple):
    """The numbers that a flag accepts; None: no bound on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, number: float) -> bool:
        low = (self.least is None or number >= self.least) and (self.above is None or number > self.above)
        high = (self.most is None or number <= self.most) and (self.below is None or number < self.below)
        return low and high

    def __str__(self) -> str:
        words = (
            ("{:g} or more", self.least),
            ("more than {:g}", self.above),
            ("at most {:g}", self.most),
            ("less than {:g}", self.below),
        )
        return ", ".join(text.format(bound) for text, bound in words if bound is not None)


class FlagSpec(NamedTuple):
    """One flag: what is known of it from the config class alone."""

    name: str  # dotted, as in optimizer.lr
    type: type  # int, float, bool or str
    default: Any
    help: str
    choices: tuple = ()  # empty: any value
    range: Range = Range()
    group_help: str = ""  # help of the nested config that the flag belongs to
    may_change: bool = False  # whether a run may go on from a checkpoint with another value

    @property
    def group(self) -> str:
        """The dotted name of the nested config that the flag belongs to, empty at the top."""
        return self.name.rpartition(".")[0]


def flag(default: T, help: str, choices: Iterable[T] = (), *, may_change: bool = False, **bounds: float) -> T:
    """A dataclass field that is a flag, or a group of flags when `default` is itself a config.

    `help` says what the value does, in which unit, and what an empty or zero value means. `choices`, if given, are the
    only values accepted; of numbers, those within the `bounds` (least, above, most, below, as in `Range`). `may_change`
    is for what does not decide what a run computes (where it writes, how often it saves, how work is split over
    devices): a run may go on from a checkpoint with another value.
    """
    metadata = {"help": help, "choices": tuple(choices), "range": Range(**bounds), "may_change": may_change}
    field: Any = dataclasses.field(default=default, metadata=metadata)
    return field


def _fields(config_class: type) -> Iterator[tuple[dataclasses.Field, type]]:
    """The fields of a config class with their types. Raises TypeError for one that no flag can express."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if field.default is dataclasses.MISSING or not (kind in EXPECTED or dataclasses.is_dataclass(kind)):
            where = f"{config_class.__name__}.{field.name}"
            raise TypeError(f"{where}: expected an int, float, str, bool or config, with a default")
        yield field, kind


def flag_specs(config_class: type) -> list[FlagSpec]:
    """Every flag that a config class gives, in the order of its fields."""

    def walk(config_class: type, prefix: str, defaults: Any, group: FlagSpec | None) -> Iterator[FlagSpec]:
        for field, kind in _fields(config_class):
            default = field.default if defaults is None else getattr(defaults, field.name)
            spec = FlagSpec(
                prefix + field.name,
                kind,
                default,
                field.metadata.get("help", ""),
                field.metadata.get("choices", ()),
                field.metadata.get("range", Range()),
                group.help if group else "",
                field.metadata.get("may_change", False) or (group is not None and group.may_change),
            )
            if dataclasses.is_dataclass(kind):
                yield from walk(kind, f"{spec.name}.", default, spec)
            else:
                yield spec._replace(default=kind(default))

    return list(walk(config_class, "", None, None))


def parse_value(spec: FlagSpec, text: str) -> Any:
    """The value of a flag from its text. Raises ValueError that says what was expected.

    A leading ~ is the home folder: shells leave it alone behind `--flag=`, and YAML files see no shell.
    """
    value: Any = os.path.expanduser(text) if spec.type is str else text
    try:
        if spec.type is bool:
            value = BOOLS[text.strip().lower()]
        elif spec.type is float:
            value = float(text.replace(".inf", "inf"))  # .inf is YAML's spelling
        elif spec.type is int:
            value = int(text)
    except (KeyError, ValueError):
        raise ValueError(f"expected {EXPECTED[spec.type]}") from None
    if spec.type is float and math.isnan(value):
        raise ValueError("expected a number")
    if spec.type is str and (unknown := _unknown_home(value)):
        raise ValueError(f"expected a home folder behind ~, found none for {unknown}")
    if spec.choices and value not in spec.choices:
        raise ValueError(f"expected one of {', '.join(map(str, spec.choices))}")
    if spec.type in (int, float) and not spec.range.holds(value):
        raise ValueError(f"expected {spec.range}")
    return value


def _unknown_home(text: str) -> str:
    """The first `~` or `~NAME` before a path in `text`, as in hf::~NAME/DIR, that is nobody's here; empty: none."""
    homes = re.findall(r"(?:^|::|[,@])\s*(~[\w.\-]*)(?=/|,|$)", text)
    return next((home for home in homes if os.path.expanduser(home) == home), "")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values."""
    return dataclasses.asdict(config)


def flag_values(config: Any) -> dict[str, Any]:
    """The value of every flag of a config, by the flag's dotted name."""
    return {spec.name: functools.reduce(getattr, spec.name.split("."), config) for spec in flag_specs(type(config))}


def from_flag_values(config_class: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The config from the values of all its flags, by dotted names that begin with `prefix`: undoes `flag_values`."""
    return config_class(
        **{
            field.name: from_flag_values(kind, values, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(kind)
            else values[prefix + field.name]
            for field, kind in _fields(config_class)
        }
    )


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The config of this class from nested values as `to_dict` gives them, which may hold more than its own flags; a
    flag that is missing has its default. A number may be text, as JSON has it where it is infinite.
    """
    fields: dict[str, Any] = {}
    for field, kind in _fields(config_class):
        value = values.get(field.name, field.default)
        if isinstance(value, Mapping):
            fields[field.name] = from_dict(kind, value)
        else:
            fields[field.name] = float(value) if kind is float else value
    return config_class(**fields)


def to_yaml(config: Any) -> str:
    """A config as the text of a file that, given back as --config, repeats the run.

    `output_dir`, `checkpoint_dir` and `jax_distributed` are left out: a repeated run is a new one, with its own folders
    and processes, and does not go on from the checkpoints of the first.
    """
    own = ("output_dir", "checkpoint_dir", "jax_distributed")
    values = {name: value for name, value in to_dict(config).items() if name not in own}
    header = "# Every flag of an easyrl run, as resolved. Give this file back as --config to repeat the run.\n"
    return header + yaml.safe_dump(values, sort_keys=False)
