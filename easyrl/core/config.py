"""Configuration: one frozen dataclass a script, from which flags, YAML files and --help are derived.

    @dataclass(frozen=True)
    class OptimizerConfig:
        lr: float = flag(1e-6, "Peak learning rate.")

    @dataclass(frozen=True)
    class Config:
        '''Trains a model.'''
        total_steps: int = flag(100, "Optimiser steps.")
        optimizer: OptimizerConfig = flag(OptimizerConfig(), "The policy's optimiser.")

    if __name__ == "__main__":
        run(main, Config)

gives `--total_steps` and `--optimizer.lr`. A value comes from the dataclass default, over it the YAML file that
--config names, over that the command line. Text becomes a value in one place (`parse_value`), wherever it was written,
so `1e-6`, which YAML reads as a string, is a number. A config class may check itself in `__post_init__` and raise
UserError.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import absl.app
import absl.flags
import absl.logging
import yaml

from easyrl.core.errors import RunFailed, RunStopped, UserError

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


CONFIG_SPEC = FlagSpec("config", str, "", "YAML file of flag values, nested or with dotted keys. Flags win over it.")


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
    if spec.choices and value not in spec.choices:
        raise ValueError(f"expected one of {', '.join(map(str, spec.choices))}")
    if spec.type in (int, float) and not spec.range.holds(value):
        raise ValueError(f"expected {spec.range}")
    return value


def load_config(config_class: type[T], argv: Sequence[str]) -> T:
    """The config that a command line asks for: defaults, then the YAML file of --config, then flags.

    Args:
      config_class: a frozen dataclass whose fields are made by `flag`. Its static method `default_yaml(given)`, if it
        has one, names the YAML file to read without --config, from the values of the flags that are given. Its
        attribute `positional`, if it has one, names the flag whose value may stand alone on the command line.
      argv: the command line without the program's name.

    Raises UserError for a flag, key, value or file that cannot be used. Prints help and exits for --help.
    """
    specs = {spec.name: spec for spec in (CONFIG_SPEC, *flag_specs(config_class))}
    if not {"--help", "-help", "-h"}.isdisjoint(argv):
        print(help_text(config_class))
        raise SystemExit(0)
    given = _parse_flags(specs, argv, getattr(config_class, "positional", ""))
    path = given.pop("config", "") or getattr(config_class, "default_yaml", lambda given: "")(given)
    del specs["config"]
    values = {name: spec.default for name, spec in specs.items()}
    values |= _read_yaml(specs, path) if path else {}
    return _build(config_class, values | given)


def _build(config_class: type[T], values: dict[str, Any], prefix: str = "") -> T:
    return config_class(
        **{
            field.name: _build(kind, values, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(kind)
            else values[prefix + field.name]
            for field, kind in _fields(config_class)
        }
    )


def _mlxu() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """mlxu's `define_flags_with_default` and `run`; where it is not installed, what they stand for in absl.

    A benchmark needs no more than jax and absl on the machine.
    """
    try:
        import mlxu  # takes a second: it imports wandb
    except ModuleNotFoundError:
        return _define_with_absl, absl.app.run
    return mlxu.define_flags_with_default, mlxu.run


def _define_with_absl(**flags: tuple[Any, str]) -> None:
    for name, (default, text) in flags.items():
        absl.flags.DEFINE_string(name, default if isinstance(default, str) else str(default), text)


class _Parser(absl.flags.ArgumentParser):
    """Has absl read a flag's text by our rules."""

    def __init__(self, spec: FlagSpec):
        self.spec = spec

    def parse(self, argument: str) -> Any:
        return parse_value(self.spec, argument)


