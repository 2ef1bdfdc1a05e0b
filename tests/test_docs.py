"""What the documents show is true of the code: commands parse, flags, files, links and headings exist.

A command is a ```bash block: one command, possibly continued over lines. Two words in capitals joined by an underscore,
or one that begins a file name (POLICY_DIR, PROMPTS.jsonl), stand for something of the reader's own.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial

import pytest

from easyrl.bench.__main__ import KINDS as BENCHMARKS
from easyrl.core.command_line import load_config
from easyrl.core.config import flag_specs
from tests.source import REPO, modules

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"\b[A-Z]+_[A-Z]+\b|\b[A-Z]{2,}\.\w+")
COMMON = {"--help", "--config"}  # flags of every script
OF_PARITY = {"--record"}  # of `make parity`, which is no script of easyrl
POD_SCRIPTS = [path.read_text(encoding="utf-8") for path in sorted((REPO / "tpu_scripts").glob("*.sh"))]
OF_PODS = {flag for text in POD_SCRIPTS for flag in re.findall(r"(?<![\w-])--[a-z]\w*", text)}
# What makes a command that trains for minutes a matter of seconds.
SHORT = {"easyrl.train_ppo": ("--num_epochs=1", "--max_steps_per_epoch=1", "--ppo_epochs=1")}


def page_id(page):
    return str(page.relative_to(REPO))


def fences(page):
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands():
    return [
        pytest.param(text, id=f"{page_id(page)}-{number}")
        for page in PAGES
        for number, text in enumerate((text for language, text in fences(page) if language == "bash"), start=1)
    ]


def words_of(command):
    """The words of a command, without assignments to environment variables in front."""
    lines = [line for line in command.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) == 1, f"a block holds one command, found {len(lines)} lines:\n{command}"
    words = shlex.split(lines[0], comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def scripts():
    """The modules that are run with flags, with their config classes."""
    found = {}
    for name, tree in modules().items():
        is_run = isinstance(tree.body[-1], ast.If) and "__main__" in ast.unparse(tree.body[-1].test)
        if is_run and "Config" in {getattr(node, "name", None) for node in tree.body}:
            found[name] = importlib.import_module(name).Config
    return found


def bench_config(kind):
    return importlib.import_module(f"easyrl.bench.{kind}").Config


def check_script(module, arguments):
    assert module in scripts(), f"there is no script {module}"
    arguments = [word for word in arguments if not (word.startswith("--config=") and PLACEHOLDER.search(word))]
    if "--help" not in arguments:
        # A script that takes another one's flags reads its command line by itself.
        parse = getattr(importlib.import_module(module), "parse", partial(load_config, scripts()[module]))
        parse(arguments)


def check_make(arguments):
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for argument in arguments:
        assert "=" in argument or argument in targets, f"the Makefile has no target {argument}"


def check_pip(arguments):
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(extras), f"pyproject.toml has no extra {extra}"


def check_pytest(arguments):
    for argument in arguments:
        path = argument.split("::")[0]
        assert not path.startswith("tests") or (REPO / path).exists(), f"there is no {path}"


def check_pod_script(script, arguments):
    """A script of tpu_scripts takes these arguments, and what it is to run on the machines is a command, too."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = subprocess.run(
        ["bash", REPO / script, *arguments[:at], "--dry_run", *arguments[at:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if arguments[at:]:
        assert arguments[at + 1 : at + 3] == ["python", "-m"]
        check_script(arguments[at + 3], arguments[at + 4 :])


@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_runs(command, monkeypatch):
    monkeypatch.chdir(REPO)
    match words_of(command):
        case ["python", "-m", "easyrl.bench", kind, *arguments]:
            load_config(bench_config(kind), arguments)
        case ["python", "-m", module, *arguments] if module.startswith("easyrl"):
            check_script(module, arguments)
        case ["python", "-m", "pytest", *arguments]:
            check_pytest(arguments)
        case ["make", *arguments]:
            check_make(arguments)
        case ["pip", "install", *arguments]:
            check_pip(arguments)
        case [script, *arguments] if script.startswith("tpu_scripts/"):
            check_pod_script(script, arguments)
        case ["sbatch", _, script, "python", "-m", module, *arguments] if (REPO / script).exists():
            check_script(module, arguments)
        case words:
            pytest.fail(f"no check knows the command {words[0]}")


def ppo_runs():
    """Arguments of train_ppo, and YAML for it, as shown for models of the reader's own by the pages and configs/."""
    for command in commands():
        match words_of(command.values[0]):
            case ["python", "-m", "easyrl.train_ppo", *arguments]:
                if "load_checkpoint_policy" in command.values[0]:
                    yield pytest.param(arguments, "", id=command.id)
    shown = [(path.name, path.read_text(encoding="utf-8")) for path in sorted((REPO / "configs").glob("*.yaml"))]
    shown += [(page_id(page), text) for page in PAGES for language, text in fences(page) if language == "yaml"]
    for name, text in shown:
        if "load_checkpoint_policy" in text:
            yield pytest.param([], text, id=name)


@pytest.mark.parametrize(("arguments", "text"), list(ppo_runs()))
def test_ppo_as_shown_updates_with_more_than_one_response(arguments, text, tmp_path, monkeypatch):
    """--mini_batch_size has to be set: its default is EasyLM's."""
    monkeypatch.chdir(REPO)
    if text:
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        arguments = [f"--config={tmp_path / 'x.yaml'}"]
    assert load_config(scripts()["easyrl.train_ppo"], arguments).mini_batch_size > 1


def test_there_are_commands():
    assert len(commands()) >= 5


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_flag_exists(page):
    configs = [*scripts().values(), *map(bench_config, BENCHMARKS)]
    specs = [spec for config in configs for spec in flag_specs(config)]
    known = {f"--{spec.name}" for spec in specs} | {f"--no{spec.name}" for spec in specs if spec.type is bool}
    known |= {f"--{spec.group}.*" for spec in specs if spec.group}
    text = prose(page)
    # The first column of a table about migration holds the flags of another program.
    text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE) if "migrating" in page.name else text
    shown = {flag.rstrip(".") for flag in re.findall(r"(?<![\w-])--[a-z][\w.]*\*?", text)}
    assert not sorted(shown - known - COMMON - OF_PARITY - OF_PODS)


def test_a_run_goes_on_with_the_flags_that_reliability_says_and_no_others():
    specs = {spec.name: spec for spec in flag_specs(scripts()["easyrl.train_ppo"])}
    text = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
    free = re.findall(r"--(\w+)", " ".join(re.findall(r"^\|(.*)\| it goes on \|", text, flags=re.MULTILINE)))
    bound = re.findall(r"^\|.*\| refused.*\| `--allow_config_change=([\w.]+)`", text, flags=re.MULTILINE)
    assert free and all(specs[name].may_change for name in free)
    assert bound and not any(specs[name].may_change for name in bound)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_somewhere(page):
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"[{text}]({target})"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {_anchor(title) for title in titles}, f"[{text}]({target})"


def _anchor(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_of_the_project_exists(page):
    """Paths in backticks, as `easyrl/steps/ppo.py` or `docs/`; what follows a comma is a name in that file."""
    for path, names in re.findall(r"`((?:easyrl|tests|docs|configs)/[\w./-]*)`((?:,\s+`\w+`)*)", prose(page)):
        assert (REPO / path).exists(), path
        if path.endswith(".py"):
            source = (REPO / path).read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"\b(def|class) {name}\b|^{name}\b", source, re.MULTILINE), f"{path} has no {name}"


def runnable():
    """The commands that need nothing of the reader's own, nor minutes: of compiling for a TPU pod, or of measuring."""
    shown = [case for case in commands() if re.search(r"-m easyrl\.(?!bench)", case.values[0])]
    return [case for case in shown if "--topology=v" not in case.values[0] and not PLACEHOLDER.search(case.values[0])]


@pytest.mark.slow
@pytest.mark.parametrize("command", runnable())
def test_command_runs(command, tmp_path):
    """As shown, but short, in an empty folder."""
    (tmp_path / "configs").symlink_to(REPO / "configs")
    _, _, module, *arguments = words_of(command)
    if "--help" not in arguments:
        arguments += SHORT.get(module, ())
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
