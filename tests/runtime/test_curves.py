import numpy as np
import pytest

from easyrl.runtime.curves import by_section, curve_svg, read_series, save_curves, section_of, smooth, title_of

ROWS = [
    {"step": step, "env/reward_mean": step / 10, "objective/kl": None if step == 3 else 0.5} for step in range(1, 31)
]


def test_a_series_knows_its_steps_and_its_gaps():
    series = read_series([*ROWS, {"step": 31, "late": 1.0}])
    assert series["env/reward_mean"].steps.tolist() == list(range(1, 31))
    assert np.flatnonzero(np.isnan(series["objective/kl"].values)).tolist() == [2]
    assert series["late"].steps.tolist() == [31]


def test_smoothing_keeps_a_constant_and_a_line_and_bridges_gaps():
    constant = np.full(50, 3.0)
    constant[20] = np.nan
    np.testing.assert_allclose(smooth(constant), np.full(50, 3.0))
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line)[5:-5], line[5:-5])
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise).std() < noise.std() / 4


def test_a_short_series_is_not_smoothed():
    values = np.array([1.0, 5.0, np.nan])
    assert smooth(values) is values
    assert np.isnan(smooth(np.full(30, np.nan))).all()


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("env/reward_mean", "Reward"),
        ("ppo/mean_scores", "Reward"),
        ("objective/kl", "KL and entropy"),
        ("ppo/policy/approxkl", "KL and entropy"),
        ("ppo/loss/value", "Losses"),
        ("ppo/val/clipfrac", "Clipping"),
        ("tokens/responses_len_mean", "Response lengths"),
        ("tokens_per_second", "Speed"),
        ("time/score", "Speed"),
        ("ppo/val/explained_variance", "Values and advantages"),
        ("ppo/learning_rate", "Learning rate and gradients"),
        ("something", "Other"),
    ],
)
def test_metrics_stand_where_a_reader_looks(name, section):
    assert section_of(name) == section


def test_sections_come_in_order_and_hold_every_metric():
    sections = by_section(["time/step", "x", "objective/kl", "env/reward_mean"])
    assert list(sections) == ["Reward", "KL and entropy", "Speed", "Other"]
    assert sections["Speed"] == ["time/step"]


def test_titles_are_plain():
    assert title_of("env/reward_mean") == "Mean reward"
    assert title_of("ppo/some_thing") == "Ppo some thing"


def test_a_curve_is_reproducible_and_survives_odd_values():
    series = read_series(ROWS)["objective/kl"]
    assert curve_svg("objective/kl", series) == curve_svg("objective/kl", series)
    nothing = read_series([{"step": 1, "a": None}, {"step": 2, "a": None}])["a"]
    assert "<svg" in curve_svg("a", nothing)


def test_curves_for_a_readme(tmp_path):
    save_curves(ROWS, tmp_path / "curves.png", ["env/reward_mean", "objective/kl"], columns=2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="typo"):
        save_curves(ROWS, tmp_path / "other.png", ["typo"])
    assert [item.name for item in tmp_path.iterdir()] == ["curves.png"]
