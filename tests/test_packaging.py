"""What pyproject.toml says of the package is true."""

import re
import subprocess
import sys
import tomllib

from tests.source import REPO, imports, modules

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
NOT_IMPORTED = {"jinja2"}  # transformers imports it for chat templates
DISTRIBUTION_OF = {"absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "pyyaml"}


def declared(requirements):
    return {re.split(r"[\[<>=~! ;]", requirement)[0].lower() for requirement in requirements}


def test_everything_imported_is_declared_and_the_other_way_round():
    known = declared(PROJECT["dependencies"]) | {"libtpu"}  # which jax[tpu] brings
    known = known.union(*(declared(PROJECT["optional-dependencies"][extra]) for extra in ("tensorboard", "parity")))
    missing, unused = set(), declared(PROJECT["dependencies"]) - NOT_IMPORTED
    for module in modules():
        for imported, line in imports(module):
            top = imported.split(".")[0]
            distribution = DISTRIBUTION_OF.get(top, top.replace("_", "-").lower())
            unused.discard(distribution)
            if top not in sys.stdlib_module_names | {"easyrl"} and distribution not in known:
                missing.add(f"{module}, line {line}: {distribution}")
    assert not missing, missing
    assert not unused, unused


def test_every_dependency_has_a_lower_bound():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert [name for group in groups for name in group if ">=" not in name] == []


def test_this_python_is_supported():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert (3, 11) <= sys.version_info[:2] < (3, 14)


def test_an_environment_without_pip_is_made_again_by_a_python_that_can(tmp_path):
    """Debian's python3 without python3-venv has venv but not ensurepip, and leaves half an environment behind."""

    def make(script):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        flags = (f"PYTHON={tmp_path / 'python'}", f"VENV={tmp_path / 'venv'}")
        return subprocess.run(["make", "setup", *flags], cwd=REPO, capture_output=True, text=True).stderr

    assert "easyrl needs Python" in make('case "$*" in *ensurepip*) exit 1;; esac')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/false")
    make(f'echo "$*" >> {tmp_path / "log"}')
    assert (tmp_path / "log").read_text().endswith(f"-m venv {tmp_path / 'venv'}\n")


def test_the_licence_is_whole():
    text = (REPO / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
