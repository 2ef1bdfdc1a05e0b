"""Answers to prompts: the rows that files of them have, and which belong together."""

import json

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.data.generations import (
    Candidate,
    Generation,
    best_row,
    generation_rows,
    preference_row,
    read_generations,
    side_by_side,
)
from easyrl.data.messages import Message
from easyrl.data.prompts import PromptRow

QUESTION = (Message("user", "Why?"),)
FLAGS = ("--generations=A", "--baseline=B")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "response": "So."},
        {"prompt": [{"role": "user", "content": "Why?"}], "completion": "So."},
        {"instruction": "Why?", "output": "So."},
        {"messages": [{"role": "user", "content": "Why?"}], "response": "So."},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_forms_of_a_row(tmp_path, row):
    path = write(tmp_path / "g.jsonl", [row | {"category": "math", "id": 7}])
    assert read_generations(path, "--generations") == [Generation(QUESTION, "So.", {"category": "math", "id": 7})]


def test_an_empty_answer_counts(tmp_path):
    (row,) = read_generations(write(tmp_path / "g.jsonl", [{"prompt": "Why?", "response": ""}]), "--generations")
    assert row.answer == ""


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "Why?"}, "line 2: found no answer in `prompt`, expected `response`"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "line 2: found no answer in `messages`"),
        ({"prompt": "Why?", "response": 3}, "line 2: column `response`: found 3, expected a string"),
        ({"response": "So."}, "line 2: found no column, expected `messages`"),
        ([1], "line 2: found [1], expected an object with named columns"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, complaint):
    path = write(tmp_path / "g.jsonl", [{"prompt": "Why?", "response": "So."}, row])
    with pytest.raises(UserError) as caught:
        read_generations(path, "--generations=x")
    assert str(caught.value).startswith("--generations=x: ")
    assert complaint in str(caught.value)


def test_a_file_without_rows(tmp_path):
    (tmp_path / "g.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"g.jsonl: found no row"):
        read_generations(str(tmp_path / "g.jsonl"), "--baseline")


def test_what_a_row_says_of_an_earlier_answer_does_not_stand_beside_a_new_one():
    earlier = {"prompt": "Why?", "response": "old", "ended": False, "score": 9.0, "sample": 3, "candidates": [{}]}
    prompt = PromptRow(earlier | {"id": 7}, QUESTION, np.zeros(1, np.int32), earlier | {"id": 7})
    new, worse = Candidate("So.", True), Candidate("No.", True)
    answer = {"prompt": "Why?", "id": 7, "response": "So.", "ended": True}
    assert generation_rows(prompt, [new]) == [answer]
    assert best_row(prompt, [new, worse], 0) == answer | {"candidates": [new.columns(), worse.columns()]}
    pair = preference_row(prompt, new._replace(score=2.0), worse._replace(score=1.0))
    assert pair.keys() == {"chosen", "rejected", "margin", "id", "chosen_score", "rejected_score"}


def rows(*ids, prompts="xyz"):
    return [
        Generation((Message("user", prompt),), f"{identity}", {} if identity is None else {"id": identity})
        for identity, prompt in zip(ids, prompts, strict=False)
    ]


def test_rows_meet_by_id_whatever_their_order():
    pairs = side_by_side(rows(1, 2, 3), rows(3, 1, 2, prompts="zxy"), FLAGS)
    assert [(one.answer, other.answer) for one, other in pairs] == [("1", "1"), ("2", "2"), ("3", "3")]


@pytest.mark.parametrize("ids", [(None, None, None), (1, 1, 2), (1, None, 2), ([1], [2], [3])])
def test_rows_without_ids_of_their_own_meet_by_order(ids):
    pairs = side_by_side(rows(*ids), rows(*ids), FLAGS)
    assert [one.messages == other.messages for one, other in pairs] == [True] * 3


@pytest.mark.parametrize(
    ("ours", "theirs", "complaint"),
    [
        (rows(1, 2), rows(1, 3), "--baseline=B: no row with the id 2"),
        (rows(1, 2), rows(1, 2, 3), "--generations=A: no row with the id 3"),
        (rows(None, None), rows(None), "--baseline=B: found 1 rows, expected 2, as in --generations=A"),
        (rows(1, 2), rows(2, 1), "--baseline=B: row 1 of --generations=A answers another prompt"),
    ],
)
def test_files_that_do_not_answer_the_same_prompts(ours, theirs, complaint):
    with pytest.raises(UserError, match=complaint):
        side_by_side(ours, theirs, FLAGS)
