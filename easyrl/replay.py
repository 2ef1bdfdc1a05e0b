"""Makes the updates of a recorded step once more, and compares their metrics with the recorded ones.

    python -m easyrl.replay RUN/rollouts/step-40.safetensors --load_checkpoint=easyrl::RUN/checkpoints/39

The recording holds what the updates read (of PPO the rollout, of the other trainers the batch) and the run's flags; the
checkpoint holds the weights and optimizer states before them. On the mesh and the kind of device of the run all numbers
are the same.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from easyrl.core.checkpoints import find_checkpoint, read_arrays
from easyrl.core.command_line import run
from easyrl.core.config import flag, from_dict
from easyrl.core.distributed import DistributedConfig, say
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.platform import set_precision
from easyrl.core.sharding import make_mesh, num_data_shards, put, replicated
from easyrl.data.packing import pack
from easyrl.hf.refs import FoundModel, find_model, load_weights
from easyrl.models.branch import trained_layers
from easyrl.models.families import param_specs
from easyrl.runtime.flight import PPOBatch
from easyrl.runtime.metrics import fetch
from easyrl.runtime.offline import OfflineConfig, learning_rate
from easyrl.runtime.recording import as_tree, load_recording
from easyrl.runtime.run_config import RunConfig, compute_settings, find_shapes
from easyrl.steps.dpo import AnswerBatch, DPOConfig, make_dpo_step
from easyrl.steps.kto import KTOBatch, make_kto_step
from easyrl.steps.optimizer import make_optimizer
from easyrl.steps.packed import place_plans
from easyrl.steps.ppo import abstract_ppo_state, make_ppo_schedules, make_update
from easyrl.steps.ppo_config import PPOConfig
from easyrl.steps.reward import RewardBatch, RewardLossConfig, make_reward_step
from easyrl.steps.rollout import run_updates
from easyrl.steps.scoring import make_forward
from easyrl.steps.sft import SFTBatch, make_sft_step
from easyrl.steps.state import abstract_train_state


@dataclasses.dataclass(frozen=True)
class Config:
    """Make a recorded step's updates once more, and compare their metrics with the recorded ones."""

    positional: ClassVar[str] = "recording"

    recording: str = flag("", "The file: rollouts/step-<n>.safetensors or batches/step-<n>.safetensors of a run.")
    load_checkpoint: str = flag("", "The state before the recorded step n: easyrl::RUN/checkpoints/<n - 1>.")
    load_checkpoint_policy: str = flag(
        "", "Where a run with --num_layers_unfrozen has its frozen layers from. Empty: as in the run's flags."
    )
    mesh_dim: str = flag("", "Sizes of the mesh axes dp,fsdp,mp. Empty: those of the recorded run.")
    tolerance: float = flag(
        1e-5, "Largest difference between equals, relative to the recorded number where that is above 1.", least=0
    )
    jax_distributed: DistributedConfig = flag(DistributedConfig(), "Several processes as one.")


def main(config: Config) -> None:
    if not config.recording:
        raise UserError(
            "found no FILE, expected the rollouts/step-<n>.safetensors or batches/step-<n>.safetensors of a run"
        )
    arrays, facts = load_recording(config.recording)
    set_precision(facts["config"]["dtype"])
    mesh = make_mesh(config.mesh_dim or facts["config"]["mesh_dim"])
    kind, _, target = config.load_checkpoint.partition("::")
    if kind != "easyrl" or not target:  # no other kind of model has optimizer states
        raise UserError(
            f"--load_checkpoint={config.load_checkpoint}: expected easyrl::RUN/checkpoints/{facts['step'] - 1}, the "
            "state before the recorded step"
        )
    folder, step = find_checkpoint(target, "--load_checkpoint")
    if step != facts["step"] - 1:
        say(f"note: the recording is of step {facts['step']}, and the checkpoint has seen {step} steps, not one less")
    restore = lambda abstract: read_arrays(folder, step, abstract)
    replay = replay_ppo if facts["kind"] == PPOBatch.__name__ else replay_offline
    metrics = fetch(replay(config, arrays, facts, mesh, restore))
    if not metrics:
        raise UserError(f"{config.recording}: the step made no update (--generate_only)")
    table, differing = compare(facts["metrics"], metrics, config.tolerance)
    say(f"step {facts['step']}, recorded on {facts['device']} with jax {facts['jax']}, replayed on "
        f"{jax.devices()[0].device_kind} with jax {jax.__version__}\n{table}")  # fmt: skip
    if differing:
        raise RunFailed(
            f"{len(differing)} of {len(metrics)} metrics differ by more than --tolerance={config.tolerance:g}"
        )


