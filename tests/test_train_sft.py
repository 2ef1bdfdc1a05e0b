"""train_sft from rows on disk to an exported folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easyrl import train_sft
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.hf.refs import load_model
from easyrl.models.heads import lm_logits
from easyrl.models.trunk import trunk
from tests.offline import TINY, explained, facts_of_card, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import make_tokenizer, write_model

PROMPTS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on", "nine", "it", "seven", "x"]
ROWS = [
    {"prompt": prompt, "completion": f" {prompt} is " + "good " * (1 + number % 2)}
    for number, prompt in enumerate(PROMPTS)
]
KEPT = "if its checkpoint was kept, python -m easyrl.convert --load_checkpoint="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture
def flags(folder, monkeypatch):
    monkeypatch.setenv("EASYRL_CACHE", str(folder / "cache"))
    return TINY | {"load_checkpoint": f"hf::{folder / 'model'}", "train_dataset.path": folder / "rows.jsonl"}


def plain_loss(model_dir, answers_only):
    """Mean of -log p over tokens of all rows, one row at a time, in float64."""
    mesh = make_mesh("1,1,1", jax.devices()[:1])
    model = load_model(f"hf::{model_dir}", mesh, head="lm")
    tokenizer = make_tokenizer()
    width = 32
    total = count = 0
    for row in ROWS:
        prompt, answer = (tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "completion"))
        tokens = np.array([*prompt, *answer, tokenizer.eos_token_id])
        padded = np.zeros(width, np.int32)
        padded[: len(tokens)] = tokens
        segments = (np.arange(width) < len(tokens)).astype(np.int32)
        hidden, _ = trunk(model.params, model.cfg, padded[None], np.arange(width)[None], segments[None])
        logits = np.asarray(lm_logits(model.params, model.cfg, hidden)[0], np.float64)[: len(tokens) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        first = len(prompt) - 1 if answers_only else 0
        learnt = logprobs[np.arange(len(tokens) - 1), tokens[1:]][first:]
        total, count = total - learnt.sum(), count + len(learnt)
    return total / count, count


def test_a_run_learns_and_leaves_everything_it_promises(folder, flags, tmp_path):
    more = {"eval_dataset.path": folder / "rows.jsonl", "eval_freq": 2, "num_epochs": 6, "save_best": True}
    run_script(train_sft, flags | more | {"export_freq": 5, "output_dir": tmp_path})

    names = {path.name for path in tmp_path.iterdir()}
    exports = {"hf", "hf_best", "hf-5"}
    rows = metrics_of(tmp_path)
    assert {name for row in rows for name in row} - {"step"} == explained("sft.md")
    assert names == exports | {
        ".lock",
        "best.json",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "samples.jsonl",
        "run_id.txt",
    }
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]  # 12 rows, 8 a step: one step an epoch
    evaluated = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert list(evaluated) == [0, 2, 4, 6]
    # The untrained model, on batches of 8 and 4 rows: every token weighs the same.
    loss, _ = plain_loss(folder / "model", answers_only=True)
    assert evaluated[0] == pytest.approx(loss, rel=1e-5)
    assert rows[0]["eval/perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert evaluated[6] < evaluated[2] < evaluated[0]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"step": min(evaluated, key=evaluated.get), "eval/loss": min(evaluated.values())}
    assert rows[-1]["eval/best_step"] == best["step"]
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([1e-2 * (1 - k / 6) for k in range(6)])

    trained = load_model(f"hf::{tmp_path / 'hf'}", make_mesh("1,1,1", jax.devices()[:1]), head="lm")
    assert trained.stop_ids == (make_tokenizer().eos_token_id,)
    assert plain_loss(tmp_path / "hf", answers_only=True)[0] == pytest.approx(evaluated[6], rel=1e-5)
    assert "eval/perplexity" in (tmp_path / "hf" / "README.md").read_text()
    assert facts_of_card(tmp_path / "hf")["num_epochs"] == "6"
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trained.params))


def test_a_run_that_goes_on_with_save_best_and_then_other_held_out_rows(flags, tmp_path, capsys):
    write_rows(tmp_path / "held_out.jsonl", ROWS)
    flags = flags | {"eval_dataset.path": tmp_path / "held_out.jsonl", "output_dir": tmp_path / "run"}
    run_script(train_sft, flags | {"total_steps": 2})
    run_script(train_sft, flags | {"total_steps": 2, "save_best": True})
    checkpoint = f"easyrl::{tmp_path / 'run' / 'checkpoints' / '2'}"
    assert f"the best step by eval/loss was 2, and there is no hf_best of it; {KEPT}{checkpoint} exports it" in (
        capsys.readouterr().err
    )
    write_rows(tmp_path / "held_out.jsonl", [{"prompt": "x", "completion": " zebras"}])
    run_script(train_sft, flags | {"total_steps": 3, "save_best": True, "allow_config_change": "total_steps"})
    *_, before, last = metrics_of(tmp_path / "run")
    assert last["eval/loss"] > before["eval/loss"] and (before["eval/best_step"], last["eval/best_step"]) == (2, 3)
    assert (tmp_path / "run" / "hf_best" / "config.json").exists() and "no hf_best" not in capsys.readouterr().err


def test_loss_on_all_tokens_in_several_passes(folder, flags, tmp_path):
    # All 12 rows in one step, which takes several passes of one packed row.
    more = {"train_dataset.batch_size": 12, "loss_on": "all", "total_steps": 1, "output_dir": tmp_path}
    run_script(train_sft, flags | more)
    loss, count = plain_loss(folder / "model", answers_only=False)
    (row,) = metrics_of(tmp_path)
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["tokens"] == count + len(ROWS)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"load_checkpoint": ""}, "--load_checkpoint: found nothing, expected hf::"),
        ({"load_checkpoint": "random::debug"}, "--tokenizer: found nothing"),
        ({"train_dataset.seq_length": 99}, "tokens, --train_dataset.seq_length is 99"),
        ({"train_dataset.path": ""}, "--train_dataset.path: found nothing"),
        ({"train_dataset.path": "nowhere.jsonl"}, "--train_dataset.path: nowhere.jsonl: no such file"),
        ({"eval_dataset.path": "nowhere.jsonl"}, "--eval_dataset.path: nowhere.jsonl: no such file"),
        ({"eval_dataset.split": "[4:2"}, None),
        ({"eval_dataset.split": "[4:]"}, "--eval_dataset.split=[4:]: needs --eval_dataset.path, which is not given"),
        ({"template": "nothing"}, "--template=nothing: found no such template"),
        (
            {"mesh_dim": "4,2,1", "micro_batch_size": 12},
            "--micro_batch_size=12: expected a multiple of 8: dp x",
        ),
        ({"save_best": True}, "--save_best: nothing says which is the best, expected --eval_dataset.path, too"),
        ({"loss_on": "prompts"}, "loss_on=prompts: expected one of answers, all"),
        ({"lr": -1}, "lr=-1: expected 0 or more"),
    ],
)
def test_what_is_wrong_is_one_line(flags, tmp_path, more, complaint):
    if complaint is None:  # a split without data is refused for that
        more |= {"eval_dataset.path": flags["train_dataset.path"]}
        complaint = "--eval_dataset.split=[4:2: expected"
    with pytest.raises(UserError) as caught:
        run_script(train_sft, flags | {"output_dir": tmp_path} | more, num_devices=8 if "mesh_dim" in more else 1)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.yaml").exists()


def test_a_bad_row_is_named_and_foreign_files_are_left_alone(folder, flags, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:2], {"prompt": "a", "completion": " "}])
    with pytest.raises(UserError, match=r"--eval_dataset.path: .*rows.jsonl line 3: .*completion"):
        run_script(train_sft, flags | {"eval_dataset.path": path, "output_dir": tmp_path / "run"})
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files that are not an earlier export"):
        run_script(train_sft, flags | {"output_dir": tmp_path / "run"})
    assert (tmp_path / "run" / "hf" / "thesis.txt").read_text() == "precious"
