from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pictures import COLOURS, GREY, ONE, exif, refusal, save, save_png, turned

from medmom.data.files import Volume, check_same_grid, read_image, read_label, write_label
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

TWO = Labels(("background", "liver", "tumour"), (0, 1, 2), ignore=9)
CLASSES = (GREY % 3).astype(np.uint8)
FOREGROUND = GREY > 99


def stored(path: Path, labels: Labels | None = None) -> np.ndarray:
    label = read_label(path, labels)
    assert label.is_picture
    assert label.array.shape == label.geometry.shape
    return np.asarray(label.array[..., 0].T)


def save_palette(path: Path, **options: Any) -> Path:
    picture = Image.fromarray(CLASSES)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(path, **options)
    return path


def test_palette_mask_gives_its_indices(tmp_path: Path) -> None:
    np.testing.assert_array_equal(stored(save_palette(tmp_path / "a.png")), CLASSES)
    np.testing.assert_array_equal(stored(save_palette(tmp_path / "b.png", transparency=0)), CLASSES)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_grey_mask_gives_its_values(dtype: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", CLASSES.astype(dtype))
    np.testing.assert_array_equal(stored(path), CLASSES)


def test_fractions_in_a_mask_are_refused(tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "a.tif", CLASSES + np.float32(0.5)), label=True)
    assert ": 35 label values are not whole numbers, such as" in text


def test_mask_with_three_equal_channels_counts_as_grey(tmp_path: Path) -> None:
    np.testing.assert_array_equal(stored(save(tmp_path / "a.png", np.dstack([CLASSES] * 3))), CLASSES)


def test_mask_in_colours_is_refused(tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "a.png", COLOURS), label=True)
    assert text.startswith(": the mask has colours (35 pixels are not grey)")


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x60"), (2, b"\x1b"), (4, b"\x01\x2f")])
def test_grey_of_few_bits_is_read_as_stored_in_a_mask(bits: int, row: bytes, tmp_path: Path) -> None:
    expected = {1: [0, 1, 1, 0], 2: [0, 1, 2, 3], 4: [0, 1, 2, 15]}[bits]
    np.testing.assert_array_equal(stored(save_png(tmp_path / "a.png", [row, row], 4, bits=bits)), [expected] * 2)


@pytest.mark.parametrize("orientation", [1, 6])
def test_mask_is_turned_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    path = save_palette(tmp_path / "a.png", exif=exif(orientation))
    np.testing.assert_array_equal(stored(path), turned(CLASSES, orientation))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_the_only_class(dtype: str, tmp_path: Path) -> None:
    white = np.iinfo(dtype).max
    path = save(tmp_path / "a.png", FOREGROUND.astype(dtype) * white)
    np.testing.assert_array_equal(stored(path, ONE), FOREGROUND)
    np.testing.assert_array_equal(stored(path), FOREGROUND * white)
    np.testing.assert_array_equal(stored(path, Labels(("background", "polyp"), (0, 4))), FOREGROUND * 4)


