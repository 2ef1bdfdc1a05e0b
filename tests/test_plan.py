"""The planner as users run it, for the eight virtual CPU devices that the tests have."""

import json
import subprocess
import sys

import jax
import pytest

from easyrl import plan
from easyrl.core.errors import UserError
from easyrl.core.params import num_params
from easyrl.core.sharding import make_mesh
from easyrl.hf.refs import find_config
from easyrl.models.families import param_specs
from easyrl.planning.measure import Measured, measure
from easyrl.planning.memory import device_bytes
from easyrl.planning.necessary import ForwardFlops
from easyrl.planning.report import Report, text
from easyrl.planning.topology import GIB, parse_topology
from tests.source import REPO
from tests.train_ppo.conftest import make_tokenizer, write_model

pytestmark = pytest.mark.usefixtures("started")

SMALL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODEL = f"random::{json.dumps(SMALL)}"
OFFLINE = (f"--load_checkpoint={MODEL}", "--train_dataset.seq_length=128", "--train_dataset.batch_size=16")
PPO = (
    f"--load_checkpoint_policy={MODEL}", "--load_checkpoint_reward=random::debug", "--train_dataset.seq_length=96",
    "--max_continuation_len=32", "--train_dataset.batch_size=16", "--mini_batch_size=8",
)  # fmt: skip


def report_of(*arguments):
    request = plan.parse(arguments)
    topology = parse_topology(request.config.topology)
    mesh = make_mesh(request.script.mesh_dim, jax.devices()[: topology.num_devices])
    return plan.make_report(request.config.script, request.script, mesh, topology, request.config.fill)


def test_flags_are_told_apart():
    request = plan.parse(["--script=train_dpo", "--fill", "0.5", "--beta=0.2", "--topology=v3:2x2"])
    assert (request.config.fill, request.config.topology, request.script.beta) == (0.5, "v3:2x2", 0.2)
    with pytest.raises(UserError, match="unknown flag --gamma"):
        plan.parse(["--script=train_dpo", "--gamma=1"])


@pytest.mark.parametrize("argument", ["-h", "-help", "--help"])
def test_help_is_the_planners_own(argument, capsys):
    with pytest.raises(SystemExit):
        plan.parse(["--script=train_dpo", argument])
    assert "--topology" in capsys.readouterr().out


def test_a_flag_is_switched_off_as_help_shows_it():
    assert not plan.parse(["--suggest", "--nosuggest"]).config.suggest


def test_flops_of_a_step_are_those_of_the_model():
    """Without remat: three times the forward pass with attention to all. Rows are one chunk long, whose logits the
    compiler shares between both passes. Agrees to 2 %: what is missing in the count is work of no matrix product.
    """
    report = report_of("--script=train_sft", "--mesh_dim=2,2,2", "--dtype=fp32", *OFFLINE)
    (step,) = report.measured
    flops = ForwardFlops(find_config(MODEL))
    tokens = 16 * 128
    forward = tokens * (flops.per_token + flops.head + 128 * flops.per_pair)
    assert step.cost.flops * 8 == pytest.approx(3 * forward, rel=0.02)
    unmasked = 16 * 128 * 129 / 2
    assert step.phase.necessary == 3 * (forward - (tokens * 128 - unmasked) * flops.per_pair)


def test_what_longer_rows_keep_of_neither_logits_nor_scores_is_counted_once_more():
    """Rows of two chunks and two blocks of attention, of which the second one has twice the keys of the first."""
    report = report_of(
        "--script=train_sft", "--mesh_dim=2,2,2", "--dtype=fp32", *OFFLINE, "--train_dataset.seq_length=256"
    )
    (step,) = report.measured
    flops, tokens, keys = ForwardFlops(find_config(MODEL)), 16 * 256, (128 + 256) / 2
    forward = tokens * (flops.per_token + flops.head + keys * flops.per_pair)
    again = tokens * (flops.head + keys * flops.per_pair / 2)  # of attention's two products the scores
    assert step.cost.flops * 8 == pytest.approx(3 * forward + again, rel=1e-3)


def test_all_but_products_is_recomputed_without_a_product_more():
    def flops(remat):
        report = report_of(
            "--script=train_sft", "--mesh_dim=2,2,2", f"--remat={remat}", *OFFLINE, "--train_dataset.seq_length=256"
        )
        return report.measured[0].cost.flops

    assert flops("dots") == flops("none")


