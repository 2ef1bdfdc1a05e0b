"""The command line of a script: its flags and YAML file become its config, and what ends it an exit status.

    if __name__ == "__main__":
        run(main, Config)

A value comes from the dataclass default, over it the YAML file that --config names, over that the flags.
"""

import contextlib
import difflib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import absl.app
import absl.flags
import absl.logging
import yaml

from easyrl.core.config import EXPECTED, FlagSpec, flag_specs, from_flag_values, parse_value
from easyrl.core.errors import RunFailed, RunStopped, UserError, raise_at_sigint, tell
from easyrl.core.printing import print_come_what_may

T = TypeVar("T")

CONFIG_SPEC = FlagSpec("config", str, "", "YAML file of flag values, nested or with dotted keys. Flags win over it.")


def load_config(config_class: type[T], argv: Sequence[str], program: str = "") -> T:
    """The config that a command line asks for: defaults, then the YAML file of --config, then flags.

    Args:
      config_class: a frozen dataclass whose fields are made by `flag`. Its static method `default_yaml(given)`, if it
        has one, names the YAML file to read without --config, from the values of the flags that are given. Its
        attribute `positional`, if it has one, names the flag whose value may stand alone on the command line.
      argv: the command line without the program's name.
      program: what comes before the flags, as --help shows it. Empty: as the script was started.

    Raises UserError for a flag, key, value or file that cannot be used. Prints help and exits for --help.
    """
    specs = {spec.name: spec for spec in (CONFIG_SPEC, *flag_specs(config_class))}
    if not {"--help", "-help", "-h"}.isdisjoint(argv):
        print(help_text(config_class, program), flush=True)
        raise SystemExit(0)
    given = _parse_flags(specs, argv, getattr(config_class, "positional", ""))
    path = given.pop("config", "") or getattr(config_class, "default_yaml", lambda given: "")(given)
    del specs["config"]
    values = {name: spec.default for name, spec in specs.items()}
    values |= _read_yaml(specs, path) if path else {}
    return from_flag_values(config_class, values | given)


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


# Names of other trainers' flags, and of the flags here that do the same.
ELSEWHERE = {
    "learning_rate": ("lr",),
    "max_steps": ("total_steps",),
    "num_train_epochs": ("num_epochs",),
    "per_device_train_batch_size": ("train_dataset.batch_size",),
    "gradient_accumulation_steps": ("micro_batch_size",),
    "gradient_checkpointing": ("remat",),
    "max_length": ("train_dataset.seq_length",),
    "max_new_tokens": ("max_continuation_len",),
    "response_length": ("max_continuation_len",),
    "model_name_or_path": ("load_checkpoint", "load_checkpoint_policy"),
    "ref_model_path": ("load_checkpoint_reference",),
    "reward_model_path": ("load_checkpoint_reward",),
    "dataset_name": ("train_dataset.path",),
    "save_steps": ("save_model_freq",),
    "eval_steps": ("eval_freq",),
    "logging_steps": ("log_freq",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
}


def _did_you_mean(name: str, names: Iterable[str], dashes: str = "") -> str:
    """`: did you mean ...?` with the names that end in `name`, end as it does or come close to it, or nothing."""
    names, last = list(names), name.rpartition(".")[2]
    close = [known for known in ELSEWHERE.get(name, ()) if known in names]
    close = close or [known for known in names if known.endswith(f".{name}")]
    close = close or difflib.get_close_matches(name, [known for known in names if known.split(".")[-1] == last], 2, 0.0)
    close = close or difflib.get_close_matches(name, names, 2)
    return f": did you mean {' or '.join(dashes + known for known in close)}?" if close else ""


def help_text(config_class: type, program: str = "") -> str:
    """What --help prints: usage, the first paragraph of the class docstring, and every flag by group.

    `program` is how the script is started; empty: as it was.
    """
    main_spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = program or (f"python -m {main_spec.name}" if main_spec else Path(sys.argv[0]).name)
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


def run(
    main: Callable[[Any], Any], config_class: type, parser: Callable[[Sequence[str]], Any] | None = None
) -> NoReturn:
    """Runs a script: reads the command line into `config_class`, calls `main(config)` and exits.

    A config with a group `jax_distributed` (`core.distributed.DistributedConfig`) joins the other processes first, if
    there are any; one whose `dtype` is fp32 multiplies in float32 on every platform (`core.platform.set_precision`).
    The exit status is 0, or that of `tell` after its line. Any other exception is a fault of ours and keeps its
    traceback.

    A script whose command line is more than one config hands over `parser(argv)`, whose result `main` gets.
    """

    def parse(argv: list[str]) -> Any:
        # absl would otherwise read its own flags and show the info messages of the libraries that log through it.
        absl.flags.FLAGS.mark_as_parsed()
        absl.logging.set_verbosity(absl.logging.WARNING)
        return parser(argv[1:]) if parser else load_config(config_class, argv[1:])

    def call(config: Any) -> None:
        from easyrl.core.platform import prepare_platform, set_precision  # imports jax, which --help does without

        prepare_platform()
        set_precision(getattr(config, "dtype", ""))
        joined = hasattr(config, "jax_distributed")
        with config.jax_distributed.joined(config) if joined else contextlib.nullcontext():
            main(config)  # what it returns is not an exit status

    print_come_what_may()
    try:
        raise_at_sigint()
        _, run_app = _mlxu()
        run_app(call, flags_parser=parse)
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # Python would wait for threads that compile, and one more Ctrl-C then aborts it
    except (UserError, RunFailed, RunStopped) as error:
        raise SystemExit(tell(error)) from None
    raise SystemExit(0)
