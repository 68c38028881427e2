"""What the README promises can be done as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from medmom import cli
from medmom.recipe_file import shipped_recipes

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


PAGES = ["README.md", *(f"docs/{name}.md" for name in ("export", "inference", "networks", "optimizers", "theory"))]


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_run(page: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert examples
    for code in examples:
        exec(compile(code, page, "exec"), {})


def test_commands_are_found() -> None:
    assert {command.split()[1] for command in COMMANDS} == {
        *("inspect", "train", "predict", "evaluate", "report", "postprocess", "export", "import")
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_spelt_as_the_command_line_reads_them(command: str) -> None:
    options, rest = cli._parser().parse_known_args(shlex.split(command)[1:])
    assert options.run is not None
    assert not rest or (options.command == "train" and rest[0].startswith("--data."))


def test_every_shipped_recipe_is_named() -> None:
    assert all(f"`{name}`" in README for name in shipped_recipes())


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))])
def test_links_into_the_project_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links or page != "README.md"
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
