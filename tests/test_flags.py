"""A flag exists only if something reads it, and says what it does.

These tests read syntax trees: a flag is a class field whose default is a call of `flag`.
"""

import ast
import dataclasses
import importlib
from typing import NamedTuple

import pytest

from tests.source import imports, modules


class Field(NamedTuple):
    module: str
    config: str
    name: str
    call: ast.Call

    def __str__(self):
        return f"{self.module}.{self.config}.{self.name}"


def config_classes():
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(True for _ in fields_of(module, node)):
                yield module, node


def fields_of(module, node):
    for item in node.body:
        call = item.value if isinstance(item, ast.AnnAssign) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("flag", "config.flag"):
            yield Field(module, node.name, ast.unparse(item.target), call)


def all_fields():
    return [field for module, node in config_classes() for field in fields_of(module, node)]


def scripts():
    """The modules with a config that a command line fills."""
    return [name for name, tree in modules().items() if "Config" in {getattr(node, "name", "") for node in tree.body}]


def reached(module):
    """A module with all that it imports, by itself or through others."""
    found, waiting = set(), [module]
    while waiting:
        if (name := waiting.pop()) in modules() and name not in found:
            found.add(name)
            waiting += [imported for imported, _ in imports(name)]
    return found


def attributes_read(where):
    """Names of all attributes loaded in these modules, but for the checks that a config makes on itself."""
    checks = {
        id(node)
        for _, config in config_classes()
        for method in config.body
        if isinstance(method, ast.FunctionDef) and method.name == "__post_init__"
        for node in ast.walk(method)
    }
    return {
        node.attr
        for module in where
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
    }


def help_of(field: Field) -> str:
    """The help text: a literal, or a constant of the same module."""
    given = [*field.call.args[1:2], *(word.value for word in field.call.keywords if word.arg == "help")]
    if len(given) != 1:
        return ""
    constants = {
        ast.unparse(node.targets[0]): node.value
        for node in modules()[field.module].body
        if isinstance(node, ast.Assign) and len(node.targets) == 1
    }
    text = constants.get(ast.unparse(given[0]), given[0])
    assert isinstance(text, ast.Constant), f"{field}: the help text of a flag is a literal or a constant of its module"
    return text.value


def test_there_are_flags():
    assert len(all_fields()) > 3


def test_every_flag_belongs_to_a_script():
    assert {field.module for field in all_fields()} <= set().union(*map(reached, scripts()))


@pytest.mark.parametrize("script", scripts())
def test_every_flag_of_a_script_is_read_by_something_that_it_runs(script):
    """A flag that a script inherits is of no use where nothing that it imports reads it."""
    config = importlib.import_module(script).Config
    unread = {field.name for field in dataclasses.fields(config)} - attributes_read(reached(script))
    assert not unread


def test_every_flag_has_a_help_text_that_is_a_sentence():
    poor = [str(field) for field in all_fields() if not help_of(field).endswith((".", ")"))]
    assert not poor, poor


def test_a_model_of_generate_convert_and_evaluate_is_shown_in_every_form_that_is_read():
    wanted = {"easyrl.generate", "easyrl.convert", "easyrl.evaluate"}
    texts = {
        str(field): help_of(field)
        for field in all_fields()
        if field.module in wanted and field.name.startswith("load_checkpoint")
    }
    assert len(texts) == len(wanted)
    forms = ("hf::", "easyrl::", "params::", "random::")
    assert [name for name, text in texts.items() if not all(form in text for form in forms)] == []


def test_configs_are_frozen_dataclasses():
    loose = [
        f"{module}.{node.name}"
        for module, node in config_classes()
        if not any("dataclass(frozen=True)" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert not loose, loose


def test_no_config_declares_the_flag_that_every_script_has():
    assert [str(field) for field in all_fields() if field.name == "config"] == []
