"""The flags that every trainer has."""

import dataclasses
import math
from typing import Any, Protocol

from jax.sharding import Mesh

from easyrl.core.config import flag
from easyrl.core.distributed import DistributedConfig
from easyrl.core.dtypes import DTYPES
from easyrl.core.errors import UserError
from easyrl.core.sharding import num_data_shards
from easyrl.data.packing import Shape, group_shapes
from easyrl.runtime.trackers import LoggerConfig
from easyrl.steps.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run computes, how it optimizes, what it writes. Inherited by the scripts' configs, so names are plain."""

    seed: int = flag(42, "Seed of everything random.", least=0, most=2**32 - 1)
    mesh_dim: str = flag(
        "1,-1,1", "Sizes of the mesh axes dp,fsdp,mp; also dp:1,fsdp:-1,mp:1. -1: what is left, once.", may_change=True
    )
    dtype: str = flag("bf16", "Format of activations and of frozen models.", choices=tuple(DTYPES))
    param_dtype: str = flag(
        "fp32", "Format of the weights in training; bf16 ones are rounded at random.", choices=tuple(DTYPES)
    )
    remat: str = flag(
        "none", "What the backward pass recomputes: nothing, all but matrix products, or whole layers.",
        choices=("none", "dots", "full"), may_change=True,
    )  # fmt: skip
    attention: str = flag(
        "auto", "How attention is computed. auto: cuDNN on GPUs, splash (a kernel) on TPUs from v4 on, elsewhere "
        "blocks: a block of queries at a time, each with the keys up to its end; xla: all pairs.",
        choices=("auto", "xla", "blocks", "splash", "cudnn"), may_change=True,
    )  # fmt: skip
    output_dir: str = flag(
        "", "Folder of the run; given again, the run goes on. Empty: runs/<script>-<date>-<time>.", may_change=True
    )
    micro_batch_size: int = flag(
        0, "Packed rows that go through a model at once, over all devices; a multiple of dp x fsdp, and even for "
        "pairs. 0: enough for 1,024 tokens a device.",
        least=0, may_change=True,
    )  # fmt: skip
    max_bad_steps: int = flag(
        3, "Steps in a row that may leave out an update because a number is not finite; one more ends the run.",
        least=0, may_change=True,
    )  # fmt: skip
    num_epochs: int = flag(1, "Passes over the data.", least=1)
    lr_schedule: str = flag("linear", "After the warm-up.", choices=("constant", "linear", "cosine"))
    optimizer: OptimizerConfig = flag(OptimizerConfig(), "AdamW.")
    eval_freq: int = flag(
        0, "Evaluate every this many steps, besides at start and end. 0: only then.", least=0, may_change=True
    )
    export_freq: int = flag(
        0, "Export the model every this many steps, to hf-<step>. 0: only at the end.", least=0, may_change=True
    )
    log_freq: int = flag(
        1, "Log to wandb and tensorboard every this many steps, besides those with an evaluation and the last one.",
        least=1, may_change=True,
    )  # fmt: skip
    logger: LoggerConfig = flag(LoggerConfig(), "Weights & Biases and TensorBoard.", may_change=True)
    jax_distributed: DistributedConfig = flag(
        DistributedConfig(), "Several processes (docs/reliability.md).", may_change=True
    )

    checkpoint_dir: str = flag(
        "", "Folder of the checkpoints, also gs://BUCKET/PATH. Empty: checkpoints in --output_dir.", may_change=True
    )
    save_model_freq: int = flag(
        0, "Save a checkpoint every this many steps, besides after the last one. 0: only by --save_minutes.",
        least=0, may_change=True,
    )  # fmt: skip
    save_minutes: float = flag(
        30.0, "Save a checkpoint when this many minutes have passed since the last one. 0: never.",
        least=0, may_change=True,
    )  # fmt: skip
    keep_checkpoints: int = flag(2, "Checkpoints to keep, the newest ones. 0: all.", least=0, may_change=True)
    keep_checkpoint_every: int = flag(
        0, "Also keep the checkpoints of steps that this number divides. 0: none of them.", least=0, may_change=True
    )
    resume: str = flag(
        "auto",
        "Where to go on: auto (the newest checkpoint in --output_dir, else the one that --load_checkpoint names if the "
        "same script made it), own (only in --output_dir), easyrl::DIR or easyrl::DIR/STEP, or never (start anew).",
        may_change=True,
    )
    allow_config_change: str = flag(
        "", "Flags, separated by commas, that may differ from those of the checkpoint to go on from.", may_change=True
    )


def compute_settings(config: RunConfig) -> dict[str, Any]:
    """How the models of a run compute: what `hf.refs.find_model` takes as `compute`."""
    return {"dtype": DTYPES[config.dtype], "remat": config.remat, "attention": config.attention}


class Grouped(Protocol):
    """Flags that say how packed rows make groups."""

    @property
    def mesh_dim(self) -> str: ...
    @property
    def micro_batch_size(self) -> int: ...


def find_shapes(
    config: Grouped, mesh: Mesh, longest: int, *, together: int = 1, sequences: int | None = None
) -> tuple[Shape, ...]:
    """`data.packing.group_shapes` as --micro_batch_size and the mesh have it. Raises UserError when they do not fit."""
    shards, rows = num_data_shards(mesh), config.micro_batch_size
    try:
        return group_shapes(longest, shards, rows=rows, together=together, sequences=sequences)
    except ValueError:
        raise UserError(
            f"--micro_batch_size={rows}: expected a multiple of {math.lcm(shards, together)}: dp x fsdp = {shards} of "
            f"--mesh_dim={config.mesh_dim}" + (f", and the {together} rows of a pair" if together > 1 else "")
        ) from None
