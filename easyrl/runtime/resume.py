"""Which checkpoint a run goes on from, and whether it may."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from etils import epath

from easyrl.core.checkpoints import find_checkpoint, is_remote, newest_step, read_facts
from easyrl.core.config import flag_specs, flag_values
from easyrl.core.errors import UserError
from easyrl.runtime.run_config import RunConfig

KIND = "easyrl::"
TEXT = ("tokenizer", "template")  # flags that, as those of train_dataset, decide what the rows are as tokens
AUTO, OWN, NEVER = "auto", "own", "never"

C = TypeVar("C", bound=RunConfig)


class Source(NamedTuple):
    """A checkpoint to go on from."""

    folder: epath.Path
    step: int
    facts: dict[str, Any]
    named_by: str  # the flag that led here, with its value


def continue_named(config: C, script: str) -> C:
    """The config with `--resume=REF` where --load_checkpoint names a checkpoint REF of the same script.

    Going on takes more than weights; --load_checkpoint becomes again what that run started from. With --resume other
    than auto, and for checkpoints of other scripts, --load_checkpoint means weights, and the config is as it was.
    A run that has gone on from REF and has checkpoints of its own needs REF no more, which may be gone.
    """
    ref = getattr(config, "load_checkpoint", "")
    if config.resume != AUTO or not ref.startswith(KIND):
        return config
    facts = _own_facts(config)
    if facts is None or facts["script"] != script or facts["config"].get("resume") != ref:
        facts = read_facts(*find_checkpoint(ref.removeprefix(KIND), "--load_checkpoint"))
    if facts["script"] != script:
        return config
    changes: dict[str, Any] = {"resume": ref, "load_checkpoint": facts["config"]["load_checkpoint"]}
    return dataclasses.replace(config, **changes)


def _own_facts(config: RunConfig) -> dict[str, Any] | None:
    """Those of the run's newest checkpoint; None where it has none, or a folder that is still to be named."""
    if not config.checkpoint_dir and (not config.output_dir or "://" in config.output_dir):  # which is refused later
        return None
    place = config.checkpoint_dir or os.path.join(config.output_dir, "checkpoints")
    folder = epath.Path(place).expanduser()
    step = newest_step(folder, _named(config, folder))
    return None if step is None else read_facts(folder, step)


def _named(config: RunConfig, folder: epath.Path) -> str:
    """The flag that names the folder of the run's checkpoints, with its value."""
    return f"--checkpoint_dir={config.checkpoint_dir}" if config.checkpoint_dir else f"--output_dir={folder.parent}"


def find_source(config: RunConfig, folder: epath.Path) -> Source | None:
    """The checkpoint to go on from: the newest one in `folder`, else the one that --resume names; None: a new run.

    Raises UserError for a --resume that cannot be used or had, and for a place that cannot be read: one that does not
    answer must not pass for empty.
    """
    named = config.resume.startswith(KIND)
    if not named and config.resume not in (AUTO, OWN, NEVER):
        raise UserError(f"--resume={config.resume}: expected auto, own, never, easyrl::DIR or easyrl::DIR/STEP")
    flag = _named(config, folder)
    own = newest_step(folder, flag)
    if config.resume == NEVER:
        return None
    if named:
        try:
            source, step = find_checkpoint(config.resume.removeprefix(KIND), "--resume")
        except UserError:
            if own is None:
                raise
        else:
            if own is None:
                return Source(source, step, read_facts(source, step), f"--resume={config.resume}")
            if _same_place(source, folder) and step < own:
                raise UserError(
                    f"--resume={config.resume}: the run has gone on to step {own} since; to go on from step {step}, "
                    "give another --output_dir"
                )
    return None if own is None else Source(folder, own, read_facts(folder, own), flag)


def check_not_elsewhere(config: RunConfig, usual: Path) -> None:
    """Raises UserError where the `usual` place holds checkpoints, for a run whose --checkpoint_dir holds none: it would
    start anew.
    """
    step = newest_step(epath.Path(usual), f"--output_dir={usual.parent}")
    if step is not None:
        raise UserError(
            f"--checkpoint_dir={config.checkpoint_dir}: holds no whole checkpoint, while {usual} holds step {step}; "
            f"go on there without the flag, or with --resume={KIND}{usual}, or start anew with --resume=never"
        )


def _same_place(one: epath.Path, other: epath.Path) -> bool:
    if is_remote(one) or is_remote(other):
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def check_same_run(
    config: RunConfig, script: str, data: str, source: Source, frozen: Mapping[str, str] | None = None
) -> None:
    """Raises UserError when going on from `source` would not be going on with the same run.

    Every flag must be as it was, but for those declared with `may_change` and those in --allow_config_change. `data` is
    the fingerprint of the training data, which must be what they were even where their path is the same; so must the
    weights of models that the run does not train, of which `frozen` has a digest by the flag that names them.
    """
    facts, now = source.facts, flag_values(config)
    specs = {spec.name: spec for spec in flag_specs(type(config))}
    allowed = {name.strip().removeprefix("--") for name in config.allow_config_change.split(",") if name.strip()}
    if unknown := sorted(allowed - specs.keys()):
        raise UserError(f"--allow_config_change={config.allow_config_change}: there is no flag --{unknown[0]}")
    if facts["script"] != script:
        raise UserError(f"{source.named_by}: holds a run of {facts['script']}, expected one of {script}")
    then: Mapping[str, Any] = {name: spec.default for name, spec in specs.items()} | facts["config"]
    changed = {
        name: f"--{name} was {_shown(then[name])}, is {_shown(now[name])}"
        for name, spec in specs.items()
        if then[name] != now[name] and not spec.may_change and name not in allowed
    }
    explained = any(name.startswith("train_dataset.") or name in TEXT for name in {*allowed, *changed})
    if facts["data"] != data and not explained:
        changed["train_dataset.path"] = f"--train_dataset.path={now['train_dataset.path']} has other rows now"
    for name, digest in (frozen or {}).items():
        if facts.get("frozen", {}).get(name, digest) != digest and name not in {*allowed, *changed}:
            changed[name] = f"--{name}={now[name]} has other weights now"
    if changed:
        raise UserError(
            f"{source.named_by}: cannot go on from step {source.step} with other flags: {'; '.join(changed.values())}. "
            "Give them as they were, or another --output_dir for a new run (--resume=own, where --load_checkpoint is "
            f"to give it weights), or --allow_config_change={','.join(changed)}"
        )


def _shown(value: Any) -> str:
    return repr(value) if value == "" else str(value)
