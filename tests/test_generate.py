"""generate: what rows hold, that layout and interruption change nothing, best of N, data makers, wrong input."""

import json

import jax
import numpy as np
import pytest

from easyrl import assets, generate, train_dpo, train_rm, train_sft
from easyrl.core.command_line import load_config
from easyrl.core.errors import UserError
from easyrl.data import templates
from easyrl.data.generations import read_generations
from easyrl.sampling.best_of_n import expected_best
from tests.offline import TINY, metrics_of, run_script, write_rows
from tests.train_ppo.conftest import FUNCTIONS, STOP_IDS, make_tokenizer, write_model

ROWS = [
    {"prompt": "sun", "id": 7, "category": "sky"},
    {"instruction": "a much longer question than others", "reference": ["x", "y"]},
    {"messages": [{"role": "user", "content": "why"}], "id": "w"},
    {"turns": ["first", "second"], "category": "turns"},
    {"instruction": "go", "input": "on", "output": "an old answer"},
]
NAMES = {"response", "ended"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    write_model(folder / "policy")
    write_model(folder / "reward", "reward", seed=1)
    write_model(folder / "foreign", "reward", seed=2, tokenizer=make_tokenizer("<end>", 9))
    write_rows(folder / "prompts.jsonl", ROWS)
    (folder / "generate_test_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("EASYRL_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def flags(folder):
    return {
        "load_checkpoint": f"hf::{folder / 'policy'}", "prompts": folder / "prompts.jsonl", "template": "none",
        "max_new_tokens": 8, "dtype": "fp32", "mesh_dim": "1,1,1", "batch_size": 4,
        "stop_ids": ",".join(map(str, STOP_IDS)),
    }  # fmt: skip


@pytest.fixture
def answers(flags, tmp_path):
    """`answers(**flags)`: the rows of a run with these flags; `num_devices` is no flag."""

    def start(num_devices=1, **more):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        run_script(generate, flags | {"output": path} | more, num_devices)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return start


def test_every_column_stays_and_the_order_is_that_of_the_prompts(answers, folder, tmp_path):
    found = answers()
    assert [{name: row[name] for name in row if name not in NAMES} for row in found] == ROWS
    assert all(type(row["response"]) is str and type(row["ended"]) is bool for row in found)
    rows = read_generations(str(tmp_path / "0.jsonl"), "--generations")  # what evaluate reads
    assert [row.answer for row in rows] == [row["response"] for row in found]
    assert rows[3].messages[0].content == "first" and rows[3].columns["category"] == "turns"


def test_layout_decides_nothing(answers):
    whole = answers(num_samples=3)
    assert [row["sample"] for row in whole] == [0, 1, 2] * 5
    assert len({row["response"] for row in whole}) > 10  # else agreement would mean little
    assert answers(num_samples=3, batch_size=2, decode_rows=4) == whole
    assert answers(num_samples=3, batch_size=8, mesh_dim="2,2,2", num_devices=8) == whole
    assert [row["response"] for row in answers()] == [row["response"] for row in whole[::3]]
    assert answers(num_samples=3, seed=1) != whole


def test_the_weights_are_there_once(answers, monkeypatch):
    loaded, original = [], generate.load_weights
    monkeypatch.setattr(
        generate, "load_weights", lambda *args, **more: loaded.append(original(*args, **more)) or loaded[0]
    )
    answers()
    assert all(x.is_deleted() for x in jax.tree.leaves(loaded[0]["layers"]))


def test_temperature_0_says_the_likeliest(answers, folder):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="compares with transformers on torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": STOP_IDS, "pad_token_id": 0}
    for ours, penalty in ((answers(temperature=0), 1.0), (answers(temperature=0, repetition_penalty=1.3), 1.3)):
        for row, prompt in zip(ours, ["sun", "a much longer question than others", "why", "first"], strict=False):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            said = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty, **greedy)
            assert row["response"] == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_killed_job_goes_on(answers, tmp_path, monkeypatch, flags):
    whole = answers()
    calls, original = [], generate.join_samples

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(generate, "join_samples", dies)
    output = {"output": tmp_path / "killed.jsonl", "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        run_script(generate, flags | output)
    part = tmp_path / "killed.jsonl.part"
    assert len(part.read_text().splitlines()) == 3 and not (tmp_path / "killed.jsonl").exists()
    with part.open("a") as file:
        file.write('{"item": 0, "ro')
    with pytest.raises(UserError, match=r"killed.jsonl.part: was begun with temperature=1.0, now it is 0.5"):
        run_script(generate, flags | output | {"temperature": 0.5})
    with monkeypatch.context() as edited:
        edited.setitem(templates.BODIES, "none", "Q: " + templates.BODIES["none"])
        with pytest.raises(UserError, match=r"killed.jsonl.part: was begun with the template's text="):
            run_script(generate, flags | output)
    run_script(generate, flags | output)
    assert len(calls) == 4  # two batches of the three, after the one that was done
    assert [json.loads(line) for line in (tmp_path / "killed.jsonl").read_text().splitlines()] == whole
    assert not part.exists()


def test_best_of_n_keeps_all_candidates(answers, folder):
    reward = {"load_checkpoint_reward": f"hf::{folder / 'reward'}"}
    pool = answers(num_samples=4, **reward)
    for row, candidates in zip(answers(best_of=4, **reward), np.reshape(pool, (5, 4)), strict=True):
        assert [{name: one[name] for name in ("response", "ended", "score")} for one in candidates] == row["candidates"]
        best = max(row["candidates"], key=lambda one: one["score"])
        assert {name: row[name] for name in best} == best


@pytest.mark.parametrize(
    "reward",
    [{"load_checkpoint_reward": "hf::{}/foreign", "reward_template": "none"},
     {"reward_function": "generate_test_functions:length", "missing_eos": "mask"}],
    ids=["another tokenizer", "a function"],
)  # fmt: skip
def test_any_source_of_reward(answers, folder, reward):
    reward = {name: value.format(folder) for name, value in reward.items()}
    for row in answers(best_of=3, **reward):
        scores = [one.get("score") for one in row["candidates"]]
        if "missing_eos" in reward:
            assert [score is not None for score in scores] == [one["ended"] for one in row["candidates"]]
        known = [score for score in scores if score is not None]
        assert row.get("score") == (max(known) if known else None)


def test_best_of_8_brings_what_order_statistics_predict(tmp_path, capsys):
    """Two independent measurements: the mean of the best of 8, and its prediction from 24 other answers."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(assets.TRAIN_PROMPTS.read_text().splitlines(keepends=True)[:24]))
    common = {
        "load_checkpoint": f"hf::{assets.POLICY}", "load_checkpoint_reward": f"hf::{assets.REWARD_MODEL}",
        "prompts": prompts, "max_new_tokens": 56, "dtype": "fp32", "mesh_dim": "1,1,1", "batch_size": 24,
    }  # fmt: skip
    for name, more in {"pool": {"num_samples": 24}, "best": {"best_of": 8, "seed": 43}}.items():
        run_script(generate, common | more | {"output": tmp_path / f"{name}.jsonl"})
    pool = np.reshape([json.loads(line)["score"] for line in (tmp_path / "pool.jsonl").open()], (24, 24))
    best = np.array([json.loads(line)["score"] for line in (tmp_path / "best.jsonl").open()])
    predicted = np.array([expected_best(scores, 8) for scores in pool])
    difference = best - predicted
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    assert abs(difference.mean()) < 3 * error
    assert best.mean() > pool.mean() + 10 * error  # the gain is no accident
    assert "mean score of the best of n answers: 1 " in capsys.readouterr().out


def test_made_data_train_every_trainer(folder, flags, tmp_path):
    make = flags | {"reward_function": "generate_test_functions:length", "best_of": 4}
    for kind in ("sft", "preferences"):
        run_script(generate, make | {"make": kind, "output": tmp_path / f"{kind}.jsonl"})
    sft = [json.loads(line) for line in (tmp_path / "sft.jsonl").open()]
    pairs = [json.loads(line) for line in (tmp_path / "preferences.jsonl").open()]
    assert len(sft) >= 4 and len(pairs) >= 3
    assert sft[0]["category"] == "sky" and sft[0]["messages"][0] == {"role": "user", "content": "sun"}
    for row in pairs:
        chosen, rejected = (len(row[side][-1]["content"]) for side in ("chosen", "rejected"))
        assert row["margin"] == chosen - rejected > 0 and row["chosen_score"] == chosen
    common = TINY | {"load_checkpoint": f"hf::{folder / 'policy'}", "train_dataset.batch_size": 2, "total_steps": 1}
    for script, kind in ((train_sft, "sft"), (train_rm, "preferences"), (train_dpo, "preferences")):
        out = tmp_path / script.__name__
        run_script(script, common | {"train_dataset.path": tmp_path / f"{kind}.jsonl", "output_dir": out})
        assert np.isfinite(metrics_of(out)[-1]["loss"])


def test_ties_are_dropped_and_counted(answers, capsys):
    rows = answers(best_of=2, make="preferences", reward_function="generate_test_functions:cut_off_earns_nothing",
                   stop_ids="103", max_new_tokens=3)  # fmt: skip
    assert rows == []
    assert "left out: 5 prompts: no answer scores lower than the best" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"prompts": ""}, "--prompts: found nothing, expected a file"),
        ({"prompts": "nowhere.jsonl"}, "--prompts: nowhere.jsonl: no such file"),
        ({"split": "[1:"}, "--split=[1:: expected"),
        ({"output": ""}, "--output: found nothing"),
        ({"load_checkpoint": "x"}, "--load_checkpoint=x: expected hf::DIR_OR_HUB_ID"),
        ({"temperature": -1}, "--temperature: found -1.0, expected 0 or more"),
        ({"max_new_tokens": 0}, "--max_new_tokens: found 0, expected 1 or more"),
        ({"max_new_tokens": 48}, "reads up to 48 tokens, of which --max_new_tokens=48 leaves 0 for a prompt"),
        ({"max_continuation_len": 20}, "--max_continuation_len=20: --max_new_tokens=8 is the same flag, expected"),
        ({"max_new_tokens": 20, "max_prompt_length": 40}, "--max_new_tokens=20 leaves 28 for a prompt, expected"),
        ({"num_samples": 2, "temperature": 0}, "--num_samples=2: --temperature=0 gives the same answer every time"),
        ({"best_of": 2}, "--best_of=2: nothing scores, expected --load_checkpoint_reward or --reward_function"),
        ({"best_of": 2, "num_samples": 2}, "--num_samples=2: does not go with --best_of=2"),
        ({"make": "sft"}, "--make=sft: --best_of=0, expected 2 or more answers to choose from"),
        ({"batch_size": 3, "mesh_dim": "2,1,1"}, "--batch_size=3: does not divide by dp x fsdp = 2"),
        ({"decode_rows": 3, "mesh_dim": "2,1,1"}, "--decode_rows=3: does not divide by dp x fsdp = 2"),
        ({"stop_ids": "104"}, "--stop_ids=104: expected ids from 0 to 103"),
        ({"missing_eos": "never"}, "--missing_eos=never: expected none, mask"),
        ({"best_of": 2, "reward_function": "generate_test_functions:wants_column"}, "needs the column 'solution'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(flags, tmp_path, more, complaint):
    with pytest.raises(UserError) as caught:
        run_script(generate, flags | {"output": tmp_path / "out.jsonl"} | more, 2 if "mesh_dim" in more else 1)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [["--max_new_tokens=4"], ["--max_continuation_len=4"], ["--max_new_tokens=4", "--max_continuation_len=4"]]
)
def test_the_most_tokens_of_an_answer_have_two_names(given):
    config = load_config(generate.Config, ["--prompts=a.jsonl", "--output=b.jsonl", *given])
    assert config.sampling.max_new_tokens == 4


def test_a_row_that_asks_nothing(flags, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"id": 3}])
    with pytest.raises(UserError, match=r"--prompts: .*bad.jsonl line 2: found `id`, expected `messages`, `turns`"):
        run_script(generate, flags | {"prompts": path, "output": tmp_path / "out.jsonl"})
