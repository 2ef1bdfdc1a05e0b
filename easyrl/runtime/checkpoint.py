"""Saving a run, and going on with it.

The order in which a run is restored, each line needing those before it:

    1. the flags, then the folder; from these, which checkpoint to go on from           (`open_checkpoints`)
    2. its run.json, whose flags, data and frozen models must be those of now           (`open_checkpoints`)
    3. models' configurations, schedule, device programs: made as in a new run          (the script)
    4. the abstract state, with its shardings on the mesh of now; no weight is read     (the script)
    5. the arrays, straight into these shardings                                        (`Checkpoints.restore`)
    6. what parts of the run remember on the host                                       (`Checkpoints.recall`)
    7. config.yaml; metrics.jsonl and samples.jsonl without the rows after the step     (`RunDir.begin`, trackers)
    8. the loop, from the next step: data, samples and shuffles are functions of seed and step

Saving is a hook. It comes after the hooks that log and export, so that a checkpoint of step k is never there before the
metrics and the model of step k are.
"""

import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from etils import epath

from easyrl.core.checkpoints import Writer, is_remote, read_arrays, whole_steps
from easyrl.core.config import flag_values
from easyrl.core.distributed import Ballot, anywhere, from_first, gather_texts, is_first, say, several
from easyrl.core.errors import RunStopped, UserError
from easyrl.core.files import set_aside
from easyrl.hf.identity import digest_models
from easyrl.hf.refs import FoundModel
from easyrl.hf.saved import SavedModel, write_models
from easyrl.runtime.evaluation import direction
from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.resume import NEVER, Source, check_not_elsewhere, check_same_run, find_source
from easyrl.runtime.run_config import RunConfig
from easyrl.runtime.run_dir import LOCK, RunDir
from easyrl.runtime.troubles import Troubles, is_of_the_disk, reason_of

State = TypeVar("State")
NOTHING, SAVE, STOP = range(3)  # wishes, the greatest of which is followed
THING, THEN = "checkpoints", "trying again at the next save; earlier checkpoints are as they were"


class Memory(Protocol):
    """A part of a run that knows more from step to step than its state on the devices: a few numbers, on the host."""

    def remember(self) -> Any:
        """All of it, as JSON can hold it."""

    def recall(self, remembered: Any) -> None:
        """Takes up what `remember` gave."""


def open_checkpoints(
    config: RunConfig, run_dir: RunDir, script: str, data: str, frozen: Sequence[FoundModel] = ()
) -> "Checkpoints":
    """The checkpoints of a run. Changes nothing on disk.

    `data` is the fingerprint of the training data, `frozen` are the models that the run reads and does not train.
    Raises UserError when the checkpoint to go on from cannot be had, or belongs to another run (see `check_same_run`).
    """
    folder = epath.Path(config.checkpoint_dir or run_dir.checkpoints).expanduser()
    source = find_source(config, folder)
    digests = digest_models(frozen)
    if source is not None:
        check_same_run(config, script, data, source, digests)
        say(f"going on after step {source.step} of {source.folder}")
    elif config.resume == NEVER:
        if is_remote(folder) and whole_steps(folder):
            raise UserError(f"--resume=never: {folder} holds checkpoints, expected an empty --checkpoint_dir")
    elif config.checkpoint_dir:
        check_not_elsewhere(config, run_dir.checkpoints)
    facts = {"script": script, "data": data, "config": flag_values(config), "frozen": digests}
    return Checkpoints(config, run_dir, folder, source, facts)


