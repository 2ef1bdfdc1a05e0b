"""train_rm from rows on disk to an exported folder, and evaluate's measure of it."""

import json
import re

import numpy as np
import pytest

from easyrl import convert, evaluate, train_rm
from easyrl.core.errors import UserError
from tests.offline import TINY, explained, facts_of_card, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import make_tokenizer, write_model

WORDS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on"]
# Only the last word tells the answers apart. Chosen is the longer answer in `long`, the shorter one in half of `mixed`.
PAIRS = [
    {"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad", "subset": "long"} for word in WORDS
] + [
    {"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad{' bad' * (k % 2)}", "subset": "mixed"}
    for k, word in enumerate(WORDS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYRL_CACHE", str(folder / "cache"))
        yield TINY | {
            "load_checkpoint": f"hf::{folder / 'model'}",
            "train_dataset.path": folder / "pairs.jsonl",
            "eval_dataset.path": folder / "pairs.jsonl",
        }


@pytest.fixture(scope="module")
def trained(folder, flags):
    run_script(train_rm, flags | {"num_epochs": 10, "eval_freq": 5, "output_dir": folder / "run"})
    return folder / "run"


def test_accuracy_rises_on_pairs_that_one_word_tells_apart(trained):
    rows = metrics_of(trained)
    evaluated = [row for row in rows if "eval/accuracy" in row]
    assert [row["step"] for row in evaluated] == [0, 5, 10, 15, 20]
    assert evaluated[0]["eval/accuracy"] < 0.9
    last = evaluated[-1]
    assert last["eval/accuracy"] == last["eval/accuracy/long"] == last["eval/accuracy/mixed"] == 1.0
    assert last["eval/longer_wins"] == pytest.approx((8 + 4) / 16)
    assert last["eval/loss"] < 0.3 < evaluated[0]["eval/loss"]
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert json.loads((trained / "best.json").read_text())["eval/accuracy"] == 1.0
    assert facts_of_card(trained / "hf")["loss"] == "pairwise"


def test_every_metric_is_explained(trained):
    names = {re.sub("(?<=^eval/accuracy/).*", "<subset>", name) for row in metrics_of(trained) for name in row}
    assert names - {"step"} - explained("sft.md") == explained("reward_models.md") - explained("sft.md")
    assert names - {"step"} >= explained("reward_models.md")


def test_the_export_carries_the_statistics_of_its_rewards(trained):
    last = metrics_of(trained)[-1]
    config = json.loads((trained / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["reward_mean"] == pytest.approx(last["eval/mean_reward"])
    assert config["reward_std"] == pytest.approx(last["eval/reward_std"])
    assert config["reward_std"] > 0


def test_what_convert_makes_of_its_checkpoint_carries_them_too(trained, tmp_path):
    run_script(convert, {"load_checkpoint": f"easyrl::{trained}", "output_dir": tmp_path / "hf"})
    exported, converted = (json.loads((at / "hf" / "config.json").read_text()) for at in (trained, tmp_path))
    assert exported == converted


def test_evaluate_finds_what_training_reported(trained, folder, capsys):
    run_script(
        evaluate,
        {"load_checkpoint_reward": f"hf::{trained / 'hf'}", "dataset": folder / "pairs.jsonl", "mesh_dim": "1,1,1"}
        | {"dtype": "fp32", "batch_size": 10, "seq_length": 32},
    )
    printed = capsys.readouterr().out.splitlines()
    results, last = json.loads(printed[-1]), metrics_of(trained)[-1]
    rows = {row["subset"]: row for row in results["subsets"]}
    assert list(rows) == ["all", "long", "mixed", "mean_of_subsets"]
    assert rows["all"] == {"subset": "all", "samples": 16, "accuracy": 1.0, "longer_wins": 0.75}
    assert rows["mixed"]["longer_wins"] == 0.5
    assert results["reward_mean"] == pytest.approx(last["eval/mean_reward"], rel=1e-4)
    assert results["reward_std"] == pytest.approx(last["eval/reward_std"], rel=1e-4)
    assert any(line.split() == ["mixed", "8", "100.0%", "50.0%"] for line in printed)


def test_transformers_gives_the_same_scores(trained, folder):
    torch = pytest.importorskip("torch", reason="compares with transformers on torch")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained / "hf")
    assert model.config.reward_mean == pytest.approx(metrics_of(trained)[-1]["eval/mean_reward"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    scores = []
    for pair in PAIRS:
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            assert inputs.input_ids[0, -1] == make_tokenizer().eos_token_id
            with torch.no_grad():
                scores.append(model(**inputs).logits[0, 0].item())
    assert np.mean(scores) == pytest.approx(model.config.reward_mean, abs=1e-4)
    assert np.std(scores) == pytest.approx(model.config.reward_std, abs=1e-4)


def test_training_goes_on_from_a_reward_model(trained, folder, flags, tmp_path):
    start = {"load_checkpoint": f"hf::{trained / 'hf'}", "template": "tokenizer", "total_steps": 1}
    run_script(train_rm, flags | start | {"output_dir": tmp_path})
    assert metrics_of(tmp_path)[0]["eval/loss"] == pytest.approx(metrics_of(trained)[-1]["eval/loss"], rel=1e-5)


def test_pointwise_learns_labels_and_takes_pairs_apart(folder, flags, tmp_path):
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("rejected", "chosen")
    ]
    path = write_rows(tmp_path / "labelled.jsonl", labelled)
    run = tmp_path / "run"
    run_script(train_rm, flags | {"loss": "pointwise", "train_dataset.path": path, "num_epochs": 8, "output_dir": run})
    rows = metrics_of(run)
    first, last = rows[0], rows[-1]
    assert len(rows) == 1 + 8 * 32 // 8
    assert last["eval/accuracy"] == last["eval/accuracy/mixed"] == 1.0 > first["eval/accuracy"]
    assert last["eval/rewards/chosen"] > 0 > last["eval/rewards/rejected"]
    assert "eval/longer_wins" not in last
    # Half of the answers have the label 1: the loss is the mean over both kinds.
    assert last["eval/loss"] < 0.3 < first["eval/loss"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"loss": "pointwise", "label_smoothing": 0.1}, "--label_smoothing=0.1: --loss=pointwise does not read it"),
        ({"loss": "pointwise", "center_coef": 0.1}, "--center_coef=0.1: --loss=pointwise does not read it"),
        ({"label_smoothing": 0.5}, "--label_smoothing=0.5: expected less than 0.5"),
        ({"center_coef": -1}, "center_coef=-1: expected 0 or more"),
        ({"loss": "hinge"}, "loss=hinge: expected one of pairwise, pointwise"),
        ({"train_dataset.row_length": 20}, "--train_dataset.row_length=20: expected at least"),
    ],
)
def test_what_is_wrong_is_one_line(flags, tmp_path, more, complaint):
    with pytest.raises(UserError) as caught:
        run_script(train_rm, flags | {"output_dir": tmp_path} | more)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_language_models_rows_are_refused(flags, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=r"--train_dataset.path: .*rows.jsonl line 1: column `chosen` is missing"):
        run_script(train_rm, flags | {"train_dataset.path": path, "output_dir": tmp_path / "run"})
