"""Synthetic scans: the same every time, right way round on every grid, and like a CT."""

import csv
import json
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmom.data.case import find_cases, read_case
from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample
from medmom.phantom import LABELS, make_phantom, make_phantoms
from medmom.phantom.shapes import KEEP, Canvas, meet, smooth_course, waves

LIVER, LUNGS, COLON = (LABELS.value(name) for name in LABELS.foreground)
SEEDS = tuple(range(10))
DEMO_GRID = {"shape": (64, 54, 64), "spacing": (6.0, 6.0, 6.0)}
COARSE_GRID = {"shape": (32, 28, 32), "spacing": (12.0, 12.0, 12.0)}
ORIENTATIONS = ("RAS", "LAS", "LPS", "RPI", "PIR", "ASL", "IPL")


@lru_cache(maxsize=len(SEEDS))
def demo_phantom(seed: int) -> tuple[np.ndarray, np.ndarray, Geometry]:
    return make_phantom(seed, **DEMO_GRID)


def centre(label: np.ndarray, value: int, geometry: Geometry) -> np.ndarray:
    """World coordinates of the middle of a class."""
    return nib.affines.apply_affine(geometry.affine, np.argwhere(label == value).mean(axis=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phantoms") / "new" / "set"
    make_phantoms(path, num_cases=4, seed=3)
    return path


def test_same_seed_gives_the_same_voxels() -> None:
    first, second = make_phantom(5, **COARSE_GRID), make_phantom(5, **COARSE_GRID)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2].is_close(second[2])


def test_another_seed_gives_another_body() -> None:
    assert (make_phantom(5, **COARSE_GRID)[1] != make_phantom(6, **COARSE_GRID)[1]).mean() > 0.02


def test_result_is_a_ct_and_a_label_on_one_grid() -> None:
    image, label, geometry = make_phantom((1, 2), shape=(30, 25, 20), spacing=(12, 13, 19), orientation="PIR")
    assert image.dtype == np.int16
    assert label.dtype == np.uint8
    assert image.shape == label.shape == geometry.shape == (25, 20, 30)
    assert geometry.orientation == "PIR"
    np.testing.assert_allclose(geometry.spacing, (13, 19, 12))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_class_has_a_plausible_volume(seed: int) -> None:
    _, label, _ = demo_phantom(seed)
    litres = {value: (label == value).sum() * 6.0**3 * 1e-6 for value in (LIVER, LUNGS, COLON)}
    assert 0.6 < litres[LIVER] < 2.0
    assert 1.8 < litres[LUNGS] < 5.0
    assert 0.4 < litres[COLON] < 1.6


@pytest.mark.parametrize("seed", SEEDS)
def test_organs_have_their_ct_numbers(seed: int) -> None:
    image, label, _ = demo_phantom(seed)
    assert 35 < np.median(image[label == LIVER]) < 135
    assert -930 < np.median(image[label == LUNGS]) < -770
    gas, wall_and_stool = np.percentile(image[label == COLON], (5, 90))
    assert gas < -700
    assert 0 < wall_and_stool < 110
    assert np.median(image[:, -2:]) < -950  # air in front of the patient


@pytest.mark.parametrize("seed", SEEDS)
def test_organs_lie_inside_the_body(seed: int) -> None:
    image, label, _ = demo_phantom(seed)
    tissue = image > -250
    right, left, front = (
        np.flip(np.logical_or.accumulate(np.flip(tissue, 0)), 0),
        np.logical_or.accumulate(tissue, 0),
        np.flip(np.logical_or.accumulate(np.flip(tissue, 1), 1), 1),
    )
    assert (right & left & front)[label > 0].all()


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_colon_frames_the_belly(seed: int) -> None:
    _, label, geometry = demo_phantom(seed)
    world = nib.affines.apply_affine(geometry.affine, np.argwhere(label == COLON)) - centre(label, LUNGS, geometry)
    right, left, middle = world[:, 0] > 60, world[:, 0] < -60, np.abs(world[:, 0]) < 20
    assert min(right.sum(), left.sum(), middle.sum()) > 200
    assert world[middle, 1].mean() > max(world[right, 1].mean(), world[left, 1].mean()) + 20  # crosses in front
    assert world[left, 2].max() > world[right, 2].max()  # climbs to the spleen


def test_scanner_noise_stays_within_bounds() -> None:
    image, label, _ = demo_phantom(1)
    inside = label[1:-1, 1:-1, 1:-1] == LIVER
    for axis in range(3):
        inside &= (np.roll(label, 1, axis) == LIVER)[1:-1, 1:-1, 1:-1]
    assert 12 < np.std(image[1:-1, 1:-1, 1:-1][inside]) < 45


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_organs_lie_on_their_side_in_the_world(orientation: str) -> None:
    _, label, geometry = make_phantom(4, **COARSE_GRID, orientation=orientation, tilt=(4, -3, 5))
    assert geometry.orientation == orientation
    liver, lungs, colon = (centre(label, value, geometry) for value in (LIVER, LUNGS, COLON))
    assert liver[0] > lungs[0] + 20  # +x is the patient's right
    assert lungs[2] > liver[2] + 60 > colon[2] + 80  # +z is the head
    assert colon[1] > lungs[1]  # +y is the front


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation_changes_the_axes_and_not_the_body(orientation: str) -> None:
    _, expected, ras = make_phantom(4, **COARSE_GRID)
    _, label, geometry = make_phantom(4, **COARSE_GRID, orientation=orientation)
    turned = resample(label[None], geometry, ras, order=0)[0]
    assert (turned != expected).mean() < 1e-4  # rounding may move a voxel on an edge


def test_finer_grid_shows_the_same_body() -> None:
    _, coarse, grid = demo_phantom(7)
    _, fine, fine_grid = make_phantom(7, shape=(96, 81, 96), spacing=(4, 4, 4))
    picked = resample((fine == LIVER)[None].astype(np.float32), fine_grid, grid, order=1)[0] > 0.5
    overlap = 2 * (picked & (coarse == LIVER)).sum() / (picked.sum() + (coarse == LIVER).sum())
    assert overlap > 0.97


def test_tilt_turns_the_grid_by_its_degrees() -> None:
    _, _, straight = make_phantom(2, **COARSE_GRID)
    _, _, tilted = make_phantom(2, **COARSE_GRID, tilt=(0, 0, 5))
    assert straight.affine[:3, 0] @ tilted.affine[:3, 0] / 144 == pytest.approx(np.cos(np.radians(5)))


def test_folder_is_read_as_a_data_set(folder: Path) -> None:
    found = find_cases(folder)
    assert found.labels == LABELS
    assert found.channels == ("CT",)
    assert [case.group for case in found.cases] == [f"patient_{k:03d}" for k in range(4)]
    case = read_case(found.cases[0], found.labels)
    assert case.label is not None
    assert set(np.unique(case.label)) == {0, 1, 2, 3}


def test_tables_name_every_file(folder: Path) -> None:
    with (folder / "cases.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert [row["file"] for row in rows] == names
    assert sorted(path.name for path in (folder / "labels").iterdir()) == names
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 4


def test_written_grids_are_oblique_and_differ(folder: Path) -> None:
    images = [nib.load(path) for path in sorted((folder / "images").iterdir())]
    assert len({nib.aff2axcodes(image.affine) for image in images}) > 1
    assert len({image.shape for image in images}) == 4
    for image in images:
        matrix = nib.affines.voxel_sizes(image.affine)
        assert matrix.max() <= 8
        assert np.abs(image.affine[:3, :3] / matrix).max(axis=0).min() < 1 - 1e-5
        assert image.get_data_dtype() == np.int16
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-2)


def test_a_case_does_not_depend_on_how_many_are_made(folder: Path, tmp_path: Path) -> None:
    make_phantoms(tmp_path, num_cases=1, seed=3)
    for kind in ("images", "labels"):
        one, same = (nib.load(path / kind / "phantom_000.nii.gz") for path in (tmp_path, folder))
        np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(same.dataobj))
        np.testing.assert_array_equal(one.affine, same.affine)


