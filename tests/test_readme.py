"""What the README promises can be done as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from medmom import cli
from medmom.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if not kind
    for line in block.splitlines()
    if line.startswith("medmom ")
]


def test_python_example_runs() -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(code, "README.md", "exec"), {})


def test_commands_are_found() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"inspect", "train", "predict", "evaluate", "report"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_spelt_as_the_command_line_reads_them(command: str) -> None:
    options, rest = cli._parser().parse_known_args(shlex.split(command)[1:])
    assert options.run is not None
    assert not rest or (options.command == "train" and rest[0].startswith("--data."))


def test_every_shipped_recipe_is_named() -> None:
    assert all(f"`{name}`" in README for name in shipped_recipes())


def test_links_into_the_project_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
