"""Flags, YAML and defaults become one frozen config; whatever is wrong with them is one line."""

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from typing import ClassVar

import absl.flags
import pytest

from easyrl.core.command_line import help_text, load_config
from easyrl.core.config import flag, flag_specs, to_yaml
from easyrl.core.errors import UserError


@dataclass(frozen=True)
class Warmup:
    steps: int = flag(0, "Steps of warm-up.")


@dataclass(frozen=True)
class Optimizer:
    lr: float = flag(1e-6, "Peak learning rate.")
    clip: float = flag(1, "Largest gradient norm.")
    schedule: str = flag("cosine", "How the learning rate decays.", choices=("cosine", "linear"))
    warmup: Warmup = flag(Warmup(), "The start of training.")


@dataclass(frozen=True)
class Config:
    """Trains something.

    This paragraph is for readers of the code.
    """

    total_steps: int = flag(10, "Optimiser steps.")
    name: str = flag("", "Name of the run.")
    remat: bool = flag(False, "Recompute activations.")
    shuffle: bool = flag(True, "Shuffle the rows.")
    output_dir: str = flag("", "Folder of the run.")
    optimizer: Optimizer = flag(Optimizer(lr=3e-5), "The policy's optimiser.")
    value_optimizer: Optimizer = flag(Optimizer(), "The value model's optimiser.")

    def __post_init__(self):
        if self.total_steps < 0:
            raise UserError(f"--total_steps={self.total_steps}: expected 0 or more")


@pytest.fixture
def write(tmp_path):
    """Writes text to a YAML file and returns the flag that names it."""

    def write(text):
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return f"--config={path}"

    return write


def error_of(*argv):
    with pytest.raises(UserError) as caught:
        load_config(Config, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_dataclass_defaults():
    config = load_config(Config, [])
    assert config == Config()
    assert config.optimizer.lr == 3e-5
    assert config.value_optimizer.lr == 1e-6
    assert type(config.optimizer.clip) is float


def test_default_then_yaml_then_flags(write):
    path = write("""
        total_steps: 20
        optimizer:
          lr: 1e-3
          warmup: {steps: 7}
        value_optimizer.lr: 1
        value_optimizer.warmup.steps: 8
        """)
    config = load_config(Config, [path, "--optimizer.lr=2e-3", "--name", "x"])
    assert (config.total_steps, config.name, config.shuffle) == (20, "x", True)
    assert (config.optimizer.lr, config.optimizer.warmup.steps) == (2e-3, 7)
    assert (config.value_optimizer.lr, config.value_optimizer.warmup.steps) == (1.0, 8)
    assert type(config.value_optimizer.lr) is float


def test_a_flag_equal_to_its_default_still_wins_over_yaml(write):
    assert load_config(Config, [write("total_steps: 20"), "--total_steps=10"]).total_steps == 10


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--remat", True), ("--noremat", False), ("--remat=true", True), ("--remat=False", False), ("--remat=0", False)],
)
def test_spellings_of_a_boolean(write, argument, value):
    assert load_config(Config, [argument]).remat is value
    assert load_config(Config, [write(f"remat: {not value}"), argument]).remat is value


@pytest.mark.parametrize("value", ["yes", "On", "true", "'true'"])
def test_yaml_booleans(write, value):
    assert load_config(Config, [write(f"remat: {value}")]).remat is True


@pytest.mark.parametrize("text", ["1e-6", "1.0e-06", "0.000001", "'1e-6'"])
def test_yaml_numbers_however_written(write, text):
    assert load_config(Config, [write(f"optimizer.lr: {text}")]).optimizer.lr == 1e-6


@pytest.mark.parametrize(
    ("bounds", "words", "good", "bad"),
    [
        ({"least": 0}, "0 or more", [0, 0.5, math.inf], [-1e-9]),
        ({"above": 0}, "more than 0", [1e-9], [0, -1]),
        ({"least": 0, "below": 1}, "0 or more, less than 1", [0, 0.999], [1, -1]),
        ({"above": 0, "most": 1}, "more than 0, at most 1", [0.5, 1], [0, 1.5, math.inf]),
    ],
)
def test_numbers_out_of_bounds_are_refused_wherever_they_stand(write, bounds, words, good, bad):
    bounded = dataclasses.make_dataclass(
        "Bounded", [("rate", float, flag(0.5, "A rate.", **bounds))], frozen=True, namespace={"__doc__": ""}
    )
    for value in good:
        assert load_config(bounded, [f"--rate={value}"]).rate == value
    for value in bad:
        for argument in (f"--rate={value}", write(f"rate: {value}")):
            with pytest.raises(UserError, match=f"rate={value}.*expected {words}"):
                load_config(bounded, [argument])
    assert f"--rate  float, default 0.5, {words}\n" in help_text(bounded)


