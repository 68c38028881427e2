"""What the commands make of their options, beyond what the rooms behind them test."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import LABELS, save_image, save_tiny
from tiny_road import run, save_model

from medmom.package import load_package


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", data={"mirror": [0]})


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for k in range(3):
        save_image(tmp_path / "scans" / f"{k}.nii.gz", (14 + k, 12, 11), seed=k)
    return tmp_path / "scans"


def test_inspect_tells_what_a_model_is(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model) == 0
    told = capsys.readouterr().out
    assert "MomentumUNet" in told and all(name in told for name in LABELS.foreground)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert run("inspect", model) == 2
    assert "do not match their checksum" in capsys.readouterr().err


def test_folder_of_predictions_has_everything_asked_for(model: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--preview", "--probabilities", "uint8", "--tta", "--fast", "--quiet")
    assert run("predict", model, scans, "--out", out, *options) == 0
    classes = [name.replace(" ", "_") for name in LABELS.names]
    wanted = {"cases.json", "run.json", "statistics.json", "statistics.csv"}
    for k in range(3):
        wanted |= {f"{k}.nii.gz", f"{k}.json", f"{k}_preview.png", *(f"{k}_{name}.nii.gz" for name in classes)}
    assert {path.name for path in out.iterdir()} == wanted
    told = json.loads((out / "1.json").read_text())
    assert told["settings"] == {"overlap": 0.25, "mirrors": [0], "skip_air": True, "cleanup": None}
    with (out / "statistics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["class"]) for row in rows] == [(str(k), n) for k in range(3) for n in LABELS.foreground]
    label = np.asarray(nib.load(out / "1.nii.gz").dataobj)
    for row in rows[2:4]:
        assert int(row["voxels"]) == int((label == LABELS.value(row["class"])).sum())


def test_probabilities_agree_with_the_label_map(model: Path, scans: Path, tmp_path: Path) -> None:
    assert run("predict", model, scans / "0.nii.gz", "--out", tmp_path / "x.nii.gz", "--probabilities", "uint16") == 0
    label = LABELS.to_channels(np.asarray(nib.load(tmp_path / "x.nii.gz").dataobj))
    files = [tmp_path / f"x_{name.replace(' ', '_')}.nii.gz" for name in LABELS.names]
    found = np.stack([nib.load(file).get_fdata() for file in files])
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-4)
    top_two = np.sort(found, axis=0)[-2:]
    clear = top_two[1] - top_two[0] > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found.argmax(axis=0)[clear], label[clear])


def test_what_is_there_is_not_done_again(
    model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("predict", model, scans, "--out", tmp_path / "out", "--skip-existing", "--quiet")
    assert run(*command) == 0
    before = (tmp_path / "out" / "0.nii.gz").stat().st_mtime_ns
    save_image(scans / "1.nii.gz", (15, 12, 11), seed=9)
    capsys.readouterr()
    assert run(*command) == 0
    assert "3 of 3 scans segmented, 2 of them were there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "0.nii.gz").stat().st_mtime_ns == before
    assert run(*command, "--fast") == 0
    assert (tmp_path / "out" / "0.nii.gz").stat().st_mtime_ns > before


def test_budget_that_is_too_small_is_refused_with_one_that_does(
    model: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", model, scans / "0.nii.gz", "--out", tmp_path / "x.nii.gz", "--max-ram", "1MiB") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--max-ram" in told and "needs at least" in told
    assert run("predict", model, scans / "0.nii.gz", "--out", tmp_path / "x.nii.gz", "--max-ram", "64 cows") == 2
    assert "--max-ram 64 cows: no size of memory" in capsys.readouterr().err
    assert not (tmp_path / "x.nii.gz").exists()


@pytest.mark.parametrize(
    "option",
    ["--tta", "--fast", "--preview", "--skip-existing", "--all-windows", "--max-ram=1GiB", "--probabilities=uint8"],
)
def test_options_of_label_maps_are_refused_by_a_classifier(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", classes=True)
    assert run("predict", model, tmp_path, "--out", tmp_path / "x.csv", option) == 2
    assert f"{option.split('=', maxsplit=1)[0]}: {model} classifies" in capsys.readouterr().err


def test_export_writes_both_formats(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", model, "--to", "onnx", "--out", tmp_path / "onnx") == 0
    assert (tmp_path / "onnx" / "model.onnx.json").is_file()
    assert run("export", model, "--to", "monai-bundle", "--out", tmp_path / "bundle") == 0
    assert (tmp_path / "bundle" / "configs" / "metadata.json").is_file()
    assert run("export", model, "--to", "monai-bundle", "--out", tmp_path / "bundle") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_cleanup_is_chosen_applied_and_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speckle besides one large block: the largest part of its class is what the references hold."""
    folder, labels = tmp_path / "run", []
    model = save_tiny(folder / "model")
    (folder / "validation").mkdir()
    for k in range(8):
        image = save_image(tmp_path / "scans" / f"{k}.nii.gz", (16, 16, 16), affine=np.eye(4), seed=k)
        reference = np.zeros((16, 16, 16), np.uint8)
        reference[3:12, 4:11, 2 + k % 3 : 12] = LABELS.values[1]
        labels.append(tmp_path / "labels" / f"{k}.nii.gz")
        labels[-1].parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(reference, np.eye(4)), labels[-1])
        case = {"name": str(k), "images": [str(image)], "label": str(labels[-1]), "group": str(k)}
        (folder / "split.json").write_text("")
        labels[-1] = case
    (folder / "split.json").write_text(json.dumps({"train": [], "validation": labels}))
    assert run("predict", folder, "--fold", "validation", "--out", folder / "validation", "--quiet") == 0
    for case in labels:
        # What a trained network would give: the reference, and an island.
        path = folder / "validation" / f"{case['name']}.nii.gz"
        found = nib.load(path)
        wanted = np.asarray(nib.load(case["label"]).dataobj).copy()
        wanted[14:, 14:, 14:] = LABELS.values[1]
        nib.save(nib.Nifti1Image(wanted, found.affine, found.header), path)
    capsys.readouterr()
    assert run("postprocess", folder, "--quiet") == 0
    assert LABELS.names[1] in capsys.readouterr().out
    chosen = load_package(model).cleanup
    assert chosen is not None and chosen.largest == (LABELS.names[1],)
    assert run("predict", folder, tmp_path / "scans" / "0.nii.gz", "--out", tmp_path / "x.nii.gz") == 0
    assert json.loads((tmp_path / "x.json").read_text())["settings"]["cleanup"] == chosen.as_dict()
    assert run("postprocess", folder, "--none") == 0
    assert load_package(model).cleanup is None
