import errno

import pytest

from easyrl.core.errors import RunFailed
from easyrl.runtime.troubles import Troubles, reason_of

FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/file")


def fail(troubles, error=FULL):
    with troubles.attempt("metrics.jsonl"):
        raise error


def test_a_trouble_is_told_once_and_so_is_its_end(capfd):
    troubles = Troubles()
    for _ in range(3):
        fail(troubles)
    assert "metrics.jsonl" in troubles
    with troubles.attempt("metrics.jsonl"):
        pass
    troubles.end()
    assert capfd.readouterr().err.splitlines() == [
        "easyrl: warning: could not write metrics.jsonl: No space left on device: /disk/file; the run goes on, trying "
        "again next time",
        "easyrl: metrics.jsonl: written again",
    ]


def test_a_run_that_has_not_written_everything_has_failed():
    troubles = Troubles()
    fail(troubles)
    with pytest.raises(RunFailed, match=r"at its end, but could not write metrics.jsonl \(No space left on device"):
        troubles.end()


def test_what_is_not_the_disks_fault_is_not_tolerated():
    with pytest.raises(KeyError):
        fail(Troubles(), KeyError("a bug"))
    with (troubles := Troubles()).attempt("tracker", any_error=True):
        raise KeyError("a library's")
    assert "tracker" in troubles


def test_reasons_are_one_short_line():
    text = (
        "RESOURCE_EXHAUSTED: write failed\n" + "Error writing: No space left on device [OS error 28: ENOSPC]\nsource.cc"
    )
    assert reason_of(ValueError(text)) == "Error writing: No space left on device [OS error 28: ENOSPC]"
    assert reason_of(TimeoutError("no answer\nin 60 s")) == "TimeoutError: no answer"