def test_ppo_has_all_its_phases_and_they_add_up():
    report = report_of("--script=train_ppo", "--mesh_dim=1,4,2", *PPO)
    assert [m.phase.name for m in report.measured] == ["sampling", "reward", "passes", "finish", "update"]
    assert report.fits
    update = report.measured[-1]
    assert update.phase.runs == 4 * 16 / 8
    weights = report.plan.resident_bytes()
    assert weights["optimizer"] == pytest.approx(2 * weights["weights"], rel=0.01)
    for measured in report.measured:
        assert measured.peak >= sum(weights.values())
        waste = report.waste(measured)
        assert waste is None or 0.9 < waste < 1.6, (measured.phase.name, waste)
    decoding = next(part for part in report.measured[0].parts if part.name.startswith("decode"))
    largest = max((c.payload for c in decoding.cost.collectives), default=0)
    assert largest < 128 * 384 * 4 / 2, "decoding moves whole weights for every token"
    between_copies = [c for c in decoding.cost.collectives if "fsdp" in c.axes]
    assert all(c.payload <= 4 for c in between_copies), "copies exchange more than whether rows go on"


def test_responses_that_wait_need_less_memory_and_as_many_operations():
    def sampling(decode_rows):
        request = plan.parse([
            "--script=train_ppo", "--mesh_dim=1,4,2", "--rollouts_per_prompt=4", f"--decode_rows={decode_rows}", *PPO,
            "--max_continuation_len=96",
        ])  # fmt: skip
        mesh = make_mesh(request.script.mesh_dim)
        phase = plan.script_plan("train_ppo", request.script, mesh, request.config.fill).phases[0]
        return measure(phase, 0, mesh, parse_topology("cpu:8"))

    every, some = sampling(0), sampling(16)
    assert some.phase.parts["cache"] / every.phase.parts["cache"] == pytest.approx(
        (16 * 96 + 16 * (96 + 96)) / (64 * (96 + 96))
    )
    assert some.peak < every.peak
    assert some.cost.flops == pytest.approx(every.cost.flops, rel=0.02)
    decoding = [part for part in some.parts if part.name.startswith(("decode", "refills"))]
    assert [part.name for part in decoding] == ["refills", "decode_4_rows_to_192"]
    largest = max(c.payload for part in decoding for c in part.cost.collectives)
    assert largest < 128 * 384 * 4 / 2, "keys and values move between devices"


def test_ppo_with_a_shared_bottom():
    report = report_of(
        "--script=train_ppo", "--mesh_dim=1,4,2", "--num_layers_unfrozen=1", "--load_checkpoint_value=policy", *PPO
    )
    weights, cfg = report.plan.resident_bytes(), find_config(MODEL)
    of = lambda head, layers: num_params(param_specs(cfg, head, layers)) / 8  # norms alone are not split
    top, bottom = range(2, 3), range(2)
    assert weights["weights"] == pytest.approx(4 * (of("lm", top) + of("value", top)), rel=0.05)
    assert weights["optimizer"] == pytest.approx(2 * weights["weights"], rel=0.01)
    reward = report.plan.resident["reward model 1"][1]
    frozen = weights["frozen weights"] - device_bytes(reward)
    assert frozen == pytest.approx(2 * (of("lm", bottom) + of("lm", top)), rel=0.05)

    measured = {m.phase.name: m for m in report.measured}
    for name in ("passes", "update"):
        assert 0.9 < report.waste(measured[name]) < 1.6


def ppo_plan(*arguments, fill=1.0):
    """Nothing compiled."""
    request = plan.parse(["--script=train_ppo", "--mesh_dim=1,4,2", *PPO, *arguments])
    return plan.script_plan("train_ppo", request.script, make_mesh(request.script.mesh_dim), fill)


def test_a_reward_model_with_a_tokenizer_of_its_own(tmp_path):
    """It has room for the text in its own tokens, and the value model starts from the policy, as in training."""
    foreign = make_tokenizer("<end>", 9)
    own = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    foreign.chat_template = own
    policy = write_model(tmp_path / "policy", max_positions=512)
    models = {
        "same": write_model(tmp_path / "same", "reward", max_positions=512, num_layers=3),
        "foreign": write_model(tmp_path / "foreign", "reward", tokenizer=foreign, max_positions=512, num_layers=3),
    }
    found = {}
    for name, folder in models.items():
        found[name] = ppo_plan(f"--load_checkpoint_policy=hf::{policy}", f"--load_checkpoint_reward=hf::{folder}")
        assert not found[name].condition

    def scored(name):
        (phase,) = (phase for phase in found[name].phases if phase.name == "reward")
        return phase.arguments[1].shape[1]

    def layers_of_the_value_model(name):
        return jax.tree.leaves(found[name].resident["value model"][1]["layers"])[0].shape[0]

    written = len("a") + 1  # the question that stands for any, and the end token
    assert (scored("same"), scored("foreign")) == (128, 2 * 128 + written)
    trained = find_config(f"hf::{policy}").num_layers
    assert (layers_of_the_value_model("same"), layers_of_the_value_model("foreign")) == (3, trained) != (3, 3)


def test_a_plan_says_what_of_tokenizers_it_cannot_know():
    named = "random::debug with the policy's tokenizer (not both are here to compare); with one of its own a reward "
    named += "model has room for 256 tokens and those of its template"
    assert ppo_plan().condition == f"{named}, and the value model starts from the policy"
    assert ppo_plan("--load_checkpoint_value=policy").condition == named


