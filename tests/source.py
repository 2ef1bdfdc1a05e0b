"""The syntax trees of easyrl/, for tests that read the code instead of running it."""

import ast
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


@cache
def modules() -> dict[str, ast.Module]:
    """Module name (`easyrl.core.config`) to syntax tree, for every module of the package."""
    trees = {}
    for path in sorted((REPO / "easyrl").rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


def imports(module: str) -> list[tuple[str, int]]:
    """Every module that `module` imports, anywhere in it, with the line.

    `from easyrl.core import masking` is an import of easyrl.core.masking.
    """
    found = []
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are written from easyrl on, not relative"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in modules() else node.module, node.lineno))
    return found
