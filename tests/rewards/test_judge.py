"""The protocol of external judges, with small Python programs as judges."""

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.data.generations import Generation
from easyrl.data.messages import Message
from easyrl.rewards.judge import ask, judge_both_orders

HEAD = "import json, sys\nrows = map(json.loads, sys.stdin)\n"
REPLY = 'print(json.dumps({"id": row["id"], "winner": winner}), flush=True)'


def command(tmp_path, body):
    path = tmp_path / "a judge.py"
    path.write_text(HEAD + body)
    return shlex.join([sys.executable, str(path)])


def pair(ours, theirs):
    prompt = (Message("user", "which; $(touch x) & é"),)
    return Generation(prompt, ours, {}), Generation(prompt, theirs, {})


PAIRS = [pair("long answer", "short"), pair("a", "as long"), pair("same!", "size!")]
LONGER = f"""
for row in rows:
    one, two = len(row["answer_1"]), len(row["answer_2"])
    winner = 1 if one > two else 2 if two > one else 0
    {REPLY}
"""


def test_a_fair_judge(tmp_path):
    verdicts = judge_both_orders(command(tmp_path, LONGER), PAIRS, ["", "", ""])
    np.testing.assert_array_equal(verdicts.points, [1.0, 0.0, 0.5])
    assert (verdicts.first_wins, verdicts.consistent) == (0.5, 1.0)


def test_a_judge_that_prefers_what_it_sees_first(tmp_path):
    body = f"for row in rows:\n    winner = 1\n    {REPLY}"
    verdicts = judge_both_orders(command(tmp_path, body), PAIRS, ["", "", ""])
    np.testing.assert_array_equal(verdicts.points, [0.5, 0.5, 0.5])
    assert (verdicts.first_wins, verdicts.consistent) == (1.0, 0.0)


def test_a_judge_that_leans_to_the_first(tmp_path):
    # It sees a longer first answer win, but a longer second one only draw: a win and a tie are 0.75 points.
    body = f"for row in rows:\n    winner = int(len(row['answer_1']) > len(row['answer_2']))\n    {REPLY}"
    verdicts = judge_both_orders(command(tmp_path, body), PAIRS, ["", "", ""])
    np.testing.assert_array_equal(verdicts.points, [0.75, 0.25, 0.5])
    assert verdicts.first_wins == pytest.approx((1 + 0.5 + 0.5 + 1 + 0.5 + 0.5) / 6)
    assert verdicts.consistent == pytest.approx(1 / 3)


def test_what_a_judge_is_asked_and_replies_in_any_order(tmp_path):
    seen = tmp_path / "seen.jsonl"
    body = f"""
rows = list(rows)
open({str(seen)!r}, "w").write("\\n".join(map(json.dumps, rows)))
for row in reversed(rows):
    winner = 1 + row["id"] % 2
    {REPLY}
"""
    verdicts = judge_both_orders(command(tmp_path, body), PAIRS[:2], ["math", ""])
    np.testing.assert_array_equal(verdicts.points, [1.0, 1.0])
    rows = [json.loads(line) for line in seen.read_text().splitlines()]
    assert rows[0] == {
        "id": 0,
        "messages": [{"role": "user", "content": "which; $(touch x) & é"}],
        "answer_1": "long answer",
        "answer_2": "short",
        "category": "math",
    }
    assert (rows[1]["answer_1"], rows[1]["answer_2"], rows[1]["id"]) == ("short", "long answer", 1)
    assert "category" not in rows[2]


def test_more_questions_than_a_pipe_holds(tmp_path):
    questions = [{"id": number, "answer_1": "x" * 4000, "answer_2": ""} for number in range(200)]
    assert ask(command(tmp_path, LONGER), questions) == [1] * 200


@pytest.mark.parametrize("reply", ["Hello!", "Hello! " * 20_000])
def test_a_judge_behind_a_wrapper_ends_with_it(tmp_path, reply):
    """It holds the pipe of the questions, which are more than that takes, and may wait for its reply to be read."""
    note = tmp_path / "pid"
    inner = command(
        tmp_path,
        f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\n"
        f"print({reply!r}, flush=True)\nprint({reply!r}, flush=True)\ntime.sleep(600)",
    )
    wrapper = tmp_path / "judge.sh"
    wrapper.write_text(f"{inner}\nexit $?\n")
    questions = [{"id": number, "answer_1": "x" * 4000, "answer_2": ""} for number in range(200)]

    def refused():
        with contextlib.suppress(UserError):
            ask(f"sh {shlex.quote(str(wrapper))}", questions)

    asking = threading.Thread(target=refused, daemon=True)
    asking.start()
    asking.join(20)
    hangs, judge = asking.is_alive(), int(note.read_text())
    for _ in range(100):  # the system may take a moment to clear away a process that was killed
        if not hangs and not is_running(judge):
            return
        time.sleep(0.05)
    os.kill(judge, signal.SIGKILL)
    raise AssertionError(f"hangs: {hangs}")


def is_running(process):
    try:
        os.kill(process, 0)
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_no_shell_reads_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask(command(tmp_path, LONGER) + " ; touch made", [{"id": 0, "answer_1": "a", "answer_2": ""}])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("print('Hello!')", 'line 1 of its output: found \'Hello!\', expected {"id": 0 to 0, "winner": 0, 1 or 2}'),
        ("print('[1]')", "line 1 of its output: found '[1]', expected"),
        ('print(\'{"id": 1, "winner": 1}\')', "line 1 of its output: found"),
        ('print(\'{"id": 0, "winner": 3}\')', "line 1 of its output: found"),
        ('print(\'{"id": 0, "winner": true}\')', "line 1 of its output: found"),
        ("list(rows)", "no reply to question 0, expected one to each of 1"),
        ("sys.exit(3)", "ended with status 3 after 0 of 1 replies"),
        ("sys.stdout.buffer.write(b'\\xff\\n')", "its output is not UTF-8 text"),
    ],
)
def test_a_judge_that_does_not_keep_to_the_protocol(tmp_path, body, complaint):
    with pytest.raises(UserError) as caught:
        ask(command(tmp_path, body), [{"id": 0, "answer_1": "a", "answer_2": ""}])
    assert str(caught.value).startswith("--judge=")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["/nowhere/judge", "'unclosed", " "])
def test_a_command_that_cannot_be_started(text):
    with pytest.raises(UserError, match=r"--judge=.*: cannot be started"):
        ask(text, [])
