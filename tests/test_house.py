"""Imports go one way: core <- layouts, tables, kernels, endpoints <- every folder <- pipeline <- cli; siblings never meet."""

import ast
from pathlib import Path

import pytest

import poise

SOURCE = Path(poise.__file__).parent
FOLDERS = sorted(p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__")
BELOW = {
    "core": set(),
    "tables": set(),
    "kernels": {"core"},
    "layouts": {"core"},
    "endpoints": {"core"},
    "pipeline": set(FOLDERS) - {"cli"},
    "cli": set(FOLDERS),
}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Folders of the package that a file imports, anywhere in it."""
    nodes = ast.walk(ast.parse(path.read_text()))
    modules = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    nodes = ast.walk(ast.parse(path.read_text()))
    modules += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return {module.split(".")[1] for module in modules if module.startswith("poise.")}


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent != SOURCE], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_go_one_way(path):
    folder = path.relative_to(SOURCE).parts[0]
    allowed = BELOW.get(folder, {"core", "layouts", "tables", "kernels", "endpoints"}) | {folder}
    assert imported(path) <= allowed


def test_core_needs_torch_and_the_standard_library_only():
    import sys

    for path in (SOURCE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outside = {n.split(".")[0] for n in names} - {*sys.stdlib_module_names, "torch", "poise"}
            assert not outside, f"{path.name} imports {outside}"


def test_core_stays_small_and_no_file_is_a_drawer():
    def count(path):
        return len(path.read_text().splitlines())

    assert max(count(path) for path in FILES) < 500
    assert not [p for p in SOURCE.rglob("*") if p.stem in ("utils", "util", "helpers", "common", "misc")]
