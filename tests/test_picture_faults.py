"""What can be wrong with pictures, masks and slices: one line with file, fact and mend, and no file is changed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tiny_pictures import chunk
from tiny_road import (
    Fault,
    complaint,
    contents,
    disc_picture,
    road_recipe,
    run,
    save_model,
    truncate,
    write_pictures,
    write_volumes,
)

from medmom.data.preparation import Preparation


def image(folder: Path) -> Path:
    return folder / "data" / "images" / "frame 1.JPG"


def mask(folder: Path) -> Path:
    return folder / "data" / "masks" / "frame 1.png"


def break_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def announce(path: Path, columns: int, rows: int) -> None:
    """A PNG of a few bytes that claims to be huge."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b""))


def save_as_cmyk(path: Path) -> None:
    with Image.open(path) as picture:
        picture.convert("CMYK").save(path)


def resize(path: Path) -> None:
    with Image.open(path) as picture:
        picture.resize((31, 45)).save(path)


def grey_edges(path: Path) -> None:
    """A black and white mask that was resized smoothly."""
    (path.parents[1] / "dataset.json").unlink()
    for each in path.parent.iterdir():
        with Image.open(each) as picture:
            white = Image.fromarray(255 * (np.asarray(picture) > 0).astype(np.uint8))
            white.save(each) if each != path else white.resize((17, 23)).resize(white.size, 2).save(each)


def put_value(path: Path) -> None:
    with Image.open(path) as picture:
        array = np.array(picture)
    array[0, 0] = 5
    Image.fromarray(array).save(path)


def colour_mask(path: Path) -> None:
    array = np.zeros((47, 33, 3), np.uint8)
    array[3:9, 3:9] = (255, 0, 0)
    Image.fromarray(array).save(path)


