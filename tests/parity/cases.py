"""What both sides run: the cases, and every number they share. Imports nothing that only one of the two has."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 30
BATCH = 8  # pairs, or single answers
WARMUP_STEPS = 3  # from 0; then down to 0 in a line
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.999)
EPSILON = 1e-8
CLIP = 1.0  # the largest global norm of a gradient
TOLERANCE = 1e-4  # relative, at every step, of every metric below

PREFERENCE_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
METRICS = {
    "SFT": ("loss", "grad_norm", "entropy"),
    "Reward": ("loss", "grad_norm", "accuracy", "margin", "mean_reward"),
    "DPO": ("loss", "grad_norm", *PREFERENCE_METRICS, "rewards/accuracies", "entropy"),
    "KTO": ("loss", "grad_norm", *PREFERENCE_METRICS, "kl", "entropy"),
    "ORPO": ("loss", "grad_norm", *PREFERENCE_METRICS, "rewards/accuracies", "nll_loss"),
    "CPO": ("loss", "grad_norm", *PREFERENCE_METRICS, "rewards/accuracies"),
}

ALL_TOKENS, MARGINS, SHORT_PROMPTS = "all tokens", "margins", "prompts of one token"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run by each side.

    `trainer` is TRL's, `theirs` its settings; `ours` are flags of easyrl's script. `data` names what is special about
    the data (a constant above). `note` says how two things that differ are made the same.
    """

    name: str
    trainer: str
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""
    note: str = ""
    learning_rate: float = 1e-3  # its peak


SMOOTHED = "TRL 1's sigmoid has no smoothing, but 1.8 sigmoid - 0.8 robust, which its trainer adds up, is that function"
MISMATCHES = "both get TRL's mismatched answers, each the one of the row before; easyrl draws its own (docs/dpo.md)"
ORPO_NLL = (
    "TRL's NLL runs over the prompt too, easyrl's over the answer: prompts of one token leave the same tokens to both"
)
SLOW = 3e-4  # a learning rate at which a mean that the loss draws to 0 does not get there

CASES = (
    Case("SFT, answers", "SFT", {"completion_only_loss": True}),
    Case("SFT, all tokens", "SFT", ours={"loss_on": "all"}, data=ALL_TOKENS),
    Case("Reward model, pairwise", "Reward"),
    Case("Reward model, margin", "Reward", data=MARGINS),
    Case(
        "Reward model, centring", "Reward",
        {"center_rewards_coefficient": 0.01}, {"center_coef": 0.01}, learning_rate=SLOW,
    ),
    Case(
        "Reward model, both", "Reward",
        {"center_rewards_coefficient": 0.1}, {"center_coef": 0.1}, MARGINS, learning_rate=SLOW,
    ),
    Case("DPO", "DPO", {"loss_type": ["sigmoid"]}, {"loss": "sigmoid"}),
    Case(
        "conservative DPO", "DPO",
        {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8], "label_smoothing": 0.1},
        {"loss": "sigmoid", "label_smoothing": 0.1}, note=SMOOTHED,
    ),
    Case(
        "robust DPO", "DPO",
        {"loss_type": ["robust"], "label_smoothing": 0.1}, {"loss": "robust", "label_smoothing": 0.1},
    ),
    Case("IPO", "DPO", {"loss_type": ["ipo"]}, {"loss": "ipo"}),
    Case("hinge", "DPO", {"loss_type": ["hinge"], "beta": 0.03}, {"loss": "hinge", "beta": 0.03}),
    Case(
        "length-normalised DPO", "DPO",
        {"loss_type": ["sigmoid_norm"], "beta": 1.0}, {"loss": "sigmoid_norm", "beta": 1.0},
    ),
    Case("APO-zero", "DPO", {"loss_type": ["apo_zero"]}, {"loss": "apo_zero"}),
    Case("APO-down", "DPO", {"loss_type": ["apo_down"]}, {"loss": "apo_down"}, learning_rate=SLOW),
    Case(
        "RPO (DPO + NLL)", "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"loss": "sigmoid", "nll_coef": 0.5},
    ),
    Case("KTO", "KTO", {"beta": 0.1}, {"loss": "kto"}, note=MISMATCHES),
    Case(
        "KTO, weighted", "KTO",
        {"beta": 0.15, "desirable_weight": 1.3, "undesirable_weight": 0.8},
        {"loss": "kto", "beta": 0.15, "desirable_weight": 1.3, "undesirable_weight": 0.8}, note=MISMATCHES,
        learning_rate=SLOW,
    ),
    Case("ORPO", "ORPO", {"beta": 0.1}, {"loss": "orpo"}, SHORT_PROMPTS, ORPO_NLL),
    Case(
        "SimPO", "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.5},
    ),
    Case(
        "SimPO, smoothed + NLL", "CPO",
        {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1, "nll_coef": 1.0},
    ),
)  # fmt: skip


def prompt_of(case: Case, prompt: list[int]) -> list[int]:
    """The prompt as this case uses it."""
    return prompt[-1:] if case.data == SHORT_PROMPTS else prompt


def run_all(folder: Path, side: str, versions: dict[str, str], run: Callable[[Case, list[dict]], dict]) -> None:
    """`run(case, pairs)` for every case, into FOLDER/SIDE.json. What a run cut short left there is kept."""
    pairs = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    path = folder / f"{side}.json"
    curves = json.loads(path.read_text(encoding="utf-8"))["curves"] if path.exists() else {}
    for number, case in enumerate(CASES, start=1):
        if case.name not in curves:
            print(f"{side} {number}/{len(CASES)}: {case.name}", flush=True)
            curves[case.name] = run(case, pairs)
            path.write_text(json.dumps({"versions": versions, "curves": curves}), encoding="utf-8")
