"""A config class says which flags there are, and goes over into nested values, flat values and YAML and back."""

from dataclasses import dataclass

import pytest
import yaml

from easyrl.core.config import flag, flag_specs, flag_values, from_dict, from_flag_values, to_dict, to_yaml


@dataclass(frozen=True)
class Warmup:
    steps: int = flag(0, "Steps of warm-up.")


@dataclass(frozen=True)
class Optimizer:
    clip: float = flag(1, "Largest gradient norm.")
    warmup: Warmup = flag(Warmup(), "The start of training.")


@dataclass(frozen=True)
class Config:
    total_steps: int = flag(10, "Optimiser steps.")
    output_dir: str = flag("", "Folder of the run.")
    optimizer: Optimizer = flag(Optimizer(clip=2), "The policy's optimiser.")


CONFIG = Config(total_steps=3, optimizer=Optimizer(warmup=Warmup(steps=4)))


def test_flags_have_dotted_names_and_the_defaults_of_the_group_that_they_are_in():
    assert {spec.name: (spec.type, spec.default) for spec in flag_specs(Config)} == {
        "total_steps": (int, 10),
        "output_dir": (str, ""),
        "optimizer.clip": (float, 2.0),
        "optimizer.warmup.steps": (int, 0),
    }


def test_flat_values_come_back_as_the_config():
    values = {"total_steps": 3, "output_dir": "", "optimizer.clip": 1, "optimizer.warmup.steps": 4}
    assert flag_values(CONFIG) == values
    assert from_flag_values(Config, values) == CONFIG


def test_a_config_comes_back_from_a_part_of_its_values():
    assert from_dict(Config, to_dict(CONFIG) | {"of_another": 1}) == CONFIG
    assert from_dict(Config, {"optimizer": {"clip": 3.0}}) == Config(optimizer=Optimizer(clip=3.0))
    assert from_dict(Optimizer, to_dict(CONFIG.optimizer)) == CONFIG.optimizer


def test_saved_yaml_is_nested_plain_and_explained():
    text = to_yaml(Config())
    assert text.startswith("# ")
    assert "--config" in text.splitlines()[0]
    expected = to_dict(Config())
    del expected["output_dir"]
    assert yaml.safe_load(text) == expected


def test_a_field_that_no_flag_can_express_is_refused():
    @dataclass(frozen=True)
    class Tuples:
        sizes: tuple = flag((1, 2), "Sizes.")

    @dataclass(frozen=True)
    class Required:
        steps: int

    for config_class in (Tuples, Required):
        with pytest.raises(TypeError, match=config_class.__name__):
            flag_specs(config_class)
