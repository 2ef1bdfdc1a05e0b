"""What saving costs the training loop, where writing a checkpoint takes as long as a step.

    python -m easyrl.bench.saving --megabytes=512 --output_dir=/tmp/saving

A state of that size is saved after every step; a step lasts as long as one checkpoint takes to write, so a loop that
waited for the disk would take twice as long. Nothing is computed in a step: on an accelerator the host is idle then.
The checkpoints go into a new folder inside --output_dir, which decides the disk, and are removed with that folder.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from easyrl.core.checkpoints import Writer
from easyrl.core.command_line import run
from easyrl.core.config import flag
from easyrl.core.errors import UserError
from easyrl.runtime.loop import Hook, StepInfo, run_loop

WRITES = 5  # before the steps, to learn how long one takes


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what asynchronous checkpoints cost the training loop."""

    megabytes: int = flag(512, "Size of the state.", least=1)
    steps: int = flag(8, "Steps to measure.", least=2)
    output_dir: str = flag("build/saving", "Folder on the disk to measure. Only what is written is removed.")


def main(config: Config) -> None:
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix="saving.", dir=config.output_dir)
    except OSError as error:
        raise UserError(f"--output_dir={config.output_dir}: cannot write there: {error.strerror}") from None
    with own as folder:
        measure(config, epath.Path(folder))


def measure(config: Config, folder: epath.Path) -> None:
    """Writes the checkpoints of all steps into `folder` and prints what that took.

    A step is as long as the slowest of a few writes. Where the disk takes longer still, the loop waits for the save
    before: what a disk costs that cannot keep up. So the median is told besides the mean.
    """
    rng = np.random.default_rng(0)
    state = {str(k): jnp.asarray(rng.normal(size=(1024, 1024)), jnp.float32) for k in range(config.megabytes // 4 or 1)}
    change = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    writer = Writer(folder, lambda facts: [step for step in facts if step < max(facts)], lambda: None)

    def seconds_to_write(step: int) -> float:
        begun = time.perf_counter()
        writer.start(step, state, {})
        writer.wait()
        return time.perf_counter() - begun

    seconds_to_write(1)  # the first is slower: threads start, code is loaded
    step_seconds = max(seconds_to_write(2 + number) for number in range(WRITES))
    held: list[float] = []

    def step(state: dict, number: int) -> tuple[dict, dict[str, float]]:
        state = jax.block_until_ready(change(state))
        time.sleep(step_seconds)
        return state, {}

    def save(info: StepInfo) -> None:
        writer.start(info.step + 1 + WRITES, info.state, {})

    def note(info: StepInfo) -> None:
        held.append(info.metrics.get("time/save", 0.0))

    hooks = [Hook(note), Hook(save, needs_state=True)]
    run_loop(state, range(config.steps + 1), step, start=0, total=config.steps + 1, hooks=hooks)
    writer.close()
    waits = held[1:]
    median, mean = float(np.median(waits)), float(np.mean(waits))
    print(f"a state of {config.megabytes} MB takes {step_seconds:.2f} s to write at most, and so long is a step")
    print(f"the loop waits {median:.3f} s for a save (median of {config.steps}): {median / step_seconds:.1%} of a step")
    print(f"on average {mean:.3f} s ({mean / step_seconds:.1%}), with the saves before that took longer than a step")


if __name__ == "__main__":
    run(main, Config)
