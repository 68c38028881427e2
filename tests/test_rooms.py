"""Imports go downward only, files and functions stay small, and every public name is explained."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The longest prefix decides. A module may import its own floor and those below.
FLOORS = {
    "medmom": 0,  # the version
    "medmom.errors": 0,
    "medmom.classes": 1,
    "medmom.device": 1,
    "medmom.interpolation": 1,
    "medmom.islands": 1,
    "medmom.geometry": 1,
    "medmom.labels": 1,
    "medmom.cleanup": 2,
    "medmom.data": 2,
    "medmom.checkpoint": 2,
    "medmom.recipe": 2,
    "medmom.recipe_file": 2,
    "medmom.phantom": 2,
    "medmom.evaluation.metrics": 2,
    "medmom.evaluation.drawing": 2,
    "medmom.evaluation.overlay": 2,
    "medmom.inference.appearance": 2,
    "medmom.inference.novelty": 2,
    "medmom.inference.windows": 2,
    "medmom.tasks": 3,
    "medmom.package": 3,
    "medmom.patches": 5,
    "medmom.budget": 4,
    "medmom.callbacks": 4,
    "medmom.describe": 4,
    "medmom.export": 4,
    "medmom.jobs": 4,
    "medmom.monitor": 4,
    "medmom.nnunet": 4,
    "medmom.network": 4,
    "medmom.sheet": 4,
    "medmom.step_cost": 4,
    "medmom.transfer": 4,
    "medmom.weights": 4,
    "medmom.optimizer": 4,
    "medmom.postprocess": 4,
    "medmom.ramp": 4,
    "medmom.rank_monitor": 4,
    "medmom.run": 4,
    "medmom.train": 4,
    "medmom.inference": 4,
    "medmom.evaluation": 4,
    "medmom.demo": 5,
    "medmom.cli": 5,
    "medmom.commands": 5,
    "medmom.__main__": 5,
}
ALONE = {
    "medmom.models": ("medmom.models", "torch", "monai"),
    "medmom.optim": ("medmom.optim", "torch"),
}
NEVER = {
    "medmom.tasks": ("medmom.data", "medmom.models", "medmom.optim"),
    "medmom.evaluation": ("torch", "monai", "lightning", "medmom.tasks", "medmom.package", "medmom.train"),
    "medmom.data.files": ("torch", "monai", "lightning"),
    "medmom.geometry": ("torch", "monai", "lightning"),
    "medmom.interpolation": ("torch", "monai", "lightning"),
}
# torchmetrics stands on torch; whoever scores segmentations imports neither.
EXCEPT = {"medmom.evaluation.class_metrics": ("torch",)}
FOLDERS = (ROOT / "medmom", ROOT / "models", ROOT / "optim")


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("models", "optim"):
        parts.insert(0, "medmom")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in FOLDERS
    for path in sorted(folder.rglob("*.py"))
    if "__pycache__" not in path.parts and not any(parent.is_symlink() for parent in path.parents)
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            # `from medmom import models` imports medmom.models.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def longest(table: dict[str, int], name: str) -> int | None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in table:
            return table[".".join(parts[:end])]
    return None


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def is_ours(name: str) -> bool:
    return within(name, "medmom")


def test_every_module_is_looked_at() -> None:
    assert {"medmom.geometry", "medmom.models.unet", "medmom.optim.engine", "medmom.cli"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downward(name: str) -> None:
    if any(within(name, room) for room in ALONE):
        return
    own = longest(FLOORS, name)
    assert own is not None
    for target in imports(name):
        if not is_ours(target) or any(within(target, room) for room in ALONE):
            continue
        floor = longest(FLOORS, target)
        assert floor is not None and floor <= own, f"{name} (floor {own}) imports {target} (floor {floor})"


@pytest.mark.parametrize("name", [n for n in FILES if any(within(n, room) for room in ALONE)])
def test_models_and_optim_know_nothing_of_the_rest(name: str) -> None:
    allowed = next(names for room, names in ALONE.items() if within(name, room))
    standard = {
        "__future__",
        "abc",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "functools",
        "itertools",
        "math",
    }
    standard |= {"typing", "weakref"}
    for target in imports(name):
        known = any(within(target, prefix) for prefix in allowed) or target.split(".")[0] in standard
        assert known, f"{name} imports {target}"


@pytest.mark.parametrize("room", NEVER)
def test_rooms_do_not_know_what_they_need_not(room: str) -> None:
    for name in [n for n in FILES if within(n, room)]:
        for target in imports(name):
            never = [prefix for prefix in NEVER[room] if prefix not in EXCEPT.get(name, ())]
            assert not any(within(target, prefix) for prefix in never), f"{name} imports {target}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name: str) -> None:
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 420, f"{name} is two things"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = (node.end_lineno or 0) - node.lineno + 1 - len(docstring.splitlines())
            assert lines <= 60, f"{name}.{node.name} has {lines} lines"


@pytest.mark.parametrize("name", FILES)
def test_public_names_have_docstrings(name: str) -> None:
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"
