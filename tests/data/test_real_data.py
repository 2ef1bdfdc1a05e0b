"""Every public file loads as it is, and packs with little padding."""

import pytest

from easyrl.data.dataset import DatasetConfig, PackedDatasetConfig, load_dataset
from easyrl.data.loader import Loader
from easyrl.data.prompts import PromptDataset
from easyrl.data.readers import open_source
from easyrl.data.templates import load_template
from easyrl.data.tokenizer import load_tokenizer

ROWS = 200  # of each file; the slow test takes them all
KINDS = {"prefs": "pair", "sft": "sft", "prompts": "prompt"}


@pytest.fixture(scope="module")
def template(shared_data):
    return load_template("tulu", load_tokenizer(str(shared_data / "tokenizers" / "llama2")))


def files(shared_data, *folders):
    return [file for folder in folders for file in sorted((shared_data / folder).iterdir())]


def kind_of(file):
    return "labelled" if "kto" in file.name else KINDS[file.parent.name]


def check_every_file(shared_data, template, split):
    for file in files(shared_data, *KINDS):
        config = PackedDatasetConfig(path=str(file), seq_length=1024, split=split)
        report = load_dataset(config, kind_of(file), template).stores[0].report
        assert report.rows == report.samples > 0 and not report.skipped and not report.rewritten, file.name
        assert report.longest <= 1024 and report.tokens > 0


def test_the_start_of_every_file_loads(shared_data, template):
    check_every_file(shared_data, template, f"[:{ROWS}]")


@pytest.mark.slow
def test_every_file_loads_as_a_whole(shared_data, template):
    check_every_file(shared_data, template, "")


@pytest.mark.slow
def test_packing_wastes_under_five_per_cent(shared_data, template):
    for file in files(shared_data, "prefs"):
        config = PackedDatasetConfig(path=str(file), seq_length=1024, batch_size=64)
        dataset = load_dataset(config, kind_of(file), template)
        assert Loader(dataset, config, 0).padding_share() < 0.05, file.name


def test_pairs_also_serve_as_prompts_and_demonstrations(shared_data, template):
    path = str(shared_data / "prefs" / "hh_harmless_base_test.jsonl.gz")
    row = next(open_source(path).rows()).value
    prompts = PromptDataset(DatasetConfig(path=path, split="[:4]", batch_size=4, shuffle=False), template, 0)
    assert [message._asdict() for message in prompts.batch(0).messages[0]] == row["chosen"][:-1]
    config = PackedDatasetConfig(path=path, split="[:4]", batch_size=4)
    (sequence,) = load_dataset(config, "sft", template).sequences(0)
    answer = template.tokenizer.decode(sequence.tokens[sequence.is_answer])
    assert answer == row["chosen"][-1]["content"] + "</s>"