def test_a_run_that_only_generates_has_no_updates():
    assert [phase.name for phase in ppo_plan("--generate_only").phases] == ["sampling", "reward", "passes", "finish"]


@pytest.mark.parametrize(("rows", "share"), [(0, 1.0), (8, 0.5)])
def test_decoding_takes_as_many_steps_as_the_longest_response_unless_some_wait(rows, share):
    def steps(fill):
        loops = ppo_plan(f"--decode_rows={rows}", fill=fill).phases[0].loops
        decoding = sum(trips for name, trips in loops.items() if name.startswith("decode"))
        return decoding * loops.get("refills", 1)

    assert steps(1.0) == pytest.approx(31 * (16 // (rows or 16)))
    assert steps(0.5) == pytest.approx(share * steps(1.0))


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Exceeded hbm capacity by 15.72G."


@pytest.mark.parametrize(
    ("said", "over", "advice"),
    [
        (OUT_OF_MEMORY, 15.72, "update needs 15.72 GiB more than a device has."),
        (
            "RESOURCE_EXHAUSTED: no",
            None,
            "update needs more than a device has; the compiler says 'RESOURCE_EXHAUSTED: no'",
        ),
    ],
)
def test_a_program_that_the_compiler_refused_has_the_size_that_it_said(said, over, advice):
    planned, topology = ppo_plan(), parse_topology("v5e:2x4")
    measured = [Measured(planned.phases[0], 1.0, arguments=GIB), Measured(planned.phases[-1], 1.0, refused=said)]
    report = Report("train_ppo", topology, make_mesh("1,4,2"), planned, measured)
    found = report.to_dict()
    assert found["peak"] == found["phases"][1]["peak"]
    assert found["peak"] == (None if over is None else pytest.approx(topology.memory + over * GIB))
    unknown = [found["seconds"], found["flops"], found["sent"], found["phases"][1]["flops"]]
    assert unknown == [None] * 4 and found["phases"][0]["peak"] == GIB
    assert advice in text(report) and " 0.00 GiB" not in text(report)


@pytest.mark.parametrize(("script", "phases"), [("train_rm", ["step"]), ("train_dpo", ["reference", "step"])])
def test_offline_trainers(script, phases):
    report = report_of(f"--script={script}", "--mesh_dim=1,4,2", "--train_dataset.row_length=128", *OFFLINE)
    assert [m.phase.name for m in report.measured] == phases and not report.plan.condition
    assert 0.9 < report.waste(report.measured[-1]) < 1.6


def test_online_dpo():
    report = report_of(
        "--script=train_dpo", "--online", "--mesh_dim=1,4,2", "--load_checkpoint_reward=random::debug",
        "--max_continuation_len=32", *OFFLINE, "--train_dataset.seq_length=96",
    )  # fmt: skip
    measured = {m.phase.name: m for m in report.measured}
    assert list(measured) == ["sampling", "reward", "reference", "step"]
    assert all(m.phase.runs == 1 for m in report.measured)
    assert report.plan.tokens == 2 * 16 * (96 + 32)
    assert measured["sampling"].phase.arguments[-1].shape == (2 * 16,)
    resident, held = report.plan.resident_bytes(), report.plan.resident
    frozen = sum(device_bytes(held[name][1]) for name in ("reference", "reward model 1"))
    assert resident["frozen weights"] == frozen
    for name in ("sampling", "reference", "step"):
        assert 0.9 < report.waste(measured[name]) < 1.6, name


def test_the_command_writes_a_table_and_json(tmp_path, capsys):
    plan.main(plan.parse(["--script=train_sft", "--topology=cpu:4", f"--json={tmp_path / 'p.json'}", *OFFLINE]))
    out = capsys.readouterr().out
    assert "fits:" in out and "unless --train_dataset.row_length=128 is given" in out
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["devices"] == 4 and written["fits"] and written["phases"][0]["flops"] > 0


def test_what_does_not_fit_has_status_3_and_says_what_would(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "easyrl.plan", "--script=train_sft", "--topology=cpu:1",
         "--load_checkpoint=random::llama2-70b", "--train_dataset.seq_length=128", "--train_dataset.batch_size=1"],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == plan.DOES_NOT_FIT, done.stderr
    assert "does not fit: step needs" in done.stdout and "more devices" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:1x1"], "--topology=v9:1x1: expected as"),
        (["--script=train_gan"], "script"),
        (["--train_dataset.path=rows.jsonl"], "--load_checkpoint_policy: found nothing, expected hf::"),
        (["--topology=cpu:4", "--mesh_dim=3,1,1"], "--mesh_dim=3,1,1"),
        (["--json=/dev/null/p.json"], r"^--json=/dev/null/p.json: cannot be written"),
    ],
)
def test_wrong_commands_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        plan.main(plan.parse(arguments))