@pytest.mark.parametrize("text", ["007", "1:30", "yes", "2024-01-01", "0x10", "1,-1,1"])
def test_yaml_text_stays_as_written(write, text):
    assert load_config(Config, [write(f"name: {text}")]).name == text


def test_an_empty_file_or_group_says_nothing(write):
    assert load_config(Config, [write("")]) == Config()
    assert load_config(Config, [write("optimizer:\n# lr: 1\n")]) == Config()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max_steps=1", "unknown flag --max_steps: did you mean --total_steps?"),
        ("--total_step=1", "unknown flag --total_step: did you mean --total_steps?"),
        ("--mesh=1", "unknown flag --mesh"),
        ("--lr=1", "unknown flag --lr: did you mean --optimizer.lr or --value_optimizer.lr?"),
        ("--optimizer.total_steps=1", "unknown flag --optimizer.total_steps: did you mean --total_steps?"),
        ("--nototal_steps", "unknown flag --nototal_steps: did you mean --total_steps?"),
        ("--verbosity=1", "unknown flag --verbosity"),  # absl's own
        ("--total_steps=1.5", "--total_steps=1.5: expected an integer"),
        ("--total_steps=", "--total_steps=: expected an integer"),
        ("--total_steps", "Missing value for flag --total_steps"),
        ("--optimizer.lr=fast", "--optimizer.lr=fast: expected a number"),
        ("--optimizer.lr=nan", "--optimizer.lr=nan: expected a number"),
        ("--optimizer.schedule=step", "--optimizer.schedule=step: expected one of cosine, linear"),
        ("--remat=maybe", "--remat=maybe: expected true or false"),
        ("--noremat=true", "--noremat=true does not take an argument"),
        ("fast", "unexpected argument 'fast': a flag is written --name=value"),
        ("--total_steps=-1", "--total_steps=-1: expected 0 or more"),
    ],
)
def test_a_bad_command_line_is_one_line(argument, message):
    assert error_of(argument) == message


@dataclass(frozen=True)
class Tool:
    """Reads a file."""

    positional: ClassVar[str] = "file"
    file: str = flag("", "The file.")
    count: int = flag(1, "How often.")


def test_one_flag_may_stand_without_its_name():
    assert load_config(Tool, ["a.txt", "--count=2"]) == load_config(Tool, ["--count=2", "--file=a.txt"])
    assert load_config(Tool, ["--count=2", "a.txt"]).file == "a.txt"
    assert "FILE [--config=FILE.yaml]" in help_text(Tool) and "positional" not in help_text(Tool)
    for argv in (["a.txt", "b.txt"], ["a.txt", "--file=b.txt"]):
        with pytest.raises(UserError, match="unexpected argument"):
            load_config(Tool, argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_step: 1", ", line 1: unknown key total_step: did you mean total_steps?"),
        ("a: 1\ntotal_steps: 1", ", line 1: unknown key a"),
        ("optimizer:\n  lrr: 1", ", line 2: unknown key optimizer.lrr: did you mean optimizer.lr"),
        ("lr: 1", ", line 1: unknown key lr: did you mean optimizer.lr or value_optimizer.lr?"),
        ("config: x.yaml", ", line 1: unknown key config"),
        ("total_steps: many", ", line 1: total_steps=many: expected an integer"),
        ("total_steps: 1.0", ", line 1: total_steps=1.0: expected an integer"),
        ("total_steps: true", ", line 1: total_steps=true: expected an integer"),
        ("\ntotal_steps: [1]", ", line 2: total_steps: expected an integer, found a list"),
        ("name: {a: 1}", ", line 1: name: expected text, found a map"),
        ("name:", ", line 1: name: expected text, found nothing"),
        ("optimizer: 3", ", line 1: expected `flag: value` lines, found '3'"),
        ("optimizer.schedule: step", ", line 1: optimizer.schedule=step: expected one of cosine, linear"),
        ("- total_steps", ", line 1: expected `flag: value` lines, found a list"),
        ("optimizer: {lr: 1}\noptimizer.lr: 2", ", line 2: optimizer.lr is given twice"),
        ("[1]: 2", ", line 1: expected the name of a flag, found a list"),
        ("name: [1", ", line 1: not YAML: expected ',' or ']'"),
        ("name: a\n---\nname: b", ", line 2: not YAML: but found another document"),
        (b"name: \xff", ": not YAML: 'utf-8' codec can't decode byte 0xff"),
        ("total_steps: !!python/object/apply:os.getcwd []", ", line 1: total_steps: expected an integer, found a list"),
    ],
)
def test_a_bad_yaml_file_is_one_line_with_file_and_row(write, text, message):
    argument = write(text)
    assert error_of(argument).startswith(argument + message)