def _parse_flags(specs: dict[str, FlagSpec], argv: Sequence[str], positional: str = "") -> dict[str, Any]:
    """The values of the flags that are present in `argv`. A word that is no flag is the value of the one `positional`
    names.
    """
    define, _ = _mlxu()
    define(**{spec.name: (spec.default, spec.help) for spec in specs.values()})
    # mlxu defines flags in absl's process-wide registry. They move to one of their own, so that nothing outlives the
    # call, configs cannot collide, and absl's own flags do not pass for ours.
    registry = absl.flags.FlagValues()
    for spec in specs.values():
        registry[spec.name] = absl.flags.FLAGS[spec.name]
        delattr(absl.flags.FLAGS, spec.name)
        registry[spec.name].parser = _Parser(spec)
    try:
        _, *words = registry(["", *argv])
    except absl.flags.UnrecognizedFlagError as error:
        raise UserError(f"unknown flag --{error.flagname}{_did_you_mean(error.flagname, specs, '--')}") from None
    except (absl.flags.Error, ValueError) as error:
        raise UserError(str(error).removeprefix("flag ")) from None
    given = {name: registry[name].value for name in specs if registry[name].present}
    if words and positional and positional not in given:
        given[positional] = words.pop(0)
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: a flag is written --name=value")
    return given


def _read_yaml(specs: dict[str, FlagSpec], path: str) -> dict[str, Any]:
    """The values in a YAML file, by flag name."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config={path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config={path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    groups = {name[:end] for name in specs for end, letter in enumerate(name) if letter == "."}
    values: dict[str, Any] = {}

    # Nodes rather than loaded objects: they know their line and the text as it was written, and show a repeated key.
    def read(node: yaml.Node, prefix: str) -> None:
        if _is_null(node):
            return
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{at(node)}: expected `flag: value` lines, found {found(node)}")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{at(key)}: expected the name of a flag, found {found(key)}")
            name = prefix + key.value
            if name in groups:
                read(value, f"{name}.")
            elif name not in specs:
                raise UserError(f"{at(key)}: unknown key {name}{_did_you_mean(name, specs)}")
            elif name in values:
                raise UserError(f"{at(key)}: {name} is given twice")
            elif not isinstance(value, yaml.ScalarNode) or _is_null(value):
                raise UserError(f"{at(key)}: {name}: expected {EXPECTED[specs[name].type]}, found {found(value)}")
            else:
                try:
                    values[name] = parse_value(specs[name], value.value)
                except ValueError as error:
                    raise UserError(f"{at(key)}: {name}={value.value}: {error}") from None

    def at(node: yaml.Node) -> str:
        return f"--config={path}, line {node.start_mark.line + 1}"

    def found(node: yaml.Node) -> str:
        if _is_null(node):
            return "nothing"
        return {"mapping": "a map", "sequence": "a list"}.get(node.id, repr(node.value))

    if root is not None:
        read(root, "")
    return values


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _did_you_mean(name: str, names: Iterable[str], dashes: str = "") -> str:
    """`: did you mean ...?` with the names that come close to `name` or end in it, or nothing."""
    close = [known for known in names if known.endswith(f".{name}")] or difflib.get_close_matches(name, names, 2)
    return f": did you mean {' or '.join(dashes + known for known in close)}?" if close else ""


def help_text(config_class: type) -> str:
    """What --help prints: usage, the first paragraph of the class docstring, and every flag by group."""
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {main_spec.name}" if main_spec else Path(sys.argv[0]).name
    width = min(shutil.get_terminal_size().columns, 100)
    program += f" {config_class.positional.upper()}" if hasattr(config_class, "positional") else ""
    lines = [f"usage: {program} [--config=FILE.yaml] [--FLAG=VALUE ...]", ""]
    # dataclass writes a signature where a class has no docstring.
    if config_class.__doc__ and not config_class.__doc__.startswith(f"{config_class.__name__}("):
        lines += [*textwrap.wrap(config_class.__doc__.split("\n\n")[0], width), ""]

    sections: dict[str, list[FlagSpec]] = {}
    for spec in (CONFIG_SPEC, *flag_specs(config_class)):
        sections.setdefault(spec.group, []).append(spec)
    for group, specs in sections.items():
        lines.append(": ".join(filter(None, (group or "flags", specs[0].group_help))))
        for spec in specs:
            default = f'"{spec.default}"' if spec.type is str else str(spec.default).lower()
            head = f"  --{'[no]' if spec.type is bool else ''}{spec.name}  {spec.type.__name__}, default {default}"
            if limits := f"one of {', '.join(map(str, spec.choices))}" if spec.choices else str(spec.range):
                head += f", {limits}"
            lines += textwrap.wrap(head, width, subsequent_indent=" " * 8, break_on_hyphens=False)
            lines += textwrap.wrap(spec.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines[:-1])


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values."""
    return dataclasses.asdict(config)


