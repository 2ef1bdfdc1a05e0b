import errno
import json
import math
import shutil

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.runtime.jsonl import JsonlWriter, read_jsonl
from easyrl.runtime.troubles import Troubles


def write(path, steps, start=0):
    writer = JsonlWriter(path, start)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def strict_loads(line):
    """JSON as the standard has it: Python's parser would also take NaN."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_step_comes_first_and_every_line_is_on_disk_at_once(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": 0.5, "note": "näïve\n\u2028"})
    text = (tmp_path / "m.jsonl").read_text(encoding="utf-8")
    writer.close()
    assert list(strict_loads(text)) == ["step", "loss", "note"]
    assert "näïve" in text and text.count("\n") == 1


def test_numbers_json_cannot_write_become_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(
        1, {"a": math.nan, "b": [math.inf, {"c": np.float32(-math.inf)}], "d": np.int64(3), "e": np.float32(0.5)}
    )
    writer.close()
    assert strict_loads((tmp_path / "m.jsonl").read_text()) == {
        "step": 1,
        "a": None,
        "b": [None, {"c": None}],
        "d": 3,
        "e": 0.5,
    }


def test_text_without_a_utf8_form_is_still_json(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"text": "\ud800"})
    writer.close()
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "text": "\ud800"}]
    write(tmp_path / "m.jsonl", [2], start=1)  # and going on with such a file keeps it
    assert read_jsonl(tmp_path / "m.jsonl")[0] == {"step": 1, "text": "\ud800"}


def test_going_on_keeps_every_step_once(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    write(path, range(5, 10), start=4)
    assert [row["step"] for row in read_jsonl(path)] == list(range(1, 10))
    assert [item.name for item in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_last_line_may_be_cut_in_the_middle_of_a_character(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    with path.open("ab") as file:
        file.write('{"step": 3, "text": "é'.encode()[:-1])
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    write(path, [3], start=2)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_a_new_run_loses_nothing_of_an_old_one(tmp_path):
    path = tmp_path / "m.jsonl"
    for run in range(3):
        write(path, [run + 1])
    assert {item.name: read_jsonl(item)[0]["step"] for item in tmp_path.iterdir()} == {
        "m.1.jsonl": 1,
        "m.2.jsonl": 2,
        "m.jsonl": 3,
    }


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": 2, "text": "\xc3"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: expected a JSON object with a step"):
        JsonlWriter(path, start=5)
    assert path.read_bytes().startswith(b'{"step": 1}')


def test_a_full_disk_costs_no_row_and_tears_no_line(tmp_path, monkeypatch):
    troubles = Troubles()
    writer = JsonlWriter(tmp_path / "m.jsonl", troubles=troubles)
    writer.write(1, {"loss": 0.5})
    real = writer._file

    class Full:
        """Takes the first bytes of a line and then no more."""

        def write(self, data):
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(data[:4])

        def __getattr__(self, name):
            return getattr(real, name)

    writer._file = Full()
    writer.write(2, {"loss": 0.25})
    writer.write(3, {"loss": 0.125})
    assert "m.jsonl" in troubles
    assert [row["step"] for row in read_jsonl(tmp_path / "m.jsonl")] == [1]
    writer._file = real
    writer.write(4, {"loss": 0.0})
    assert [row["step"] for row in read_jsonl(tmp_path / "m.jsonl")] == [1, 2, 3, 4]
    troubles.end()


def test_a_folder_that_vanished_is_made_again_with_all_rows(tmp_path):
    troubles = Troubles()
    (tmp_path / "run").mkdir()
    writer = JsonlWriter(tmp_path / "run" / "m.jsonl", troubles=troubles)
    writer.write(1, {})
    shutil.rmtree(tmp_path / "run")
    writer.write(2, {})
    (tmp_path / "run" / "m.jsonl").unlink()
    writer.close()
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "m.jsonl")] == [1, 2]
    troubles.end()
