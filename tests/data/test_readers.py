"""Every kind of file and folder gives the same rows, with their places."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from easyrl.core.errors import UserError
from easyrl.data.choice import Split, parse_mixture, parse_split
from easyrl.data.readers import open_source

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "ü", "n": 3}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def values(source):
    return [row.value for row in source.rows()]


def write(folder, name):
    """Writes ROWS as the kind of file or folder that `name` says."""
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_bytes(LINES)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(LINES))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif name.endswith(".json.gz"):
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif name == "files":
        path.mkdir()
        write(path, "part.jsonl")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "saved", "files"])
def test_every_kind_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path, name)
    source = open_source(path)
    assert values(source) == ROWS
    assert source.num_rows() in (3, None) and open_source(path, parse_split("[1:9]")).num_rows() in (2, None)
    assert values(open_source(path, parse_split("[1:]"))) == ROWS[1:]
    assert values(open_source(path, parse_split("[:2]"))) == ROWS[:2]
    assert open_source(path).fingerprint == source.fingerprint != open_source(path, parse_split("[1:]")).fingerprint


def test_places_are_lines_or_rows_from_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\n\n"))
    assert [row.where for row in open_source(str(path)).rows()] == [f"{path} line {n}" for n in (1, 3, 5)]
    assert [row.where for row in open_source(write(tmp_path, "a.parquet"), parse_split("[2:]")).rows()] == [
        f"{tmp_path / 'a.parquet'} row 3"
    ]


def test_no_line_behind_a_slice_is_read(tmp_path):
    """Of a file cut short behind the slice neither rows nor their number want the end."""
    path = tmp_path / "a.jsonl.gz"
    zipped = gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(50_000)))
    path.write_bytes(zipped[: len(zipped) // 2])
    source = open_source(str(path), parse_split("[1:3]"))
    assert source.num_rows() == 2 and values(source) == [{"n": 1}, {"n": 2}]
    assert open_source(str(path)).num_rows() is None


def test_broken_rows_have_their_place_in_a_slice(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n{"n"\n{"n": 2}\n{"n": 3}\n')
    broken = []
    assert [row.value["n"] for row in open_source(str(path), parse_split("[:3]")).rows(broken.append)] == [0, 2]
    assert [str(error) for error in broken] == [f"{path} line 2: broken JSON at column 5 (Expecting ':' delimiter)"]
    assert values(open_source(str(path), parse_split("[2:3]"))) == [{"n": 2}]


@pytest.mark.parametrize("saved", [False, True])
def test_text_that_is_no_utf8_is_a_bad_row(tmp_path, saved):
    """Parquet files and `datasets` folders may hold it: not every writer looks."""
    data = pyarrow.array([b"a", b"\xff\xfe", b"c"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *data.buffers()[1:])
    table = pyarrow.table({"n": [1, 2, 3], "prompt": text})
    path = tmp_path / ("saved" if saved else "a.parquet")
    if saved:
        datasets.Dataset(table).save_to_disk(str(path))
    else:
        pyarrow.parquet.write_table(table, path)
    broken = []
    found = list(open_source(str(path)).rows(broken.append))
    assert [(row.where, row.value["prompt"]) for row in found] == [(f"{path} row 1", "a"), (f"{path} row 3", "c")]
    assert [str(error) for error in broken] == [
        f"{path} row 2: {'a column' if saved else 'column `prompt`'}: found byte 0xff, expected UTF-8 text"
    ]
    with pytest.raises(UserError, match=r"row 2: .* expected UTF-8 text"):
        values(open_source(str(path)))


def test_a_value_that_python_cannot_hold_is_a_bad_row(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"at": pyarrow.array([10**17, 0], pyarrow.timestamp("ms"))}), path)
    with pytest.raises(
        UserError, match=r"a.parquet row 1: column `at`: found a value that cannot be read \("
    ) as caught:
        values(open_source(str(path)))
    assert "\n" not in str(caught.value)
    assert len(values(open_source(str(path), parse_split("[1:]")))) == 1


def test_a_json_file_of_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(LINES)
    assert values(open_source(str(tmp_path / "a.json"))) == ROWS


def test_files_of_a_folder_follow_their_names_and_splits(tmp_path):
    for name, row in (("train-1.jsonl", 1), ("train-0.jsonl", 0), ("test.jsonl", 2)):
        (tmp_path / name).write_text(json.dumps({"n": row}))
    assert [row["n"] for row in values(open_source(str(tmp_path)))] == [2, 0, 1]
    assert [row["n"] for row in values(open_source(str(tmp_path), parse_split("train")))] == [0, 1]
    with pytest.raises(UserError, match=r"no file belongs to split 'dev', found test\.jsonl, train-0\.jsonl"):
        open_source(str(tmp_path), parse_split("dev"))


def test_a_split_is_the_files_that_are_called_so(tmp_path):
    """UltraFeedback's train_sft is no part of its train_prefs, nor is there a split `train`."""
    for name in ("train_prefs-00000-of-00001.parquet", "train_sft-00000-of-00001-0a1b.parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"n": [name[6]]}), tmp_path / name)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"n": "t"}'))
    (tmp_path / "a_test.jsonl").write_text('{"n": "other"}')
    found = {
        name: values(open_source(str(tmp_path), parse_split(name))) for name in ("train_prefs", "train_sft", "test")
    }
    assert found == {"train_prefs": [{"n": "p"}], "train_sft": [{"n": "s"}], "test": [{"n": "t"}]}


def test_what_lies_beside_the_data_is_no_data(tmp_path):
    write(tmp_path, "a.jsonl")
    for name in (".ipynb_checkpoints/b.jsonl", "sub/.c.jsonl", "dataset_info.json", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "x"}')
    assert values(open_source(str(tmp_path))) == ROWS


def test_a_saved_dict_of_splits(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "dict"))
    assert values(open_source(str(tmp_path / "dict"))) == ROWS
    assert values(open_source(str(tmp_path / "dict"), parse_split("test[:1]"))) == ROWS[:1]
    with pytest.raises(UserError, match="no split 'dev', found train, test"):
        open_source(str(tmp_path / "dict"), parse_split("dev"))