def replay_ppo(config: Config, arrays: Mapping[str, np.ndarray], facts: dict[str, Any], mesh: Mesh, restore) -> dict:
    """The metrics of all updates from a recorded rollout."""
    values = facts["config"]
    ppo, settings = from_dict(PPOConfig, values), from_dict(RunConfig, values)
    batch = as_tree(PPOBatch, arrays)
    lengths = batch.prompt_lengths + batch.response_lengths
    start, bottom = find_bottom(config, values, ppo, settings, mesh)
    policy_cfg, value_cfg = ((start or find(config.load_checkpoint, head, settings)).cfg for head in ("lm", "value"))
    total = facts["total_updates"]
    schedules = make_ppo_schedules(
        settings.lr_schedule, values["lr"], values["value_lr"],
        policy_updates=facts.get("policy_updates", total),  # earlier versions had one schedule
        value_updates=total, warmup_updates=facts["warmup_updates"],
    )  # fmt: skip
    policy_optimizer, value_optimizer = (make_optimizer(settings.optimizer, schedule) for schedule in schedules)
    dtype = DTYPES[settings.param_dtype]
    state = restore(
        abstract_ppo_state(policy_cfg, value_cfg, ppo, dtype, policy_optimizer, value_optimizer, mesh)
    )  # fmt: skip
    rollout = put(batch.rollout, replicated(mesh))
    width, size = rollout.tokens.shape[1], values["mini_batch_size"]
    if bottom is not None:
        # What leaves the bottom is too large to be recorded; of the program that computes it nothing else is read.
        forward = make_forward(policy_cfg, policy_cfg, value_cfg, ppo, mesh)
        shapes = find_shapes(settings, mesh, width, sequences=len(lengths))
        plans = place_plans(pack(lengths, width, shapes), len(lengths), mesh)
        policy_params, value_params = state.policy.params, state.value.params
        passes = forward(policy_params, policy_params, value_params, rollout.tokens, rollout.mask, plans, bottom=bottom)
        rollout = rollout.replace(hidden=passes.hidden)
    update = make_update(
        policy_cfg, value_cfg, ppo, policy_optimizer, value_optimizer, mesh, train_policy=not facts["frozen"]
    )
    _, metrics = run_updates(
        functools.partial(update, bottom=bottom), state, rollout, lengths,
        size=size, epochs=0 if values["generate_only"] else values["ppo_epochs"],
        key=(settings.seed, facts["step"] - 1), shapes=find_shapes(settings, mesh, width, sequences=size), mesh=mesh,
    )  # fmt: skip
    return metrics


def find_bottom(
    config: Config, values: Mapping[str, Any], ppo: PPOConfig, settings: RunConfig, mesh: Mesh
) -> tuple[FoundModel | None, dict | None]:
    """With --num_layers_unfrozen: the model that policy and value model both have the form of, and its frozen layers,
    which no checkpoint has. (None, None) where all layers have been trained.
    """
    if ppo.num_layers_unfrozen <= 0:
        return None, None
    ref = config.load_checkpoint_policy or values["load_checkpoint_policy"]
    start = find(ref, "lm", settings, flag="--load_checkpoint_policy")
    lowest = trained_layers(start.cfg.num_layers, ppo.num_layers_unfrozen).start
    if lowest == 0:
        return None, None
    dtype = DTYPES[settings.dtype]
    return start, load_weights(start, mesh, head="lm", dtype=dtype, seed=settings.seed, layers=range(lowest))


