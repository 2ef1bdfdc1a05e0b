"""Tokenised data: found again in the cache, made anew when anything changes, the same from any number of processes."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np
import pytest

import easyrl.data.dataset as dataset_module
from easyrl.core.errors import UserError
from easyrl.data.dataset import HeldOutConfig, PackedDatasetConfig, load_dataset
from easyrl.data.messages import BadRow
from easyrl.data.readers import Row, Source, refuse
from easyrl.data.sequences import Encoder, Limits
from easyrl.data.templates import load_template
from easyrl.data.workers import CHUNK, _work, encode_rows


@pytest.fixture
def template(tokenizer):
    return load_template("tulu", tokenizer)


def rows(count):
    return [{"prompt": f"question {i}", "completion": f"answer {i}", "n": i} for i in range(count)]


def load(path, template, kind="sft", **settings):
    return load_dataset(PackedDatasetConfig(path=path, **settings), kind, template)


def tokens(dataset):
    return [sequence.tokens.tolist() for i in range(len(dataset)) for sequence in dataset.sequences(i)]


@pytest.fixture
def builds(monkeypatch):
    """Counts how often data is tokenised."""
    built = []
    write = dataset_module.write_store

    def counted(folder, *args):
        built.append(folder)
        return write(folder, *args)

    monkeypatch.setattr(dataset_module, "write_store", counted)
    return built


def test_the_cache_gives_the_same(write_rows, template, builds):
    path = write_rows(rows(5))
    first, second = load(path, template), load(path, template)
    assert len(builds) == 1
    assert tokens(first) == tokens(second)
    assert [second.columns(i) for i in range(5)] == [{"n": i} for i in range(5)]
    assert first.summary() == second.summary()


def test_any_change_makes_it_anew(write_rows, template, builds, make_tokenizer):
    path = write_rows(rows(5))
    for kind, settings in (
        ("sft", {}), ("prompt", {}), ("sft", {"seq_length": 40}), ("sft", {"max_prompt_length": 30}),
        ("sft", {"split": "[1:]"}), ("sft", {"remove_truncated_samples": True}), ("sft", {"skip_bad_rows": True}),
    ):  # fmt: skip
        load(path, template, kind, **settings)
    load(path, load_template("none", template.tokenizer))
    load(path, load_template("tulu", make_tokenizer(eos="<|im_end|>")))
    load(write_rows(rows(6)), template)
    assert len(builds) == len(set(builds)) == 10
    load(path, template, batch_size=2, shuffle=False, num_workers=1)
    assert len(builds) == 10


def test_what_is_left_of_a_cache_is_replaced(write_rows, template, builds):
    path = write_rows(rows(5))
    expected = tokens(load(path, template))
    for damage in (
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "tokens.bin").write_bytes(b"12"),
        lambda folder: (folder / "samples.npz").write_bytes(b"PK"),
        lambda folder: (folder / "samples.npz").write_bytes((folder / "samples.npz").read_bytes()[:200]),
        lambda folder: (folder / "samples.npz").write_bytes(b""),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text("[]"),
    ):
        damage(builds[-1])
        assert tokens(load(path, template)) == expected
    assert len(builds) == 8


def test_an_interrupted_build_leaves_nothing(write_rows, template, cache_folder):
    path = write_rows([*rows(5), {"prompt": "q"}])
    with pytest.raises(UserError, match="line 6"):
        load(path, template)
    assert list((cache_folder / "data").iterdir()) == []


def test_what_killed_builds_left_goes_after_a_day_and_others_may_read_a_cache(write_rows, template, cache_folder):
    day = 86_400
    for name, age in (("old", 2 * day), ("new", 0), ("slow", 2 * day)):
        (cache_folder / "data" / f"{name}.tmp").mkdir(parents=True)
        (cache_folder / "data" / f"{name}.tmp" / "tokens.bin").touch()
        for path in (f"{name}.tmp/tokens.bin", f"{name}.tmp"):
            os.utime(cache_folder / "data" / path, (time.time() - age,) * 2)
    (cache_folder / "data" / "slow.tmp" / "tokens.bin").write_bytes(b"1")  # still written to
    before = os.umask(0o022)
    try:
        load(write_rows(rows(2)), template)
    finally:
        os.umask(before)
    assert {path.name for path in (cache_folder / "data").glob("*.tmp")} == {"new.tmp", "slow.tmp"}
    (store,) = (cache_folder / "data").glob("sft-*")
    assert store.stat().st_mode & 0o777 == 0o755


def test_cache_folders(write_rows, template, tmp_path, cache_folder):
    path = write_rows(rows(2))
    load(path, template, cache_dir=str(tmp_path / "own"))
    assert len(list((tmp_path / "own" / "data").iterdir())) == 1 and not (cache_folder / "data").exists()
    load(path, template)
    assert len(list((cache_folder / "data").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--train_dataset.cache_dir=.*file: cache folder .*file/data: cannot be"):
        load(path, template, cache_dir=str(tmp_path / "file"))


def test_several_datasets_are_one_list(write_rows, template):
    one, two = write_rows(rows(3), "one.jsonl"), write_rows(rows(5)[3:], "two.jsonl")
    both = load(f"{one},{two}", template)
    assert len(both) == 5 and both.weights is None and both.sizes == [3, 2]
    assert [both.columns(i)["n"] for i in range(5)] == list(range(5))
    assert tokens(both) == tokens(load(one, template)) + tokens(load(two, template))
    assert both.lengths.tolist() == [len(found) for found in tokens(both)]
    assert load(f"{one}:1,{two}:3", template).weights == [0.25, 0.75]
    with pytest.raises(IndexError):
        both.columns(5)


def test_rows_are_read_as_they_are_needed(template):
    read = []

    def reading():
        for i, row in enumerate(rows(100)):
            read.append(i)
            yield Row(f"row {i}", row)

    samples = encode_rows(reading(), Encoder("sft", template, Limits(64)), refuse)
    for i in range(10):
        next(samples)
        assert len(read) == i + 1


def test_processes_give_the_same_in_order(tokenizer, template):
    encoder = Encoder("sft", template, Limits(64))
    count = 2 * CHUNK + 7
    places = [Row(f"row {i}", row) for i, row in enumerate(rows(count))]
    places[300] = Row("row 300", {"prompt": "q"})
    bad_here, bad_there = [], []
    here = list(encode_rows(places, encoder, bad_here.append))
    there = list(encode_rows(places, encoder, bad_there.append, processes=2))
    assert len(here) == len(there) == count - 1
    for a, b in zip(here, there, strict=True):
        assert a.columns == b.columns and np.array_equal(a.sequences[0].tokens, b.sequences[0].tokens)
    assert [str(error) for error in bad_here] == [str(error) for error in bad_there]
    assert bad_there[0].reason == "columns" and "row 300" in str(bad_there[0])


def die(end):
    os._exit(1)


def die_later(end):
    end.recv()
    os._exit(1)


@pytest.mark.parametrize("work", [die, die_later])
def test_a_process_that_dies_is_reported(monkeypatch, template, work):
    monkeypatch.setattr("easyrl.data.workers._work", work)
    place = Row("row 1", {"prompt": "q" * 10**6, "completion": "a"})  # more than a pipe holds
    with pytest.raises(UserError, match="num_workers: a tokenising process ended early"):
        list(encode_rows([place] * 2, Encoder("sft", template, Limits(64)), refuse, processes=2))


def tell_mask(end):
    end.recv()
    end.recv()
    end.send([BadRow(str(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())), "")])


def test_processes_start_empty_handed_and_leave_ctrl_c_to_this_one(monkeypatch, template):
    """What a process is started with is written before it reads: more than a pipe holds would wait for all imports."""
    monkeypatch.setattr("easyrl.data.workers._work", tell_mask)
    started = []
    start = SpawnProcess.start

    def starting(process):
        started.append(process._args)
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", starting)
    found = []
    assert not list(encode_rows(rows(1), Encoder("sft", template, Limits(64)), found.append, processes=2))
    assert [str(error) for error in found] == ["True"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert [[type(arg) for arg in args] for args in started] == [[Connection]] * 2


def test_a_process_whose_starter_is_gone_ends(template):
    here, there = multiprocessing.Pipe()
    here.send(Encoder("sft", template, Limits(64)))
    here.close()
    _work(there)


def test_as_many_processes_as_cores_and_text(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert [dataset_module._worth(size * 1_000_000) for size in (0, 20, 40, 10_000)] == [1, 1, 2, 3]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert dataset_module._worth(10**12) == 64


def test_hosts_that_read_other_tokens_are_refused(write_rows, template, monkeypatch):
    said = []
    monkeypatch.setattr(dataset_module, "check_same", lambda what, found: said.append(found))
    for answer in ("one", "two", "one"):
        load(write_rows([{"prompt": "q", "completion": answer}], f"{answer}.jsonl"), template)
    assert said[0] == said[2] != said[1]


def test_lines_are_counted_for_the_bar_alone(write_rows, template, monkeypatch):
    monkeypatch.setattr(Source, "num_rows", lambda source: pytest.fail("counted"))
    monkeypatch.setattr(dataset_module, "quiet", lambda: True)
    assert len(load(write_rows(rows(3)), template)) == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"split": "[:9]"}, "--eval_dataset.split=[:9]: needs --eval_dataset.path, which is not given"),
        ({"skip_bad_rows": True}, "--eval_dataset.skip_bad_rows=True: needs --eval_dataset.path, which is not given"),
        (
            {"path": "a.jsonl:0.7,b.jsonl:0.3"},
            "--eval_dataset.path=a.jsonl:0.7,b.jsonl:0.3: found weights, expected none: every held-out row counts once",
        ),
        (
            {"path": "a.jsonl:0.7,b.jsonl"},
            "--eval_dataset.path: 'a.jsonl:0.7,b.jsonl': found weights for 1 of 2 datasets, expected all or none",
        ),
    ],
)
def test_held_out_flags_that_would_do_nothing(settings, expected):
    with pytest.raises(UserError) as caught:
        HeldOutConfig(**settings).check()
    assert str(caught.value) == expected


def test_held_out_data():
    assert not HeldOutConfig().path
    held_out = HeldOutConfig("a.jsonl,b.jsonl", "[:9]", True).like(PackedDatasetConfig(path="c.jsonl", batch_size=7))
    assert (held_out.path, held_out.split, held_out.skip_bad_rows) == ("a.jsonl,b.jsonl", "[:9]", True)
    assert held_out.batch_size == 7 and not held_out.shuffle
