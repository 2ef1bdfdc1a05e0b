"""Arrays and facts by step: whole or absent, back on any mesh, and earlier ones safe from a disk that fails."""

import errno
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from easyrl.core import checkpoints
from easyrl.core.checkpoints import Writer, find_checkpoint, newest_step, read_arrays, read_facts, whole_steps
from easyrl.core.errors import UserError
from easyrl.core.sharding import make_mesh


def arrays(seed: int = 0, shape=(16, 8)):
    rng = np.random.default_rng(seed)
    return {"params": {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}, "updates": jnp.int32(seed)}


def abstract_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path / "checkpoints")


@pytest.fixture
def writer(folder):
    writer = Writer(folder, lambda facts: [], lambda: None)
    yield writer
    writer.close()


def save(writer, step, tree=None, **facts):
    writer.start(step, arrays(step) if tree is None else tree, facts)
    writer.wait()


def test_what_is_saved_comes_back(writer, folder):
    for step in (2, 10):
        save(writer, step, metrics={"loss": 0.1 + 0.2})
    assert whole_steps(folder) == [2, 10]
    assert read_facts(folder, 10)["metrics"] == {"loss": 0.1 + 0.2}
    for step in (2, 10):
        assert_same(read_arrays(folder, step, abstract_of(arrays())), arrays(step))


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = epath.Path("run/checkpoints")
    writer = Writer(folder, lambda facts: [], lambda: None)
    save(writer, 3)
    writer.close()
    assert find_checkpoint("run", "--resume") == (folder, 3)
    assert_same(read_arrays(folder, 3, abstract_of(arrays())), arrays(3))