def test_the_fingerprint_follows_the_contents(tmp_path):
    before = open_source(write(tmp_path, "a.jsonl")).fingerprint
    (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"1", b"7"))
    assert open_source(str(tmp_path / "a.jsonl")).fingerprint != before


@pytest.mark.parametrize("form", ["numpy", "arrow", "pandas"])
def test_rows_of_a_folder_are_plain_whatever_format_it_was_saved_with(tmp_path, form):
    rows = [{"messages": [{"role": "user", "content": "x"}], "label": True, "hidden": 1}]
    shown = datasets.Dataset.from_list(rows).with_format(form, columns=["messages", "label"])
    shown.save_to_disk(str(tmp_path / "saved"))
    assert values(open_source(str(tmp_path / "saved"))) == [{"messages": rows[0]["messages"], "label": True}]


def test_images_and_sounds_are_left_out(tmp_path):
    """To decode them takes time and libraries, and broken ones would stop a run that has no use for them."""
    broken = {"bytes": b"no image", "path": None}
    rows = datasets.Dataset.from_list([{"prompt": "q", "image": broken, "images": [broken], "sound": broken}])
    rows = rows.cast_column("image", datasets.Image()).cast_column("sound", datasets.Audio())
    rows.cast_column("images", datasets.List(datasets.Image())).save_to_disk(str(tmp_path / "saved"))
    assert values(open_source(str(tmp_path / "saved"))) == [{"prompt": "q"}]


def test_a_saved_folder_is_known_by_its_bytes(tmp_path):
    """`datasets` itself takes two datasets for one that were made by the same steps from other files."""
    prompts = datasets.Dataset.from_list([{"prompt": "q"}])

    def saved(name, answer):
        (tmp_path / "answer.txt").write_text(answer)
        rows = prompts.map(
            lambda row: {"completion": (tmp_path / "answer.txt").read_text()}, load_from_cache_file=False
        )
        rows.save_to_disk(str(tmp_path / name))
        return rows._fingerprint, open_source(str(tmp_path / name)).fingerprint

    (theirs, ours), (same, other) = saved("one", "a"), saved("two", "b")
    assert theirs == same and ours != other
    assert open_source(str(tmp_path / "one")).fingerprint == ours


def test_hub_ids(monkeypatch):
    asked = []

    def load_dataset(repo, config, split):
        asked.append((repo, config, split))
        if repo == "owner/missing":
            raise FileNotFoundError("no such thing")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(open_source("owner/name", parse_split("test[1:]"))) == ROWS[1:]
    assert next(open_source("owner/name/main").rows()).where == "owner/name/main row 1"
    assert asked == [("owner/name", None, "test"), ("owner/name", "main", "train")]
    with pytest.raises(UserError, match="owner/missing: no such file or folder, and the hub gives no such dataset"):
        open_source("owner/missing")


@pytest.mark.parametrize(
    ("text", "split"),
    [("", Split("")), ("train", Split("train")), ("[2:]", Split("", 2)), ("test[3:9]", Split("test", 3, 9))],
)
def test_splits(text, split):
    assert parse_split(text) == split


def test_mixtures(tmp_path):
    assert parse_mixture("a.jsonl") == [("a.jsonl", None)]
    assert parse_mixture("a.jsonl,b.jsonl") == [("a.jsonl", None), ("b.jsonl", None)]
    assert parse_mixture("a.jsonl:3, owner/name:1") == [("a.jsonl", 0.75), ("owner/name", 0.25)]
    odd = tmp_path / "a,b:1"
    odd.write_text("")
    assert parse_mixture(str(odd)) == [(str(odd), None)]
