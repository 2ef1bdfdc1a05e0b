"""train_dpo from rows on disk to an exported folder: references kept, asked live or not needed; every kind of data."""

import json

import numpy as np
import pytest

from easyrl import train_dpo
from easyrl.core.errors import UserError
from easyrl.hf.presets import PRESETS
from easyrl.runtime import reference
from tests.offline import TINY, facts_of_card, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import write_model

WORDS = ["sun", "river", "old dog", "why", "tell me", "a b", "blue", "go on"]
PAIRS = [
    {"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad{' bad' * (k % 2)}"}
    for k, word in enumerate(WORDS * 2)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("rejected", "chosen")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    write_model(folder / "model")
    write_model(folder / "other", seed=3)
    write_rows(folder / "pairs.jsonl", PAIRS)
    write_rows(folder / "labelled.jsonl", LABELLED)
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYRL_CACHE", str(folder / "cache"))
        yield TINY | {"load_checkpoint": f"hf::{folder / 'model'}", "train_dataset.path": folder / "pairs.jsonl"}


@pytest.fixture(scope="module")
def trained(folder, flags):
    more = {"eval_dataset.path": folder / "pairs.jsonl", "eval_freq": 5, "num_epochs": 10}
    run_script(train_dpo, flags | more | {"output_dir": folder / "run"})
    return folder / "run"


def test_it_starts_at_log_2_and_learns_to_prefer(trained):
    rows = metrics_of(trained)
    assert rows[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 5, 10, 15, 20]
    last = rows[-1]
    assert last["eval/rewards/accuracies"] == 1.0
    assert last["eval/loss"] < 0.3
    assert last["eval/rewards/margins"] == pytest.approx(
        last["eval/rewards/chosen"] - last["eval/rewards/rejected"], rel=1e-4
    )
    assert last["alarms/chosen_falls"] == 0
    assert json.loads((trained / "best.json").read_text())["eval/loss"] == min(
        row["eval/loss"] for row in rows if "eval/loss" in row
    )


def test_the_run_leaves_what_every_run_leaves(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "best.json", "hf", "report.html"} <= names
    (facts,) = (trained / "checkpoints").glob("*/run.json")
    assert json.loads(facts.read_text())["frozen"].keys() == {"load_checkpoint"}  # the reference
    card = (trained / "hf" / "README.md").read_text()
    assert "DPO" in card and "label smoothing" in card and "dpop" not in card
    assert facts_of_card(trained / "hf")["num_epochs"] == "10"
    assert json.loads((trained / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_plain_torch_takes_the_same_steps(folder, flags, tmp_path):
    """An independent check of the whole chain: texts, masks, log-probs, reference, loss, gradient, AdamW."""
    torch = pytest.importorskip("torch", reason="compares with transformers on torch")
    import transformers

    settings = {
        "train_dataset.shuffle": False, "total_steps": 4, "lr": 1e-3, "lr_schedule": "constant",
        "label_smoothing": 0.1, "nll_coef": 0.5, "output_dir": tmp_path,
    }  # fmt: skip
    run_script(train_dpo, flags | settings)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    policy, frozen = (transformers.AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    def answers(model, pairs, side):
        """(log-prob, number of tokens) of the answers, one sequence at a time."""
        sums, lengths = [], []
        for pair in pairs:
            question = tokenizer(pair["prompt"]).input_ids
            answer = [*tokenizer(pair[side]).input_ids, tokenizer.eos_token_id]
            logprobs = torch.log_softmax(model(torch.tensor([question + answer])).logits[0], dim=-1)
            places = torch.arange(len(question) - 1, len(question) + len(answer) - 1)
            sums.append(logprobs[places, torch.tensor(answer)].sum())
            lengths.append(len(answer))
        return torch.stack(sums), torch.tensor(lengths)

    for step, row in enumerate(metrics_of(tmp_path)):
        pairs = PAIRS[:8] if step % 2 == 0 else PAIRS[8:]
        (chosen, lengths), (rejected, _) = (answers(policy, pairs, side) for side in ("chosen", "rejected"))
        with torch.no_grad():
            (ref_chosen, _), (ref_rejected, _) = (answers(frozen, pairs, side) for side in ("chosen", "rejected"))
        chosen_rewards, rejected_rewards = 0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)
        margins, logsigmoid = chosen_rewards - rejected_rewards, torch.nn.functional.logsigmoid
        nll = -chosen.sum() / lengths.sum()
        loss = (-0.9 * logsigmoid(margins) - 0.1 * logsigmoid(-margins)).mean() + 0.5 * nll
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        expected = {
            "loss": loss, "nll_loss": nll, "grad_norm": norm, "rewards/margins": margins.mean(),
            "rewards/chosen": chosen_rewards.mean(), "rewards/rejected": rejected_rewards.mean(),
            "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(),
            "rewards/accuracies": (margins > 0).float().mean() if step else None,  # at first a matter of rounding
        }  # fmt: skip
        for name, value in expected.items():
            if value is not None:
                assert row[name] == pytest.approx(value.item(), rel=1e-4, abs=2e-5), (step, name)


def computed(monkeypatch):
    """A list that grows with every batch that the reference is asked about."""
    calls, original = [], reference.make_answer_logprobs

    def counting(*args):
        logprobs = original(*args)
        return lambda *arrays: calls.append(1) or logprobs(*arrays)

    monkeypatch.setattr(reference, "make_answer_logprobs", counting)
    return calls


EXACT = ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "grad_norm")


def test_a_live_reference_gives_the_run_of_the_kept_one(trained, folder, flags, tmp_path, monkeypatch):
    calls = computed(monkeypatch)
    short = flags | {"total_steps": 3}
    run_script(train_dpo, short | {"output_dir": tmp_path / "kept"})
    assert not calls  # the run before this one has left them
    run_script(train_dpo, short | {"precompute_reference": False, "output_dir": tmp_path / "live"})
    assert len(calls) == 3
    for kept, live in zip(metrics_of(tmp_path / "kept"), metrics_of(tmp_path / "live"), strict=True):
        assert {name: kept[name] for name in EXACT} == pytest.approx({name: live[name] for name in EXACT}, abs=1e-4)


def test_a_precomputation_that_was_killed_goes_on(folder, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PART", 1)
    flags = flags | {"train_dataset.cache_dir": tmp_path / "cache", "total_steps": 1}
    calls = computed(monkeypatch)
    write = reference._write_part

    def dies(folder, first, part):
        write(folder, first, part)
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "_write_part", dies)
    with pytest.raises(KeyboardInterrupt):
        run_script(train_dpo, flags | {"output_dir": tmp_path / "killed"})
    monkeypatch.setattr(reference, "_write_part", write)
    run_script(train_dpo, flags | {"output_dir": tmp_path / "run"})
    assert len(calls) == 2  # one for each batch of the data
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_another_reference_is_another_question(folder, flags, tmp_path):
    other = {"load_checkpoint_reference": f"hf::{folder / 'other'}", "total_steps": 1, "output_dir": tmp_path}
    run_script(train_dpo, flags | other)
    (row,) = metrics_of(tmp_path)
    assert abs(row["rewards/margins"]) > 1e-3


def test_eight_devices_and_other_micro_batches_give_the_same_run(trained, flags, tmp_path):
    more = {"mesh_dim": "2,2,2", "micro_batch_size": 8, "total_steps": 3, "output_dir": tmp_path}
    run_script(train_dpo, flags | more, num_devices=8)
    run_script(train_dpo, flags | {"total_steps": 3, "output_dir": tmp_path / "one"})
    for one, eight in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path), strict=True):
        assert {name: eight[name] for name in EXACT} == pytest.approx({name: one[name] for name in EXACT}, abs=2e-5)