def test_data_set_is_never_written_over(folder: Path) -> None:
    with pytest.raises(MedmomError, match="holds a data set already"):
        make_phantoms(folder, num_cases=1)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MedmomError, match=r"file/set: cannot be written \(.+\)"):
        make_phantoms(blocked / "set", num_cases=1)


def test_no_phantoms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="num_cases is 0"):
        make_phantoms(tmp_path, num_cases=0)


def canvas(points: np.ndarray) -> Canvas:
    return Canvas(points, edge=2.0, hu=np.full(points.shape[1], -1000.0))


def test_tube_is_as_far_as_its_nearest_sphere() -> None:
    points = np.random.default_rng(0).uniform(-30, 30, (3, 400)).astype(np.float32)
    course = smooth_course(np.array([(-20, 0, 0, 5), (0, 8, 0, 5), (20, 0, 5, 5)], dtype=float))
    distance, at, nearest = canvas(points).tube(course)
    gaps = np.linalg.norm(points.T[:, None] - course[None, :, :3], axis=2)
    np.testing.assert_allclose(distance, gaps.min(axis=1)[at] - 5, atol=1e-4)
    np.testing.assert_array_equal(nearest, gaps.argmin(axis=1)[at])
    assert np.isin(np.flatnonzero(gaps.min(axis=1) < 5), at).all()


def test_edge_voxel_is_seen_in_part_and_labelled_by_its_centre() -> None:
    scene = canvas(np.zeros((3, 4), dtype=np.float32))
    scene.paint(np.array([-5.0, -0.5, 0.5, 5.0]), 1000.0, 2)
    np.testing.assert_allclose(scene.hu, [1000, 500, -500, -1000])
    np.testing.assert_array_equal(scene.label, [2, 2, 0, 0])
    scene.paint(np.full(4, -5.0), 0.0, KEEP)
    np.testing.assert_array_equal(scene.label, [2, 2, 0, 0])


def test_meeting_shapes_are_rounded_only_where_they_meet() -> None:
    first, second = np.array([-20.0, -1.0, 5.0]), np.array([3.0, -1.0, -30.0])
    np.testing.assert_allclose(meet(first, second, round_mm=8), [3, -1 + 2, 5])


def test_waves_have_mean_zero_and_variance_one() -> None:
    points = np.random.default_rng(1).uniform(0, 2000, (3, 20000)).astype(np.float32)
    field = waves(points, np.random.default_rng(2), 50.0)
    assert abs(field.mean()) < 0.03
    assert field.std() == pytest.approx(1, abs=0.05)
