"""Cutting: prompts from the left, answers from the right, the assistant's tag and the bos token survive."""

import numpy as np
import pytest

from easyrl.data.readers import Row
from easyrl.data.sequences import ALIKE, LABELLED_BAD, Encoder, Limits, fit
from easyrl.data.templates import load_template


@pytest.fixture
def template(tokenizer):
    return load_template("tulu", tokenizer)


def encode(template, kind, row, seq_length, **limits):
    return Encoder(kind, template, Limits(seq_length, **limits)).encode(Row("here", row))


def text(template, ids):
    return template.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "completions", "max_prompt", "expected"),
    [
        (4, [6], 0, (4, [6])),  # all fits
        (8, [4], 0, (6, [4])),  # the answer is short: the prompt keeps the rest
        (8, [9], 0, (5, [5])),  # both long: half each
        (2, [9], 0, (2, [8])),  # the prompt is short: the answer keeps the rest
        (8, [4, 2], 0, (6, [4, 2])),  # a pair keeps one prompt
        (8, [1, 9], 0, (5, [1, 5])),
        (8, [1], 3, (3, [1])),  # a limit of its own holds even where there would be room
        (2, [9], 3, (2, [8])),
    ],
)
def test_shares_of_ten_tokens(prompt, completions, max_prompt, expected):
    assert fit(prompt, completions, Limits(10, max_prompt)) == expected


def test_a_long_prompt_keeps_its_end(template):
    row = {"prompt": "start " + "x" * 200 + " end?", "completion": "yes"}
    (sample,) = encode(template, "sft", row, 60)
    (sequence,) = sample.sequences
    prompt = sequence.tokens[: sequence.prompt_length]
    assert sample.prompt_cut and not sample.answer_cut and len(sequence.tokens) == 60
    assert prompt[0] == template.bos_id
    assert text(template, prompt).endswith("x end?\n<|assistant|>\n") and "start" not in text(template, prompt)
    assert text(template, sequence.tokens[sequence.is_answer]) == "yes</s>"
    assert sequence.tokens[-1] == template.end_id and sequence.is_answer[-1]


def test_a_long_answer_keeps_its_start_and_has_no_end(template):
    (sample,) = encode(template, "sft", {"prompt": "q", "completion": "start " + "x" * 200}, 60)
    (sequence,) = sample.sequences
    assert sample.answer_cut and not sample.prompt_cut and len(sequence.tokens) == 60
    assert text(template, sequence.tokens[sequence.is_answer]).startswith("start xxx")
    assert template.end_id not in sequence.tokens[sequence.is_answer]
    assert (np.flatnonzero(~sequence.is_answer) < sequence.prompt_length).all()


def test_both_sides_of_a_pair_keep_the_same_prompt(template):
    row = {"prompt": "p" * 200, "chosen": "c", "rejected": "r" * 200, "margin": 0.5, "subset": "s"}
    (sample,) = encode(template, "pair", row, 60)
    chosen, rejected = sample.sequences
    assert chosen.prompt_length == rejected.prompt_length == 30
    assert chosen.tokens[:30].tolist() == rejected.tokens[:30].tolist()
    assert (sample.value, sample.columns, sample.prompt_cut, sample.answer_cut) == (0.5, '{"subset": "s"}', True, True)


def test_a_cut_in_a_later_question_leaves_no_loose_end(template):
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "q"), ("assistant", "a"), ("user", "x" * 200), ("assistant", "b"))
    ]
    (sample,) = encode(template, "sft", {"messages": messages}, 60)
    (sequence,) = sample.sequences
    assert sample.answer_cut and sequence.is_answer[-1]
    assert text(template, sequence.tokens[sequence.is_answer]) == "a</s>"


@pytest.mark.parametrize("row", [{"prompt": "p" * 200, "completion": "a"}, {"prompt": "p", "completion": "a" * 200}])
def test_what_would_be_cut_can_be_left_out(template, row):
    (sample,) = encode(template, "sft", row, 60, remove_truncated=True)
    assert sample.sequences == ()
    (sample,) = encode(template, "sft", row, 600, remove_truncated=True)
    assert len(sample.sequences) == 1 and not (sample.prompt_cut or sample.answer_cut)


def test_a_pair_whose_answers_are_the_same_tokens_is_left_out(template, tokenizer):
    row = {"prompt": "q", "chosen": "x" * 200 + " yes", "rejected": "x" * 200 + " no"}
    (cut,), (whole,) = (encode(template, "pair", row, length) for length in (60, 400))
    assert (cut.sequences, cut.left_out) == ((), ALIKE) and len(whole.sequences) == 2 and not whole.left_out
    trimming = load_template("llama3", tokenizer)
    (trimmed,) = encode(trimming, "pair", {"prompt": "q", "chosen": "yes", "rejected": "yes "}, 400)
    assert (trimmed.sequences, trimmed.left_out) == ((), ALIKE)


@pytest.mark.parametrize(("label", "left_out"), [(False, LABELLED_BAD), (True, ""), (0, ""), ("false", "")])
def test_an_answer_labelled_bad_is_not_learnt_as_one_to_give(label, left_out, template):
    (sample,) = encode(template, "sft", {"prompt": "q", "completion": "a", "label": label}, 60)
    assert sample.left_out == left_out and bool(sample.sequences) != bool(left_out)


def test_labels_and_texts(template):
    (sample,) = encode(template, "labelled", {"text": "some text", "label": True}, 60)
    assert sample.value == 1.0 and sample.sequences[0].prompt_length == 1
    good, bad = encode(template, "labelled", {"prompt": "q", "chosen": "a", "rejected": "b"}, 60)
    assert (good.value, bad.value) == (1.0, 0.0)


def test_a_long_labelled_text_keeps_its_end(template):
    (sample,) = encode(template, "labelled", {"text": "start " + "x" * 200 + " end", "label": 1}, 60)
    (sequence,) = sample.sequences
    assert sample.answer_cut and len(sequence.tokens) == 60
    assert sequence.tokens[0] == template.bos_id and sequence.tokens[-1] == template.end_id
    kept = text(template, sequence.tokens[1:])
    assert kept.endswith("x end</s>") and "start" not in kept and sequence.is_answer[1:].all()


def test_columns_that_json_lacks_become_text(template):
    (sample,) = encode(template, "sft", {"text": "a", "when": np.datetime64("2020-01-02")}, 60)
    assert sample.columns == '{"when": "2020-01-02"}'
