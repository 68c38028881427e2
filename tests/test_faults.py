"""What the user can mend: one line that names file, fact and mend, exit code 2, and nothing is written over."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from tiny import save_image, save_tiny
from tiny_run import write_recipe, write_scans

from medmom.cli import main


class Fault(NamedTuple):
    """What to break in the folder, and what the line must say: file, fact, mend."""

    spoil: Callable[[Path], object]
    words: tuple[str, ...]


def scan(folder: Path, kind: str = "images") -> Path:
    return folder / "scans" / kind / "case_1.nii.gz"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put_nan(path: Path) -> None:
    image = nib.load(path)
    array = image.get_fdata().astype(np.float32)
    array[3, 2, 1] = np.nan
    nib.save(nib.Nifti1Image(array, image.affine), path)


def move_grid(path: Path) -> None:
    label = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), label.affine @ np.diag([1, 1, 1.5, 1])), path)


def put_value(path: Path) -> None:
    label = nib.load(path)
    array = np.asarray(label.dataobj).copy()
    array[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(array, label.affine), path)


SCANS = {
    "truncated gz": Fault(lambda f: truncate(scan(f)), ("images/case_1.nii.gz", "cut short", "again")),
    "empty file": Fault(lambda f: scan(f).write_bytes(b""), ("images/case_1.nii.gz", "empty", "again")),
    "text named nii.gz": Fault(lambda f: scan(f).write_text("not a scan\n"), ("images/case_1.nii.gz", "NIfTI")),
    "text in gzip": Fault(
        lambda f: scan(f).write_bytes(gzip.compress(b"text " * 999)), ("images/case_1.nii.gz", "NIfTI")
    ),
    "NaN volume": Fault(lambda f: put_nan(scan(f)), ("images/case_1.nii.gz", "NaN")),
}
LABELS = {
    "label of another grid": Fault(lambda f: move_grid(scan(f, "labels")), ("labels/case_1.nii.gz", "grid")),
    "unknown label value": Fault(lambda f: put_value(scan(f, "labels")), ("labels/case_1.nii.gz", "7", "dataset.json")),
    "truncated label": Fault(lambda f: truncate(scan(f, "labels")), ("labels/case_1.nii.gz", "cut short", "again")),
}


def contents(folder: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "cache" not in path.parts
    }


def complaint(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> str:
    """Runs a command that must fail; checks all that every fault has in common."""
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    assert contents(folder) == before
    said = capsys.readouterr().err
    assert said.startswith("medmom: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert "Errno" not in said
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipe(tmp_path / "tiny.yaml", write_scans(tmp_path / "scans"))
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("package") / "model")


def train_words(folder: Path, *more: str | Path) -> list[str | Path]:
    return ["train", folder / "tiny.yaml", "--device", "cpu", "--quiet", *(more or ("--out", folder / "run"))]


@pytest.mark.parametrize("name", SCANS | LABELS)
def test_training_on_a_bad_scan(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = (SCANS | LABELS)[name]
    fault.spoil(folder)
    said = complaint(capsys, folder, *train_words(folder))
    assert all(word in said for word in fault.words)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", SCANS | LABELS)
def test_inspecting_a_bad_scan(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = (SCANS | LABELS)[name]
    fault.spoil(folder)
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(folder / "scans"), "--quiet"])
    assert ended.value.code == 2
    assert contents(folder) == before
    said = capsys.readouterr()
    assert said.err == ""
    assert any(all(word in line for word in fault.words) for line in said.out.splitlines())


@pytest.mark.parametrize("name", SCANS)
def test_predicting_a_bad_scan(name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SCANS[name].spoil(folder)
    out = folder / "out.nii.gz"
    said = complaint(capsys, folder, "predict", model, scan(folder), "--out", out, "--device", "cpu", "--quiet")
    assert all(word in said for word in SCANS[name].words)
    assert not out.exists()


def test_one_bad_scan_does_not_stop_the_others(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_nan(scan(folder))
    before = contents(folder / "scans")
    words = ["predict", model, folder / "scans" / "images", "--out", folder / "out", "--device", "cpu", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "case_1.nii.gz" in said.err
    assert "4 of 5 scans segmented" in said.out
    assert sorted(path.name for path in (folder / "out").glob("*.nii.gz")) == [f"case_{k}.nii.gz" for k in (0, 2, 3, 4)]
    assert contents(folder / "scans") == before


@pytest.mark.parametrize("kind", ["grid", "value"])
def test_scoring_a_bad_label(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "scans" / "labels", folder / "predictions")
    {"grid": move_grid, "value": put_value}[kind](folder / "predictions" / "case_1.nii.gz")
    out = folder / "scores.json"
    words = ("evaluate", folder / "predictions", folder / "scans" / "labels", "--out", out, "--quiet")
    said = complaint(capsys, folder, *words)
    assert "case_1.nii.gz" in said
    assert {"grid": "grid", "value": "7"}[kind] in said
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "GONE"],
        ["train", "demo", "--data.folder", "GONE", "--out", "OUT"],
        ["train", "--resume", "GONE"],
        ["predict", "MODEL", "GONE", "--out", "OUT"],
        ["predict", "GONE", "SCAN", "--out", "OUT"],
        ["evaluate", "GONE", "SCANS", "--out", "OUT"],
        ["evaluate", "SCANS", "GONE", "--out", "OUT"],
        ["report", "GONE", "--out", "OUT"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_missing_folder(words: list[str], folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"GONE": folder / "gone", "OUT": folder / "out", "MODEL": model, "SCAN": scan(folder)}
    names["SCANS"] = folder / "scans" / "labels"
    said = complaint(capsys, folder, *(names.get(word, word) for word in words), "--quiet")
    assert str(folder / "gone") in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "RECIPE", "--out", "OUT"],
        ["predict", "MODEL", "SCAN", "--out", "OUT.nii.gz"],
        ["predict", "MODEL", "SCANS", "--out", "OUT"],
        ["evaluate", "LABELS", "LABELS", "--out", "OUT"],
        ["demo", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_unwritable_output(words: list[str], folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Below a file: permissions do not hold root back.
    blocked = folder / "scans" / "dataset.json" / "out"
    names = {"OUT": blocked, "OUT.nii.gz": f"{blocked}.nii.gz", "MODEL": model, "RECIPE": folder / "tiny.yaml"}
    names |= {"SCAN": scan(folder), "SCANS": folder / "scans" / "images", "LABELS": folder / "scans" / "labels"}
    said = complaint(capsys, folder, *(names.get(word, word) for word in words), "--quiet")
    assert "dataset.json" in said
    assert "cannot be written" in said


def test_unwritable_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = folder / "scans" / "dataset.json" / "cached"
    said = complaint(capsys, folder, *train_words(folder, "--out", folder / "run", "--data.cache", blocked))
    assert "dataset.json" in said
    assert "--data.cache" in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize("link", [False, True])
def test_output_equal_to_input(link: bool, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = scan(folder)
    if link:
        out = folder / "link.nii.gz"
        out.symlink_to(scan(folder))
    said = complaint(capsys, folder, "predict", model, scan(folder), "--out", out, "--device", "cpu", "--quiet")
    assert out.name in said
    assert "input" in said


def test_output_folder_equal_to_input_folder(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder / "scans" / "images"
    said = complaint(capsys, folder, "predict", model, images, "--out", images, "--device", "cpu", "--quiet")
    assert "input" in said


def test_run_in_a_folder_that_is_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, folder, *train_words(folder, "--out", folder / "scans"))
    assert str(folder / "scans") in said
    assert "already there" in said


@pytest.mark.parametrize("channels", [("T1", "T2"), ("T1", "T2", "FLAIR")])
def test_wrong_number_of_channels(channels: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(folder / "model", channels=channels)
    image = save_image(folder / "one.nii.gz")
    out = folder / "out.nii.gz"
    said = complaint(capsys, folder, "predict", model, image, "--out", out, "--device", "cpu", "--quiet")
    assert "one.nii.gz" in said
    assert f"channels is 1, the model takes {len(channels)}" in said
    assert not out.exists()


def test_unknown_recipe_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("steps_per_epoch", "step_per_epoch"))
    said = complaint(capsys, folder, *train_words(folder))
    assert "tiny.yaml: unknown key training.step_per_epoch; did you mean training.steps_per_epoch?" in said


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "data: [1,\n", "\x00", "training: 3\n"])
def test_recipe_that_is_none(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tiny.yaml").write_text(text)
    assert "tiny.yaml" in complaint(capsys, folder, *train_words(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_package_with_a_changed_byte(
    file: str, place: float, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = folder / "copy"
    shutil.copytree(model, copy)
    content = bytearray((copy / file).read_bytes())
    content[int(place * len(content))] ^= 1
    (copy / file).write_bytes(content)
    out = folder / "out.nii.gz"
    said = complaint(capsys, folder, "predict", copy, scan(folder), "--out", out, "--device", "cpu", "--quiet")
    assert file in said
    assert "checksum" in said
    assert "again" in said
    assert not out.exists()
