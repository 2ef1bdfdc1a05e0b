"""Will it fit, and how long will it take? What a trainer's flags ask of devices that are not there.

    python -m easyrl.plan --script=train_ppo --topology=v3:8x16 [that script's flags]

Compiles the very programs that the script would run, on abstract weights, for a TPU topology (libtpu does that on any
Linux machine), for virtual CPU devices, or for GPUs. docs/scaling.md explains what is printed. Exit status 3: it does
not fit.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from easyrl import assets
from easyrl.core.command_line import load_config, run
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.core.files import check_writable, write_atomic
from easyrl.core.platform import set_precision
from easyrl.core.sharding import make_mesh
from easyrl.planning.measure import measure
from easyrl.planning.memory import device_bytes
from easyrl.planning.offline import offline_plan
from easyrl.planning.phases import ScriptPlan
from easyrl.planning.ppo import ppo_plan
from easyrl.planning.report import Report, text
from easyrl.planning.suggest import COMPILED, candidates, fastest, table
from easyrl.planning.topology import Topology, find_devices, parse_topology

SCRIPTS = ("train_sft", "train_rm", "train_dpo", "train_ppo")
DOES_NOT_FIT = 3  # the exit status


@dataclasses.dataclass(frozen=True)
class Config:
    """Plan a run on devices that are not there: memory, FLOPs, traffic, collectives and the time of a step.

    Flags that are not listed here are those of the script that is planned (--help of that script shows them).
    """

    script: str = flag("train_ppo", "The trainer.", choices=SCRIPTS)
    topology: str = flag(
        "cpu:8", "The devices: a TPU slice in chips (v3:8x16, v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16, or several as "
        "2xv5e:16x16), cpu:8, or gpu:8xH100-80GB.",
    )  # fmt: skip
    json: str = flag("", "File to write the plan to, as JSON. Empty: none.")
    suggest: bool = flag(
        False,
        "Search mesh, micro-batch and remat for the fastest plan that fits; the flags given for them are ignored.",
    )
    fill: float = flag(
        1.0, "Length of the average sequence, as a share of the longest that flags allow.", above=0, most=1
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """A command line: what to plan, and the config of the script."""

    config: Config
    script: Any


def parse(argv: Sequence[str]) -> Request:
    """The planner's own flags, and the config that the script makes of all the others."""
    own, others = split(argv)
    config = load_config(Config, own)
    module = importlib.import_module(f"easyrl.{config.script}")
    return Request(config, load_config(module.Config, others))


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are the planner's own, and the others."""
    names = {field.name for field in dataclasses.fields(Config)} | {"help", "h"}
    names |= {f"no{field.name}" for field in dataclasses.fields(Config) if field.type is bool}
    own: list[str] = []
    others: list[str] = []
    into = others
    for argument in argv:
        if argument.startswith("-"):
            into = own if argument.lstrip("-").partition("=")[0] in names else others
        into.append(argument)
    return own, others


def main(request: Request) -> None:
    config, script = request.config, request.script
    if config.json:
        check_writable(config.json, "--json")
    topology = parse_topology(config.topology)
    jax.config.update("jax_platforms", "cpu")  # whatever devices there are here are of no use to a plan
    set_precision(script.dtype)
    devices = find_devices(topology)
    if config.suggest:
        report = suggest(config, script, devices, topology)
    else:
        report = make_report(config.script, script, make_mesh(script.mesh_dim, devices), topology, config.fill)
    print(text(report), flush=True)
    if config.json:
        with write_atomic(Path(config.json).expanduser()) as path:
            path.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if not report.fits:
        raise SystemExit(DOES_NOT_FIT)


def suggest(config: Config, script: Any, devices: list[jax.Device], topology: Topology) -> Report:
    """Prints what was tried; returns the plan of the fastest settings that fit, else of the first that were tried."""
    plan_of = lambda changed, mesh: script_plan(config.script, changed, mesh, config.fill)
    found = candidates(script, devices, topology, plan_of)[:COMPILED]
    if not found:
        raise UserError(f"--suggest: the model does not divide over the {len(devices)} devices of {topology.text}")
    tried = [(c, make_report(config.script, c.config, c.mesh, topology, config.fill)) for c in found]
    print(table(tried), end="\n\n", flush=True)
    return (fastest(tried) or tried[0])[1]


def make_report(name: str, script: Any, mesh: Mesh, topology: Topology, fill: float) -> Report:
    """Compiles and measures every phase of one step of a script."""
    plan = script_plan(name, script, mesh, fill)
    resident = sum(plan.resident_bytes().values())
    measured = []
    for phase in plan.phases:
        print(f"compiling {phase.name} ...", file=sys.stderr, flush=True)
        beside = device_bytes(phase.arguments) if phase.before else resident
        measured.append(measure(phase, beside, mesh, topology))
    return Report(name, topology, mesh, plan, measured)


def script_plan(name: str, script: Any, mesh: Mesh, fill: float) -> ScriptPlan:
    """The phases of a script with this config."""
    if name != "train_ppo":
        return offline_plan(name, script, mesh, fill)
    return ppo_plan(assets.fill_in(script), mesh, fill)


if __name__ == "__main__":
    run(main, Config, parse)