def flag_values(config: Any) -> dict[str, Any]:
    """The value of every flag of a config, by the flag's dotted name."""
    return {spec.name: functools.reduce(getattr, spec.name.split("."), config) for spec in flag_specs(type(config))}


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The config of this class from nested values as `to_dict` gives them, which may hold more than its own flags; a
    flag that is missing has its default.
    """
    fields = {}
    for field, kind in _fields(config_class):
        value = values.get(field.name, field.default)
        fields[field.name] = from_dict(kind, value) if isinstance(value, Mapping) else value
    return config_class(**fields)


def to_yaml(config: Any) -> str:
    """A config as the text of a file that, given back as --config, repeats the run.

    `output_dir` and `jax_distributed` are left out: a repeated run is a new one, with its own folder and processes.
    """
    values = {name: value for name, value in to_dict(config).items() if name not in ("output_dir", "jax_distributed")}
    header = "# Every flag of an easyrl run, as resolved. Give this file back as --config to repeat the run.\n"
    return header + yaml.safe_dump(values, sort_keys=False)


def run(
    main: Callable[[Any], Any], config_class: type, parser: Callable[[Sequence[str]], Any] | None = None
) -> NoReturn:
    """Runs a script: reads the command line into `config_class`, calls `main(config)` and exits.

    A config with a group `jax_distributed` (`core.distributed.DistributedConfig`) joins the other processes first, if
    there are any. The exit status is 0, or that of `tell` after its line. Any other exception is a fault of ours and
    keeps its traceback.

    A script whose command line is more than one config hands over `parser(argv)`, whose result `main` gets.
    """

    def parse(argv: list[str]) -> Any:
        # absl would otherwise read its own flags and show the info messages of the libraries that log through it.
        absl.flags.FLAGS.mark_as_parsed()
        absl.logging.set_verbosity(absl.logging.WARNING)
        return parser(argv[1:]) if parser else load_config(config_class, argv[1:])

    def call(config: Any) -> None:
        from easyrl.core.platform import prepare_platform  # imports jax, which --help does without

        prepare_platform()
        joined = hasattr(config, "jax_distributed")
        with config.jax_distributed.joined(config) if joined else contextlib.nullcontext():
            main(config)  # what it returns is not an exit status

    try:
        _, run_app = _mlxu()
        run_app(call, flags_parser=parse)
    except (UserError, RunFailed, RunStopped, KeyboardInterrupt) as error:
        raise SystemExit(tell(error)) from None
    raise SystemExit(0)


def tell(error: BaseException, show: bool = True) -> int:
    """Says in one line on stderr, below whatever was being printed, what ended a script; returns its exit status.

    2 for a UserError, 1 for a RunFailed, that of a RunStopped, 130 when interrupted, 1 and no line for anything else.
    """
    sys.stdout.flush()
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()
    known: dict[type, tuple[str, int]] = {
        UserError: (f"error: {error}", 2),
        RunFailed: (f"error: {error}", 1),
        RunStopped: (str(error), getattr(error, "status", 0)),
        KeyboardInterrupt: ("interrupted", 130),
    }
    message, status = known.get(type(error), ("", 1))
    if message and show:
        print(f"easyrl: {message}", file=sys.stderr)
    return status
