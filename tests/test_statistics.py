from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from medmom.data.files import Volume
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.inference import labelled, statistics
from medmom.inference.statistics import label_statistics, write_statistics
from medmom.labels import Labels

LABELS = Labels(("background", "liver", "spleen", "aorta"), (0, 3, 1, 200), ignore=255)
SHAPE = (9, 8, 7)
TURN = Rotation.from_euler("xyz", (10, -5, 20), degrees=True).as_matrix()
QUANTILES = {"p05": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}


def volume(array: np.ndarray, affine: np.ndarray | None = None, *, is_picture: bool = False) -> Volume:
    grid = Geometry(array.shape[1:], np.diag([0.5, 2, 3, 1]) if affine is None else affine)
    return Volume(Path("scan.nii.gz"), array, grid, None if is_picture else object())


def random_label(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 1, 3, 255], dtype=np.uint8), shape, p=[0.4, 0.3, 0.2, 0.1])


def described(values: np.ndarray) -> dict[str, float]:
    """The same by numpy."""
    values = values.astype(np.float64)
    ranks = {name: np.percentile(values, rank) for name, rank in QUANTILES.items()}
    return {"mean": values.mean(), "std": values.std(), "min": values.min(), **ranks, "max": values.max()}


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = (1, *SHAPE)
    return {
        "int8": rng.integers(-128, 128, shape, dtype=np.int8),
        "uint8": rng.integers(0, 256, shape, dtype=np.uint8),
        "ct": rng.integers(-1024, 3072, shape, dtype=np.int16),
        "int16": rng.integers(-(2**15), 2**15, shape, dtype=np.int16),
        "uint16": rng.integers(0, 2**16, shape, dtype=np.uint16),
        "int32": rng.integers(-(2**31), 2**31, shape, dtype=np.int32),
        "float32": rng.normal(size=shape).astype(np.float32),
        "tiny": (1e-9 * rng.normal(size=shape)).astype(np.float32),
    }


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", images())
@pytest.mark.parametrize("slab", [1, 100, 1 << 20])
def test_intensities_equal_those_of_numpy(monkeypatch: pytest.MonkeyPatch, kind: str, order: Any, slab: int) -> None:
    monkeypatch.setattr(labelled, "SLAB", slab)
    monkeypatch.setattr(statistics, "CHUNK", 13)
    monkeypatch.setattr(statistics, "MAX_GATHERED", 100)
    label, array = random_label(), images()[kind]
    found = label_statistics(np.array(label, order=order), volume(np.asfortranarray(array)), LABELS)
    for name in ("liver", "spleen"):
        (shown,) = found[name]["intensity"]
        wanted = described(array[0][label == LABELS.value(name)])
        assert list(shown) == list(wanted)
        np.testing.assert_allclose(list(shown.values()), list(wanted.values()), rtol=1e-12, atol=0)


def test_a_single_voxel_has_itself_for_every_quantile() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[4, 4, 4] = 3
    found = label_statistics(label, volume(np.full((1, *SHAPE), -7, np.int16)), LABELS)["liver"]
    assert found["intensity"] == [{"std": 0.0} | dict.fromkeys(["mean", "min", *QUANTILES, "max"], -7.0)]
    assert (found["voxels"], found["volume_ml"], found["borders"]) == (1, pytest.approx(0.003), [])


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAL", "PIR"])
@pytest.mark.parametrize("slab", [1, 100, 1 << 20])
def test_size_and_centre_are_in_the_world(monkeypatch: pytest.MonkeyPatch, orientation: str, slab: int) -> None:
    monkeypatch.setattr(labelled, "SLAB", slab)
    affine = np.eye(4)
    affine[:3, :3] = TURN * (0.7, 0.9, 2.5)
    affine[:3, 3] = (5, -200, 31)
    geometry = Geometry((9, 8, 7), affine).reoriented(orientation)
    label = random_label(shape=geometry.shape)
    image = volume(np.zeros((1, *geometry.shape), np.int16), geometry.affine)
    for name, found in label_statistics(label, image, LABELS).items():
        where = np.argwhere(label == LABELS.value(name))
        assert found["voxels"] == len(where)
        if len(where):
            assert found["volume_ml"] == pytest.approx(len(where) * 0.7 * 0.9 * 2.5 / 1000, rel=1e-9)
            world = (geometry.affine[:3, :3] @ where.T).mean(axis=1) + geometry.affine[:3, 3]
            np.testing.assert_allclose(found["centre_mm"], world, rtol=1e-9)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAL", "PIR"])
