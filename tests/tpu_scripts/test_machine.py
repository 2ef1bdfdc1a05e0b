"""tpu_scripts on a machine: worker.sh, and what the others have it do there; and the job of SLURM."""

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from tests.source import REPO

SCRIPTS = REPO / "tpu_scripts"


def put_programs(folder, **bodies):
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)


def make_checkout(folder):
    """What setup.sh leaves on a machine, as far as worker.sh is concerned."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "tpu_scripts").symlink_to(SCRIPTS)


def work(folder, body, bucket=""):
    """The status that worker.sh leaves in the folder of run x, for a command that is `body` in bash."""
    if not (folder / ".venv").exists():
        make_checkout(folder)
    put_programs(folder, curl="echo 0")
    env = os.environ | {"RUN": "x", "BUCKET": bucket, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    env["HOME"] = str(folder)
    command = ["bash", "tpu_scripts/worker.sh", "bash", "-c", body]
    subprocess.run(command, env=env, cwd=folder, stdin=subprocess.DEVNULL, timeout=30)
    (status,) = (folder / "runs" / "x").glob("status.*")
    return status.read_text().strip()


@pytest.mark.parametrize(
    ("body", "status"), [("true", "0"), ("exit 3", "3"), ("echo 'SIGTERM: stopped after step 3, saved'", "stopped")]
)
def test_a_machine_keeps_log_and_exit_status(body, status, tmp_path):
    assert work(tmp_path, f"echo hi; {body}") == status
    (log,) = (tmp_path / "runs" / "x").glob("log.*")
    assert log.read_text().startswith("hi\n")
    assert not list((tmp_path / "runs" / "x").glob("pid.*"))


def test_a_run_that_was_stopped_once_is_not_taken_for_stopped_when_it_is_complete(tmp_path):
    """Its log goes on where it was."""
    assert work(tmp_path, "echo 'SIGTERM: stopped after step 3, saved'") == "stopped"
    assert work(tmp_path, "echo complete") == "0"


def test_a_machine_has_the_secrets_in_the_environment_of_its_run_and_not_in_its_folder(tmp_path):
    (tmp_path / "easyrl.secrets").write_text("HF_TOKEN=hf_1=+/\nexport WANDB_API_KEY='a b'\n")
    assert work(tmp_path, 'test "$HF_TOKEN $WANDB_API_KEY" = "hf_1=+/ a b"') == "0"
    assert not any("hf_1" in path.read_text() for path in (tmp_path / "runs" / "x").iterdir())


# A bucket that is a folder; the first copies from and to it fail, as many as the files say.
BUCKET = """
case "$2 $*" in
  ls*) [ -e bucket/x ] || { echo 'ERROR: One or more URLs matched no objects.' >&2; exit 1; }; exit ;;
  *'gs://mine/x runs/x') from=bucket/x to=runs/x ;;
  *) from=runs/x to=bucket/x ;;