@pytest.mark.parametrize("text", ["~nobody_here/x", "hf::~nobody_here/x", "a.jsonl:0.5,~nobody_here/b:0.5"])
def test_a_home_of_nobody_is_refused(text):
    with pytest.raises(UserError, match=r"expected a home folder behind ~, found none for ~nobody_here$") as caught:
        load_config(Config, [f"--name={text}"])
    assert str(caught.value).startswith(f"--name={text}: ")


def test_a_tilde_that_is_no_home_stays():
    assert load_config(Config, ["--name=~5 % more, a~b/c"]).name == "~5 % more, a~b/c"


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("name: ~/name\n")
    config = load_config(Config, ["--config=~/c.yaml", "--output_dir=~/out"])
    assert (config.name, config.output_dir) == (f"{tmp_path}/name", f"{tmp_path}/out")


def test_a_missing_yaml_file_is_named(tmp_path):
    assert error_of(f"--config={tmp_path}/no.yaml") == f"--config={tmp_path}/no.yaml: No such file or directory"
    assert error_of(f"--config={tmp_path}") == f"--config={tmp_path}: Is a directory"


def test_a_script_may_name_the_yaml_it_reads_without_config(tmp_path, write):
    (tmp_path / "quickstart.yaml").write_text("total_steps: 30")

    class Quickstart(Config):
        @staticmethod
        def default_yaml(given):
            return "" if "name" in given else str(tmp_path / "quickstart.yaml")

    assert load_config(Quickstart, []).total_steps == 30
    assert load_config(Quickstart, ["--total_steps=40"]).total_steps == 40
    assert load_config(Quickstart, ["--name=x"]).total_steps == 10
    assert load_config(Quickstart, [write("shuffle: false")]).total_steps == 10


def test_nothing_is_left_in_the_flag_registry():
    before = set(absl.flags.FLAGS)
    load_config(Config, ["--name=x"])
    with pytest.raises(UserError):
        load_config(Config, ["--nam=x"])
    assert set(absl.flags.FLAGS) == before


@pytest.mark.parametrize(
    "name", ["null", "1e-6", "yes", " a ", "a: b # c", "'\"\\", "tab\tline\nend\n", "é☃𝄞", "-", "1:30"]
)
def test_saved_yaml_repeats_the_run(tmp_path, name):
    config = dataclasses.replace(
        Config(), name=name, remat=True, output_dir="runs/a", optimizer=Optimizer(lr=1 / 3, clip=math.inf)
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Config, [f"--config={path}"]) == dataclasses.replace(config, output_dir="")


def test_help_shows_every_flag_with_type_default_choices_and_text():
    text = help_text(Config)
    for spec in flag_specs(Config):
        assert f"{spec.name}  {spec.type.__name__}, default " in text
        assert spec.help in text
    assert "Trains something." in text
    assert "readers of the code" not in text
    assert "--[no]remat  bool, default false" in text
    assert '--optimizer.schedule  str, default "cosine", one of cosine, linear' in text
    assert "\noptimizer: The policy's optimiser.\n" in text
    assert "--config" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_shows_the_program_that_is_named():
    assert help_text(Config, "python -m some.tool KIND").startswith(
        "usage: python -m some.tool KIND [--config=FILE.yaml]"
    )
