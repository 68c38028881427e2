"""The command line: help, errors in one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import tiny_recipe

from medmom import __version__, commands
from medmom.cli import main
from medmom.errors import MedmomError

COMMANDS = {
    "inspect": ["folder", "--data.group"],
    "train": ["recipe", "--out", "--resume", "--training.max_minutes", "--data.fold", "--optimizer", "hippocampus"],
    "predict": [
        *("model", "inputs", "--out", "--fold", "--skip-existing", "--tta", "--fast", "--all-windows", "--max-ram"),
        *("--max-vram", "--preview", "--probabilities", "--explain", "torchrun"),
    ],
    "postprocess": ["RUN", "--predictions", "--none"],
    "export": ["model", "--to", "monai-bundle", "onnx", "--out"],
    "evaluate": ["predictions", "references", "--out", "--cases", "--nsd-tolerance"],
    "report": ["RUN_OR_SCORES", "--out", "--images"],
    "demo": ["--out", "--minutes"],
}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command gives which the user can mend."""
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("medmom: ")
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1
    return said.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"medmom {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f"medmom {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in [*COMMANDS[name], "--device", "--quiet"])
    assert "\n  -h, --help" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["trian"], "trian"),
        (["inspect"], "folder"),
        (["inspect", "there", "--wrong"], "--wrong"),
        (["predict", "model"], "--out"),
        (["predict", "model", "--out", "x", "--fold", "test"], "validation"),
        (["report", "run"], "--out"),
        (["evaluate", "a", "b", "--nsd-tolerance", "wide"], "wide"),
        (["demo", "--minutes", "few"], "few"),
    ],
)
def test_wrong_command_line_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, *arguments)
    assert words in line
    assert "--help" in line


def test_training_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "train")
    assert "no recipe given" in line
    assert "medmom train --help" in line


def test_unknown_recipe_has_its_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "train", "hipocampus")
    assert "hipocampus: no recipe of that name" in line
    assert "did you mean hippocampus?" in line


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("--training.epoch", "training.epochs"),
        ("--data.foldr", "data.folder"),
        ("--trainig.seed", "training.seed"),
        ("--optimizer.init_args.learning", "lr"),
    ],
)
def test_unknown_key_has_its_nearest_name(
    key: str, nearest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, "train", "demo", key, "3", "--out", str(tmp_path / "run"))
    assert key.rpartition(".")[2] in line
    if "learning" not in key:
        assert f"did you mean {nearest}?" in line.lower()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments", [["demo", "stray"], ["demo", "--training.epochs"], ["demo", "--training.epochs", "many"]]
)
def test_wrong_value_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, "train", *arguments, "--out", str(tmp_path / "run"))
    assert arguments[-1].removeprefix("--") in line


def test_resuming_takes_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["demo"], ["--training.epochs", "3"]):
        assert "takes no recipe" in complaint(capsys, "train", *more, "--resume", str(tmp_path))


def test_resuming_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no recipe.yaml" in complaint(capsys, "train", "--resume", str(tmp_path / "never"))


def test_error_of_many_lines_becomes_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> int:
        raise MedmomError("a\nb\n  c")

    monkeypatch.setattr(commands, "inspect", fail)
    assert complaint(capsys, "inspect", "there") == "medmom: a b c\n"


def test_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "inspect", fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "there"])


def test_training_says_where_the_model_is_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_recipe(tmp_path, epochs=1, steps_per_epoch=1)
    out = tmp_path / "run"
    assert run("train", str(tmp_path / "tiny.yaml"), "--out", str(out), "--device", "cpu", "--quiet") == 0
    said = capsys.readouterr()
    assert f"Model package: {out / 'model'}" in said.out
    assert said.err == ""
    # The line that it proposes works.
    words = next(line for line in said.out.splitlines() if line.startswith("Next: medmom ")).split()[2:]
    assert run(*words, "--device", "cpu", "--quiet") == 0
    assert (out / "validation" / "cases.json").is_file()
    said = capsys.readouterr()
    assert said.err == ""
    assert run("evaluate", str(out / "validation"), "--quiet") == 0
    assert (out / "validation" / "scores.json").is_file()


def test_progress_bar_is_shown_unless_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_recipe(tmp_path, epochs=1, steps_per_epoch=2)
    recipe = str(tmp_path / "tiny.yaml")
    assert run("train", recipe, "--out", str(tmp_path / "a"), "--device", "cpu") == 0
    loud = capsys.readouterr()
    assert "Epoch 0" in loud.out + loud.err
    assert "2/2" in loud.out + loud.err
    assert run("train", recipe, "--out", str(tmp_path / "b"), "--device", "cpu", "--quiet") == 0
    quiet = capsys.readouterr()
    assert "Epoch" not in quiet.out + quiet.err


def test_help_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys\n"
        "from medmom.cli import main\n"
        "for command in ([], ['predict'], ['evaluate'], ['report'], ['inspect'], ['demo']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'monai', 'lightning', 'matplotlib', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "medmom", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"medmom {__version__}\n", "")