class Checkpoints:
    """The checkpoints of one run: the one it goes on from, if any, and those it writes.

    `start` is the step the run goes on from, 0 for a new run; `metrics` are that step's, `flags` those it was made with
    by their dotted names. `made_here` is the same as `start` where the files in the run's folder are those of this run,
    and 0 where they are another one's: checkpoints and folder bear the same `run_id`. `frozen` has a digest of the
    models that are not trained, by the flag that names them.
    """

    def __init__(
        self, config: RunConfig, run_dir: RunDir, folder: epath.Path, source: Source | None, facts: dict[str, Any]
    ):
        self._config, self._run_dir, self.folder, self._source = config, run_dir, folder, source
        self.start: int = source.step if source else 0
        theirs, ours = source.facts.get("run_id", "") if source else "", run_dir.run_id
        # Checkpoints from before runs had ids are known by their place.
        same = source is not None and theirs == ours and (bool(ours) or source.folder == folder)
        self.made_here: int = self.start if same else 0
        self.run_id: str = ours if self.made_here else from_first(lambda: uuid.uuid4().hex[:12])
        self._facts = facts | {"run_id": self.run_id}
        self.frozen: Mapping[str, str] = facts["frozen"]
        self.metrics: dict[str, float] = source.facts["metrics"] if source else {}
        self.flags: dict[str, Any] = source.facts["config"] if source else {}
        self._stop = _Stop()

    def restore(self, abstract: State, create: Callable[[], State]) -> State:
        """The state to train: that of the checkpoint, or for a new run `create()`.

        `abstract` says what to restore: a tree of ShapeDtypeStruct with shardings.
        """
        if self._source is None:
            return create()
        return read_arrays(self._source.folder, self._source.step, abstract)

    def request_stop(self, reason: str) -> None:
        """Asks for the run to end after the step under way, saved, with `reason` in its last line and exit status 0.

        Cheap and safe to call at any time, from another thread too. Of several processes any may be asked; they all end
        one step later, after the same one.
        """
        self._stop.asked = self._stop.asked or reason

    def recall(self, memories: Mapping[str, Memory]) -> None:
        """Gives memories, by name, back what they knew at the step the run goes on from."""
        known = self._source.facts["memories"] if self._source else {}
        for name in memories.keys() & known.keys():
            memories[name].recall(known[name])

    def hook(
        self,
        memories: Mapping[str, Memory],
        models: Sequence[SavedModel],
        troubles: Troubles,
        *,
        total: int,
        best_by: str = "",
        measured: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> Hook:
        """The hook that saves, which must come after those that log and export. From here on the folder is this run's:
        a run that starts anew sets aside what is there.

        Args:
          memories: everything the run is to remember on the host, by name.
          models: what readers of the weights need to know of the models in the state.
          troubles: told of saves that fail; the run goes on and the earlier checkpoints stay.
          total: the last step, always saved.
          best_by: the metric of an evaluation by which the best checkpoint is found, which is kept.
          measured: a name of what evaluations measure; only those of one name are compared.
        """
        config = self._config
        keep, every = config.keep_checkpoints, config.keep_checkpoint_every
        describe = partial(write_models, self.folder, models)
        try:
            if config.resume == NEVER and self._source is None:
                self._set_aside()
            if is_first():
                describe()
            writer = Writer(self.folder, lambda facts: spare_steps(facts, keep, every), describe)
        except Exception as error:  # stores have errors of their own
            if not (is_remote(self.folder) or is_of_the_disk(error)):
                raise
            named = "--checkpoint_dir=" if config.checkpoint_dir else ""
            raise UserError(f"{named}{self.folder}: cannot write checkpoints there: {reason_of(error)}") from None
        sign = direction(best_by)

        def facts_of(info: StepInfo) -> dict[str, Any]:
            score = sign * info.metrics.get(best_by, math.nan)
            return self._facts | {
                "step": info.step,
                "score": score if math.isfinite(score) else None,
                "measured": measured,
                "metrics": info.metrics,
                "memories": {name: memory.remember() for name, memory in memories.items()},
            }

        saver = _Saver(config, writer, facts_of, self._stop, troubles, start=self.start, total=total, clock=clock)
        return Hook(
            saver.save_and_go_on, every=saver.due, needs_state=True, on_end=saver.finish, on_stop=saver.stop,
            close=writer.close,
        )  # fmt: skip

    def check_end(self, troubles: Troubles) -> None:
        """What is left to say when the loop is over: RunFailed where something could not be written, RunStopped where
        the run was asked to end early.
        """
        troubles.end()
        if self._stop.reason and self._stop.after:
            raise RunStopped(
                f"{self._stop.reason}: stopped after step {self._stop.after}, saved in {self.folder}; the same command "
                f"with --output_dir={self._run_dir.path} goes on"
            )

    def _set_aside(self) -> None:
        """A run that starts anew leaves the checkpoints of the earlier one under another name."""
        folder = Path(self.folder)
        if is_remote(self.folder) or not is_first() or not folder.exists():
            return
        if all(path.name == LOCK for path in folder.iterdir()):
            return
        if folder.is_symlink():  # to a larger disk, which the new run is to use, too
            folder = folder.resolve()
        aside = set_aside(folder)
        folder.mkdir()
        if (lock := aside / LOCK).exists():  # of a --checkpoint_dir, which stays this run's
            lock.rename(folder / LOCK)
        say(f"checkpoints of an earlier run are in {aside} now")


@dataclasses.dataclass
class _Stop:
    """Why a run is to end early, and where it did."""

    asked: str = ""  # the reason that this process has
    reason: str = ""  # that of all processes
    after: int = 0  # the last step


class _Saver:
    """Saves the steps at which a save is due, each while the next ones are made."""

    def __init__(
        self,
        config: RunConfig,
        writer: Writer,
        facts_of: Callable[[StepInfo], dict[str, Any]],
        stop: _Stop,
        troubles: Troubles,
        *,
        start: int,
        total: int,
        clock: Callable[[], float],
    ):
        self._config, self._writer, self._facts_of, self._stop = config, writer, facts_of, stop
        self._troubles, self._total, self._clock, self._ballot = troubles, total, clock, Ballot()
        self._saved, self._saved_at, self._under_way = start, clock(), False

    def due(self, step: int) -> bool:
        """Whether to save this step: the last one, by its number, by the clock, or because the run is to stop."""
        minutes, every = self._config.save_minutes, self._config.save_model_freq
        late = minutes > 0 and self._clock() - self._saved_at >= 60 * minutes
        wish = self._ballot(STOP if self._stop.asked else SAVE if late else NOTHING)
        if wish == STOP and not self._stop.reason:
            self._stop.reason = next(filter(None, gather_texts(self._stop.asked)))
        # A vote to save that is older than the last save is done with.
        urgent = wish == STOP or (wish == SAVE and (step > self._saved + 1 or not several()))
        return urgent or step == self._total or (every > 0 and step % every == 0)

    def save_and_go_on(self, info: StepInfo) -> bool:
        """Saves in the background; whether the run ends here."""
        self._save(info)
        return bool(self._stop.reason) and info.step < self._total

    def finish(self, info: StepInfo) -> None:
        """Waits until the last step is saved."""
        self._settle()
        if info.step > self._saved or anywhere(THING in self._troubles):
            self._save(info)
            self._settle()

    def stop(self, info: StepInfo) -> None:
        """As `finish`, of a run that ends early."""
        self.finish(info)
        self._stop.after = info.step

    def _save(self, info: StepInfo) -> None:
        self._settle()
        facts = self._facts_of(info)
        try:
            self._writer.start(info.step, info.state, facts)
            self._under_way = True
        except Exception as error:
            self._troubles.add(THING, error, THEN)
        self._saved, self._saved_at = info.step, self._clock()

    def _settle(self) -> None:
        """Waits for the save under way, if there is one."""
        if not self._under_way:
            return
        self._under_way = False
        try:
            self._writer.wait()
        except Exception as error:
            self._troubles.add(THING, error, THEN)
        else:
            self._troubles.mend(THING)


def spare_steps(facts: Mapping[int, Mapping[str, Any]], keep: int, every: int) -> list[int]:
    """The steps that need not be kept: not among the last `keep` (0: keep all), no multiple of `every`, not the best.

    The best has the highest score, of equals the earliest; a step without an evaluation has none. Scores of other data
    or settings than the newest step's do not count; a step from before these were kept is taken to have the same.
    """
    if keep == 0:
        return []
    kept = set(sorted(facts)[-keep:])
    measured = facts[max(facts)].get("measured")
    alike = [step for step in sorted(facts) if facts[step].get("measured", measured) == measured]
    scores = {step: facts[step]["score"] for step in alike if facts[step]["score"] is not None}
    if scores:
        kept.add(max(scores, key=lambda step: scores[step]))
    return [step for step in facts if step not in kept and not (every and step % every == 0)]
