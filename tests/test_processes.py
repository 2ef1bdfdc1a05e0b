"""The offline trainers by several real processes: the run of one process, caches built together included."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from easyrl import train_dpo, train_rm, train_sft
from easyrl.runtime.metrics import timeless
from tests.offline import TINY, metrics_of, run_script, write_rows
from tests.processes import run_processes, told
from tests.test_resume import ROWS, WORDS
from tests.train_ppo.conftest import write_model

PAIRS = [{"prompt": word, "chosen": f" {word} good", "rejected": f" {word} bad{' bad' * (k % 2)}"}
         for k, word in enumerate(WORDS * 2)]  # fmt: skip

SCRIPTS = {"train_sft": train_sft, "train_rm": train_rm, "train_dpo": train_dpo}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "devices", "mesh_dim"),
    [
        ("train_dpo", 4, 2, "2,2,2"),
        ("train_dpo", 2, 2, "1,4,1"),
        ("train_rm", 2, 2, "2,2,1"),
        ("train_sft", 2, 2, "4,1,1"),
    ],
)
def test_several_processes_are_one_run(name, count, devices, mesh_dim, tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS if name == "train_sft" else PAIRS)
    flags = TINY | {
        "load_checkpoint": f"hf::{tmp_path / 'model'}", "train_dataset.path": rows, "eval_dataset.path": rows,
        "eval_freq": 2, "num_epochs": 2, "save_best": True,
    }  # fmt: skip
    for run, count_of_run in (("one", 1), ("several", count)):
        monkeypatch.setenv("EASYRL_CACHE", str(tmp_path / f"cache_{run}"))  # each starts with nothing
        mine = flags | {"output_dir": tmp_path / run}
        if count_of_run == 1:
            run_script(SCRIPTS[name], mine)
        else:
            mine |= {"mesh_dim": mesh_dim, "micro_batch_size": 0}
            ended = run_processes(f"easyrl.{name}", mine, count, devices, tmp_path / "logs")
            assert not [line for e in ended[1:] for line in told(e.out)]

    ours, theirs = ([timeless(row) for row in metrics_of(tmp_path / run)] for run in ("several", "one"))
    assert len(ours) == len(theirs) > 4
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        # Before the first update policy and reference are one model: which margin is above 0 is a matter of rounding.
        undecided = {"rewards/accuracies"} if name == "train_dpo" and row["step"] == 1 else set()
        for metric in row.keys() - {"tokens/padding_share"} - undecided:
            np.testing.assert_allclose(row[metric], expected[metric], atol=1e-5, rtol=1e-5, err_msg=metric)
    for folder in ("hf", "hf_best"):
        weights, expected = (load_file(tmp_path / run / folder / "model.safetensors") for run in ("several", "one"))
        for tensor, weight in expected.items():
            np.testing.assert_allclose(weights[tensor], weight, atol=1e-5, err_msg=f"{folder} {tensor}")
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
