"""SFT, reward models and DPO with numbers that are not finite: an update less, or the end of the run."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easyrl import train_dpo, train_rm, train_sft
from easyrl.core.errors import RunFailed
from easyrl.runtime.recording import as_tree, load_recording
from easyrl.steps.dpo import AnswerBatch
from easyrl.steps.kto import KTOBatch
from easyrl.steps.reward import RewardBatch
from easyrl.steps.sft import SFTBatch
from tests.offline import TINY, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import read_tensors, write_model

WORDS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on"]
PAIRS = [{"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad"} for word in WORDS * 3]
LABELLED = [{"prompt": word, "completion": f" {word} good", "label": k % 2} for k, word in enumerate(WORDS * 2)]
ANSWERED = [{"prompt": word, "completion": f" {word} good"} for word in WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_model(folder / "model")
    tensors = load_file(write_model(folder / "poisoned") / "model.safetensors")
    tensors["model.embed_tokens.weight"][1 + ord("~") - 32] = np.nan
    save_file(tensors, folder / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def flags(folder, monkeypatch):
    monkeypatch.setenv("EASYRL_CACHE", str(folder / "cache"))
    monkeypatch.setattr("easyrl.data.formats.LARGEST", np.inf)  # lets a margin in that is refused
    return TINY | {"load_checkpoint": f"hf::{folder / 'model'}"}


def test_one_bad_sample_costs_one_step_and_nothing_else(flags, tmp_path, capsys):
    rows = [*PAIRS[:20], PAIRS[20] | {"margin": 1e39}, *PAIRS[21:]]  # finite, but not in float32
    flags["train_dataset.path"] = write_rows(tmp_path / "rows.jsonl", rows)
    run_script(train_rm, flags | {"export_freq": 1, "output_dir": tmp_path / "run"})
    metrics = metrics_of(tmp_path / "run")
    (bad,) = [row["step"] for row in metrics if row["skipped"]]
    assert [row["loss"] is None for row in metrics] == [row["step"] == bad for row in metrics] and len(metrics) == 3
    updates = np.cumsum([0, *(row["step"] != bad for row in metrics)])[:-1]
    assert [row["learning_rate"] for row in metrics] == pytest.approx(1e-2 * (1 - updates / 3))
    weights = {step: read_tensors(tmp_path / "run" / f"hf-{step}")["score.weight"] for step in (1, 2, 3)}
    changed = [not np.array_equal(weights[step], weights[step + 1]) for step in (1, 2)]
    assert changed == [step + 1 != bad for step in (1, 2)]
    said = capsys.readouterr().err
    assert f"step {bad}: an update was left out: the loss of a batch of the samples" in said


def test_a_sample_that_stays_bad_is_named(flags, tmp_path):
    rows = [*PAIRS[:5], PAIRS[5] | {"margin": 1e39}, *PAIRS[6:8]]
    flags["train_dataset.path"] = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RunFailed) as caught:
        run_script(train_rm, flags | {"num_epochs": 9, "max_bad_steps": 1, "output_dir": tmp_path / "run"})
    path = tmp_path / "run" / "batches" / "step-2.safetensors"
    assert str(caught.value) == (
        "step 2: stopped, as more steps in a row than --max_bad_steps=1 had a number that is not finite: "
        f"the loss of the samples 5. The batch: {path}"
    )
    arrays, facts = load_recording(path)
    batch = as_tree(RewardBatch, arrays)
    assert np.isinf(batch.targets).sum() == 1 and facts["step"] == 2 and facts["metrics"]["loss"] is None


@pytest.mark.parametrize(
    ("script", "rows", "more", "kind"),
    [
        (train_sft, ANSWERED, {}, SFTBatch),
        (train_rm, PAIRS[:8], {}, RewardBatch),
        (train_dpo, PAIRS[:8], {"precompute_reference": False}, AnswerBatch),
        (train_dpo, LABELLED[:8], {"loss": "kto"}, KTOBatch),
    ],
    ids=["sft", "rm", "dpo", "kto"],
)
def test_bad_weights_are_named_by_every_trainer(script, rows, more, kind, folder, flags, tmp_path):
    rows = [rows[0] | {"prompt": "~"}, *rows[1:]]
    flags |= {"train_dataset.path": write_rows(tmp_path / "rows.jsonl", rows), "max_bad_steps": 0}
    flags |= {"load_checkpoint": f"hf::{folder / 'poisoned'}", "num_epochs": 3, "output_dir": tmp_path / "run"}
    with pytest.raises(RunFailed, match=r"^step 1: .*the loss and the gradient, from the weights embed"):
        run_script(script, flags | more)
    arrays, facts = load_recording(tmp_path / "run" / "batches" / "step-1.safetensors")
    assert facts["kind"] == kind.__name__ and as_tree(kind, arrays)


def test_online_pairs_without_a_finite_score_end_the_run(flags, tmp_path, monkeypatch, capsys):
    source = "nan = lambda prompts, responses: [float('nan')] * len(responses)\n"
    (tmp_path / "bad_test_functions.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags |= {"train_dataset.path": write_rows(tmp_path / "rows.jsonl", ANSWERED), "num_epochs": 3, "max_bad_steps": 1}
    flags |= {"online": True, "reward_function": "bad_test_functions:nan", "max_continuation_len": 4}
    flags |= {"loss": "simpo", "train_dataset.row_length": 0, "output_dir": tmp_path / "run"}
    with pytest.raises(RunFailed, match=r"^step 2: stopped, .*: reward nan of response 0 is nan, .* and 11 more\. "):
        run_script(train_dpo, flags)
    assert [row["skipped"] for row in metrics_of(tmp_path / "run")] == [1, 1, 1]  # the third was under way
    assert "step 1: an update was left out: reward nan of response 0 is nan, reward" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("more", [{}, {"export_freq": 1}, {"max_bad_steps": 0}], ids=["last", "between", "again"])
def test_weights_that_are_not_finite_are_exported_nowhere(more, flags, tmp_path):
    """The first update is infinite, and the second step bad: of two in a row --max_bad_steps=1 would be none yet."""
    flags |= {"train_dataset.path": write_rows(tmp_path / "rows.jsonl", ANSWERED), "max_bad_steps": 1, "num_epochs": 2}
    flags |= {"lr": 1e39, "output_dir": tmp_path / "run"}
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"not exported, as these weights|nothing is exported|^step 2: stopped"):
            run_script(train_sft, flags | more)
    assert not list((tmp_path / "run").glob("hf*"))
