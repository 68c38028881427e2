from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmom.data.files import Volume, read_image
from medmom.evaluation.drawing import Plane
from medmom.geometry import resample
from medmom.inference import preview as module
from medmom.inference.preview import preview
from medmom.labels import Labels
from medmom.phantom import LABELS, make_phantom


def phantom(orientation: str = "RAS", depth: int = 24) -> tuple[np.ndarray, Volume]:
    image, label, geometry = make_phantom(3, shape=(32, 27, depth), spacing=(12, 12, 16), orientation=orientation)
    return label, Volume(Path("scan.nii.gz"), image[None], geometry, object())


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


class Drawn:
    """What was given to be drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planes: list[Plane] = []
        self.legend: list[str] = []
        self.names: list[str] = []
        monkeypatch.setattr(module, "draw_planes", self.draw)

    def draw(self, planes: list[Plane], labels: Labels, *, legend: list[tuple[str, str]]) -> bytes:
        self.planes, self.names, self.legend = planes, [name for name, _ in legend], [text for _, text in legend]
        return b""


def test_three_planes_show_the_prediction_in_its_colours() -> None:
    label, image = phantom()
    drawn, empty = pixels(preview(label, image, LABELS)), pixels(preview(np.zeros_like(label), image, LABELS))
    assert drawn.shape[1] == empty.shape[1]
    for name in LABELS.foreground:
        # The legend has the pure colour, and nothing else of a picture in grey.
        assert (drawn == LABELS.colour(name)).all(axis=2).any()
        assert not (empty == LABELS.colour(name)).all(axis=2).any()


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "ASL"])
def test_planes_do_not_depend_on_how_the_axes_lie(monkeypatch: pytest.MonkeyPatch, orientation: str) -> None:
    drawn = Drawn(monkeypatch)
    wanted_label, wanted = phantom()
    preview(wanted_label, wanted, LABELS)
    planes, legend = drawn.planes, drawn.legend
    label = phantom(orientation)[0]
    # The noise of a scan depends on its axes.
    turn = phantom(orientation)[1].geometry
    image = Volume(Path("scan.nii.gz"), resample(wanted.array, wanted.geometry, turn, order=0), turn, object())
    preview(label, image, LABELS)
    assert [plane.name for plane in drawn.planes] == ["axial", "coronal", "sagittal"]
    assert drawn.legend == legend
    for found, plane in zip(drawn.planes, planes, strict=True):
        np.testing.assert_array_equal(found.image, plane.image)
        np.testing.assert_array_equal(found.prediction, plane.prediction)
        assert found.size == pytest.approx(plane.size)


def test_planes_lie_where_the_structures_are(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    _, image = phantom()
    label = np.zeros(image.geometry.shape, np.uint8)
    label[2:5, 20:23, 20:22] = LABELS.value("colon")
    preview(label, image, LABELS)
    assert all((plane.prediction > 0).any() for plane in drawn.planes)
    assert all(plane.prediction.max() == LABELS.channel("colon") for plane in drawn.planes)


def test_only_the_planes_become_float(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    label, image = phantom()
    assert image.array.dtype == np.int16
    preview(label, image, LABELS)
    assert {plane.image.dtype for plane in drawn.planes} == {np.dtype(np.float32)}


def test_legend_tells_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    label, image = phantom()
    preview(label, image, LABELS)
    voxel = 12 * 12 * 16 / 1000
    sizes = [round(np.count_nonzero(label == LABELS.value(name)) * voxel) for name in LABELS.foreground]
    assert drawn.names == list(LABELS.foreground)
    assert drawn.legend == [f"{name}  {size} ml" for name, size in zip(LABELS.foreground, sizes, strict=True)]


def test_legend_of_many_classes_names_the_largest_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    labels = Labels(("background", *(f"rib_{k}" for k in range(1, 105))), tuple(range(105)))
    label = np.zeros((32, 27, 24), np.uint8)
    # 100 of 104 are there, the higher the larger.
    sizes = np.repeat(np.arange(1, 101), np.arange(1, 101))
    label.reshape(-1)[: len(sizes)] = sizes
    preview(label, phantom()[1], labels)
    assert drawn.names == [*(f"rib_{k}" for k in range(89, 101)), ""]
    assert drawn.legend[-1] == "and 88 more"


def test_empty_prediction_says_so_in_the_middle_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    label, image = phantom()
    preview(np.zeros_like(label), image, LABELS)
    assert drawn.legend == ["nothing found"]
    np.testing.assert_array_equal(drawn.planes[0].image, image.array[0, ::-1, ::-1, 12].T)


def test_ignored_voxels_are_background(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    label, image = phantom()
    preview(np.full_like(label, 99), image, Labels(LABELS.names, LABELS.values, ignore=99))
    assert drawn.legend == ["nothing found"]
    assert not any(plane.prediction.any() for plane in drawn.planes)


def test_a_single_slice_has_one_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    preview(*phantom("LPS", 1), LABELS)
    assert [plane.name for plane in drawn.planes] == ["axial"]


def test_a_picture_is_shown_whole_in_its_colours(tmp_path: Path) -> None:
    colours = np.full((40, 60, 3), (10, 200, 30), dtype=np.uint8)
    colours[:, 30:] = (250, 240, 0)
    Image.fromarray(colours).save(tmp_path / "photo.png")
    image = read_image(tmp_path / "photo.png")
    label = np.zeros((60, 40, 1), np.uint8)
    label[5:20, 10:30] = 1
    # Neither sign has a meaning in a legend.
    labels = Labels(("background", "_polyp $1$"), (0, 1))
    drawn = pixels(preview(label, image, labels))
    assert (drawn == labels.colour("_polyp $1$")).all(axis=2).any()
    # Green and yellow of the picture, brightened to its range.
    assert (drawn[..., 1].astype(int) - drawn[..., 2] > 120).mean() > 0.3


@pytest.mark.parametrize("name", ["_polyp", "a $1$ b", "x" * 200])
def test_any_class_name_can_stand_in_the_legend(name: str) -> None:
    label, image = phantom()
    labels = Labels(("background", name), (0, LABELS.value("liver")))
    found = np.where(label == LABELS.value("liver"), label, 0)
    assert (pixels(preview(found, image, labels)) == labels.colour(name)).all(axis=2).any()


def test_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie on a grid"):
        preview(np.zeros((2, 2, 2), np.uint8), phantom()[1], LABELS)
