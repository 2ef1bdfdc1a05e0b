"""Prompts for PPO: the same batch for the same seed and step, padded, cut from the left, with the rows' columns."""

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.data.dataset import DatasetConfig
from easyrl.data.prompts import PromptDataset
from easyrl.data.templates import load_template
from easyrl.data.tokenizer import encode


@pytest.fixture
def template(tokenizer):
    return load_template("tulu", tokenizer)


def rows(count):
    return [{"instruction": f"question {i}", "number": i} | ({"hint": "odd"} if i % 2 else {}) for i in range(count)]


def dataset(path, template, seed=0, **settings):
    return PromptDataset(DatasetConfig(path=path, **({"batch_size": 4, "seq_length": 64} | settings)), template, seed)


def test_a_batch_holds_what_the_rows_say(write_rows, template):
    prompts = dataset(write_rows(rows(6)), template, shuffle=False)
    batch = prompts.batch(0)
    assert batch.samples.tolist() == [0, 1, 2, 3]
    assert batch.tokens.shape == (4, 64) and batch.tokens.dtype == np.int32
    assert batch.texts[2] == "<s><|user|>\nquestion 2\n<|assistant|>\n"
    assert batch.messages[2] == (("user", "question 2"),)
    assert batch.columns == {"number": [0, 1, 2, 3], "hint": [None, "odd", None, "odd"]}
    assert list(prompts.take(np.array([2])).columns) == ["number"] and list(prompts.columns()) == ["number", "hint"]
    for tokens, length, text in zip(batch.tokens, batch.lengths, batch.texts, strict=True):
        assert tokens[:length].tolist() == encode(template.tokenizer, text)
        assert (tokens[length:] == template.tokenizer.eos_token_id).all()


def test_batches_depend_on_seed_and_step_alone(write_rows, template):
    path = write_rows(rows(10))
    first, again, other = dataset(path, template), dataset(path, template), dataset(path, template, seed=1)
    steps = [first.batch(step).samples.tolist() for step in range(6)]
    assert [again.batch(step).samples.tolist() for step in (5, 3, 0)] == [steps[5], steps[3], steps[0]]
    assert [other.batch(step).samples.tolist() for step in range(6)] != steps
    assert first.steps_per_epoch == 2
    for epoch in range(3):
        assert len({sample for step in steps[2 * epoch : 2 * epoch + 2] for sample in step}) == 8
    assert steps[0:2] != steps[2:4]


def test_long_prompts_are_cut_from_the_left(write_rows, template):
    path = write_rows([{"instruction": "x" * 200 + " end?", "n": 0}, {"instruction": "short"}])
    batch = dataset(path, template, batch_size=2, shuffle=False, seq_length=32).batch(0)
    assert batch.lengths[0] == 32
    assert template.tokenizer.decode(batch.tokens[0, 1:32]).endswith("x end?\n<|assistant|>\n")
    assert batch.tokens[0, 0] == template.tokenizer.bos_token_id
    left = dataset(path, template, batch_size=1, seq_length=32, remove_truncated_samples=True)
    assert len(left) == 1 and left.dataset.stores[0].report.left_out == {"too long": 1}


def test_too_few_prompts(write_rows, template):
    with pytest.raises(UserError, match=r"--train_dataset.path=.*: found 3 prompts, fewer than .*batch_size=4"):
        dataset(write_rows(rows(3)), template)
    assert PromptDataset(
        DatasetConfig(path=write_rows(rows(3)), batch_size=4, shuffle=False), template, 0, keep_last=True
    ).batch(0).samples.tolist() == [0, 1, 2]


def test_no_room_for_the_assistants_tag(write_rows, template):
    with pytest.raises(UserError, match=r"--train_dataset.seq_length=5.*the assistant's tag alone takes \d+"):
        dataset(write_rows(rows(3)), template, seq_length=5)