@pytest.mark.parametrize(
    ("place", "sides"),
    [
        ((8, 4, 4), ["right"]),
        ((0, 4, 4), ["left"]),
        ((4, 7, 3), ["anterior"]),
        ((4, 0, 3), ["posterior"]),
        ((4, 4, 6), ["superior"]),
        ((4, 4, 0), ["inferior"]),
        ((0, 7, 6), ["anterior", "left", "superior"]),
        ((4, 4, 3), []),
    ],
)
def test_borders_are_named_by_anatomy(
    place: tuple[int, ...], sides: list[str], orientation: str, *, tilted: bool
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = (TURN if tilted else np.eye(3)) * (1, 1, 2)
    grid = Geometry(SHAPE, affine)
    turned = grid.reoriented(orientation)
    index = np.linalg.inv(turned.affine) @ affine @ (*place, 1)
    label = np.zeros(turned.shape, np.uint8)
    label[tuple(np.rint(index[:3]).astype(int))] = 1
    found = label_statistics(label, volume(np.zeros((1, *turned.shape), np.int16), turned.affine), LABELS)["spleen"]
    assert sorted(found["borders"]) == sides
    assert found["touches_border"] is bool(sides)


def test_an_axis_of_one_voxel_cuts_nothing_off() -> None:
    label = np.zeros((9, 8, 1), np.uint8)
    label[4, 4] = 3
    assert label_statistics(label, volume(np.zeros((1, 9, 8, 1))), LABELS)["liver"]["touches_border"] is False


def test_absent_classes_have_no_values() -> None:
    found = label_statistics(random_label(), volume(np.zeros((1, *SHAPE))), LABELS, confidence={"aorta": math.nan})
    assert list(found) == ["liver", "spleen", "aorta"]
    assert list(found["aorta"]) == list(found["liver"])
    assert found["aorta"].pop("voxels") == 0
    assert set(found["aorta"].values()) == {None}


def test_empty_label_map_has_statistics() -> None:
    found = label_statistics(np.zeros(SHAPE, np.uint8), volume(np.zeros((1, *SHAPE))), LABELS)
    assert [each["voxels"] for each in found.values()] == [0, 0, 0]


def test_confidence_is_told_where_there_is_one() -> None:
    image = volume(np.zeros((1, *SHAPE)))
    found = label_statistics(random_label(), image, LABELS, confidence={"liver": np.float64(0.75), "spleen": math.nan})
    assert [each["mean_confidence"] for each in found.values()] == [0.75, None, None]
    assert type(found["liver"]["mean_confidence"]) is float


def test_pictures_have_pixels_and_sides_of_a_page() -> None:
    label = np.zeros((6, 5, 1), np.uint8)
    label[2:4, :2] = 3
    label[5, 4] = 1
    image = volume(np.ones((3, 6, 5, 1), np.uint8), np.eye(4), is_picture=True)
    found = label_statistics(label, image, LABELS)
    assert (found["liver"]["area_pixels"], found["liver"]["volume_ml"], found["liver"]["centre_mm"]) == (4, None, None)
    assert (found["liver"]["centre_pixels"], found["liver"]["borders"]) == ([2.5, 0.5], ["top"])
    assert found["spleen"]["borders"] == ["right", "bottom"]
    assert len(found["spleen"]["intensity"]) == 3


def test_other_grids_and_unknown_values_are_refused() -> None:
    with pytest.raises(ValueError, match="does not lie on a grid"):
        label_statistics(np.zeros((2, 2, 2), np.uint8), volume(np.zeros((1, *SHAPE))), LABELS)
    with pytest.raises(ValueError, match="label value 9 is not among"):
        label_statistics(np.full(SHAPE, 9), volume(np.zeros((1, *SHAPE))), LABELS)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "statistics.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_files_hold_one_row_a_case_and_class(tmp_path: Path) -> None:
    array = images()["ct"]
    sure = {"liver": 0.5}
    rows = {f"case, {k}": label_statistics(random_label(k), volume(array), LABELS, confidence=sure) for k in range(2)}
    write_statistics(tmp_path / "new", rows)
    assert json.loads((tmp_path / "new" / "statistics.json").read_text()) == rows
    table = rows_of(tmp_path / "new")
    names = ["liver", "spleen", "aorta"]
    assert [(row["case"], row["class"]) for row in table] == [(f"case, {k}", name) for k in range(2) for name in names]
    wanted, row = rows["case, 1"]["liver"], table[3]
    assert row["voxels"] == str(wanted["voxels"])
    for name in ("volume_ml", "mean_confidence"):
        assert float(row[name]) == pytest.approx(wanted[name], rel=1e-8)
    for name, value in wanted["intensity"][0].items():
        assert float(row[name]) == pytest.approx(value, rel=1e-8)
    assert [float(row[f"centre_{axis}_mm"]) for axis in "xyz"] == pytest.approx(wanted["centre_mm"], rel=1e-8)
    assert (row["touches_border"], row["borders"]) == ("true", ";".join(wanted["borders"]))
    absent = {name: value for name, value in table[2].items() if value}
    assert absent == {"case": "case, 0", "class": "aorta", "voxels": "0"}


def test_channels_are_numbered_in_the_table(tmp_path: Path) -> None:
    array = np.stack([np.full(SHAPE, 5, np.int16), np.full(SHAPE, 9, np.int16)])
    write_statistics(tmp_path, {"a": label_statistics(random_label(), volume(array), LABELS)})
    row = rows_of(tmp_path)[0]
    assert (row["mean_0"], row["median_0"], row["mean_1"], row["p95_1"]) == ("5", "5", "9", "9")
    assert "mean" not in row
    assert "area_pixels" not in row


def test_pictures_have_columns_of_their_own(tmp_path: Path) -> None:
    image = volume(np.ones((1, 6, 5, 1), np.uint8), np.eye(4), is_picture=True)
    write_statistics(tmp_path, {"a": label_statistics(random_label(shape=(6, 5, 1)), image, LABELS)})
    row = rows_of(tmp_path)[0]
    assert int(row["area_pixels"]) == int(row["voxels"]) > 0
    assert (row["volume_ml"], row["centre_x_mm"], row["centre_x_pixels"] != "") == ("", "", True)


def test_no_case_gives_a_table_without_rows(tmp_path: Path) -> None:
    write_statistics(tmp_path, {})
    assert rows_of(tmp_path) == []
    assert json.loads((tmp_path / "statistics.json").read_text()) == {}


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MedmomError, match=r"file/statistics\.json: cannot be written"):
        write_statistics(tmp_path / "file", {})