# Kind of a recorded batch -> its class, the model's head, and how its step is made of (model, optimizer, mesh, flags).
OFFLINE = {
    "SFTBatch": (SFTBatch, "lm", lambda model, optimizer, mesh, flags: make_sft_step(model.cfg, optimizer, mesh)),
    "RewardBatch": (
        RewardBatch, "reward", lambda model, optimizer, mesh, flags: make_reward_step(
            model.cfg, optimizer, mesh, from_dict(RewardLossConfig, flags), pad_id=model.pad_id
        ),
    ),
    "AnswerBatch": (
        AnswerBatch, "lm", lambda model, optimizer, mesh, flags: make_dpo_step(
            model.cfg, optimizer, mesh, from_dict(DPOConfig, flags)
        ),
    ),
    "KTOBatch": (
        KTOBatch, "lm", lambda model, optimizer, mesh, flags: make_kto_step(
            model.cfg, optimizer, mesh, from_dict(DPOConfig, flags)
        ),
    ),
}  # fmt: skip


def replay_offline(
    config: Config, arrays: Mapping[str, np.ndarray], facts: dict[str, Any], mesh: Mesh, restore
) -> dict:
    """The metrics of one step of SFT, a reward model or DPO on a recorded batch."""
    if facts["kind"] not in OFFLINE:
        raise UserError(
            f"{config.recording}: holds a {facts['kind']}, expected one of {', '.join(OFFLINE)} or PPOBatch"
        )
    kind, head, make_step = OFFLINE[facts["kind"]]
    rows = {x.shape[1] for name, x in arrays.items() if name.endswith("source_GRS")}
    if any(count % num_data_shards(mesh) for count in rows):
        raise UserError(
            f"--mesh_dim={config.mesh_dim}: dp x fsdp = {num_data_shards(mesh)} does not divide the {min(rows)} packed "
            "rows of a pass in the recording"
        )
    settings = from_dict(OfflineConfig, facts["config"])
    model = find(config.load_checkpoint, head, settings)
    optimizer = make_optimizer(settings.optimizer, learning_rate(settings, facts["total"]))
    abstract = abstract_train_state(param_specs(model.cfg, head), DTYPES[settings.param_dtype], optimizer, mesh)
    batch = put(as_tree(kind, arrays), replicated(mesh))
    return make_step(model, optimizer, mesh, facts["config"])(restore(abstract), batch)[1]


def find(ref: str, head: str, settings: RunConfig, flag: str = "--load_checkpoint") -> FoundModel:
    """A model, set to compute as in the recorded run."""
    return find_model(ref, head=head, compute=compute_settings(settings), flag=flag)


def compare(
    recorded: Mapping[str, float | None], replayed: Mapping[str, float], tolerance: float
) -> tuple[str, list[str]]:
    """(a table of recorded and replayed metrics, the names of those that differ by more than the tolerance).

    A number that is not finite equals another such number, and nothing else.
    """
    rows, differing = [("metric", "recorded", "replayed", "difference")], []
    for name, new in replayed.items():
        old = recorded.get(name)
        if old is None or not math.isfinite(new):
            same, difference = old is None and not math.isfinite(new), "not finite"
        else:
            same = abs(new - old) <= tolerance * max(1.0, abs(old))
            difference = f"{new - old:.3g}"
        differing += [] if same else [name]
        rows.append((name, "none" if old is None else f"{old:.8g}", f"{new:.8g}", difference + " !" * (not same)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines), differing


if __name__ == "__main__":
    run(main, Config)
