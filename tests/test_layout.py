"""Imports run one way: from the top of the layout in CONTRIBUTING.md to its bottom, and never in a circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = re.findall(r"^  (\w+)/", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
LEAVES = ["checks", "eval_mode", "randomness", "warn", "_arviz", "_version"]  # import nothing of the library


def modules(package):
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}


def imported(path):
    """Return what a file imports when it runs, here or inside a function; imports for types alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in for_types]
    return [(node.module or "", alias.name) for node in found for alias in node.names]


def test_folders_import_only_what_stands_above_them():
    assert {path.name for path in (ROOT / "pyro_bmrs").iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        *FOLDERS
    }
    against = []
    for name, path in modules("pyro_bmrs").items():
        own = name.split(".")[1]
        for module, _ in imported(path):
            parts = module.split(".")
            if parts[0] in ("models", "analysis"):
                against.append((name, module))
            if parts[0] != "pyro_bmrs" or len(parts) == 1 or own in (parts[1], "__init__") or parts[1] in LEAVES:
                continue
            if own in LEAVES or FOLDERS.index(parts[1]) > FOLDERS.index(own):
                against.append((name, module))
    assert against == []


def test_files_import_each_other_in_no_circle():
    known = {**modules("pyro_bmrs"), **modules("models"), **modules("analysis")}
    graph = {}
    for name, path in known.items():
        targets = {f"{module}.{each}" if f"{module}.{each}" in known else module for module, each in imported(path)}
        graph[name] = {target for target in targets if target in known and target != name}
    assert [*TopologicalSorter(graph).static_order()]


def test_programs_of_the_analysis_are_told_apart_from_their_parts():
    """A file at the top, or in ``benchmarks`` or ``examples``, is run; what they are made of is in folders."""
    programs, parts = [], []
    for path in modules("analysis").values():
        folder = path.parent.name
        if path.name != "__init__.py":
            (programs if folder in ("analysis", "benchmarks", "examples") else parts).append(path)
    for path in programs:
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), path
    for path in parts:
        assert '__name__ == "__main__"' not in path.read_text(encoding="utf-8"), path
