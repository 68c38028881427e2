from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmom.errors import MedmomError
from medmom.labels import IGNORE, Labels
from medmom.sheet import Drawn, write_sheet

LABELS = Labels(("background", "polyp", "tool"), (0, 1, 2))
RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float) / 255


def share(sheet: np.ndarray, colour: tuple[float, ...]) -> float:
    """Share of pixels that have a colour."""
    return float((np.abs(sheet - colour).max(axis=-1) < 0.03).mean())


def draw(path: Path, *samples: Drawn, labels: Labels | None = LABELS, **options: object) -> np.ndarray:
    write_sheet(samples, path / "sheet.png", title=r"a $\frac{ title", labels=labels, **options)  # type: ignore[arg-type]
    return read(path / "sheet.png")


def coloured(colour: tuple[float, ...], shape: tuple[int, ...] = (20, 16)) -> np.ndarray:
    return np.ones((3, *shape), np.float32) * np.reshape(np.array(colour, np.float32), (3, *[1] * len(shape)))


def block(shape: tuple[int, ...], value: int = 1) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[(slice(4, 12), slice(5, 11), *[slice(2, 6)] * (len(shape) - 2))] = value
    return label


def places(sheet: np.ndarray, colour: tuple[float, ...]) -> tuple[float, float]:
    """Mean row and column of the pixels of a colour, as shares of the sheet."""
    rows, columns = np.nonzero(np.abs(sheet - colour).max(axis=-1) < 0.03)
    return float(rows.mean() / sheet.shape[0]), float(columns.mean() / sheet.shape[1])


def test_rows_are_cases_and_columns_their_samples(tmp_path: Path) -> None:
    samples = [("a", coloured(RED), None), ("a", coloured(GREEN), None), ("b", coloured(BLUE), None)]
    sheet = draw(tmp_path, *samples, intensity="unit")
    red, green, blue = places(sheet, RED), places(sheet, GREEN), places(sheet, BLUE)
    assert red[0] == pytest.approx(green[0], abs=0.01)
    assert red[1] == pytest.approx(blue[1], abs=0.01)
    assert blue[0] > red[0] + 0.3
    assert green[1] > red[1] + 0.3


def test_pictures_begin_in_the_upper_left_corner_and_x_is_the_column(tmp_path: Path) -> None:
    image = coloured((0.2, 0.2, 0.2))
    image[:, 14:, :4] = coloured(RED, (6, 4))
    image[:, :6, 12:] = coloured(GREEN, (6, 4))
    sheet = draw(tmp_path, ("a", image, None), intensity="unit")
    (red_row, red_column), (green_row, green_column) = places(sheet, RED), places(sheet, GREEN)
    assert red_row < green_row
    assert red_column > green_column


def test_slices_of_scans_show_right_to_the_left_and_front_to_the_top(tmp_path: Path) -> None:
    image = coloured((0.2, 0.2, 0.2))
    image[:, 14:, 12:] = coloured(RED, (6, 4))
    sheet = draw(tmp_path, ("a", image, None), intensity="unit", is_scan=True)
    row, column = places(sheet, RED)
    assert column < 0.2
    assert row < 0.4


@pytest.mark.parametrize("axis", [True, False])
def test_labels_are_outlined_in_their_colours(tmp_path: Path, axis: bool) -> None:
    image = np.zeros((1, 20, 16), np.float32)
    for channel, name in enumerate(LABELS.foreground, start=1):
        label = block((20, 16), channel)
        sheet = draw(tmp_path, ("a", image, label[None] if axis else label))
        own = tuple(part / 255 for part in LABELS.colour(name))
        other = tuple(part / 255 for part in LABELS.colour(LABELS.foreground[channel % 2]))
        assert share(sheet, own) > 1e-4
        assert share(sheet, other) == 0


@pytest.mark.parametrize("shape", [(20, 16), (20, 16, 10)])
def test_nothing_is_outlined_without_a_label_or_where_it_is_ignored(tmp_path: Path, shape: tuple[int, ...]) -> None:
    colours = [tuple(part / 255 for part in LABELS.colour(name)) for name in LABELS.foreground]
    image = np.zeros((1, *shape), np.float32)
    for label, labels in ((None, LABELS), (block(shape), None), (block(shape, IGNORE), LABELS)):
        sheet = draw(tmp_path, ("a", image, label), labels=labels)
        assert all(share(sheet, colour) == 0 for colour in colours)


def test_a_volume_shows_three_slices_through_its_label(tmp_path: Path) -> None:
    label = np.zeros((20, 16, 10), np.uint8)
    label[1:8, 1:7, 1:4] = 1  # no central slice holds any of it
    image = label[None].astype(np.float32)
    sheet = draw(tmp_path, ("a", image, label), labels=None, intensity="unit")
    white = np.abs(sheet - 1).max(axis=-1) < 0.03
    rows, columns = np.nonzero(white)
    middle = (sheet.shape[0] * 0.55, sheet.shape[1] * 0.25)
    above, left = rows < middle[0], columns < middle[1]
    assert (above & left).sum() > 50
    assert (above & ~left).sum() > 50
    assert (~above & left).sum() > 50


def test_grey_of_other_scales_reaches_from_black_to_white(tmp_path: Path) -> None:
    image = np.linspace(-1000, 3000, 320, dtype=np.float32).reshape(1, 20, 16)
    image[0, 3, 3] = np.nan
    sheet = draw(tmp_path, ("a", image, None))
    assert share(sheet, (0, 0, 0)) > 1e-3
    assert share(sheet, (1, 1, 1)) > 1e-3
    unit = draw(tmp_path, ("a", np.full_like(image, 0.5), None), intensity="unit")
    assert share(unit, (0.5, 0.5, 0.5)) > 0.1


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((1, 1, 1), np.float32),
        np.zeros((3, 1, 9), np.float32),
        np.full((2, 8, 8), np.nan, np.float32),
        np.zeros((1, 8, 1, 8), np.float32),
        np.ones((4, 8, 8, 8), np.float32),
        np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32) * 9,
    ],
)
@pytest.mark.parametrize("intensity", ["unit", "zscore"])
def test_odd_images_are_drawn_too(tmp_path: Path, image: np.ndarray, intensity: str) -> None:
    label = np.ones(image.shape[1:], np.uint8)
    sheet = draw(tmp_path, (r"a $\frac{ strange _name " * 9, image, label), intensity=intensity)
    assert sheet.shape[0] > 100


@pytest.mark.parametrize(
    ("num", "name", "message"),
    [
        (0, "sheet.png", "0 rows of 0 samples make no sheet; draw 1 to 20 of each"),
        (40, "sheet.png", "1 rows of 40 samples make no sheet"),
        (1, "sheet.jpg", "a sheet is a PNG picture; name it sheet.png"),
        (1, "file/sheet.png", "cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_lost(tmp_path: Path, num: int, name: str, message: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "sheet.png").write_text("kept")
    with pytest.raises(MedmomError, match=f"{name}: {message}"):
        write_sheet([("a", coloured(RED), None)] * num, tmp_path / name, title="")
    assert (tmp_path / "sheet.png").read_text() == (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "sheet.png"]


def test_a_sheet_is_the_same_twice(tmp_path: Path) -> None:
    samples = [("a", coloured(RED), block((20, 16)))]
    assert np.array_equal(draw(tmp_path, *samples), draw(tmp_path, *samples))
