"""report.html: what a run did, on one page that needs nothing else.

Written from the files of the run's folder, so it can be made again at any time.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from easyrl.core.files import write_atomic
from easyrl.runtime.curves import Series, by_section, curve_svg, read_series, title_of
from easyrl.runtime.jsonl import read_jsonl
from easyrl.runtime.run_dir import RunDir

SAMPLES_SHOWN = 12

# Told at the top, when the run has them.
HEADLINES = (
    "env/reward_mean",
    "objective/kl",
    "loss",
    "rewards/margins",
    "tokens/responses_len_mean",
    "tokens_per_second",
)

STYLE = """
:root { color-scheme: light; --ink: #222933; --soft: #5b6572; --line: #dfe4ea; --accent: #1c4f91; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 1180px; color: var(--ink); background: #f6f7f9;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.6rem 0 .8rem; font-size: 1.2rem; }
p { color: var(--soft); margin: .3rem 0 0; }
code { font: .82em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--soft); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); margin-top: 1.4rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1rem; margin: 0;
  min-width: 0; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; color: var(--accent); font-weight: 650; }
.tiles span, .before { color: var(--soft); }
figcaption { font-weight: 600; line-height: 1.35; margin-bottom: .3rem; }
figcaption code { display: block; font-weight: 400; overflow-wrap: anywhere; }
figure img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; } .card.wide { overflow-x: auto; }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.v { overflow-wrap: anywhere; }
.sample { margin-bottom: 1rem; }
.pair { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20em; overflow-y: auto; }
.prompt { border-bottom: 1px solid var(--line); padding-bottom: .6rem; margin-bottom: .7rem; font-weight: 600; }
.label { display: flex; justify-content: space-between; color: var(--soft); font-size: .85rem; margin-bottom: .2rem; }
"""


def write_report(run: RunDir, title: str) -> Path:
    """Writes `report.html` into the run's folder and returns its path.

    It shows headline numbers, samples of the same prompts at the start and at the end, the curve of every metric, a
    table of the numbers, and the configuration. Everything is inline and all text from the run is escaped.
    """
    rows = read_jsonl(run.metrics) if run.metrics.exists() else []
    samples = read_jsonl(run.samples) if run.samples.exists() else []
    config = yaml.safe_load(run.config.read_text(encoding="utf-8")) if run.config.exists() else {}
    series = read_series(rows)
    sections = _curves(series)
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(run.path.name)}</p>",
        _tiles(rows, series),
        *sections[:1],
        _samples(samples),
        *sections[1:],
        _numbers(series),
        _config(config),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    with write_atomic(run.report) as part:
        part.write_text(page, encoding="utf-8", errors="replace")
    return run.report


def _tiles(rows: Sequence[Mapping[str, Any]], series: Mapping[str, Series]) -> str:
    if not rows:
        return "<p>No step has been logged.</p>"
    tiles = [("Steps", f"{rows[-1]['step']:,}", "")]
    for name in HEADLINES:
        if name in series:
            start, end = _ends(series[name].values)
            tiles.append((title_of(name), _number(end), f"from {_number(start)}"))
    if "time/step" in series:
        tiles.append(("Time in steps", _duration(float(np.nansum(series["time/step"].values))), ""))
    cards = (f'<div class="card">{escape(a)}<b>{escape(b)}</b><span>{escape(c)}</span></div>' for a, b, c in tiles)
    return (
        f'<div class="tiles">{"".join(cards)}</div>'
        "<p>A number and where it came from are means over the last and the first tenth of the steps.</p>"
    )


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Means over the first and the last tenth of the finite values."""
    values = values[np.isfinite(values)]
    tenth = max(1, len(values) // 10)
    return (float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))) if len(values) else (np.nan, np.nan)


def _curves(series: Mapping[str, Series]) -> list[str]:
    parts = []
    for section, names in by_section(series).items():
        figures = []
        for name in names:
            image = base64.b64encode(curve_svg(name, series[name]).encode()).decode()
            figures.append(
                f'<figure class="card"><figcaption>{escape(title_of(name))}<code>{escape(name)}</code></figcaption>'
                f'<img alt="Curve of {escape(name)}" src="data:image/svg+xml;base64,{image}"></figure>'
            )
        note = "<p>The first step, which compiles, is not drawn.</p>" if section == "Speed" else ""
        parts.append(f'<h2>{escape(section)}</h2><div class="grid">{"".join(figures)}</div>{note}')
    return parts


def pair_samples(samples: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """For every prompt sampled at more than one step, its earliest and its latest sample; widest apart first."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        seen.setdefault(_text(sample.get("prompt", "")), []).append(sample)
    pairs = [(min(group, key=_step), max(group, key=_step)) for group in seen.values()]
    pairs = [(before, after) for before, after in pairs if _step(before) < _step(after)]
    return sorted(pairs, key=lambda pair: _step(pair[0]) - _step(pair[1]))


def _step(sample: Mapping[str, Any]) -> int:
    return sample["step"]


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    pairs = pair_samples(samples)
    shown = [list(pair) for pair in pairs] or [[sample] for sample in samples[-SAMPLES_SHOWN:]]
    cards = []
    for group in shown[:SAMPLES_SHOWN]:
        columns = "".join(f"<div>{_response(sample)}</div>" for sample in group)
        prompt = escape(_text(group[0].get("prompt", "")))
        cards.append(
            f'<div class="card sample"><div class="text prompt">{prompt}</div><div class="pair">{columns}</div></div>'
        )
    heading = "The same prompts, before and after" if pairs else "The last samples"
    return f"<h2>{heading}</h2>{''.join(cards)}<p>All samples are in <code>samples.jsonl</code>.</p>"


def _response(sample: Mapping[str, Any]) -> str:
    reward = sample.get("reward")
    score = f"reward {_number(reward)}" if isinstance(reward, int | float) else ""
    return (
        f'<div class="label"><span>step {sample["step"]}</span><span>{escape(score)}</span></div>'
        f'<div class="text">{escape(_text(sample.get("response", "")))}</div>'
    )


def _numbers(series: Mapping[str, Series]) -> str:
    if not series:
        return ""
    rows = []
    for names in by_section(series).values():
        for name in names:
            values = series[name].values
            finite = values[np.isfinite(values)]
            lowest, highest = (np.min(finite), np.max(finite)) if len(finite) else (np.nan, np.nan)
            cells = "".join(f'<td class="n">{_number(v)}</td>' for v in (values[0], values[-1], lowest, highest))
            rows.append(f"<tr><td>{escape(title_of(name))}</td><td><code>{escape(name)}</code></td>{cells}</tr>")
    head = "".join(f'<th class="n">{word}</th>' for word in ("first step", "last step", "lowest", "highest"))
    return (
        '<h2>Numbers</h2><div class="card wide"><table><tr><th>What</th><th>Name</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def _config(config: Mapping[str, Any]) -> str:
    rows = [
        f'<tr><td><code>--{escape(name)}</code></td><td class="v">{escape(str(value))}</td></tr>'
        for name, value in _flatten(config)
    ]
    return f'<h2>Configuration</h2><div class="card wide"><table>{"".join(rows)}</table></div>' if rows else ""


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in config.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return flat


def _text(value: Any) -> str:
    """A prompt or response as text; messages and other structures as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """Four significant digits, without an exponent where one can read it without."""
    if not np.isfinite(value):
        return "not finite"
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
