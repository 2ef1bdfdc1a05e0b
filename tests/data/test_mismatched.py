"""Mismatches: the prompts of all rows before the answers to others."""

import numpy as np
import pytest

from easyrl.data.dataset import PackedDatasetConfig, load_dataset
from easyrl.data.loader import Loader
from easyrl.data.mismatched import Mismatched, find_distance, mismatched_loader
from easyrl.data.templates import load_template


@pytest.fixture
def load(write_rows, tokenizer):
    template = load_template("tulu", tokenizer)

    def load(prompts, completions, **settings):
        rows = [
            {"prompt": prompt, "completion": completion, "label": i % 2}
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        config = PackedDatasetConfig(path=write_rows(rows), seq_length=64, batch_size=3, **settings)
        return load_dataset(config, "labelled", template), config, tokenizer

    return load


def test_every_answer_follows_the_prompt_half_a_file_away(load):
    dataset, _, tokenizer = load([f"ask {i}" for i in range(5)], [f"say {i}" for i in range(5)])
    mismatched = Mismatched(dataset, 64)
    assert len(mismatched) == 5
    for i in range(5):
        (sequence,) = mismatched.sequences(i)
        said = f"say {(i + 2) % 5}</s>"
        assert tokenizer.decode(sequence.tokens) == f"<s><|user|>\nask {i}\n<|assistant|>\n{said}"
        assert tokenizer.decode(sequence.tokens[sequence.is_answer]) == said
        assert not sequence.is_answer[: sequence.prompt_length].any()
        assert mismatched.lengths[i] == len(sequence.tokens)


def test_a_file_of_all_good_rows_and_then_all_bad_ones_to_the_same_prompts(load, capsys):
    # The first good answer is so long that its prompt is cut, before the bad one it is not.
    asked = ["x" * 30 + f" ask {i}" for i in range(4)]
    dataset, _, _ = load([*asked, *asked], ["good" * 4, *["good"] * 3, *["bad"] * 4])
    own = [dataset.sequences(i)[0] for i in range(8)]
    assert own[0].prompt_length < own[4].prompt_length
    answers = [sequence.tokens[sequence.is_answer].tolist() for sequence in own]
    mismatched = Mismatched(dataset, 64)
    for i in range(8):
        (sequence,) = mismatched.sequences(i)
        assert sequence.tokens[sequence.is_answer].tolist() == answers[(i + 5) % 8]
        assert mismatched.lengths[i] == len(sequence.tokens)
    assert "no answer to another prompt" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prompts", "distance", "equal"),
    [
        ("a", 0, 1),
        ("ab", 1, 0),
        ("aabbccdd", 4, 0),
        ("abcdabcd", 5, 0),
        ("aabbaabb", 6, 0),
        ("aabaac", 4, 2),  # a is the prompt of most rows
        ("aaaa", 2, 4),
    ],
)
def test_rows_are_paired_half_a_file_apart_or_where_fewest_prompts_are_equal(prompts, distance, equal):
    assert find_distance(np.array(list(prompts))) == (distance, equal)


def test_it_is_said_how_many_rows_have_no_other_prompt(load, capsys):
    dataset, _, _ = load(["same"] * 3, ["one", "two", "three"])
    Mismatched(dataset, 64)
    assert "3 of 3 rows have no answer to another prompt: KTO's z0 takes theirs to the same one" in (
        capsys.readouterr().out
    )


def test_a_prompt_too_long_for_the_answer_loses_its_start(load):
    dataset, _, tokenizer = load(["x" * 25, "short"], ["yes", "y" * 35])
    (own,), (sequence,) = dataset.sequences(0), Mismatched(dataset, 64).sequences(0)
    assert len(sequence.tokens) == Mismatched(dataset, 64).lengths[0] == 64
    assert tokenizer.decode(sequence.tokens).endswith("x\n<|assistant|>\n" + "y" * 35 + "</s>")
    assert sequence.prompt_length < own.prompt_length


@pytest.mark.parametrize("settings", [{}, {"batch_rows": 2}])
def test_the_loader_takes_the_mismatches_of_a_batch(load, settings):
    dataset, config, _ = load([f"ask {i}" for i in range(8)], ["say" * i for i in range(1, 9)], **settings)
    loader = Loader(dataset, config, 0, keep_last=True)
    mismatched = mismatched_loader(loader, config, 0)
    last = loader.batch(loader.order.steps(0) - 1)
    batch = mismatched.take(last.samples)
    assert batch.samples.tolist() == last.samples.tolist()
    assert batch.tokens.shape[0] == last.tokens.shape[0]
    assert ((batch.lengths > 0) == (last.samples >= 0)).all()
    assert sum(len(plan.source) for plan in batch.packing.plans) <= len(batch.tokens)
    for row, sample in enumerate(last.samples[last.samples >= 0].tolist()):
        (sequence,) = mismatched.dataset.sequences(sample)
        np.testing.assert_array_equal(batch.tokens[row, : batch.lengths[row]], sequence.tokens)


def test_pairs_are_refused(write_rows, tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    config = PackedDatasetConfig(path=write_rows(rows), seq_length=64)
    with pytest.raises(ValueError, match="found 2 sequences a sample, expected single answers"):
        Mismatched(load_dataset(config, "pair", load_template("tulu", tokenizer)), 64)
