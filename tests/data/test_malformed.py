"""What is wrong with a file or a row is said in one line that names the file and the row."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from easyrl.core.errors import UserError
from easyrl.data.dataset import PackedDatasetConfig, load_dataset
from easyrl.data.readers import open_source
from easyrl.data.templates import load_template

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
SYSTEM = {"role": "system", "content": "s"}
GOOD = {
    "sft": {"messages": [Q, A]},
    "pair": {"chosen": [Q, A], "rejected": [Q, B]},
    "labelled": {"messages": [Q, A], "label": 1},
    "prompt": {"prompt": "q"},
}

# (kind, line 2 of a file whose first line is good, the complaint behind "FILE line 2: ")
BAD_ROWS = {
    # broken lines
    "broken JSON": ("sft", '{"messages": [', "broken JSON at column 15 (Expecting value)"),
    "a line of a CSV": ("sft", "q,a", "broken JSON at column 1 (Expecting value)"),
    "two objects on a line": ("prompt", '{"prompt": "q"} {}', "broken JSON at column 17 (Extra data)"),
    "a Python literal": (
        "prompt",
        "{'prompt': 'q'}",
        "broken JSON at column 2 (Expecting property name enclosed in double",
    ),
    "a list, not an object": ("sft", "[1, 2]", "found [1, 2], expected an object with named columns"),
    "a string, not an object": ("prompt", '"q"', "found 'q', expected an object with named columns"),
    "a column given twice": (
        "prompt",
        '{"prompt": "q", "prompt": "r"}',
        "column 'prompt' is given twice, expected once",
    ),
    "wrong encoding": ("prompt", b'{"prompt": "\xfcber"}', "found byte 0xfc at column 13, expected UTF-8 text"),
    "half a surrogate pair": (
        "prompt",
        '{"prompt": "\\ud83d"}',
        "found half of a surrogate pair, expected whole characters",
    ),
    "a number of 5000 digits": ("prompt", f'{{"prompt": "a", "n": {"7" * 5000}}}', "broken JSON (a number of too many"),
    "deep nesting": ("prompt", "[" * 100_000, "broken JSON (nested too deeply)"),
    # columns
    "no known column": (
        "sft",
        {"question": "q", "answer": "a"},
        "found `question`, `answer`, expected `messages`, `prompt` + `completion`, `instruction` + `output`, `text`, "
        "or `chosen` + `rejected`",
    ),
    "no column at all": ("prompt", {}, "found no column, expected `messages`, `turns`, `instruction`, `prompt`, `que"),
    "only nulls": ("prompt", {"prompt": None}, "found no column, expected `messages`, `turns`"),
    "no rejected": ("pair", {"chosen": [Q, A]}, "column `rejected` is missing, found `chosen`, expected"),
    "no chosen": ("pair", {"rejected": [Q, A]}, "column `chosen` is missing, found `rejected`, expected"),
    "answers without their prompt": (
        "pair",
        {"chosen": "a", "rejected": "b"},
        "column `prompt` is missing, and `chosen` starts with an answer; found `chosen`, `rejected`",
    ),
    "a completion without its prompt": (
        "sft",
        {"completion": "a"},
        "column `prompt` is missing beside `completion`, found `completion`",
    ),
    "no label": ("labelled", {"messages": [Q, A]}, "column `label` is missing, found `messages`"),
    "a message without role": (
        "sft",
        {"messages": [{"content": "q"}, A]},
        "column `messages[0]`: `role` is missing, found `content`",
    ),
    "a message without content": (
        "sft",
        {"messages": [Q, {"role": "assistant", "content": None}]},
        "column `messages[1]`: `content` is missing, found `role`, `content`",
    ),
    # values of a wrong type
    "messages as a string": ("sft", {"messages": "q"}, "column `messages`: found 'q', expected a list of messages"),
    "messages as strings": (
        "sft",
        {"messages": ["q", "a"]},
        "column `messages[0]`: found 'q', expected an object with `role` and `content`",
    ),
    "content as a list": (
        "sft",
        {"messages": [{"role": "user", "content": ["q"]}, A]},
        "column `messages[0].content`: found ['q'], expected a string",
    ),
    "a prompt as a number": (
        "prompt",
        {"prompt": 7},
        "column `prompt`: found 7, expected a string or a list of messages",
    ),
    "a text as a number": ("labelled", {"text": 7, "label": 1}, "column `text`: found 7, expected a string"),
    "an instruction as a list": (
        "prompt",
        {"instruction": ["q"]},
        "column `instruction`: found ['q'], expected a string",
    ),
    "a system that is no text": ("prompt", {"prompt": "q", "system": 1}, "column `system`: found 1, expected a string"),
    "turns as a string": ("prompt", {"turns": "q"}, "column `turns`: found 'q', expected a list of user messages"),
    "label NaN": (
        "labelled",
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": NaN}',
        "column `label`: found nan, expected 0, 1, true or false",
    ),
    "label 2": ("labelled", {"text": "a", "label": 2}, "column `label`: found 2, expected 0, 1, true or false"),
    "label as text": (
        "labelled",
        {"text": "a", "label": "1"},
        "column `label`: found '1', expected 0, 1, true or false",
    ),
    "margin as text": (
        "pair",
        GOOD["pair"] | {"margin": "big"},
        "column `margin`: found 'big', expected a finite number",
    ),
    "margin infinite": (
        "pair",
        '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": Infinity}',
        "column `margin`: found inf, expected a finite number",
    ),
    "margin of 400 digits": (
        "pair",
        GOOD["pair"] | {"margin": 10**400},
        f"column `margin`: found 1{'0' * 56}..., expected a finite number, as a float32",
    ),
    "margin beyond float32": (
        "pair",
        GOOD["pair"] | {"margin": 1e39},
        "column `margin`: found 1e+39, expected a finite number, as a float32",
    ),
    "margin below 0": (
        "pair",
        GOOD["pair"] | {"margin": -1},
        "column `margin`: found -1, expected 0 or more, since `chosen` is the better",
    ),
    # roles
    "an unknown role": (
        "sft",
        {"messages": [{"role": "bot", "content": "q"}, A]},
        "column `messages[0].role`: found 'bot', expected one of system, user, assistant",
    ),
    "two users in a row": (
        "sft",
        {"messages": [Q, Q, A]},
        "column `messages`, message 2: found role 'user', expected 'assistant'",
    ),
    "the assistant first": (
        "sft",
        {"messages": [A, Q, A]},
        "column `messages`, message 1: found role 'assistant', expected 'user'",
    ),
    "a system message in the middle": (
        "sft",
        {"messages": [Q, SYSTEM, A]},
        "column `messages`, message 2: found role 'system', expected 'assistant'",
    ),
    "no answer": ("sft", {"messages": [Q]}, "column `messages` ends with 'user', expected 'assistant'"),
    "nothing but a system message": (
        "prompt",
        {"messages": [SYSTEM]},
        "column `messages` ends with 'system', expected 'user'",
    ),
    "a completion that asks": (
        "sft",
        {"prompt": "q", "completion": [Q, A]},
        "column `completion`, message 2: found role 'user', expected 'assista",
    ),
    "tool calls": (
        "sft",
        {"messages": [Q, A | {"tool_calls": [{}]}]},
        "column `messages[1]`: found `tool_calls`, expected messages of text alone",
    ),
    # nothing there
    "an empty answer": (
        "sft",
        {"messages": [Q, A | {"content": " \n"}]},
        "column `messages`, message 2: found no text from 'assistant', expected some",
    ),
    "an empty rejected answer": (
        "pair",
        {"prompt": "q", "chosen": "a", "rejected": ""},
        "column `rejected`, message 2: found no text from 'assistant', expected some",
    ),
    "an empty prompt": (
        "prompt",
        {"prompt": ""},
        "column `prompt`, message 1: found no text from 'user', expected some",
    ),
    "an empty text": ("labelled", {"text": "", "label": 1}, "column `text`: found no text, expected some"),
    "no messages": ("sft", {"messages": []}, "column `messages`: found no message, expected some"),
    "no turns": ("prompt", {"turns": []}, "column `turns`: found [], expected a list of user messages"),
    # columns that contradict each other
    "two texts": ("sft", {"messages": [Q, A], "text": "t"}, "found both `messages` and `text`, expected one of them"),
    "two prompts": (
        "prompt",
        {"instruction": "q", "prompt": "r"},
        "`instruction` and `prompt` contradict each other, expected the same",
    ),
    "a prompt beside another conversation": (
        "sft",
        {"prompt": "r", "messages": [Q, A]},
        "`prompt` and `messages` contradict each other, expected the same prom",
    ),
    "a prompt beside another pair": (
        "pair",
        GOOD["pair"] | {"prompt": "r"},
        "`prompt` and `chosen` contradict each other, expected the same prompt in b",
    ),
    "messages beside another pair": (
        "pair",
        GOOD["pair"] | {"messages": [Q, B]},
        "`messages` and `chosen` contradict each other, expected the same",
    ),
    "answers to different questions": (
        "pair",
        {"chosen": [Q, A], "rejected": [Q | {"content": "r"}, B]},
        "`chosen` and `rejected` ask different things, expected two answers to one prompt",
    ),
    "the same answer twice": (
        "pair",
        {"chosen": [Q, A], "rejected": [Q, A]},
        "`chosen` and `rejected` are the same, expected two different answ",
    ),
    "a label beside a pair": (
        "labelled",
        GOOD["pair"] | {"label": 1},
        "found `label` beside `chosen` and `rejected`, expected one or the other",
    ),
}


@pytest.fixture
def template(tokenizer):
    return load_template("tulu", tokenizer)


def complaint(path, kind, template, **settings):
    with pytest.raises(UserError) as caught:
        load_dataset(PackedDatasetConfig(path=str(path), **settings), kind, template)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_bytes(line):
    return line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row(tmp_path, template, case):
    kind, line, expected = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_bytes(GOOD[kind]) + b"\n" + as_bytes(line) + b"\n" + as_bytes(GOOD[kind]) + b"\n")
    assert complaint(path, kind, template).startswith(f"--train_dataset.path: {path} line 2: {expected}")
    kept = load_dataset(PackedDatasetConfig(path=str(path), skip_bad_rows=True), kind, template)
    report = kept.stores[0].report
    assert len(kept) == 2 and report.rows == 3
    assert sum(report.skipped.values()) == 1 and report.first_skipped.startswith(f"{path} line 2: {expected}")


def test_broken_json_on_line_7(tmp_path, template):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n' * 6 + '{"prompt": "q"\n')
    assert f"{path} line 7: broken JSON" in complaint(path, "prompt", template)


def test_what_lies_behind_a_slice_is_not_read(tmp_path, template):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n{"prompt"\n')
    assert len(load_dataset(PackedDatasetConfig(path=str(path), split="[:1]"), "prompt", template)) == 1
    assert f"{path} line 2: broken JSON" in complaint(path, "prompt", template, split="[:2]")


def test_a_file_that_goes_while_it_is_read(tmp_path, template):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n')
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(UserError, match=f"^{path}: the file cannot be read \\(No such file or directory\\)"):
        list(source.rows())


LINE = b'{"prompt": "q"}\n'
ZIPPED = gzip.compress(b'{"prompt": "%d"}\n' * 400)
BAD_FILES = {
    # name: (contents, the complaint behind "FILE")
    "empty.jsonl": (b"", ": the file is empty"),
    "blank.jsonl": (b"\n \n", ": found no row to use (0 rows read), expected `messages`"),
    "short.jsonl.gz": (ZIPPED[: len(ZIPPED) // 2], ": the gzip file is cut short after line "),
    "damaged.jsonl.gz": (ZIPPED[:30] + b"\xff" * 9 + ZIPPED[39:], ": the gzip file is damaged after line "),
    "nothing.jsonl.gz": (gzip.compress(b""), ": the file is empty"),
    "plain.jsonl.gz": (LINE, ": found plain data, expected gzip"),
    "zipped.jsonl": (gzip.compress(LINE), ": found gzip data, expected plain text (or a name ending in .gz)"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), ": found UTF-16 text, expected UTF-8"),
    "table.csv": (b"prompt\nq\n", ": found a file of unknown kind, expected one of .jsonl, .jsonl.gz, .json"),
    "list.json": (
        b'[{"prompt": "q"},\n {"prompt" "r"}]',
        ": broken JSON at line 2 column 12 (Expecting ':' delimiter)",
    ),
    "open.json": (b'[{"prompt": "q"}', ": broken JSON at column 17 (Expecting ',' delimiter)"),
    "not.parquet": (LINE, ": not a whole parquet file ("),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file(tmp_path, template, name):
    contents, expected = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(contents)
    for skip_bad_rows in (False, True):
        found = complaint(path, "prompt", template, skip_bad_rows=skip_bad_rows)
        assert found.startswith(f"--train_dataset.path: {path}{expected}")


def test_bad_parquet_files(tmp_path, template):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"] * 1000}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert complaint(path, "prompt", template).startswith(f"--train_dataset.path: {path}: not a whole parquet file")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    assert complaint(path, "prompt", template) == f"--train_dataset.path: {path}: the file has no row"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q", ""]}), path)
    assert complaint(path, "prompt", template).startswith(
        f"--train_dataset.path: {path} row 2: column `prompt`, message 1:"
    )
    (tmp_path / "rows.jsonl").write_bytes(whole)
    assert "found parquet data, expected JSON" in complaint(tmp_path / "rows.jsonl", "prompt", template)


def test_bad_places(tmp_path, template):
    def found(path, **settings):
        return complaint(path, "prompt", template, **settings)

    assert found("") == "--train_dataset.path: found nothing, expected a file, a folder or a hub id"
    assert found("missing.jsonl") == "--train_dataset.path: missing.jsonl: no such file or folder"
    assert found("x" * 5000 + ".jsonl").endswith("xxx.jsonl: no such file or folder")
    assert found("/no/such/folder") == "--train_dataset.path: /no/such/folder: no such file or folder"
    assert found("owner/missing").startswith(
        "--train_dataset.path: owner/missing: no such file or folder, and the hub gives no"
    )
    assert found(tmp_path).startswith(
        f"--train_dataset.path: {tmp_path}: found no data file in this folder, expected one of"
    )
    (tmp_path / "state.json").write_text("{}")
    assert found(tmp_path).startswith(f"--train_dataset.path: {tmp_path}: not a whole `datasets` folder (")
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    assert found(path, split="train[:10%]").startswith(
        "--train_dataset.split=train[:10%]: expected a name, a slice of rows"
    )
    assert found(path, split=f"[:{'9' * 5000}]").endswith(" as in train, [2048:] or train[:2048]")
    assert f"{path}: no split 'test', a file has none" in found(path, split="test")
    assert "found no row to use (0 rows read)" in found(path, split="[5:]")
    assert "found weights for 1 of 2 datasets, expected all or none" in found(f"{path}:0.5,{path}")
    assert "found weight 0, expected a number above 0" in found(f"{path}:0,{path}:1")
    assert "found an empty path" in found(f"{path},")


def test_bad_numbers(tmp_path, template):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    found = complaint(path, "prompt", template, seq_length=3)
    assert found.startswith(
        "--train_dataset.seq_length=3, max_prompt_length=0: found room for a prompt of 3 tokens, the"
    )
    found = complaint(path, "sft", template, seq_length=64, max_prompt_length=64)
    assert found.startswith("--train_dataset.max_prompt_length=64: expected less than seq_length=64")


def test_nothing_left(tmp_path, template):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "%s"}\n{"prompt": ""}\n' % (b"long " * 99))
    found = complaint(path, "prompt", template, skip_bad_rows=True, remove_truncated_samples=True, seq_length=40)
    assert "found no row to use (2 rows read, left out: 1 empty, 1 too long)" in found
