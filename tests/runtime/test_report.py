from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from easyrl.core.config import flag
from easyrl.runtime.report import pair_samples, write_report
from easyrl.runtime.run_dir import make_run_dir
from easyrl.runtime.trackers import JsonlTracker

EVIL = '<script>alert("x")</script> & <img src=http://evil.example/x.png>'


@dataclass(frozen=True)
class Nested:
    lr: float = flag(1e-4, "Learning rate.")


@dataclass(frozen=True)
class Config:
    notes: str = flag(EVIL, "Notes.")
    optimizer: Nested = flag(Nested(), "Optimiser.")


class Page(HTMLParser):
    """Which tags, addresses and text a page has, and whether its tags are balanced."""

    VOID = ("meta", "img", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    run = make_run_dir(str(tmp_path / "run"), "train_ppo")
    run.save_config(Config())
    return run


def fill(run):
    tracker = JsonlTracker(run)
    for step in (0, 10, 20):
        responses = [{"prompt": "Same?", "response": f"at {step}", "reward": step / 10}]
        responses += [{"prompt": f"only {step} {EVIL}", "response": EVIL, "reward": 0.5}]
        tracker.log_samples(step, responses)
    for step in range(1, 21):
        tracker.log(step, {"env/reward_mean": step / 4, "odd$name_{": 1.0, "loss": float("nan"), "time/step": 3.0})
    tracker.close()


def test_the_report_shows_the_run_and_needs_nothing_else(run):
    fill(run)
    page = Page(write_report(run, "PPO & friends").read_text(encoding="utf-8"))
    assert page.open == []
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert len(page.addresses) == 4 and page.tags.count("svg") == 0
    for shown in ("PPO & friends", "Mean reward", "The same prompts, before and after", "at 0", "at 20", "1 min 0 s"):
        assert shown in page.text
    assert "--optimizer.lr" in page.text and "0.0001" in page.text
    assert "4.875" in page.text and "from 0.375" in page.text  # means over the last and first tenth
    assert "not finite" in page.text  # the loss


def test_text_from_the_run_cannot_become_markup(run):
    fill(run)
    page = Page(write_report(run, EVIL).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert EVIL in page.text


def test_before_and_after_are_the_earliest_and_latest_of_a_prompt():
    samples = [
        {"step": step, "prompt": prompt, "response": f"{prompt}{step}"}
        for step, prompts in ((1, "ab"), (5, "bc"), (9, "cb"))
        for prompt in prompts
    ]
    pairs = [(before["response"], after["response"]) for before, after in pair_samples(samples)]
    assert pairs == [("b1", "b9"), ("c5", "c9")]


def test_samples_without_a_pair_are_shown_alone(run):
    tracker = JsonlTracker(run)
    tracker.log_samples(3, [{"prompt": [{"role": "user", "content": "hé"}], "response": "one"}])
    tracker.close()
    text = Page(write_report(run, "SFT").read_text(encoding="utf-8")).text
    assert "The last samples" in text and '"content": "hé"' in text and "No step has been logged." in text


def test_a_run_that_wrote_nothing_still_has_a_report(run):
    assert "No step has been logged." in write_report(run, "PPO").read_text(encoding="utf-8")
