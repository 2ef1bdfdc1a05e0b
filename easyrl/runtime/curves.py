"""Curves of the metrics of a run, and the words they are shown with."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from easyrl.core.files import write_atomic

# Titles of the metrics a reader meets first; docs/metrics.md has the formula of every one.
TITLES = {
    "env/reward_mean": "Mean reward",
    "env/reward_std": "Spread of the rewards",
    "objective/kl": "KL to the reference (nats per response)",
    "objective/kl_per_token": "KL to the reference (nats per token)",
    "objective/kl_coef": "KL coefficient",
    "objective/entropy": "Entropy of the policy (nats per token)",
    "ppo/mean_scores": "Mean score after gain and bias",
    "ppo/mean_non_score_reward": "KL penalty per token",
    "ppo/loss/policy": "Policy loss",
    "ppo/loss/value": "Value loss",
    "ppo/loss/total": "Total loss",
    "ppo/policy/clipfrac": "Share of clipped ratios",
    "ppo/policy/approxkl": "KL of an update (nats per token)",
    "ppo/val/clipfrac": "Share of clipped values",
    "ppo/val/explained_variance": "Explained variance of the values",
    "ppo/learning_rate": "Learning rate",
    "rewards/chosen": "Reward of the better answers",
    "rewards/rejected": "Reward of the worse answers",
    "rewards/margins": "Margin between their rewards",
    "rewards/accuracies": "Share of pairs told apart",
    "logps/chosen": "Log-prob of the better answers (nats)",
    "logps/rejected": "Log-prob of the worse answers (nats)",
    "tokens/responses_len_mean": "Mean response length (tokens)",
    "tokens_per_second": "Tokens per second",
    "time/step": "Seconds per step",
}

# Section -> which metrics it takes, first match wins; ORDER is how a reader wants them.
SECTIONS = {
    "Speed": r"^time/|per_second|^tokens$",
    "Losses": r"loss",
    "Clipping": r"clipfrac|ratio",
    "KL and entropy": r"(^|[/_])(approx)?kl|entropy",
    "Reward": r"reward|score|accuracy|margin|logps|alarms",
    "Response lengths": r"len|ended|tokens/",
    "Values and advantages": r"(^|/)val|advantage|return",
    "Learning rate and gradients": r"learning_rate|grad_norm|skipped",
    "Other": r"",
}
ORDER = (
    "Reward",
    "KL and entropy",
    "Losses",
    "Clipping",
    "Response lengths",
    "Values and advantages",
    "Learning rate and gradients",
    "Speed",
    "Other",
)

RAW, SMOOTHED = "#a8c0dc", "#1c4f91"


class Series(NamedTuple):
    """One metric over the steps that report it; NaN where it was not finite."""

    steps: np.ndarray
    values: np.ndarray


def read_series(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """The rows of metrics.jsonl as one series a metric; null (a number that was not finite) becomes NaN."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                points.setdefault(name, []).append((row["step"], np.nan if value is None else float(value)))
    return {name: Series(*(np.array(column) for column in zip(*pairs, strict=True))) for name, pairs in points.items()}


def title_of(name: str) -> str:
    """Plain words for a metric: those of `TITLES`, or its name made readable."""
    if name in TITLES:
        return TITLES[name]
    words = re.sub(r"[/_]+", " ", name).strip()
    return words[:1].upper() + words[1:]


def section_of(name: str) -> str:
    """The section of the report a metric belongs to."""
    return next(section for section, pattern in SECTIONS.items() if re.search(pattern, name))


def by_section(names: Iterable[str]) -> dict[str, list[str]]:
    """Metric names under their sections, in `ORDER`; empty sections are left out."""
    sections: dict[str, list[str]] = {section: [] for section in ORDER}
    for name in names:
        sections[section_of(name)].append(name)
    return {section: found for section, found in sections.items() if found}


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over about a tenth of the points; NaN is left out of it. Below ten points: unchanged."""
    width = len(values) // 10
    if width < 1:
        return values
    kernel = np.ones(2 * (width // 2) + 1 if width > 1 else 3)
    finite = np.isfinite(values)
    count = np.convolve(finite, kernel, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def draw(axes: Axes, name: str, series: Series) -> None:
    """A metric as a pale line with its running mean over it. The first step of a time is not drawn: it compiles."""
    first = 1 if section_of(name) == "Speed" and len(series.steps) > 2 else 0
    steps, values = series.steps[first:], series.values[first:]
    smoothed = smooth(values)
    marker = "o" if len(steps) < 10 else None
    if smoothed is not values:
        axes.plot(steps, values, color=RAW, linewidth=0.9)
    axes.plot(steps, smoothed, color=SMOOTHED, linewidth=1.7, marker=marker, markersize=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e8ee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#8a94a3", labelcolor="#4a5361")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def curve_svg(name: str, series: Series) -> str:
    """One metric's curve as an SVG document, without a title: text belongs to the page around it."""
    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    draw(figure.add_subplot(), name, series)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "easyrl"}):  # the same numbers give the same file
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return out.getvalue()


def save_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, names: Sequence[str], columns: int = 3) -> None:
    """The curves of the metrics `names` side by side as a PNG, for a README. Raises KeyError for one never reported."""
    series = read_series(rows)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * lines), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(lines, columns, number)
        draw(axes, name, series[name])
        axes.set_title(title_of(name), fontsize=10, loc="left", color="#222933", parse_math=False)
        axes.set_xlabel("step", fontsize=8, color="#4a5361")
    with write_atomic(path) as part:
        figure.savefig(part, format="png", dpi=150, facecolor="white", metadata={"Software": None})