IMAGES = {
    "one pixel": Fault(lambda f: Image.new("RGB", (1, 1)).save(image(f)), ("frame 1.JPG", "1 x 1", "Give")),
    "huge": Fault(lambda f: announce(image(f), 20_000, 20_000), ("frame 1.JPG", "20000 x 20000", "Crop")),
    "CMYK": Fault(lambda f: save_as_cmyk(image(f)), ("frame 1.JPG", "CMYK", "Convert")),
    "truncated": Fault(lambda f: truncate(image(f)), ("frame 1.JPG", "cut short", "again")),
    "empty": Fault(lambda f: image(f).write_bytes(b""), ("frame 1.JPG", "empty", "again")),
    "text": Fault(lambda f: image(f).write_text("no picture"), ("frame 1.JPG", "not a PNG", "again")),
    "one grey": Fault(lambda f: Image.new("RGB", (33, 47), "grey").save(image(f)), ("frame 1.JPG", "shows nothing")),
    "broken link": Fault(lambda f: break_link(image(f), f / "gone.jpg"), ("frame 1.JPG", "o such file")),
}
MASKS = {
    "other size": Fault(lambda f: resize(mask(f)), ("frame 1.png", "31x45", "33x47", "one size")),
    "grey edges": Fault(lambda f: grey_edges(mask(f)), ("frame 1.png", "neither black nor white", "Threshold")),
    "unknown value": Fault(lambda f: put_value(mask(f)), ("frame 1.png", "5", "dataset.json")),
    "colours": Fault(lambda f: colour_mask(mask(f)), ("frame 1.png", "colours", "class numbers")),
    "truncated mask": Fault(lambda f: truncate(mask(f)), ("frame 1.png", "cut short", "again")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    road_recipe(tmp_path / "tiny.yaml", write_pictures(tmp_path / "data"), classes=False, preparation={"colour": "rgb"})
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("package") / "model", colour="rgb")


def train_words(folder: Path, *more: str | Path) -> list[str | Path]:
    return ["train", folder / "tiny.yaml", "--out", folder / "run", *more]


@pytest.mark.parametrize("name", IMAGES | MASKS)
def test_training_on_a_bad_picture(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = (IMAGES | MASKS)[name]
    fault.spoil(folder)
    said = complaint(capsys, folder, *train_words(folder))
    assert all(word in said for word in fault.words), said
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", IMAGES | MASKS)
def test_inspection_lists_a_bad_picture(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = (IMAGES | MASKS)[name]
    fault.spoil(folder)
    before = contents(folder)
    assert run("inspect", folder / "data") == 2
    said = capsys.readouterr().out
    faults = [line for line in said.splitlines() if "frame 1" in line and ". " in line]
    assert [line for line in faults if all(word in line for word in fault.words)], said
    assert contents(folder) == before


@pytest.mark.parametrize("name", IMAGES)
def test_prediction_of_a_bad_picture(name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IMAGES[name].spoil(folder)
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "out.png")
    assert all(word in said for word in IMAGES[name].words), said


def test_one_bad_picture_among_many_stops_no_other(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(image(folder))
    assert run("predict", model, folder / "data" / "images", "--out", folder / "out") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "frame 1.JPG" in said.err
    assert sorted(path.stem for path in (folder / "out").glob("*.png")) == [f"frame {k}" for k in (0, 2, 3, 4)]
    errors = [case["error"] for case in json.loads((folder / "out" / "cases.json").read_text())["cases"]]
    assert [error is None for error in errors] == [True, False, True, True, True]


def test_all_pictures_unreadable(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "data" / "images").iterdir():
        truncate(path)
    assert run("predict", model, folder / "data" / "images", "--out", folder / "out") == 2
    assert capsys.readouterr().err.count("cut short") == 5
    assert {path.name for path in (folder / "out").iterdir()} == {"cases.json", "run.json"}


def test_picture_for_a_model_of_volumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ct = Preparation(None, "ct", clip=(-100.0, 200.0), mean=0.0, std=50.0, colour="grey")
    models = [save_model(folder / "model", edges=3), save_model(folder / "slices", preparation=ct)]
    for model in models:
        said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "out.png")
        assert "frame 1.JPG: a picture, the model was made for volumes. Give a NIfTI image." in said


def test_volume_for_a_model_of_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = np.random.default_rng(0).normal(0, 500, (20, 18, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "scan.nii.gz")
    model = save_model(folder / "model")
    said = complaint(capsys, folder, "predict", model, folder / "scan.nii.gz", "--out", folder / "out.nii.gz")
    assert "scan.nii.gz: values from -" in said
    assert "made for pictures, from 0 to 255" in said


@pytest.mark.parametrize("out", ["x.csv", "x.jpg", "x.nii.gz", "x.json", "x.npz", "x.txt", "x.html"])
def test_output_of_another_kind(out: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / out)
    assert out in said
    assert ".png" in said


def test_explanation_of_a_segmentation(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "x.png", "--explain")
    assert "--explain" in said
    assert "segments" in said


def test_pictures_are_never_written_over(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder / "data" / "images"
    Image.fromarray(disc_picture(7, (40, 40))[0]).save(folder / "own.png")
    (folder / "link.png").symlink_to(folder / "own.png")
    for given, out in (
        (images, images),
        (folder / "own.png", folder / "own.png"),
        (folder / "own.png", folder / "link.png"),
        (image(folder), mask(folder)),
        (images, folder / "data" / "masks"),
    ):
        complaint(capsys, folder, "predict", model, given, "--out", out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(mode=0o500)
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "locked" / "x.png")
    assert "cannot be written" in said


def test_output_below_a_file(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "tiny.yaml" / "x.png"
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", out)
    assert "cannot be written" in said
    said = complaint(capsys, folder, "inspect", folder / "data", "--augment", folder / "tiny.yaml", "--out", out)
    assert "cannot be written" in said


def test_colours_and_grey_are_not_mixed_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(image(folder)) as picture:
        picture.convert("L").save(image(folder))
    said = complaint(capsys, folder, *train_words(folder, "--preparation.colour", "own"))
    assert "frame 1" in said
    assert "preparation.colour" in said


def test_same_picture_in_training_and_validation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, ending in (("images", "JPG"), ("masks", "png")):
        source = folder / "data" / kind / f"frame 1.{ending}"
        (folder / "data" / kind / f"again.{ending}").write_bytes(source.read_bytes())
    said = complaint(capsys, folder, *train_words(folder, "--data.validation", "[again]"))
    assert "again" in said
    assert "frame 1" in said
    assert "same image" in said


def test_unmatched_mask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(folder).rename(mask(folder).with_name("frame one.png"))
    assert run("inspect", folder / "data") == 2
    assert "frame one.png" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["text", "classifier", "volumes"])
def test_weights_of_another_kind(source: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = folder / "start"
    if source == "text":
        start.write_text("no weights\n")
    else:
        save_model(start, classes=source == "classifier", edges=3 if source == "volumes" else 2)
    said = complaint(capsys, folder, *train_words(folder, "--init-from", start))
    assert str(start) in said


def test_mask_of_another_size_is_not_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks, others = folder / "data" / "masks", folder / "others"
    others.mkdir()
    for path in masks.iterdir():
        (others / path.name).write_bytes(path.read_bytes())
    resize(others / "frame 1.png")
    said = complaint(capsys, folder, "evaluate", others, masks)
    assert "frame 1" in said
    assert "31x45" in said


def test_names_as_people_give_them(folder: Path, model: Path) -> None:
    given = folder / "Ärztliche Bilder (neu)"
    given.mkdir()
    pixels = disc_picture(3, (30, 26))[0]
    for name in ("Bild 1.PNG", "größe.Tiff", "画像.JPEG", "a.b.c.png", "[x].png"):
        Image.fromarray(pixels).save(given / name)
    (given / "link.png").symlink_to(given / "Bild 1.PNG")
    (given / ".hidden.png").write_bytes(b"")
    assert run("predict", model, given, "--out", folder / "out put") == 0
    found = {path.stem for path in (folder / "out put").glob("*.png")}
    assert found == {"Bild 1", "größe", "画像", "a.b.c", "[x]", "link"}
    assert run("predict", model, given / "[x].png", "--out", folder / "[x] label.PNG") == 0
    assert (folder / "[x] label.PNG").is_file()


def test_slices_of_a_bad_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {"intensity": "zscore", "colour": "own"}
    road_recipe(tmp_path / "tiny.yaml", write_volumes(tmp_path / "data"), classes=False, preparation=wanted)
    truncate(tmp_path / "data" / "images" / "scan_1.nii.gz")
    said = complaint(capsys, tmp_path, *train_words(tmp_path))
    assert "scan_1.nii.gz" in said