@pytest.mark.parametrize(
    "labels", [Labels(("background", "polyp"), (0, 255)), Labels(("background", "polyp"), (0, 1), ignore=255)]
)
def test_white_that_has_a_meaning_stays(labels: Labels, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", FOREGROUND.astype(np.uint8) * 255)
    np.testing.assert_array_equal(stored(path, labels), FOREGROUND * 255)


def test_mask_that_is_all_white_or_all_black_is_read(tmp_path: Path) -> None:
    assert stored(save(tmp_path / "a.png", np.full_like(GREY, 255)), ONE).min() == 1
    assert stored(save(tmp_path / "b.png", np.zeros_like(GREY)), TWO).max() == 0


def test_white_among_several_classes_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", FOREGROUND.astype(np.uint8) * 255)
    with pytest.raises(MedmomError, match=r"black and white \(0 and 255\), the classes are liver, tumour"):
        read_label(path, TWO)


def test_grey_edges_are_refused_with_their_number(tmp_path: Path) -> None:
    edged = np.where(FOREGROUND, 255, 0).astype(np.uint8)
    edged[0, :3] = 37
    assert refusal(save(tmp_path / "a.png", edged), label=True) == (
        ": 3 pixels are neither black nor white, such as 37 (saved as JPEG, or resized?). Threshold the mask at 127 "
        "and save it as PNG."
    )


@pytest.mark.parametrize("values", [(0, 1, 7), (0, 1, 255)])
def test_unknown_class_numbers_are_left_to_the_label_table(values: tuple[int, ...], tmp_path: Path) -> None:
    mask = np.array(values, np.uint8)[GREY % 3]
    with pytest.raises(ValueError, match=f"label value {values[2]} is not among"):
        ONE.to_channels(read_label(save(tmp_path / "a.png", mask), ONE).array)


def like(path: Path, shape: tuple[int, ...] = (7, 5, 1)) -> Volume:
    return Volume(path, np.zeros((1, *shape), np.float32), Geometry(shape, np.eye(4)), None)


def test_written_mask_has_indices_in_the_colours_of_the_labels(tmp_path: Path) -> None:
    values = TWO.to_values(CLASSES)
    values[0, 0] = 9
    write_label(tmp_path / "out/a.png", values.T[..., None], TWO, like(tmp_path / "in.png"))
    picture = Image.open(tmp_path / "out/a.png")
    assert (picture.mode, picture.size) == ("P", (7, 5))
    np.testing.assert_array_equal(np.asarray(picture), values)
    colours = np.asarray(picture.convert("RGB"))
    for name in TWO.names:
        assert (colours[values == TWO.value(name)] == TWO.colour(name)).all()
    np.testing.assert_array_equal(stored(tmp_path / "out/a.png", TWO), values)


def test_written_mask_of_large_values_is_sixteen_bit_grey(tmp_path: Path) -> None:
    labels = Labels(("background", "polyp"), (0, 1000))
    write_label(tmp_path / "a.png", (FOREGROUND * 1000).T[..., None], labels, like(tmp_path / "in.png"))
    np.testing.assert_array_equal(stored(tmp_path / "a.png", labels), FOREGROUND * 1000)


def test_written_mask_of_a_turned_picture_is_upright(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "in.jpg", COLOURS, exif=exif(6)))
    write_label(tmp_path / "out.png", (image.array[0] > 99).astype(np.uint8), ONE, image)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (5, 7)
    check_same_grid(image, read_label(tmp_path / "out.png"))


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("a.nii.gz", (0, 1), "the label map of a picture is written as .png"),
        ("a.jpg", (0, 1), "the label map of a picture is written as .png"),
        ("a.png", (0, -1), "class values from -1 to 0 do not fit a PNG"),
        ("in.png", (0, 1), "the output would replace its own input"),
    ],
)
def test_mask_that_cannot_be_written_leaves_the_disk_alone(
    name: str, values: tuple[int, int], text: str, tmp_path: Path
) -> None:
    image = read_image(save(tmp_path / "in.png", GREY))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(MedmomError, match=text):
        write_label(tmp_path / name, np.zeros((7, 5, 1), np.uint8), Labels(("background", "polyp"), values), image)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_png_for_a_volume_is_refused(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "in.nii", np.zeros((1, 7, 5, 1), np.float32), Geometry((7, 5, 1), np.eye(4)), object())
    with pytest.raises(MedmomError, match=r"label maps are written as \.nii\.gz or \.nii"):
        write_label(tmp_path / "a.png", np.zeros((7, 5, 1), np.uint8), ONE, volume)


def test_mask_of_another_size_is_refused_in_pixels(tmp_path: Path) -> None:
    image, mask = save(tmp_path / "a.png", GREY), save(tmp_path / "m.png", CLASSES[:4])
    with pytest.raises(MedmomError) as caught:
        check_same_grid(read_image(image), read_label(mask))
    assert str(caught.value) == f"{mask}: 7x4 pixels, but {image} has 7x5. Save both at one size."


def test_mask_with_its_sides_swapped_is_told_about_exif(tmp_path: Path) -> None:
    image, mask = save(tmp_path / "a.jpg", GREY, exif=exif(6)), save(tmp_path / "m.png", CLASSES)
    with pytest.raises(MedmomError, match="Turn one: pictures are read as EXIF turns them"):
        check_same_grid(read_image(image), read_label(mask))
