from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import LABELS, save_tiny
from tiny_road import save_model

from medmom.cleanup import Cleanup
from medmom.errors import MedmomError
from medmom.evaluation.scores import evaluate
from medmom.package import load_package
from medmom.postprocess import choose, take_out

HEAD = Cleanup(largest=("head",))


def write(path: Path, label: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, np.eye(4)), path)
    return path


def write_predictions(run: Path, *, islands: bool = True, settings: dict[str, Any] | None = None) -> Path:
    """Writes what predict would: label maps, their sidecars and the list, of the package as it is."""
    folder, entries = run / "validation", []
    told = {"labels": LABELS.as_dict(), "model": {"checksum": load_package(run).checksum}}
    sidecar = told if settings is None else {**told, "settings": settings}
    for k in range(5):
        label = np.zeros((12, 10, 8), np.uint8)
        label[2:8, 2:8, 2:6] = 1
        label[9:, 2:8, 2:6] = 4
        reference = write(run / "references" / f"c{k}.nii", label)
        label[k : k + 2, 9, 7] = islands
        write(folder / f"c{k}.nii", label)
        image = run / "images" / f"c{k}.nii"
        (folder / f"c{k}.json").write_text(json.dumps({**sidecar, "image": [str(image)]}))
        row = {"name": f"c{k}", "prediction": f"c{k}.nii", "patient": f"p{k}", "image": [str(image)]}
        entries.append({**row, "reference": str(reference)})
    (folder / "cases.json").write_text(json.dumps({**sidecar, "cases": entries}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "run" / "model")
    write_predictions(tmp_path / "run")
    return tmp_path / "run"


def package_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "model").iterdir())}


def test_choice_goes_into_the_package_and_leaves_its_weights(run: Path) -> None:
    before, checksum = package_bytes(run), load_package(run).checksum
    choice = choose(run, quiet=True)
    package, after = load_package(run), package_bytes(run)
    assert choice.cleanup == package.cleanup == HEAD
    assert after["model.safetensors"] == before["model.safetensors"]
    assert package.checksum != checksum
    assert package.raw_checksum == checksum
    told = json.loads((run / "validation" / "cleanup.json").read_text())
    assert (told["cleanup"]["largest"], told["model"]["checksum"]) == (["head"], checksum)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_taking_it_out_gives_the_old_package_to_the_byte(run: Path) -> None:
    before = package_bytes(run)
    choose(run / "model", quiet=True)
    assert package_bytes(run) != before
    assert take_out(run)
    assert package_bytes(run) == before
    assert not take_out(run)
    assert package_bytes(run) == before


def test_choosing_again_from_the_same_predictions_changes_nothing(run: Path) -> None:
    choose(run, quiet=True)
    before = package_bytes(run)
    assert choose(run, quiet=True).cleanup == HEAD
    assert package_bytes(run) == before


def test_nothing_chosen_leaves_or_makes_a_package_without_cleanup(run: Path) -> None:
    before = package_bytes(run)
    choose(run, quiet=True)
    take_out(run)
    write_predictions(run, islands=False)
    assert not choose(run, quiet=True).cleanup
    assert package_bytes(run) == before
    write_predictions(run)
    choose(run, quiet=True)
    # Of the package with its cleanup, but made without it.
    write_predictions(run, islands=False, settings={"cleanup": None})
    assert not choose(run, quiet=True).cleanup
    assert package_bytes(run) == before


def test_old_predictions_are_still_scored_after_the_choice(run: Path) -> None:
    before = evaluate(run / "validation")["mean"]
    choose(run, quiet=True)
    assert evaluate(run / "validation")["mean"] == before


def test_predictions_may_lie_elsewhere(run: Path) -> None:
    (run / "validation").rename(run / "other")
    with pytest.raises(MedmomError, match=r"validation: no cases\.json .*medmom predict .* --fold validation --out"):
        choose(run, quiet=True)
    assert choose(run, run / "other", quiet=True).cleanup == HEAD
    assert (run / "other" / "cleanup.json").is_file()


@pytest.mark.parametrize("settings", [None, {"cleanup": {"largest": ["head"], "smoothing": {}}}, {"cleanup": True}])
def test_predictions_made_with_a_cleanup_are_refused(run: Path, settings: dict[str, Any] | None) -> None:
    choose(run, quiet=True)
    write_predictions(run, settings=settings)
    before = package_bytes(run)
    with pytest.raises(MedmomError, match=r"made with the cleanup of the model.*postprocess \S+ --none, then medmom"):
        choose(run, quiet=True)
    assert package_bytes(run) == before


@pytest.mark.parametrize("cleanup", [None, False, {}, {"largest": [], "smoothing": {}}])
def test_predictions_that_say_they_had_no_cleanup_are_taken(run: Path, cleanup: Any) -> None:
    write_predictions(run, settings={"cleanup": cleanup, "overlap": 0.5})
    assert choose(run, quiet=True).cleanup == HEAD


@pytest.mark.parametrize("name", ["cases.json", "c3.json"])
def test_one_file_of_another_model_is_found(run: Path, name: str) -> None:
    path = run / "validation" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"checksum": "0" * 64}}))
    before = package_bytes(run)
    with pytest.raises(MedmomError, match=rf"{name}: these predictions were made by another model"):
        choose(run, quiet=True)
    assert package_bytes(run) == before


def test_prediction_without_its_sidecar_is_refused(run: Path) -> None:
    (run / "validation" / "c3.json").unlink()
    with pytest.raises(MedmomError, match=r"c3\.json: cannot be read"):
        choose(run, quiet=True)


def test_cases_of_the_training_are_refused(run: Path) -> None:
    split = {"train": [{"name": "c1", "images": [str(run / "images" / "c1.nii")]}], "validation": []}
    (run / "split.json").write_text(json.dumps(split))
    with pytest.raises(MedmomError, match="the model was trained on the case c1"):
        choose(run, quiet=True)
    (run / "split.json").write_text("[]")
    with pytest.raises(MedmomError, match=r"split\.json: not as medmom train writes it"):
        choose(run, quiet=True)


def test_other_classes_are_refused(run: Path) -> None:
    path = run / "validation" / "cases.json"
    labels = {"names": ["background", "head", "tail"], "values": [0, 1, 4], "ignore": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": labels}))
    with pytest.raises(MedmomError, match=r"cases\.json: has other classes than the model"):
        choose(run, quiet=True)


def test_classifier_has_no_cleanup(tmp_path: Path) -> None:
    save_model(tmp_path / "run" / "model", classes=True)
    for action in (choose, take_out):
        with pytest.raises(MedmomError, match="classifies whole images; a cleanup is for label maps"):
            action(tmp_path / "run")


def test_damaged_package_is_refused(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MedmomError, match="checksum"):
        choose(run, quiet=True)
