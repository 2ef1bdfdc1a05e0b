"""evaluate on files of answers: win rates by a reward model and by a judge, the table, the JSON, and what is wrong."""

import dataclasses
import json
import shlex
import sys

import jax
import numpy as np
import pytest

from easyrl import evaluate
from easyrl.core.errors import RunFailed, UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.templates import load_template
from easyrl.hf.refs import load_model
from easyrl.models.heads import scalar
from easyrl.models.trunk import trunk
from tests.offline import run_script, write_rows
from tests.train_ppo.conftest import make_tokenizer, write_model

PROMPTS = ["sun", "river", "old dog", "why", "tell me"]
CATEGORIES = ["math", "math", "math", "code", "others"]
OURS = ["round", "long", "barks a lot", "", "no"]
THEIRS = ["a disc", "wet", "sleeps", "because", "no"]
JUDGE = """
import json, sys
for row in map(json.loads, sys.stdin):
    one, two = len(row["answer_1"]), len(row["answer_2"])
    print(json.dumps({"id": row["id"], "winner": 1 if one > two else 2 if two > one else 0}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "reward", "reward", seed=1)
    (folder / "judge.py").write_text(JUDGE)
    rows = [
        [
            {"id": number, "prompt": prompt, "response": answer, "category": category}
            for number, (prompt, answer, category) in enumerate(zip(PROMPTS, answers, CATEGORIES, strict=True))
        ]
        for answers in (OURS, THEIRS)
    ]
    write_rows(folder / "ours.jsonl", rows[0])
    write_rows(folder / "theirs.jsonl", rows[1][::-1])  # matched by id
    write_rows(folder / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return folder


@pytest.fixture
def flags(folder, monkeypatch):
    monkeypatch.setenv("EASYRL_CACHE", str(folder / "cache"))
    answers = {"generations": folder / "ours.jsonl", "baseline": folder / "theirs.jsonl"}
    model = {"load_checkpoint_reward": f"hf::{folder / 'reward'}", "template": "none", "seq_length": 16}
    return {
        "answers": answers,
        "judge": answers | {"judge": shlex.join([sys.executable, str(folder / "judge.py")])},
        "model": answers | model | {"mesh_dim": "1,1,1", "dtype": "fp32", "batch_size": 4},
        "pairs": model | {"dataset": folder / "pairs.jsonl"},
    }


def test_win_rate_by_a_judge(flags, tmp_path, capsys):
    out = tmp_path / "result.json"
    run_script(evaluate, flags["judge"] | {"exclude_category": "others", "output": out})
    results = json.loads(out.read_text())
    rows = {row["category"]: row["win_rate"] for row in results["categories"]}
    # The longer answer wins: loss, win, win in math, a loss in code, a tie in others.
    assert rows == {
        "all": pytest.approx(2.5 / 5),
        "math": pytest.approx(2 / 3),
        "code": 0.0,
        "others": 0.5,
        "mean_of_categories": pytest.approx((2 / 3 + 0 + 0.5) / 3),
        "mean_of_categories_without_others": pytest.approx((2 / 3 + 0) / 2),
    }
    assert (results["first_wins"], results["consistent"]) == (0.5, 1.0)
    assert results["mean_characters"] == {"generations": 22 / 5, "baseline": 24 / 5}
    printed = capsys.readouterr().out
    assert "66.7%" in printed and "first wins: 0.5" in printed
    assert json.dumps(results) not in printed


def test_win_rate_by_a_reward_model(flags, folder, capsys):
    run_script(evaluate, flags["model"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])

    model = load_model(f"hf::{folder / 'reward'}", make_mesh("1,1,1", jax.devices()[:1]), head="reward")
    tokenizer = make_tokenizer()

    def score(prompt, answer):
        tokens = [*tokenizer(prompt + answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        tokens = np.array(tokens)[-16:]  # the beginning is what a long conversation loses
        padded = np.zeros(16, np.int32)
        padded[: len(tokens)] = tokens
        segments = (np.arange(16) < len(tokens)).astype(np.int32)
        hidden, _ = trunk(model.params, model.cfg, padded[None], np.arange(16)[None], segments[None])
        return float(scalar(model.params, model.cfg, hidden)[0, len(tokens) - 1])

    ours = np.array([score(*pair) for pair in zip(PROMPTS, OURS, strict=True)])
    theirs = np.array([score(*pair) for pair in zip(PROMPTS, THEIRS, strict=True)])
    expected = 0.5 + 0.5 * np.sign(ours - theirs)
    assert expected[-1] == 0.5  # the same answer
    rows = {row["category"]: row for row in results["categories"]}
    assert rows["all"]["win_rate"] == pytest.approx(expected.mean())
    assert rows["math"]["win_rate"] == pytest.approx(expected[:3].mean())
    assert results["reward_mean"]["generations"] == pytest.approx(ours.mean(), abs=1e-5)
    assert results["reward_mean"]["baseline"] == pytest.approx(theirs.mean(), abs=1e-5)
    assert results["cut"] == pytest.approx(1 / 10)


def test_equal_answers_tie(flags, monkeypatch, capsys):
    """Though their scores differ by rounding."""
    noise = lambda sequences: 1 + 1e-6 * np.arange(len(sequences), dtype=np.float32)
    template = load_template("none", make_tokenizer())
    monkeypatch.setattr(evaluate, "load_scorer", lambda config: (noise, template, 16))
    run_script(evaluate, flags["model"] | {"baseline": flags["model"]["generations"]})
    (row,) = [
        row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["categories"] if row["category"] == "all"
    ]
    assert (row["wins"], row["ties"], row["losses"], row["win_rate"]) == (0, len(OURS), 0, 0.5)


def test_an_answer_that_was_cut_off_gets_no_end(flags, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "a", "response": "b"}]
    ours, theirs = (
        write_rows(tmp_path / f"{ended}.jsonl", [row | {"ended": ended} for row in rows]) for ended in (True, False)
    )
    seen, template = [], load_template("none", make_tokenizer())
    score = lambda sequences: seen.extend(sequences) or np.arange(len(sequences), dtype=np.float32)
    monkeypatch.setattr(evaluate, "load_scorer", lambda config: (score, template, 16))
    run_script(evaluate, flags["model"] | {"generations": ours, "baseline": theirs})
    assert seen[0].tolist() == [*seen[1], template.tokenizer.eos_token_id]
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["ended"] == {"generations": 1.0, "baseline": 0.0}


@pytest.mark.parametrize("use", ["model", "pairs"])
def test_a_score_that_is_not_finite_is_no_result(flags, tmp_path, monkeypatch, use):
    """Of two pairs of answers the first three are scored well."""
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "response": "d"}] * 2)
    scores = lambda tokens: np.array([1.0, 2.0, 3.0, np.nan][: len(tokens)], np.float32)
    monkeypatch.setattr(evaluate, "SequenceScorer", lambda *_, **__: scores)
    files = {key: tmp_path / "rows.jsonl" for key in ("dataset", "generations", "baseline") if key in flags[use]}
    with pytest.raises(
        RunFailed, match=r"reward: 1 of 4 scores are not finite, the first .* nan, of answer 2 of pair 2$"
    ):
        run_script(evaluate, flags[use] | files | {"output": tmp_path / "out.json"})
    assert not (tmp_path / "out.json").exists()


def test_a_long_conversation_keeps_the_token_that_begins_a_text(flags, monkeypatch):
    tokenizer, seen = make_tokenizer(), []
    template = dataclasses.replace(load_template("none", tokenizer), bos_id=tokenizer.convert_tokens_to_ids("o"))

    def score(sequences):
        seen.extend(tokenizer.decode(sequence) for sequence in sequences)
        return np.zeros(len(sequences))

    monkeypatch.setattr(evaluate, "load_scorer", lambda config: (score, template, 16))
    run_script(evaluate, flags["model"])
    assert "odogbarks a lot</s>" in seen


@pytest.mark.parametrize(
    ("use", "more", "complaint"),
    [
        (None, {}, "found nothing, expected --dataset, or --generations and --baseline"),
        ("model", {"baseline": ""}, "found --generations, expected --dataset, or --generations and --baseline"),
        ("judge", {"dataset": "x.jsonl"}, "found --baseline, --dataset, --generations, expected --dataset, or"),
        ("answers", {}, "found neither of --load_checkpoint_reward and --judge, expected one of them"),
        ("model", {"judge": "cat"}, "found both of --load_checkpoint_reward and --judge, expected one of them"),
        ("pairs", {"load_checkpoint_reward": "", "judge": "cat"}, "--judge=cat: does not judge a --dataset"),
        (
            "judge",
            {"exclude_category": "other"},
            "--exclude_category=other: no such category, found code, math, others",
        ),
        ("judge", {"generations": "nowhere.jsonl"}, "--generations=nowhere.jsonl: nowhere.jsonl: no such file"),
        ("pairs", {"dataset": "nowhere.jsonl"}, "--dataset: nowhere.jsonl: no such file"),
        ("pairs", {"split": "[1:"}, "--split=[1:: expected"),
        ("pairs", {"load_checkpoint_reward": "nothing"}, "--load_checkpoint_reward=nothing: expected hf::"),
        ("pairs", {"template": "chatml"}, "--template=chatml: the tokenizer has no token"),
    ],
)
def test_what_is_wrong_is_one_line(flags, use, more, complaint):
    with pytest.raises(UserError) as caught:
        run_script(evaluate, (flags[use] if use else {}) | more)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_language_model_cannot_score(flags, tmp_path):
    write_model(tmp_path / "lm")
    with pytest.raises(UserError, match=r"score.weight is missing, expected a reward model's head"):
        run_script(evaluate, flags["pairs"] | {"load_checkpoint_reward": f"hf::{tmp_path / 'lm'}"})


def test_a_place_that_cannot_be_written(flags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output=.*: cannot be written"):
        run_script(evaluate, flags["judge"] | {"output": tmp_path / "file" / "result.json"})