def test_a_part_of_the_arrays_in_another_format(writer, folder):
    save(writer, 1)
    wanted = {"params": {"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=arrays()["params"]["w"].sharding)}}
    found = read_arrays(folder, 1, wanted)
    assert found.keys() == {"params"}
    np.testing.assert_array_equal(found["params"]["w"], arrays(1)["params"]["w"].astype(jnp.bfloat16))


@pytest.mark.parametrize("spec", [PartitionSpec("fsdp"), PartitionSpec("mp", "dp"), PartitionSpec()])
def test_written_on_one_mesh_and_read_on_others(spec, writer, folder):
    sharding = NamedSharding(make_mesh("2,2,2"), spec)
    tree = {"w": jax.device_put(arrays()["params"]["w"], sharding)}
    save(writer, 1, tree)
    for mesh_dim, devices in (("1,1,1", 1), ("1,2,1", 2), ("1,1,8", 8)):
        other = NamedSharding(make_mesh(mesh_dim, jax.devices()[:devices]), PartitionSpec("fsdp", "mp"))
        found = read_arrays(folder, 1, {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=other)})["w"]
        assert found.sharding == other
        np.testing.assert_array_equal(found, tree["w"])


def test_arrays_may_be_donated_as_soon_as_saving_has_started(writer, folder):
    tree = arrays(3, shape=(1024, 1024))
    expected = jax.tree.map(np.array, tree)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    abstract = abstract_of(tree)
    writer.start(1, tree, {})
    for _ in range(5):
        tree = change(tree)
    writer.wait()
    assert_same(read_arrays(folder, 1, abstract), expected)


def test_what_a_kill_leaves_is_never_taken_for_whole_and_goes_with_the_next_writer(writer, folder):
    for step in (1, 2, 3):
        save(writer, step)
    (folder / "2" / "run.json").unlink()
    (folder / "7" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "2024" / "thesis").mkdir(parents=True)
    assert whole_steps(folder) == [1, 3]
    Writer(folder, lambda facts: [], lambda: None).close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2024", "3"]


def test_steps_that_may_go_go_when_the_next_one_is_whole(folder):
    asked = []

    def spare(facts):
        asked.append(sorted(facts))
        return [step for step in facts if step < max(facts)]

    writer = Writer(folder, spare, lambda: None)
    for step in (1, 2):
        save(writer, step)
    writer.close()
    assert asked == [[1], [1, 2]]
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_a_step_that_cannot_be_written_leaves_the_others_alone(writer, folder, monkeypatch, capfd):
    save(writer, 1)
    real = checkpoints.write_atomic
    monkeypatch.setattr(checkpoints, "write_atomic", no_space)
    writer.start(2, arrays(2), {})
    with pytest.raises(OSError, match="No space"):
        writer.wait()
    assert [path.name for path in folder.iterdir()] == ["1"]
    monkeypatch.setattr(checkpoints, "write_atomic", real)
    writer.wait()  # an error is raised once
    save(writer, 3)
    assert whole_steps(folder) == [1, 3]
    assert_same(read_arrays(folder, 1, abstract_of(arrays())), arrays(1))
    assert capfd.readouterr().err == ""


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_vanished_is_made_again(tmp_path):
    described, folder = [], epath.Path(tmp_path / "checkpoints")
    writer = Writer(folder, lambda facts: [], lambda: described.append(1) or (folder / "models").mkdir())
    save(writer, 1)
    save(writer, 2)
    assert len(described) == 1
    folder.rmtree()
    save(writer, 3)
    writer.close()
    assert len(described) == 2 and whole_steps(folder) == [3]


def test_a_full_disk_keeps_the_checkpoint_before(small_disk, capfd):
    folder = epath.Path(small_disk / "checkpoints")
    writer = Writer(folder, lambda facts: [], lambda: None)
    kept = arrays(1, shape=(512, 512))
    save(writer, 1, kept)
    with pytest.raises(Exception, match="No space left"):
        save(writer, 2, arrays(2, shape=(1024, 1024)))
    assert whole_steps(folder) == [1]
    assert_same(read_arrays(folder, 1, abstract_of(kept)), kept)
    save(writer, 3)  # what the failed one took is free again
    writer.close()
    assert whole_steps(folder) == [1, 3]
    assert capfd.readouterr().err == ""


def test_names_of_checkpoints(writer, folder):
    for step in (2, 10):
        save(writer, step)
    run = folder.parent
    assert find_checkpoint(str(run), "--f") == find_checkpoint(str(folder), "--f") == (folder, 10)
    assert find_checkpoint(str(folder / "2"), "--f") == (folder, 2)
    for target in (run / "elsewhere", folder / "3"):
        complaint = f"--f=easyrl::{target}: found no whole checkpoint there"
        with pytest.raises(UserError, match=re.escape(complaint)):
            find_checkpoint(str(target), "--f")
    numbered = epath.Path(shutil.copytree(run, run / "1"))
    assert find_checkpoint(str(numbered), "--f") == (numbered / "checkpoints", 10)
    assert newest_step(folder, "--f") == 10 and newest_step(run / "elsewhere", "--f") is None


def test_a_store_that_does_not_answer_does_not_pass_for_empty(folder, monkeypatch):
    def unreachable(_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(checkpoints, "whole_steps", unreachable)
    with pytest.raises(UserError, match=r"--output_dir: cannot read .*: no route to host"):
        newest_step(folder, "--output_dir")


def test_a_store_that_is_silent_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(checkpoints, "ANSWER", 0.1)
    monkeypatch.setattr(checkpoints, "whole_steps", lambda folder: time.sleep(5))
    with pytest.raises(UserError, match=r"--checkpoint_dir: cannot read gs://bucket/run: no answer within 0.1 s"):
        newest_step(epath.Path("gs://bucket/run"), "--checkpoint_dir")


def test_damage_is_one_line_that_names_the_file(writer, folder):
    save(writer, 1)
    with pytest.raises(UserError, match=r"checkpoints/1/state: cannot be restored: .*remove .*checkpoints/1") as caught:
        read_arrays(folder, 1, {"params": abstract_of(arrays(shape=(4, 4))["params"])})
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    params = abstract_of(arrays()["params"])
    with pytest.raises(UserError, match=r"state: cannot be restored: has no params/v, expected \[16, 8\]"):
        read_arrays(folder, 1, {"params": params | {"v": params["w"]}})
    (folder / "1" / "run.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"checkpoints/1/run.json: expected a checkpoint of format 1"):
        read_facts(folder, 1)
    (folder / "1" / "run.json").write_text('{"for')
    with pytest.raises(UserError, match=r"checkpoints/1/run.json: cannot be read"):
        read_facts(folder, 1)
