"""Which checkpoint a run goes on from, and which it refuses."""

import dataclasses
import json
import re
import shutil

import pytest
from etils import epath

from easyrl import train_sft
from easyrl.core.config import flag_values
from easyrl.core.errors import UserError
from easyrl.data.dataset import PackedDatasetConfig
from easyrl.runtime.resume import check_same_run, continue_named, find_source

CONFIG = train_sft.Config(
    lr=1e-3, load_checkpoint="hf::base", train_dataset=PackedDatasetConfig(path="rows.jsonl", batch_size=8)
)


@pytest.fixture
def run(tmp_path):
    """The checkpoints folder of a run of SFT that was at step 10."""
    return write_steps(tmp_path / "run" / "checkpoints", 5, 10)


def write_steps(folder, *steps, script="train_sft", config=CONFIG):
    for step in steps:
        (folder / str(step)).mkdir(parents=True)
        facts = {"format": 1, "step": step, "script": script, "data": "rows", "config": flag_values(config)}
        (folder / str(step) / "run.json").write_text(json.dumps(facts))
    return epath.Path(folder)


def of(**changes):
    return dataclasses.replace(CONFIG, **changes)


def test_the_newest_of_its_own_comes_first(run, tmp_path):
    other = write_steps(tmp_path / "other", 3)
    for resume in ("auto", "own", f"easyrl::{other}"):
        assert find_source(of(resume=resume), run)[:2] == (run, 10)
    assert find_source(of(resume="never"), run) is None


def test_a_new_folder_goes_on_from_what_is_named(run, tmp_path):
    new = epath.Path(tmp_path / "new" / "checkpoints")
    assert find_source(of(resume="auto"), new) is None
    assert find_source(of(resume=f"easyrl::{run}"), new)[:2] == (run, 10)
    assert find_source(of(resume=f"easyrl::{run.parent}"), new)[:2] == (run, 10)
    assert find_source(of(resume=f"easyrl::{run}/5"), new)[:2] == (run, 5)


def test_going_back_within_a_run_would_lose_what_came_after(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the run has gone on to step 10 since; .* another --output_dir"):
        find_source(of(resume=f"easyrl::{run}/5"), run)
    (tmp_path / "link").symlink_to(run.parent)
    monkeypatch.chdir(tmp_path)
    for named in ("run/checkpoints/5", "./link/checkpoints/5"):  # the same place in other words
        with pytest.raises(UserError, match="has gone on to step 10"):
            find_source(of(resume=f"easyrl::{named}"), run)


def test_wrong_values_are_named(run, tmp_path):
    with pytest.raises(UserError, match="--resume=yes: expected auto, own, never"):
        find_source(of(resume="yes"), run)
    with pytest.raises(UserError, match=re.escape(f"--resume=easyrl::{run}/7: found no whole checkpoint")):
        find_source(of(resume=f"easyrl::{run}/7"), epath.Path(tmp_path / "new"))


def test_a_checkpoint_of_the_same_script_as_load_checkpoint_is_gone_on_with(run):
    config = continue_named(of(load_checkpoint=f"easyrl::{run}/5"), "train_sft")
    assert config == of(resume=f"easyrl::{run}/5")  # and the model it came from is named again
    bucket = of(load_checkpoint=f"easyrl::{run}/5", output_dir="gs://bucket/run")  # which nobody asks
    assert continue_named(bucket, "train_sft") == dataclasses.replace(config, output_dir="gs://bucket/run")
    for same in (of(load_checkpoint=f"easyrl::{run}/5", resume="own"), CONFIG):
        assert continue_named(same, "train_sft") is same
    weights = of(load_checkpoint=f"easyrl::{run}")
    assert continue_named(weights, "train_dpo") is weights


def test_once_it_has_gone_on_a_run_needs_no_more_what_it_went_on_from(run, tmp_path):
    command = of(load_checkpoint=f"easyrl::{run}/5", output_dir=str(tmp_path / "new"))
    first = continue_named(command, "train_sft")
    shutil.rmtree(run.parent)
    with pytest.raises(UserError, match=r"--load_checkpoint=easyrl::.*: found no whole checkpoint"):
        continue_named(command, "train_sft")
    own = write_steps(tmp_path / "new" / "checkpoints", 7, config=first)
    again = continue_named(command, "train_sft")
    assert again == first and find_source(again, own)[:2] == (own, 7)
    other = dataclasses.replace(command, load_checkpoint=f"easyrl::{run}/4")
    with pytest.raises(UserError, match=r"--load_checkpoint=easyrl::.*/4: found no whole checkpoint"):
        continue_named(other, "train_sft")


def refused(run, config, data="rows", script="train_sft"):
    source = find_source(config, run)
    with pytest.raises(UserError) as caught:
        check_same_run(config, script, data, source)
    return str(caught.value)


def test_flags_that_decide_what_is_computed_may_not_change(run):
    message = refused(run, of(lr=2e-3, seed=7, train_dataset=PackedDatasetConfig(path="rows.jsonl", batch_size=16)))
    assert message.startswith(f"--output_dir={run.parent}: cannot go on from step 10 with other flags: ")
    for change in ("--seed was 42, is 7", "--lr was 0.001, is 0.002", "--train_dataset.batch_size was 8, is 16"):
        assert change in message
    assert message.endswith("--allow_config_change=seed,train_dataset.batch_size,lr")


def test_flags_that_do_not_and_flags_that_are_allowed_may(run):
    free = {"mesh_dim": "1,1,-1", "micro_batch_size": 4, "eval_freq": 3, "save_minutes": 1.0, "output_dir": "x"}
    for config in (CONFIG, of(**free), of(lr=2e-3, seed=7, allow_config_change="--seed, lr")):
        check_same_run(config, "train_sft", "rows", find_source(config, run))
    assert "--seed was" in refused(run, of(lr=2e-3, seed=7, allow_config_change="lr"))
    message = refused(run, of(allow_config_change="learning_rate"))
    assert message == "--allow_config_change=learning_rate: there is no flag --learning_rate"


def test_other_rows_under_the_same_path_are_noticed(run):
    assert "--train_dataset.path=rows.jsonl has other rows now" in refused(run, CONFIG, data="others")
    allowed = of(allow_config_change="train_dataset.path")
    check_same_run(allowed, "train_sft", "others", find_source(allowed, run))


def test_other_weights_of_a_frozen_model_under_the_same_name_are_noticed(run):
    def check(config, load_checkpoint):
        check_same_run(config, "train_sft", "rows", find_source(config, run), {"load_checkpoint": load_checkpoint})

    check(CONFIG, "old")  # a checkpoint from before these were kept
    path = run / "10" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen": {"load_checkpoint": "old"}}))
    check(CONFIG, "old")
    with pytest.raises(UserError, match=r"--load_checkpoint=hf::base has other weights now\. .*=load_checkpoint$"):
        check(CONFIG, "new")
    check(of(allow_config_change="load_checkpoint"), "new")


def test_a_run_of_another_script_is_another_run(run):
    assert "holds a run of train_sft, expected one of train_rm" in refused(run, CONFIG, script="train_rm")


def test_flags_that_are_new_since_the_checkpoint_count_by_their_defaults(run):
    path = run / "10" / "run.json"
    facts = json.loads(path.read_text())
    del facts["config"]["seed"]
    path.write_text(json.dumps(facts))
    check_same_run(CONFIG, "train_sft", "rows", find_source(CONFIG, run))
    assert "--seed was 42, is 7" in refused(run, of(seed=7))
