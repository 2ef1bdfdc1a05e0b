"""Files and folders that make room for others."""

from easyrl.core.files import set_aside


def test_a_file_that_is_set_aside_keeps_its_suffix_and_a_folder_has_none(tmp_path):
    for _ in range(2):
        (tmp_path / "rows.jsonl").touch()
        (tmp_path / "llama-3.1-8b").mkdir()
        set_aside(tmp_path / "rows.jsonl")
        set_aside(tmp_path / "llama-3.1-8b")
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows.1.jsonl", "rows.2.jsonl", "llama-3.1-8b.1", "llama-3.1-8b.2",
    }  # fmt: skip