def test_kto_learns_from_labels(folder, flags, tmp_path):
    kto = {
        "loss": "kto", "train_dataset.path": folder / "labelled.jsonl", "eval_dataset.path": folder / "labelled.jsonl",
        "num_epochs": 6, "output_dir": tmp_path,
    }  # fmt: skip
    run_script(train_dpo, flags | kto)
    rows = metrics_of(tmp_path)
    assert [rows[0]["eval/loss"], rows[1]["loss"]] == pytest.approx([0.5, 0.5], abs=1e-5)  # 1 - sigmoid(0)
    last = rows[-1]
    assert last["eval/loss"] < 0.35
    assert last["eval/rewards/chosen"] > 0 > last["eval/rewards/rejected"]
    assert last["eval/rewards/margins"] == pytest.approx(
        last["eval/rewards/chosen"] - last["eval/rewards/rejected"], rel=1e-4
    )
    assert "KTO" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    ("good", "settings", "told"),
    [
        (4, {}, "labels: 4 good, 4 bad"),
        (6, {}, "labels: 6 good, 2 bad: advised is --undesirable_weight=3, or down to a quarter less"),
        (6, {"undesirable_weight": 2.5}, "labels: 6 good, 2 bad"),
        (2, {"desirable_weight": 3.0}, "labels: 2 good, 6 bad"),
        (0, {}, "labels: 0 good, 8 bad: expected some of both"),
    ],
)
def test_kto_says_how_labels_are_balanced(good, settings, told):
    config = train_dpo.Config(loss="kto", **settings)
    assert train_dpo.balance(config, np.arange(8) < good) == told


