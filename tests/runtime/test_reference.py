"""Reference log-probs on disk: computed once, resumed where a kill left them, found again only for the same data."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest

from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh
from easyrl.data.dataset import PackedDatasetConfig, load_dataset
from easyrl.data.loader import Loader
from easyrl.data.templates import load_template
from easyrl.runtime import reference
from easyrl.runtime.reference import Answers, ReferenceModel, cache_folder, precompute
from tests.tiny import tiny_config
from tests.train_ppo.conftest import make_tokenizer

ROWS = [{"prompt": f"ask {i}", "chosen": "a" * (i + 1), "rejected": "b" * (2 * i % 5 + 1)} for i in range(11)]


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("EASYRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "PART", 4)  # samples in a file: four parts

    def load(rows=ROWS, template="none", batch_size=4, **settings):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PackedDatasetConfig(path=str(path), seq_length=32, batch_size=batch_size, **settings)
        return Loader(load_dataset(config, "pair", load_template(template, make_tokenizer())), config, seed=0)

    return load


@pytest.fixture
def mesh():
    return make_mesh("1,1,1", jax.devices()[:1])


class Counting:
    """Stands for a model: the log-prob of an answer is its number of tokens, sign and all, and calls are counted."""

    def __init__(self, dies_at=None):
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, tokens, mask, plan):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return -mask.sum(axis=1).astype(np.float32)


def answer_lengths(dataset):
    counted = [[seq.is_answer.sum() for seq in dataset.sequences(i)] for i in range(len(dataset))]
    return np.array(counted, np.float32)


def test_the_table_holds_every_answer_and_serves_every_batch(load, mesh, tmp_path):
    loader = load()
    table = precompute(Answers(loader, mesh), Counting(), tmp_path / "kept", "data")
    np.testing.assert_array_equal(table, -answer_lengths(loader.dataset))
    held_out = Loader(loader.dataset, PackedDatasetConfig(seq_length=32, batch_size=4), seed=1, keep_last=True)
    from_table, live = Answers(held_out, mesh, table=table), Answers(held_out, mesh, live=Counting())
    for step in range(3):  # the last batch is not full
        batch = held_out.batch(step)
        for answers in (from_table, live):
            np.testing.assert_array_equal(answers(batch).ref_logprobs, -batch.mask.sum(axis=1))


def test_a_killed_call_loses_one_part_and_a_finished_one_computes_nothing(load, mesh, tmp_path):
    loader, folder = load(), tmp_path / "kept"
    ask = partial(precompute, Answers(loader, mesh), folder=folder, name="data")
    with pytest.raises(KeyboardInterrupt):
        ask(Counting(dies_at=3))
    assert sorted(path.name for path in folder.iterdir()) == ["000000000.npy", "000000004.npy"]
    resumed, again = Counting(), Counting()
    table = ask(resumed)
    np.testing.assert_array_equal(ask(again), table)
    np.testing.assert_array_equal(table, -answer_lengths(loader.dataset))
    assert (resumed.calls, again.calls) == (1, 0)


def test_another_batch_size_goes_on_with_the_same_parts(load, mesh, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        precompute(Answers(load(), mesh), Counting(dies_at=3), tmp_path / "kept", "data")
    loader, rest = load(batch_size=3), Counting()
    table = precompute(Answers(loader, mesh), rest, tmp_path / "kept", "data")
    np.testing.assert_array_equal(table, -answer_lengths(loader.dataset))
    assert rest.calls == 1


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00cut short"])
def test_a_damaged_part_is_computed_again(load, mesh, tmp_path, content):
    loader, folder = load(), tmp_path / "kept"
    table = precompute(Answers(loader, mesh), Counting(), folder, "data")
    (folder / "000000004.npy").write_bytes(content)
    rest = Counting()
    np.testing.assert_array_equal(precompute(Answers(loader, mesh), rest, folder, "data"), table)
    assert rest.calls == 2


def test_what_decides_the_numbers_decides_the_folder(load):
    asked = ReferenceModel(tiny_config(), Counting(), "a" * 64)
    folder = cache_folder(load().dataset, asked)
    cfg = partial(dataclasses.replace, asked.cfg)
    assert cache_folder(load(batch_size=3, shuffle=False).dataset, asked) == folder
    assert cache_folder(load().dataset, asked._replace(cfg=cfg(remat="full"))) == folder
    others = [
        cache_folder(load().dataset, asked._replace(weights="b" * 64)),
        cache_folder(load().dataset, asked._replace(cfg=cfg(dtype="bfloat16"))),
        cache_folder(load().dataset, asked._replace(cfg=cfg(rope_theta=5e5))),
        cache_folder(load(rows=ROWS[1:]).dataset, asked),
        cache_folder(load(template="tulu").dataset, asked),
        cache_folder(load(max_prompt_length=4).dataset, asked),
    ]
    assert len({folder, *others}) == 7


def test_a_folder_that_cannot_be_written_is_named(load, mesh, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file/kept: cannot be written \(Not a directory\)"):
        precompute(Answers(load(), mesh), Counting(), tmp_path / "file" / "kept", "data")
