"""The progress bar: one line, on process 0; and the warnings above it."""

import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from tqdm import tqdm

from easyrl.core.ahead import Call, compile_ahead
from easyrl.core.distributed import is_first, quiet, say
from easyrl.runtime.loop import Hook, StepInfo

# In a log file every refresh is one more line, in a terminal it overwrites the last. So a file gets none before the
# first step is done: a run that stops there says why in one line.
SECONDS_BETWEEN_LINES = 30.0


def progress_hook(total: int, show: Mapping[str, str], *, start: int = 0, file: TextIO | None = None) -> Hook:
    """A bar over steps `start ... total` followed by the metrics in `show`, a mapping from label to metric name.

    `show={"reward": "env/reward_mean", "tok/s": "tokens_per_second"}` gives `reward 0.712, tok/s 5.31k`. A metric a
    step does not report is left out. Other processes than 0 draw nothing.
    """
    file = sys.stderr if file is None else file
    terminal = file.isatty()
    bar = tqdm(
        total=total,
        initial=start,
        unit="step",
        file=file,
        dynamic_ncols=True,
        mininterval=0.2 if terminal else SECONDS_BETWEEN_LINES,
        delay=0.0 if terminal else SECONDS_BETWEEN_LINES,
        disable=not is_first(),
    )

    def on_step(info: StepInfo) -> None:
        shown = [f"{label} {short(info.metrics[name])}" for label, name in show.items() if name in info.metrics]
        bar.set_postfix_str(", ".join(shown), refresh=False)
        bar.delay = 0.0
        bar.update(info.step - bar.n)

    def end(info: StepInfo) -> None:
        bar.close()  # what else is said at the end has lines of its own

    return Hook(on_step=on_step, on_stop=end, on_end=end, close=bar.close)


def warn(text: str) -> None:
    """Prints a warning on process 0, above the bar."""
    if is_first():
        tqdm.write(f"easyrl: warning: {text}", file=sys.stderr)


def compile_programs(calls: Sequence[Call]) -> None:
    """`compile_ahead`, with a bar, and a line that says after how many seconds each program was ready."""
    with tqdm(total=len(calls), unit="program", desc="compiling", disable=quiet(), leave=False) as bar:
        seconds = compile_ahead(calls, lambda name: bar.update())
    if calls:
        ready = ", ".join(f"{name} {after:.1f}" for name, after in seconds.items())
        say(f"compiled in {max(seconds.values()):.1f} s; ready after seconds: {ready}")


def short(value: float) -> str:
    """Three significant digits; thousands and millions as k and M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
