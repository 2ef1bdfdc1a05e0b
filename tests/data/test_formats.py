"""Rows of every shape become the examples they describe."""

import json
import re
from pathlib import Path

import pytest

from easyrl.data.formats import Demonstration, Labelled, Pair, Prompt, parse_row
from easyrl.data.messages import BadRow, Message


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


Q, A, B = user("q"), assistant("a"), assistant("b")
ASKED, ANSWER, OTHER = (Message("user", "q"),), (Message("assistant", "a"),), (Message("assistant", "b"),)

DEMONSTRATIONS = {
    "messages": {"messages": [Q, A]},
    "prompt and completion as strings": {"prompt": "q", "completion": "a"},
    "prompt and completion as messages": {"prompt": [Q], "completion": [A]},
    "prompt as messages, completion as a string": {"prompt": [Q], "completion": "a"},
    "Alpaca": {"instruction": "q", "input": "", "output": "a"},
    "Alpaca with the text of both": {"instruction": "q", "input": "", "output": "a", "text": "Below is q\na"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "spellings that `datasets` has made one": {
        "messages": [
            {"role": None, "content": None, "from": "human", "value": "q"},
            {"role": "assistant", "content": "a", "from": None, "value": None},
        ]
    },
    "the chosen side of a pair": {"chosen": [Q, A], "rejected": [Q, B]},
    "the chosen side beside an empty one": {"prompt": "q", "chosen": "a", "rejected": "", "margin": -1},
    "the chosen side beside the same": {"chosen": [Q, A], "rejected": [Q, A]},
    "a null column is absent": {"messages": [Q, A], "text": None, "prompt": None},
    "an empty system message says nothing": {"messages": [system(""), Q, A], "system": " "},
    "a prompt that repeats the first question": {"prompt": "q", "messages": [Q, A]},
}


@pytest.mark.parametrize("row", DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations(row):
    (example,) = parse_row(row, "sft")
    assert (example.prompt, example.completion) == (ASKED, ANSWER) and set(example.columns) <= {"text"}


def test_all_answers_of_a_conversation_are_demonstrated():
    (example,) = parse_row({"messages": [system("s"), Q, A, user("q2"), B], "source": "x"}, "sft")
    assert example.prompt == (Message("system", "s"), *ASKED)
    assert example.completion == (*ANSWER, Message("user", "q2"), *OTHER)
    assert example.columns == {"source": "x"}


def test_a_prompt_with_history_demonstrates_only_the_completion():
    (example,) = parse_row({"prompt": [Q, A, user("q2")], "completion": "b"}, "sft")
    assert example.prompt == (*ASKED, *ANSWER, Message("user", "q2")) and example.completion == OTHER


def test_text_has_no_prompt():
    assert parse_row({"text": "a"}, "sft") == [Demonstration((), ANSWER)]
    assert parse_row({"text": "a", "label": 0}, "labelled") == [Labelled((), ANSWER, False)]


def test_alpaca_input_continues_the_instruction():
    (example,) = parse_row({"instruction": "q", "input": "x", "output": "a"}, "sft")
    assert example.prompt == (Message("user", "q\n\nx"),)
    (example,) = parse_row({"instruction": "q", "input": "x"}, "prompt")
    assert example == Prompt((Message("user", "q\n\nx"),))


def test_system_column():
    (example,) = parse_row({"system": "s", "prompt": "q", "completion": "a"}, "sft")
    assert example.prompt == (Message("system", "s"), *ASKED)
    (example,) = parse_row({"system": "s", "messages": [system("own"), Q, A]}, "sft")
    assert example.prompt == (Message("system", "own"), *ASKED)


PAIRS = {
    "whole conversations": {"chosen": [Q, A], "rejected": [Q, B]},
    "answers as strings": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "answers as messages": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "answers as messages to a string": {"prompt": "q", "chosen": [A], "rejected": [B]},
    "UltraFeedback": {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]},
    "answers to messages": {"messages": [Q], "chosen": [A], "rejected": [B]},
    "answers to Alpaca's instruction": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    "answers to ShareGPT's conversation": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "answers to a question": {"question": "q", "chosen": "a", "rejected": "b"},
    "HH-RLHF": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "HH-RLHF with its prompt apart": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
    "HH-RLHF with its prompt repeated": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": "\n\nHuman: q\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: b",
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs(row):
    assert parse_row(row, "pair") == [Pair(ASKED, ANSWER, OTHER)]
    assert parse_row(row | {"margin": 2, "source": "x"}, "pair") == [Pair(ASKED, ANSWER, OTHER, 2.0, {"source": "x"})]
    assert parse_row(row, "prompt") == [Prompt(ASKED)]
    assert parse_row(row, "labelled") == [Labelled(ASKED, ANSWER, True), Labelled(ASKED, OTHER, False)]


def test_the_system_column_goes_before_both_sides_and_the_messages_beside_them():
    asked = (Message("system", "s"), *ASKED)
    for beside in ({}, {"messages": [Q, A]}, {"messages": [Q]}, {"messages": [system("s"), Q]}):
        assert parse_row({"system": "s", "chosen": [Q, A], "rejected": [Q, B], **beside}, "pair") == [
            Pair(asked, ANSWER, OTHER)
        ]


@pytest.mark.parametrize("rejected", [{}, {"rejected": None}, {"rejected": []}, {"rejected": ""}])
def test_a_side_that_is_not_learnt_from_may_be_empty(rejected):
    row = {"chosen": [Q, A]} | rejected
    assert parse_row(row, "sft") == [Demonstration(ASKED, ANSWER)]
    assert parse_row(row, "prompt") == [Prompt(ASKED)]
    assert parse_row({"prompt": "q", "chosen": "a"} | rejected, "sft") == [Demonstration(ASKED, ANSWER)]
    turned = {"rejected": [Q, A]} | ({"chosen": rejected["rejected"]} if rejected else {})
    assert parse_row(turned, "prompt") == [Prompt(ASKED)]
    for bad, kind in ((row, "pair"), (row, "labelled"), (turned, "sft"), ({"chosen": []} | rejected, "prompt")):
        with pytest.raises(BadRow):
            parse_row(bad, kind)


@pytest.mark.parametrize("answers", [("a", "a"), ("", "b"), ("a", ""), ("", ""), (None, "b"), ("a", []), ([], "b")])
def test_a_pairs_prompt_needs_no_answers(answers):
    row = {"prompt": "q", "chosen": answers[0], "rejected": answers[1], "margin": -1}
    assert parse_row(row, "prompt") == [Prompt(ASKED)]


def test_a_pair_parts_where_its_answers_first_differ():
    turns = [Q, A, user("q2")]
    (pair,) = parse_row({"chosen": [*turns, A], "rejected": [*turns, B]}, "pair")
    assert len(pair.prompt) == 3 and pair.chosen == ANSWER and pair.rejected == OTHER
    (pair,) = parse_row({"chosen": [*turns, A], "rejected": [Q, B]}, "pair")
    assert pair.prompt == ASKED and len(pair.chosen) == 3
    (pair,) = parse_row({"chosen": [Q, A], "rejected": [Q, A, user("other"), B]}, "pair")
    assert pair.prompt == ASKED and pair.chosen == ANSWER and len(pair.rejected) == 3


def test_a_transcript_keeps_blank_lines_inside_a_turn():
    row = {"chosen": "\n\nHuman: q\n\nstill q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nstill q\n\nAssistant: b"}
    assert parse_row(row, "pair")[0].prompt == (Message("user", "q\n\nstill q"),)


def test_a_label_is_of_the_last_answer():
    (labelled,) = parse_row({"messages": [Q, A, Q, A], "label": 1}, "labelled")
    assert (labelled.prompt, labelled.completion) == ((*ASKED, *ANSWER, *ASKED), ANSWER)


@pytest.mark.parametrize(("label", "value"), [(0, False), (1, True), (True, True), (False, False), (1.0, True)])
def test_labels(label, value):
    expected = [Labelled(ASKED, ANSWER, value, {"source": "x"})]
    assert parse_row({"messages": [Q, A], "label": label, "source": "x"}, "labelled") == expected
    assert parse_row({"prompt": "q", "completion": "a", "label": label, "source": "x"}, "labelled") == expected


PROMPTS = {
    "instruction": {"instruction": "q"},
    "prompt as a string": {"prompt": "q"},
    "prompt as messages": {"prompt": [Q]},
    "prompt as one message": {"prompt": Q},
    "question": {"question": "q"},
    "messages that end with the user": {"messages": [Q]},
    "messages whose last answer is dropped": {"messages": [Q, A]},
    "columns that agree": {"messages": [Q], "prompt": "q", "instruction": "q"},
}


@pytest.mark.parametrize("row", PROMPTS.values(), ids=PROMPTS)
def test_prompts(row):
    assert parse_row(row | {"reference": "42"}, "prompt") == [Prompt(ASKED, {"reference": "42"})]


def test_of_several_turns_the_first_is_asked_and_all_are_kept():
    row = {"turns": ["q", "q2"], "id": 3}
    assert parse_row(row, "prompt") == [Prompt(ASKED, row)]


def test_a_question_beside_a_prompt_is_another_column():
    assert parse_row({"prompt": "q", "question": "x"}, "prompt") == [Prompt(ASKED, {"question": "x"})]


def test_a_prompts_completion_is_a_column_for_reward_functions():
    assert parse_row({"prompt": "q", "completion": "a"}, "prompt") == [Prompt(ASKED, {"completion": "a"})]


def test_the_rows_that_the_documents_show():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in re.search(r"```json\n(.*?)```", page, re.DOTALL)[1].splitlines()]
    kinds = ["sft", "sft", "pair", "pair", "labelled", "labelled", "prompt"]
    assert [type(parse_row(row, kind)[0]) for row, kind in zip(rows, kinds, strict=True)] == [
        Demonstration, Demonstration, Pair, Pair, Labelled, Labelled, Prompt
    ]  # fmt: skip
