"""The whole road to classes: pictures, slices of volumes, volumes, several classes an image, and files of many."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tiny_road import (
    check_resume,
    contents,
    road_recipe,
    run,
    write_class_pictures,
    write_class_volumes,
    write_multilabel,
    write_packed,
)

KINDS = ["pictures", "slices", pytest.param("volumes", marks=pytest.mark.slow), "multilabel", "packed"]
VOLUMES = {"intensity": "zscore", "colour": "own"}
LONG = {"patch": [32, 32, 16], "batch_size": 2}

MAKE: dict[str, tuple[Callable[[Path], Path], dict[str, dict[str, Any]]]] = {
    "pictures": (write_class_pictures, {}),
    "slices": (write_class_volumes, {"data": {"slices": 3}, "preparation": VOLUMES}),
    "volumes": (
        lambda folder: write_class_volumes(folder, num_slices=18),
        {"data": LONG, "preparation": {**VOLUMES, "size": [32, 32, 16]}, "model": {"preset": "cls3d_s"}},
    ),
    "multilabel": (write_multilabel, {"data": {"folds": 2}}),
    "packed": (lambda folder: write_packed(folder / "stripes.npz"), {}),
}


class Road(NamedTuple):
    """A trained run, what it was trained on, and its predictions of the validation cases."""

    kind: str
    data: Path
    recipe: Path
    run: Path
    table: Path


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Road]:
    made: dict[str, Road] = {}

    def road(kind: str) -> Road:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            make, sections = MAKE[kind]
            data = make(folder / "data")
            recipe = road_recipe(folder / "tiny.yaml", data, classes=True, **sections)
            assert run("train", recipe, "--out", folder / "run") == 0
            table = folder / "out" / "classes.csv"
            assert run("predict", folder / "run", "--fold", "validation", "--out", table, "--explain") == 0
            made[kind] = Road(kind, data, recipe, folder / "run", table)
        return made[kind]

    return road


@pytest.fixture(params=KINDS)
def road(request: pytest.FixtureRequest, roads: Callable[[str], Road]) -> Road:
    return roads(request.param)


@pytest.fixture
def pictures(roads: Callable[[str], Road]) -> Road:
    return roads("pictures")


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def held_out(road: Road) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((road.run / "split.json").read_text())["validation"]
    return found


def test_folder_is_inspected_and_drawn(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(road.data.parent)
    assert run("inspect", road.data) == 0
    said = capsys.readouterr().out
    assert "2 classes" in said
    assert "no fault found" in said
    assert ("any number of classes" in said) == (road.kind == "multilabel")
    assert run("inspect", road.data, "--augment", road.recipe, "--out", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 300
        assert np.asarray(sheet).std() > 10
    assert contents(road.data.parent) == before


def test_run_folder_is_complete(road: Road) -> None:
    names = {"recipe.yaml", "split.json", "metrics.csv", "last.ckpt", "best.ckpt", "tensorboard", "model"}
    assert {path.name for path in road.run.iterdir()} == names
    metrics = rows(road.run / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["0", "1"]
    score = "val_auroc" if road.kind == "multilabel" else "val_balanced_accuracy"
    assert all(0 <= float(row[score]) <= 1 for row in metrics)


def test_every_validation_case_has_a_row_with_sound_probabilities(road: Road) -> None:
    table = rows(road.table)
    assert [row["case"] for row in table] == [case["name"] for case in held_out(road)]
    names = [column.removeprefix("p_") for column in table[0] if column.startswith("p_")]
    assert list(table[0]) == ["case", "image", "class", "probability", "flag", *(f"p_{name}" for name in names)]
    for row in table:
        found = [float(row[f"p_{name}"]) for name in names]
        assert max(found) == float(row["probability"])
        likely = [name for name, value in zip(names, found, strict=True) if value >= 0.5]
        if road.kind == "multilabel":
            assert row["class"] == ";".join(likely)
        else:
            assert math.isclose(sum(found), 1, abs_tol=1e-5)
            assert row["class"] == names[int(np.argmax(found))]


def test_explanations_and_slices_lie_beside_the_table(road: Road) -> None:
    names = [case["name"] for case in held_out(road)]
    listed = {"classes.csv", "classes.json", "classes_explain"} | ({"slices.csv"} if road.kind == "slices" else set())
    assert {path.name for path in road.table.parent.iterdir()} - {"classes_scores.json"} == listed
    assert sorted(path.stem for path in (road.table.parent / "classes_explain").iterdir()) == sorted(names)
    for path in (road.table.parent / "classes_explain").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 10
    if road.kind == "slices":
        seen = rows(road.table.with_name("slices.csv"))
        assert [(row["case"], row["slice"]) for row in seen] == [(name, str(z)) for name in names for z in (0, 2, 4)]


def test_predictions_are_scored_and_reported(road: Road, tmp_path: Path) -> None:
    assert run("evaluate", road.table, "--out", tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {case["name"] for case in scores["cases"]} == {case["name"] for case in held_out(road)}
    if road.kind != "packed":
        references = road.data / "images.csv" if road.kind == "multilabel" else road.data
        assert run("evaluate", road.table, references, "--out", tmp_path / "again.json") == 0
        again = json.loads((tmp_path / "again.json").read_text())
        assert again["summary"] == scores["summary"]
    for source in (tmp_path / "scores.json", road.run):
        assert run("report", source, "--out", tmp_path / "page.html") == 0
        assert "data:image/png;base64" in (tmp_path / "page.html").read_text()


def test_report_of_a_run_finds_the_scores_of_its_table(road: Road, tmp_path: Path) -> None:
    folder = shutil.copytree(road.run, tmp_path / "run")
    assert run("predict", folder, "--fold", "validation", "--out", folder / "validation.csv") == 0
    assert run("evaluate", folder / "validation.csv") == 0
    assert run("report", folder, "--out", tmp_path / "page.html") == 0
    assert "Reliability diagram" in (tmp_path / "page.html").read_text()


def test_files_and_folders_give_what_the_validation_fold_gave(road: Road, tmp_path: Path) -> None:
    cases = held_out(road)
    files = [case["images"][0] for case in cases]
    given = [road.data] if road.kind == "packed" else files
    assert run("predict", road.run, *given, "--out", tmp_path / "some.csv") == 0
    found = {row["case"]: row for row in rows(tmp_path / "some.csv")}
    assert len(found) == (16 if road.kind == "packed" else len(cases))
    for row in rows(road.table):
        for column in row:
            if column.startswith("p_"):
                # Batches of other sizes may round otherwise.
                assert float(row[column]) == pytest.approx(float(found[row["case"]][column]), abs=2e-6)
    assert {path.name for path in tmp_path.iterdir()} - {"some_slices.csv"} == {"some.csv", "some.json"}


def test_folder_of_classes_is_predicted_whole(pictures: Road, tmp_path: Path) -> None:
    before = contents(pictures.data)
    assert run("predict", pictures.run, pictures.data, "--out", tmp_path / "all.csv") == 0
    assert len(rows(tmp_path / "all.csv")) == 12
    assert run("evaluate", tmp_path / "all.csv", pictures.data) == 0
    assert (tmp_path / "all_scores.json").is_file()
    # A second time: our own table is replaced.
    assert run("predict", pictures.run, pictures.data / "rows", "--out", tmp_path / "all.csv") == 0
    assert len(rows(tmp_path / "all.csv")) == 6
    assert contents(pictures.data) == before


@pytest.mark.parametrize(
    "kind", ["pictures", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("slices", "multilabel", "packed"))]
)
def test_resumed_run_is_the_straight_one(
    kind: str, roads: Callable[[str], Road], monkeypatch: pytest.MonkeyPatch
) -> None:
    road = roads(kind)
    check_resume(road.recipe, road.run, monkeypatch)


@pytest.mark.slow
def test_resumed_run_on_volumes_is_the_straight_one(
    roads: Callable[[str], Road], monkeypatch: pytest.MonkeyPatch
) -> None:
    road = roads("volumes")
    check_resume(road.recipe, road.run, monkeypatch)


@pytest.mark.parametrize("kind", ["pictures", "multilabel"])
def test_score_of_the_last_epoch_is_that_of_the_predictions(
    kind: str, roads: Callable[[str], Road], tmp_path: Path
) -> None:
    road = roads(kind)
    assert run("evaluate", road.table, "--out", tmp_path / "scores.json") == 0
    last, scores = rows(road.run / "metrics.csv")[-1], json.loads((tmp_path / "scores.json").read_text())
    name = "auroc" if kind == "multilabel" else "balanced_accuracy"
    assert float(last[f"val_{name}"]) == pytest.approx(scores["summary"][name]["value"], abs=1e-5)


def test_stripes_are_told_apart_after_seconds(tmp_path: Path) -> None:
    data = write_class_pictures(tmp_path / "data")
    training, plain = {"epochs": 10, "steps_per_epoch": 8}, {"augment": False, "batch_size": 6}
    recipe = road_recipe(tmp_path / "tiny.yaml", data, classes=True, data=plain, training=training)
    assert run("train", recipe, "--out", tmp_path / "run") == 0
    assert run("predict", tmp_path / "run", "--fold", "validation", "--out", tmp_path / "classes.csv") == 0
    for row in rows(tmp_path / "classes.csv"):
        assert row["case"].startswith(row["class"])
    assert run("predict", tmp_path / "run", data, "--out", tmp_path / "all.csv") == 0
    assert run("evaluate", tmp_path / "all.csv", data) == 0
    assert json.loads((tmp_path / "all_scores.json").read_text())["summary"]["accuracy"]["value"] == 1
