"""The whole road in two dimensions: pictures, and slices of volumes, from inspect to report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tiny_road import LABELS, SIZES, TURNED, check_resume, contents, road_recipe, run, write_pictures, write_volumes

VALUES = set(LABELS.values())


class Road(NamedTuple):
    """A trained run and what it was trained on."""

    data: Path
    recipe: Path
    run: Path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Road:
    folder = tmp_path_factory.mktemp("pictures")
    data = write_pictures(folder / "data")
    recipe = road_recipe(folder / "tiny.yaml", data, classes=False, preparation={"colour": "rgb"})
    assert run("train", recipe, "--out", folder / "run") == 0
    return Road(data, recipe, folder / "run")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Road:
    folder = tmp_path_factory.mktemp("volumes")
    data = write_volumes(folder / "data")
    scaled = {"intensity": "zscore", "colour": "own"}
    recipe = road_recipe(folder / "tiny.yaml", data, classes=False, preparation=scaled)
    assert run("train", recipe, "--out", folder / "run") == 0
    return Road(data, recipe, folder / "run")


def values(path: Path) -> np.ndarray:
    """Stored values of a picture of labels, (rows, columns)."""
    with Image.open(path) as picture:
        return np.asarray(picture)


def check_sheet(road: Road, out: Path) -> None:
    assert run("inspect", road.data, "--augment", road.recipe, "--out", out) == 0
    with Image.open(out) as sheet:
        assert min(sheet.size) > 300
        assert np.asarray(sheet).std() > 10


def test_pictures_are_inspected(pictures: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(pictures.data)
    assert run("inspect", pictures.data) == 0
    said = capsys.readouterr().out
    assert "5 cases" in said
    assert all(f"{columns}x{rows}" in said for columns, rows in SIZES)
    assert "no fault found" in said
    check_sheet(pictures, tmp_path / "sheet.png")
    assert contents(pictures.data) == before


def test_slices_are_inspected(volumes: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", volumes.data) == 0
    assert "34x38x5" in capsys.readouterr().out
    check_sheet(volumes, tmp_path / "sheet.png")


@pytest.mark.parametrize("kind", ["pictures", "volumes"])
def test_run_folder_is_complete(kind: str, request: pytest.FixtureRequest) -> None:
    road = request.getfixturevalue(kind)
    names = {"recipe.yaml", "split.json", "metrics.csv", "last.ckpt", "best.ckpt", "pictures", "tensorboard", "model"}
    assert {path.name for path in road.run.iterdir()} == names
    assert len((road.run / "metrics.csv").read_text().splitlines()) == 3


def test_masks_have_the_size_of_their_pictures_and_the_stored_values(pictures: Road, tmp_path: Path) -> None:
    before = contents(pictures.data)
    assert run("predict", pictures.run, pictures.data / "images", "--out", tmp_path / "out") == 0
    found = {path.stem: values(path) for path in (tmp_path / "out").glob("*.png")}
    assert {name: mask.shape[::-1] for name, mask in found.items()} == {
        f"frame {k}": size for k, size in enumerate(SIZES)
    }
    assert {value for mask in found.values() for value in np.unique(mask)} <= VALUES
    assert any(len(np.unique(mask)) > 1 for mask in found.values())
    assert contents(pictures.data) == before


def test_one_picture_is_segmented_as_in_a_folder(pictures: Road, tmp_path: Path) -> None:
    image = pictures.data / "images" / "frame 1.JPG"
    assert run("predict", pictures.run, image, "--out", tmp_path / "one.png") == 0
    assert run("predict", pictures.run, image, pictures.data / "images" / "frame 2.JPG", "--out", tmp_path / "two") == 0
    np.testing.assert_array_equal(values(tmp_path / "one.png"), values(tmp_path / "two" / "frame 1.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "one.json", "two"}


def test_mirror_images_are_averaged_on_request(pictures: Road, tmp_path: Path) -> None:
    image = pictures.data / "images" / "frame 1.JPG"
    assert run("predict", pictures.run, image, "--out", tmp_path / "one.png", "--tta") == 0
    assert json.loads((tmp_path / "one.json").read_text())["settings"]["mirrors"] == [0, 1]


def test_mask_is_upright_however_the_picture_is_stored(pictures: Road, tmp_path: Path) -> None:
    with Image.open(pictures.data / "images" / "frame 0.JPG") as picture:
        upright = np.asarray(picture)
    tags = Image.Exif()
    tags[274] = 6  # to be turned clockwise
    Image.fromarray(upright).save(tmp_path / "plain.png")
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "turned.png", exif=tags)
    assert run("predict", pictures.run, tmp_path / "*.png", "--out", tmp_path / "out") == 0
    plain, turned = (values(tmp_path / "out" / f"{name}.png") for name in ("plain", "turned"))
    assert plain.shape == upright.shape[:2]
    np.testing.assert_array_equal(plain, turned)


@pytest.mark.parametrize("kind", ["pictures", "volumes"])
def test_validation_is_predicted_scored_and_reported(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    road, out = request.getfixturevalue(kind), tmp_path / "validation"
    assert run("predict", road.run, "--fold", "validation", "--out", out) == 0
    held_out = [case["name"] for case in json.loads((road.run / "split.json").read_text())["validation"]]
    assert run("evaluate", out) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert [case["name"] for case in scores["cases"]] == held_out
    labels = next(path for path in (road.data / "labels", road.data / "masks") if path.exists())
    assert run("evaluate", out, labels, "--out", tmp_path / "again.json") == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert [case["scores"] for case in again["cases"]] == [case["scores"] for case in scores["cases"]]
    for source in (out / "scores.json", road.run):
        assert run("report", source, "--out", tmp_path / "page.html") == 0
        assert "data:image/png;base64" in (tmp_path / "page.html").read_text()


def test_references_score_full_marks(pictures: Road, tmp_path: Path) -> None:
    masks = pictures.data / "masks"
    assert run("evaluate", masks, masks, "--out", tmp_path / "scores.json") == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert {scores["dice"] for case in found["cases"] for scores in case["scores"].values()} == {1.0}


def predicted(road: Road, image: nib.Nifti1Image, folder: Path) -> nib.Nifti1Image:
    folder.mkdir(parents=True)
    nib.save(image, folder / "scan.nii.gz")
    assert run("predict", road.run, folder / "scan.nii.gz", "--out", folder / "label.nii.gz") == 0
    return nib.load(folder / "label.nii.gz")


def test_volume_is_put_together_on_its_own_grid(volumes: Road, tmp_path: Path) -> None:
    image = nib.load(volumes.data / "images" / "scan_0.nii.gz")
    label = predicted(volumes, image, tmp_path / "a")
    assert label.shape == (34, 38, 5)
    np.testing.assert_array_equal(label.affine, TURNED)
    assert set(np.unique(np.asarray(label.dataobj))) <= VALUES


def test_slices_are_segmented_each_by_itself(volumes: Road, tmp_path: Path) -> None:
    image = nib.load(volumes.data / "images" / "scan_0.nii.gz")
    array, order = np.asarray(image.dataobj), [3, 0, 4, 2, 1]
    label = np.asarray(predicted(volumes, image, tmp_path / "a").dataobj)
    assert any((label[..., 0] != label[..., z]).any() for z in range(1, 5))
    mixed = predicted(volumes, nib.Nifti1Image(array[..., order], image.affine), tmp_path / "b")
    np.testing.assert_array_equal(np.asarray(mixed.dataobj), label[..., order])


def test_stored_axes_do_not_matter(volumes: Road, tmp_path: Path) -> None:
    image = nib.load(volumes.data / "images" / "scan_1.nii.gz")
    label = predicted(volumes, image, tmp_path / "a")
    plain = predicted(volumes, nib.as_closest_canonical(image), tmp_path / "b")
    assert plain.shape == (38, 34, 5)
    np.testing.assert_array_equal(np.asarray(nib.as_closest_canonical(label).dataobj), np.asarray(plain.dataobj))


def test_resumed_run_on_pictures_is_the_straight_one(pictures: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resume(pictures.recipe, pictures.run, monkeypatch)


@pytest.mark.slow
def test_resumed_run_on_slices_is_the_straight_one(volumes: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resume(volumes.recipe, volumes.run, monkeypatch)


@pytest.fixture(params=["colours as grey", "grey as colours", "colours and grey as colours"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    data = write_pictures(tmp_path / "data")
    (data / "dataset.json").unlink()
    for k, mask in enumerate(sorted((data / "masks").iterdir())):
        Image.fromarray(255 * (values(mask) > 0).astype(np.uint8)).save(mask)
        path = data / "images" / f"frame {k}.JPG"
        if request.param.startswith("grey") or (" and " in request.param and k > 1):
            with Image.open(path) as picture:
                picture.convert("L").save(path)
    yield data, "grey" if request.param.endswith("as grey") else "rgb"


def test_pictures_are_brought_to_the_colours_that_the_recipe_wants(mixed: tuple[Path, str], tmp_path: Path) -> None:
    data, colour = mixed
    one = {"epochs": 1, "steps_per_epoch": 1}
    wanted = {"colour": colour}
    recipe = road_recipe(tmp_path / "tiny.yaml", data, classes=False, preparation=wanted, training=one)
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    assert run("predict", tmp_path / "run", data / "images", "--out", tmp_path / "out") == 0
    found = [values(path) for path in (tmp_path / "out").glob("*.png")]
    assert len(found) == 5
    assert {value for mask in found for value in np.unique(mask)} <= {0, 1}


def test_inspection_names_what_is_wrong_with_a_folder_of_masks(
    pictures: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "data")
    (data / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    assert run("inspect", data) == 2
    assert 'dataset.json: no "channel_names"' in capsys.readouterr().err