def test_a_loss_without_reference_asks_none(flags, tmp_path, monkeypatch):
    calls = computed(monkeypatch)
    flags = flags | {"train_dataset.cache_dir": tmp_path / "cache"}
    run_script(train_dpo, flags | {"loss": "orpo", "total_steps": 2, "output_dir": tmp_path / "run"})
    assert not calls and not (tmp_path / "cache" / "reference").exists()
    first = metrics_of(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(first["preference_loss"] + first["nll_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"load_checkpoint": ""}, "--load_checkpoint: found nothing, expected hf::DIR_OR_HUB_ID"),
        ({"train_dataset.path": ""}, "--train_dataset.path: found nothing"),
        ({"loss": "dpo"}, "loss=dpo: expected one of sigmoid, "),
        ({"beta": 0}, "beta=0: expected more than 0"),
        ({"loss": "kto", "train_dataset.path": "unlabelled.jsonl"}, "column `label` is missing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "--label_smoothing=0.1: --loss=ipo does not read it"),
        (
            {"loss": "simpo", "load_checkpoint_reference": "hf::x"},
            "--load_checkpoint_reference=hf::x: --loss=simpo needs no reference",
        ),
        ({"load_checkpoint_reference": "hf::/nowhere"}, "--load_checkpoint_reference=hf::/nowhere: no such folder"),
        ({"load_checkpoint_reference": "random::small.json"}, "ids go up to 103, the model has embeddings for 0 to 63"),
        ({"micro_batch_size": 3, "mesh_dim": "2,1,1"}, "--micro_batch_size=3: expected a multiple of 2: dp x fsdp = 2"),
        ({"train_dataset.batch_size": 17}, "found 16 samples, fewer than --train_dataset.batch_size=17"),
        ({"train_dataset.seq_length": 64}, "reads up to 48 tokens, --train_dataset.seq_length is 64"),
        ({"lr_schedule": "constant", "end_lr": 1e-7}, "--end_lr=1e-07: --lr_schedule=constant does not read it"),
    ],
)
def test_what_is_wrong_is_one_line(flags, tmp_path, monkeypatch, more, complaint):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "unlabelled.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "small.json").write_text(json.dumps(PRESETS["debug"] | {"vocab_size": 64}))
    with pytest.raises(UserError) as caught:
        run_script(train_dpo, flags | {"output_dir": "run"} | more, num_devices=2 if "mesh_dim" in more else 1)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
