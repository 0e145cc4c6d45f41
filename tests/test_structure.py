"""The tree: imports run one way, a name stands for one thing, functions fit on a screen."""

import ast
from collections import Counter, defaultdict
from graphlib import TopologicalSorter

from conftest import ROOT, present

FILES = [path for folder in ("rlhf", "eval", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
# from the ground up: what stands on one floor doesn't import its neighbours
FLOORS = (
    {"rlhf.errors", "rlhf.comparisons"}, {"rlhf.starter"}, {"rlhf.data"}, {"rlhf.models", "rlhf.run"},
    {"rlhf.rewards", "rlhf.pretraining", "rlhf.tasks", "rlhf.engines"},
    {"rlhf.ppo", "rlhf.feedback", "rlhf.rloo", "rlhf.hub"}, {"rlhf.planning"}, {"eval"}, {"recipes"},
)  # fmt: skip


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imported(path):
    """The project's modules that a file imports."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in MODULES and MODULES[name] != path}


def room(name):
    return ".".join(name.split(".")[:2]) if name.startswith("rlhf.") else name.split(".")[0]


def test_every_package_stands_on_a_floor_and_imports_from_lower_ones_only():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = defaultdict(set)
    for name, path in MODULES.items():
        for other in imported(path):
            if room(name) not in (room(other), "rlhf") and floor[room(other)] >= floor[room(name)]:
                upward[name].add(other)
    assert not upward


def test_files_import_each_other_in_no_circle():
    # a package's __init__ hands on what its files define, so importing from it is importing those
    graph = {name: imported(path) for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)


def test_no_public_name_is_defined_twice():
    found = defaultdict(set)
    for path, tree in TREES.items():
        if "metrics" in path.parent.parts and path.name != "__init__.py":
            continue  # a metric is a module of its own, loaded by its folder
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].add(module(path))
    del found["main"]
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_functions_fit_on_a_screen_and_the_top_level_stays_small():
    lines = {
        f"{module(path)}.{node.name}": present(node.end_lineno) - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: count for name, count in lines.items() if count > 60} == {}
    beside = Counter(path.parent.name for path in FILES if path.name != "__init__.py" and path.parent.parent == ROOT)
    assert beside["rlhf"] <= 5
    commands = [path for path in (ROOT / "eval").glob("*.py") if path.name != "__init__.py"]
    assert all("__main__" in path.read_text(encoding="utf-8") for path in commands)
    assert not [path for path in FILES if path.name == "utils.py"]
