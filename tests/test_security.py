"""No flag, file or model can run code, and no archive is unpacked: read from the syntax trees, so that it stays so."""

import ast

import pytest

from tests.source import imports, modules

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
ARCHIVES = {"zipfile", "tarfile"}  # gzip holds one file, which has no name
UNSAFE_ATTRIBUTES = {("yaml", "load"), ("yaml", "unsafe_load"), ("torch", "load"), ("os", "system"), ("os", "popen")}
UNPACKING = {"unpack_archive", "extract", "extractall"}
ASKING = {"from_pretrained", "from_config"}  # of transformers, which by default asks on stdin whether to run code
UNSAFE_ARGUMENTS = {"trust_remote_code", "allow_pickle", "shell"}


def called(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(modules()[module]) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_module_reads_pickles_unpacks_archives_or_runs_text(module):
    assert not {name.partition(".")[0] for name, _ in imports(module)} & (PICKLES | ARCHIVES)
    for call in called(module):
        function = call.func
        if isinstance(function, ast.Name):
            assert function.id not in RUN_TEXT, f"{module}, line {call.lineno}"
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            assert (function.value.id, function.attr) not in UNSAFE_ATTRIBUTES, f"{module}, line {call.lineno}"
        if isinstance(function, ast.Attribute):
            assert function.attr not in UNPACKING, f"{module}, line {call.lineno}"
            if function.attr in ASKING:
                assert "trust_remote_code" in {argument.arg for argument in call.keywords}, f"line {call.lineno}"
        for argument in call.keywords:
            off = isinstance(argument.value, ast.Constant) and argument.value.value is False
            assert argument.arg not in UNSAFE_ARGUMENTS or off, f"{module}, line {call.lineno}"
