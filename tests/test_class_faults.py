"""What can be wrong with classified images and their tables: one line with file and mend, and no file is changed."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_classes import write_volume
from tiny_road import (
    Fault,
    class_picture,
    complaint,
    contents,
    road_recipe,
    run,
    save_model,
    truncate,
    write_class_pictures,
    write_class_volumes,
    write_multilabel,
    write_packed,
    write_pictures,
    write_rows,
)


def image(folder: Path) -> Path:
    return folder / "data" / "rows" / "rows_1.png"


def table(folder: Path, *rows: str, header: str = "image,label", **options: str) -> int:
    """A table of the first images of both classes and of what else is given."""
    names = [f"{kind}/{kind}_{k}.png,{kind}" for kind in ("rows", "columns") for k in range(5)]
    lines = [header, *names, *rows]
    return 0 * (folder / "data" / "list.csv").write_text("\n".join(lines), **options)


IMAGES = {
    "one pixel": Fault(lambda f: Image.new("L", (1, 1)).save(image(f)), ("rows_1.png", "1 x 1", "Give")),
    "truncated": Fault(lambda f: truncate(image(f)), ("rows_1.png", "cut short", "again")),
    "empty": Fault(lambda f: image(f).write_bytes(b""), ("rows_1.png", "empty", "again")),
    "text": Fault(lambda f: image(f).write_text("no picture"), ("rows_1.png", "not a PNG", "again")),
    "black": Fault(lambda f: Image.new("L", (9, 9)).save(image(f)), ("rows_1.png", "shows nothing", "Give")),
    "transparent": Fault(lambda f: Image.new("RGBA", (9, 9)).save(image(f)), ("rows_1.png", "transparent", "alpha")),
}
FOLDERS = {
    "empty class": Fault(lambda f: (f / "data" / "third").mkdir(), ("third", "no file", "Add images")),
    "one class": Fault(
        lambda f: shutil.rmtree(f / "data" / "rows"), ("data", "one class only (columns)", "Add images")
    ),
    "nested classes": Fault(
        lambda f: (f / "data" / "rows").rename(f / "rows") and shutil.move(f / "rows", f / "data" / "third" / "rows"),
        ("third", "folders, such as rows", "Give"),
    ),
    "missing file": Fault(lambda f: table(f, "rows/gone.png,rows"), ("list.csv", "rows/gone.png", "Correct")),
    "two rows": Fault(lambda f: table(f, "rows/rows_1.png,rows"), ("list.csv", "rows_1.png", "listed 2 times")),
    "no rows": Fault(lambda f: (f / "data" / "list.csv").write_text("image,label\n"), ("list.csv", "no row", "List")),
    "empty table": Fault(lambda f: (f / "data" / "list.csv").write_text(""), ("list.csv", "no header")),
    "too many cells": Fault(lambda f: table(f, "rows/rows_5.png,rows,1"), ("list.csv", "3 cells", "Quote")),
    "no image": Fault(lambda f: table(f, "notes.txt,rows"), ("list.csv", "notes.txt", "Give an image")),
    "not UTF-8": Fault(lambda f: table(f, "größe.png,rows", encoding="latin-1"), ("list.csv", "UTF-8")),
    "one class in a table": Fault(
        lambda f: (f / "data" / "list.csv").write_text("image,label\nrows/rows_0.png,rows\nrows/rows_1.png,rows\n"),
        ("list.csv", "one class only (rows)"),
    ),
    "unheard class": Fault(
        lambda f: (
            table(
                f,
                *(f"{kind}/{kind}_5.png,{new},val" for kind, new in (("rows", "rows"), ("columns", "waves"))),
                header="image,label,fold",
            )
            or (f / "data" / "list.csv").write_text(
                (f / "data" / "list.csv")
                .read_text()
                .replace(",rows\n", ",rows,train\n")
                .replace(",columns\n", ",columns,train\n")
            )
        ),
        ("waves", "training"),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    road_recipe(tmp_path / "tiny.yaml", write_class_pictures(tmp_path / "data"), classes=True)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("package") / "model", classes=True)


def train_words(folder: Path, *more: str | Path) -> list[str | Path]:
    return ["train", folder / "tiny.yaml", "--out", folder / "run", *more]


@pytest.mark.parametrize("name", IMAGES | FOLDERS)
def test_training_on_bad_images(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault = (IMAGES | FOLDERS)[name]
    (folder / "data" / "third").mkdir() if name == "nested classes" else None
    fault.spoil(folder)
    said = complaint(capsys, folder, *train_words(folder))
    assert all(word in said for word in fault.words), said
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", IMAGES)
def test_inspection_lists_bad_images(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IMAGES[name].spoil(folder)
    before = contents(folder)
    assert run("inspect", folder / "data") == 2
    said = capsys.readouterr().out
    assert "1 faults" in said
    assert [line for line in said.splitlines() if all(word in line for word in IMAGES[name].words)], said
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["empty class", "one class", "missing file", "empty table", "one class in a table"])
def test_inspection_names_what_is_wrong_with_classes(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FOLDERS[name].spoil(folder)
    said = complaint(capsys, folder, "inspect", folder / "data")
    assert all(word in said for word in FOLDERS[name].words), said


@pytest.mark.parametrize("text", ["image,label\n", "image,label\na.png,rows\n", "", "file,age\na.png,3\n"])
def test_inspection_of_a_bad_table_itself(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text(text)
    assert "list.csv: " in complaint(capsys, tmp_path, "inspect", tmp_path / "list.csv")


@pytest.mark.parametrize("name", IMAGES)
def test_prediction_of_a_bad_image(name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IMAGES[name].spoil(folder)
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "x.csv")
    assert all(word in said for word in IMAGES[name].words), said


def test_one_bad_image_among_many_stops_no_other(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(image(folder))
    assert run("predict", model, folder / "data", "--out", folder / "x.csv", "--explain") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "rows_1.png" in said.err
    assert "11 of 12 images classified" in said.out
    with (folder / "x.csv").open() as stream:
        names = [row["case"] for row in csv.DictReader(stream)]
    assert len(names) == 11
    assert "rows_1" not in names
    assert len(list((folder / "x_explain").iterdir())) == 11
    errors = {case["name"]: case["error"] for case in json.loads((folder / "x.json").read_text())["cases"]}
    assert [name for name, error in errors.items() if error] == ["rows_1"]
    # A failed case is wrong: it does not vanish from the scores.
    assert run("evaluate", folder / "x.csv", folder / "data") == 0
    assert "1 not predicted" in capsys.readouterr().out


def test_all_images_unreadable(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "data").rglob("*.png"):
        truncate(path)
    assert run("predict", model, folder / "data", "--out", folder / "x.csv") == 2
    said = capsys.readouterr()
    assert said.err.count("cut short") == 12
    assert "0 of 12" in said.out
    assert run("evaluate", folder / "x.csv", folder / "data") in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_picture_among_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_class_volumes(tmp_path / "data")
    Image.fromarray(class_picture(0, 0)).save(data / "rows" / "rows_9.png")
    wanted = {"intensity": "zscore", "colour": "own"}
    road_recipe(tmp_path / "tiny.yaml", data, classes=True, data={"slices": 3}, preparation=wanted)
    said = complaint(capsys, tmp_path, *train_words(tmp_path))
    assert "rows_9.png" in said
    road_recipe(tmp_path / "tiny.yaml", data, classes=True, preparation=wanted)
    said = complaint(capsys, tmp_path, *train_words(tmp_path))
    assert ".nii.gz: a volume of 5" in said


def test_colours_and_grey_are_not_mixed_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(image(folder)) as picture:
        picture.convert("RGB").save(image(folder))
    said = complaint(capsys, folder, *train_words(folder, "--preparation.colour", "own"))
    assert "rows_1.png" in said or "channels" in said
    assert "--preparation.colour grey or rgb" in said
    assert run(*train_words(folder, "--training.epochs", "1", "--training.steps_per_epoch", "1")) == 0


def test_volume_for_a_model_of_pictures(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_volume(folder / "scan.nii.gz")
    said = complaint(capsys, folder, "predict", model, scan, "--out", folder / "x.csv")
    assert "scan.nii.gz: " in said
    assert "a volume of" in said or "the model was made for pictures" in said


def test_picture_for_a_model_of_volumes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(folder / "volumes", classes=True, edges=3)
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "x.csv")
    assert "rows_1.png: a picture, the model was made for volumes. Give a NIfTI image." in said


def test_label_maps_are_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pictures(tmp_path / "data")
    road_recipe(tmp_path / "tiny.yaml", data, classes=True)
    said = complaint(capsys, tmp_path, *train_words(tmp_path))
    assert "data: images and label maps, and cls2d_xs classifies whole images." in said


@pytest.mark.parametrize("out", ["results", "x.png", "x.nii.gz", "x.json", "data"])
def test_classes_go_into_a_table(out: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / out)
    assert out in said
    assert ".csv" in said


@pytest.mark.parametrize("kind", ["table", "listing", "slices", "folder of pictures"])
def test_files_of_others_are_not_replaced(
    kind: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "folder of pictures":
        (folder / "x_explain").mkdir()
        Image.fromarray(class_picture(0, 0)).save(folder / "x_explain" / "rows_1.png")
    else:
        name = {"table": "x.csv", "listing": "x.json", "slices": "x_slices.csv"}[kind]
        (folder / name).write_text("image,label\na.png,rows\n")
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "x.csv", "--explain")
    assert "was not written by medmom predict" in said


def test_mirror_images_are_for_label_maps(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "x.csv", "--tta")
    assert "--tta" in said and "classifies" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(mode=0o500)
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "locked" / "x.csv")
    assert "cannot be written" in said


def test_output_below_a_file(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, folder, "predict", model, image(folder), "--out", folder / "tiny.yaml" / "x.csv")
    assert "tiny.yaml" in said
    assert "cannot be written" in said


def predicted(folder: Path, model: Path) -> Path:
    assert run("predict", model, folder / "data", "--out", folder / "x.csv") == 0
    return folder / "x.csv"


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def swap_probabilities(lines: list[str]) -> list[str]:
    cells = lines[1].split(",")
    return [lines[0], ",".join([*cells[:-2], cells[-1], cells[-2]]), *lines[2:]]


EDITS: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "probabilities changed": (swap_probabilities, "are not those of its logits"),
    "not a number": (lambda lines: [lines[0], lines[1].rpartition(",")[0] + ",high", *lines[2:]], "no number from 0"),
    "sum": (lambda lines: [lines[0], lines[1].rpartition(",")[0] + ",0.99", *lines[2:]], "add up to"),
    "row taken out": (lambda lines: [*lines[:3], *lines[4:]], "has no row of the case"),
    "row twice": (lambda lines: [*lines, lines[1]], "two rows are of"),
    "foreign row": (
        lambda lines: [*lines, lines[1].replace("rows_", "mine_").replace("columns_", "mine_")],
        "is not in",
    ),
    "column taken out": (lambda lines: [line.rpartition(",")[0] for line in lines], "has no column p_"),
    "header alone": (lambda lines: lines[:1], "has no row of the case"),
    "empty": (lambda lines: [], "is no header"),
}


@pytest.mark.parametrize("name", EDITS)
def test_table_edited_by_hand_is_not_scored(
    name: str, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, fact = EDITS[name]
    edit(predicted(folder, model), change)
    said = complaint(capsys, folder, "evaluate", folder / "x.csv", folder / "data")
    assert "x.csv" in said
    assert fact in said


def test_table_of_another_tool_is_not_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder / "x.csv", [["image", "label"], ["a.png", "rows"]])
    said = complaint(capsys, folder, "evaluate", folder / "x.csv", folder / "data")
    assert "x.json is not beside it" in said


def test_references_of_other_classes(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predicted(folder, model)
    (folder / "data" / "rows").rename(folder / "data" / "lines")
    said = complaint(capsys, folder, "evaluate", folder / "x.csv", folder / "data")
    assert "of the class lines, which the model does not know" in said


@pytest.mark.parametrize("source", ["text", "segmenter", "volumes"])
def test_weights_of_another_kind(source: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = folder / "start"
    if source == "text":
        start.write_text("no weights\n")
    else:
        save_model(start, classes=source == "volumes", edges=3 if source == "volumes" else 2)
    said = complaint(capsys, folder, *train_words(folder, "--init-from", start))
    assert str(start) in said


def test_same_image_in_training_and_validation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(image(folder), folder / "data" / "rows" / "twin.png")
    said = complaint(capsys, folder, *train_words(folder, "--data.validation", "[twin, columns_1]"))
    assert "twin.png (validation) holds the same image as" in said
    assert "rows_1.png (training)" in said
    assert run("inspect", folder / "data") == 0
    assert "1 images occur more than once" in capsys.readouterr().out


def test_damaged_packed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_packed(tmp_path / "data" / "stripes.npz")
    road_recipe(tmp_path / "tiny.yaml", data, classes=True)
    truncate(data)
    for words in (train_words(tmp_path), ["inspect", data]):
        said = complaint(capsys, tmp_path, *words)
        assert "stripes.npz" in said
        assert "again" in said


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8-sig"), ("\t", "utf-8")])
def test_tables_as_spreadsheets_save_them(delimiter: str, encoding: str, tmp_path: Path) -> None:
    data = write_multilabel(tmp_path / "data")
    rows = [[f"frames/{k}.png", ["Größe", "rund"][k % 2], f"Ärztin {k}"] for k in range(12)]
    table = [["image", "label", "patient"], *rows]
    write_rows(data / "images.csv", table, encoding=encoding, delimiter=delimiter, lineterminator="\r\n")
    recipe = road_recipe(tmp_path / "tiny.yaml", data, classes=True, training={"epochs": 1, "steps_per_epoch": 1})
    assert run("inspect", data) == 0
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    out = tmp_path / "out put" / "Größen.csv"
    assert run("predict", tmp_path / "run", "--fold", "validation", "--out", out) == 0
    assert "p_Größe" in out.read_text(encoding="utf-8").splitlines()[0]
    assert run("evaluate", out, data / "images.csv") == 0
    assert run("report", out.with_name("Größen_scores.json"), "--out", tmp_path / "Größen.html") == 0


def test_names_as_people_give_them(folder: Path, model: Path) -> None:
    data = folder / "Ärztliche Bilder"
    (folder / "data").rename(data)
    (data / "rows").rename(data / "schräge Linien")
    given = data / "schräge Linien"
    (given / "rows_0.png").rename(given / "größe 0.PNG")
    (given / "rows_1.png").rename(given / "画像.png")
    (given / "rows_2.png").rename(given / "a.b, c;d.png")
    (folder / "rows_3.png").write_bytes((given / "rows_3.png").read_bytes())
    (given / "rows_3.png").unlink()
    (given / "rows_3.png").symlink_to(folder / "rows_3.png")
    recipe = road_recipe(folder / "tiny.yaml", data, classes=True, training={"epochs": 1, "steps_per_epoch": 1})
    assert run("train", recipe, "--out", folder / "run") == 0
    assert run("predict", folder / "run", data, "--out", folder / "x.csv", "--explain") == 0
    with (folder / "x.csv").open(encoding="utf-8") as stream:
        names = {row["case"] for row in csv.DictReader(stream)}
    assert {"größe 0", "画像", "a.b, c;d", "rows_3"} < names
    assert run("evaluate", folder / "x.csv", data) == 0
    found = json.loads((folder / "x_scores.json").read_text())
    assert len(found["cases"]) == 12
    assert {path.stem for path in (folder / "x_explain").iterdir()} == names
