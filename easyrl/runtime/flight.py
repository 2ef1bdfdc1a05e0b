"""The flight recorder of PPO: the last rollouts at hand, every n-th one in a file, and what in one is not finite."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from easyrl.core.sharding import fetch
from easyrl.runtime.guard import Guard, bad_weights, listed, terms_of
from easyrl.runtime.loop import Hook, StepInfo
from easyrl.runtime.recording import save_recording
from easyrl.steps.ppo import PPOState
from easyrl.steps.rollout import SampledBatch
from easyrl.steps.scoring import Rollout

# What stands in a rollout: what others follow from, and what follows.
CAUSES = {
    "old_logprobs": "the policy's log-prob",
    "ref_logprobs": "the reference's log-prob",
    "values": "the old value",
    "scores": "the reward",
}
EFFECTS = {"rewards": "the token reward", "returns": "the return", "advantages": "the advantage"}
UPDATE_TERMS = {
    "ppo/loss/policy": "the policy loss",
    "ppo/policy/grad_norm": "the gradient of the policy",
    "ppo/loss/value": "the value loss",
    "ppo/val/grad_norm": "the gradient of the value model",
}


class PPOBatch(flax.struct.PyTreeNode):
    """A rollout and what is known of its responses beside it: what a recording holds."""

    rollout: Rollout
    sampler_logprobs: np.ndarray  # float32 [B, T]
    prompt_lengths: np.ndarray  # int [B]
    response_lengths: np.ndarray


class Recorded(NamedTuple):
    """One step's rollout and what is needed to make its updates again."""

    step: int  # counted from 1
    rollout: Rollout
    sampled: SampledBatch
    faults: tuple[str, ...]  # what the sources of reward have done wrong
    facts: Mapping[str, Any]


class FlightRecorder:
    """Keeps the rollouts of the last two steps, because a step's metrics come while the next one is made.

    Args:
      folder: where `step-<n>.safetensors` is written.
      every: steps between files; 0: only a rollout that ends the run is written.
      facts: of the run, for the files: its flags and schedule.
    """

    def __init__(self, folder: Path, every: int, facts: Mapping[str, Any]):
        self._folder, self._every, self._facts = folder, every, facts
        self._recent: deque[Recorded] = deque(maxlen=2)

    def keep(
        self, step: int, rollout: Rollout, sampled: SampledBatch, faults: tuple[str, ...] = (), **facts: Any
    ) -> None:
        """Called in every step, counted from 1, before its updates; `facts` are of the step."""
        self._recent.append(Recorded(step, rollout, sampled, faults, facts))

    def write(self, step: int, metrics: Mapping[str, float]) -> Path:
        """The rollout of one of the last two steps as a file."""
        recorded = self._of(step)
        sampled = recorded.sampled
        batch = PPOBatch(recorded.rollout, sampled.sampler_logprobs, sampled.prompt_lengths, sampled.response_lengths)
        facts = {"step": step, **self._facts, **recorded.facts, "metrics": dict(metrics)}
        return save_recording(self._folder / f"step-{step}.safetensors", batch, facts)

    def explain(self, step: int, metrics: Mapping[str, float], state: PPOState | None) -> str:
        """What of a step is not finite, in words; with a state, also which weights."""
        recorded = self._of(step)
        causes = []
        if state is not None:
            for name, params in (("policy", state.policy.params), ("value model", state.value.params)):
                if bad := bad_weights(params):
                    causes.append(f"weights of the {name}: {listed(bad)}")
        causes += [*recorded.faults, *bad_terms(recorded.rollout, explained=bool(recorded.faults))]
        return "; ".join(causes) or f"{terms_of(metrics, UPDATE_TERMS)}, in a minibatch of a rollout that is finite"

    def guard(self, most_in_a_row: int) -> Guard:
        """The guard that explains and keeps what this has recorded."""
        return Guard(most_in_a_row, self.explain, self.write)

    def hook(self) -> Hook:
        """Writes every n-th rollout."""

        def on_step(info: StepInfo) -> None:
            self.write(info.step, info.metrics)

        return Hook(on_step, every=self._every)

    def _of(self, step: int) -> Recorded:
        return next(recorded for recorded in self._recent if recorded.step == step)


def bad_terms(rollout: Rollout, *, explained: bool = False) -> list[str]:
    """The terms of a rollout that are not finite where something is learnt, with their responses.

    Effects only where there is no cause. With `explained`, it is known which rewards are bad, and not said again.
    """
    host = fetch(rollout)

    def bad(terms: Mapping[str, str]) -> list[str]:
        found = []
        for name, words in terms.items():
            x = getattr(host, name)
            rows = (~np.isfinite(x) & host.mask).any(axis=1) if x.ndim == 2 else ~np.isfinite(x) & host.mask.any(axis=1)
            if rows.any() and not (explained and name == "scores"):
                found.append(f"{words} of responses {listed(np.flatnonzero(rows).tolist())}")
        return found

    return bad(CAUSES) or ([] if explained else bad(EFFECTS))