esac
echo "$to" >>copies
[ $(grep -c "$to" copies) -gt "$(cat failing.${to%/x} 2>/dev/null || echo 0)" ] || exit 1
mkdir -p $to; cp $from/* $to/
"""
# The minute copy comes after a second here, and no pause is longer.
SLEEP = "[ $1 != 60 ] || exec /bin/sleep 1"


@pytest.mark.parametrize(("failing", "status", "copies"), [(0, "0", 1), (3, "0", 4), (9, "1", 4)])
def test_a_run_is_not_complete_before_it_is_in_the_bucket(failing, status, copies, tmp_path):
    """One copy to it, which is tried three times more."""
    put_programs(tmp_path, gcloud=BUCKET, sleep=SLEEP)
    (tmp_path / "failing.bucket").write_text(str(failing))
    assert work(tmp_path, "true", bucket="gs://mine") == status
    assert (tmp_path / "copies").read_text().split() == ["bucket/x"] * copies


@pytest.mark.parametrize(("failing", "status", "metrics"), [(0, "0", "old new"), (3, "0", "old new"), (9, "1", "old")])
def test_what_is_in_the_bucket_comes_back_before_the_run_starts(failing, status, metrics, tmp_path):
    """And is not written over where it does not."""
    put_programs(tmp_path, gcloud=BUCKET, sleep=SLEEP)
    (tmp_path / "failing.runs").write_text(str(failing))
    (tmp_path / "bucket" / "x").mkdir(parents=True)
    (tmp_path / "bucket" / "x" / "metrics.jsonl").write_text("old\n")
    assert work(tmp_path, "echo new >>runs/x/metrics.jsonl; sleep 1.5", bucket="gs://mine") == status
    assert (tmp_path / "bucket" / "x" / "metrics.jsonl").read_text().split() == metrics.split()
    (log,) = (tmp_path / "runs" / "x").glob("log.*")
    assert ("is not started without what is in gs://mine/x" in log.read_text()) == (status == "1")


def test_a_bucket_that_cannot_be_looked_into_is_not_taken_for_an_empty_one(tmp_path):
    put_programs(tmp_path, gcloud="echo 'HTTPError 503: try later' >&2; exit 1", sleep=SLEEP)
    assert work(tmp_path, "touch started", bucket="gs://mine") == "1"
    (log,) = (tmp_path / "runs" / "x").glob("log.*")
    assert "cannot look into gs://mine/x: HTTPError 503: try later" in log.read_text()
    assert not (tmp_path / "started").exists()


def test_a_machine_that_has_the_folder_does_not_take_an_older_one_from_the_bucket(tmp_path):
    """As after a last copy that failed."""
    put_programs(tmp_path, gcloud=BUCKET, sleep=SLEEP)
    write = "echo line >>runs/x/metrics.jsonl"
    assert work(tmp_path, write, bucket="gs://mine") == "0"
    (tmp_path / "failing.bucket").write_text("5")
    assert work(tmp_path, write, bucket="gs://mine") == "1"
    assert work(tmp_path, write, bucket="gs://mine") == "0"
    assert (tmp_path / "bucket" / "x" / "metrics.jsonl").read_text() == 3 * "line\n"


@pytest.fixture
def machine(tmp_path):
    """`machine(script, *arguments)` runs a script for run x on a pod of one machine, and here what ssh is to run there.

    `machine.state()` is what run.sh sees of the run, and `machine.folder` where the machine has it.
    """
    make_checkout(tmp_path / "easyrl")
    gcloud = 'for word; do case $word in --command=*) exec bash -c "${word#*=}" ;; esac; done'
    put_programs(tmp_path, curl="echo 0", gcloud=gcloud)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}

    def bash(*words):
        return subprocess.run(["bash", *words], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=30)

    def machine(script, *arguments):
        return bash(SCRIPTS / script, "--name=ppo", "--run=x", *arguments)

    look = f"source {SCRIPTS}/lib.sh; parse_flags --name=ppo --run=x; status_of_run"
    machine.state = lambda: bash("-c", look).stdout.strip()
    machine.folder = tmp_path / "easyrl" / "runs" / "x"
    return machine


def test_a_machine_may_be_set_up_again(tmp_path):
    """As when what is committed has changed. uv makes no environment where there is one, unless it is told to."""
    make_checkout(tmp_path)
    (tmp_path / ".local" / "bin").mkdir(parents=True)
    put_programs(tmp_path, python3="true")
    put_programs(tmp_path / ".local" / "bin", uv='case "$*" in pip*|*--allow-existing*) ;; *) exit 2 ;; esac')
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run(["bash", "tpu_scripts/worker_setup.sh"], env=env, cwd=tmp_path).returncode == 0


def test_a_run_is_running_while_its_process_is_there(machine):
    """Where a machine has restarted, the file says that it runs, and nothing does."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    machine.folder.mkdir(parents=True)
    states = []
    for pid in (os.getpid(), ended.pid):
        (machine.folder / f"status.{socket.gethostname()}").write_text(f"running {pid}\n")
        states.append(machine.state())
    assert states == ["RUNNING", "CRASHED"]


def test_launch_returns_while_the_command_runs(machine):
    """Here, too, its output is a pipe, which ends when nobody can write to it any more."""
    assert machine("launch.sh", "--", "sleep", "5").returncode == 0
    assert machine.state() == "RUNNING"


@pytest.mark.parametrize("missing", ["easyrl/.venv", "easyrl"])
def test_launch_on_a_machine_that_is_not_set_up_fails_with_a_line(missing, machine, tmp_path):
    shutil.rmtree(tmp_path / missing)
    done = machine("launch.sh", "--", "true")
    assert done.returncode == 1
    assert done.stderr == f"{socket.gethostname()}: not set up: setup.sh does that\n"


def test_a_run_is_not_started_beside_itself(machine):
    machine("launch.sh", "--", "sleep", "5")
    done = machine("launch.sh", "--", "touch", "beside")
    assert done.returncode == 1 and done.stderr == f"{socket.gethostname()}: x is still running\n"
    assert machine.state() == "RUNNING" and not (machine.folder.parents[1] / "beside").exists()


def test_stop_returns_when_the_run_has_saved_so_that_the_same_command_goes_on(machine):
    trap = "trap 'sleep 2; touch saved; echo SIGTERM: stopped after step 3, saved; exit' TERM"
    machine("launch.sh", "--", "bash", "-c", f"{trap}; echo ready; sleep 9 & wait")
    wait_until(lambda: "ready" in "".join(log.read_text() for log in machine.folder.glob("log.*")))
    assert machine("stop.sh").returncode == 0
    assert (machine.folder.parents[1] / "saved").exists() and machine.state() == "ENDED"
    assert machine("launch.sh", "--", "sleep", "9").returncode == 0
    assert machine.state() == "RUNNING"
    machine("stop.sh")
    assert machine.state() == "ENDED"


@pytest.mark.parametrize(("by", "state"), [("stop.sh", "ENDED"), ("maintenance", "STOPPED")])
def test_a_machine_knows_whether_stop_sh_has_ended_its_run(by, state, machine):
    trap = "trap 'echo SIGTERM: stopped after step 3, saved; exit' TERM"
    machine("launch.sh", "--", "bash", "-c", f"{trap}; echo ready; sleep 5 & wait")
    wait_until(lambda: "ready" in "".join(log.read_text() for log in machine.folder.glob("log.*")))
    assert machine.state() == "RUNNING"
    if by == "stop.sh":
        machine("stop.sh")
    else:
        (pid,) = machine.folder.glob("pid.*")
        os.kill(int(pid.read_text()), signal.SIGTERM)
    wait_until(lambda: machine.state() != "RUNNING")
    assert machine.state() == state


def test_a_command_that_stop_sh_has_ended_before_it_starts_does_not_start(tmp_path):
    put_programs(tmp_path, gcloud="touch runs/x/end.$(hostname)")  # during the copy from the bucket
    assert work(tmp_path, "touch started", bucket="gs://mine") == "ended"
    assert not (tmp_path / "started").exists()


def wait_until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_slurm_has_every_process_joined_and_a_stopped_run_queued_again(tmp_path):
    stopped = "SIGTERM: stopped after step 3, saved"
    srun = f'echo "$@"\necho "$SRUN_CPUS_PER_TASK cores"\necho "{stopped}"'
    put_programs(tmp_path, srun=srun, scontrol='echo "$@" > asked')
    env = os.environ | {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    env |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", SCRIPTS / "slurm.sbatch", "python", "-m", "easyrl.train_sft", "--seed=1"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    joined = "--jax_distributed.initialize_jax_distributed=True"
    assert done.stdout.splitlines()[0] == f"--kill-on-bad-exit=1 python -m easyrl.train_sft --seed=1 {joined}"
    assert done.stdout.splitlines()[1] == "8 cores"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
