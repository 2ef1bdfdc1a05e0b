import pytest

from easyrl.runtime.atomic import atomic_dir


def names(path):
    return sorted(item.name for item in path.iterdir())


def test_a_folder_replaces_the_earlier_one_as_a_whole(tmp_path):
    for content in ("one", "two"):
        with atomic_dir(tmp_path / "hf") as part:
            (part / f"{content}.txt").write_text(content)
            (part / "sub").mkdir()
            (part / "sub" / "x").write_text(content)
    assert names(tmp_path) == ["hf"]
    assert names(tmp_path / "hf") == ["sub", "two.txt"]
    assert (tmp_path / "hf" / "sub" / "x").read_text() == "two"


def test_a_folder_that_raises_leaves_the_earlier_one_and_no_litter(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "weights").write_text("good")

    def write():
        with atomic_dir(tmp_path / "hf") as part:
            (part / "weights").write_text("ba")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write()
    assert (tmp_path / "hf" / "weights").read_text() == "good"
    assert names(tmp_path) == ["hf"]


def test_what_a_killed_writer_left_is_not_taken_over(tmp_path):
    killed = atomic_dir(tmp_path / "hf")
    part = killed.__enter__()  # and never left, as after SIGKILL
    (part / "stale").write_text("x")
    assert not (tmp_path / "hf").exists()
    with atomic_dir(tmp_path / "hf") as part:
        assert names(part) == []
        (part / "fresh").write_text("x")
    assert names(tmp_path / "hf") == ["fresh"]
