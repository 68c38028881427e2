from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pictures import (
    COLOURS,
    DEEP,
    GREY,
    RNG,
    chunk,
    exif,
    refusal,
    save,
    save_deep,
    save_png,
    save_tiff,
    turned,
)

from medmom.data.files import is_image, is_picture, picture_channels, read_geometry, read_image, read_images, stem
from medmom.errors import MedmomError


def seen(path: Path) -> np.ndarray:
    """The image as (rows, columns, channels), as a viewer shows it."""
    volume = read_image(path)
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous
    assert volume.geometry.shape == volume.array.shape[1:] == read_geometry(path).shape
    assert len(volume.array) == picture_channels(path)
    assert volume.is_picture
    np.testing.assert_array_equal(volume.geometry.affine, np.eye(4))
    return np.asarray(volume.array[..., 0].transpose(2, 1, 0))


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.tif", "a.v1.TIFF"])
def test_picture_suffixes_are_images(name: str) -> None:
    assert is_image(name)
    assert is_picture(name)
    assert stem(name) == name.rpartition(".")[0]


@pytest.mark.parametrize("name", ["a.nii.gz", "a.gif", "a.bmp", "png"])
def test_other_suffixes_are_no_pictures(name: str) -> None:
    assert not is_picture(name)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("pixels", [COLOURS, GREY], ids=["colours", "grey"])
def test_eight_bits_are_read_as_stored(suffix: str, pixels: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{suffix}", pixels)
    np.testing.assert_array_equal(seen(path), np.atleast_3d(pixels))
    assert read_image(path).bits == 8


def test_first_axis_is_the_column_and_second_the_row(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.png", GREY)).array[0, 6, 2, 0] == GREY[2, 6]


def test_jpeg_is_read_as_pillow_decodes_it(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", COLOURS, quality=95)
    np.testing.assert_array_equal(seen(path), np.asarray(Image.open(path)))


def test_bytes_and_not_the_name_say_the_format(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", COLOURS).rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(seen(path), COLOURS)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_divided_by_257(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{suffix}", DEEP[..., 0])
    np.testing.assert_array_equal(seen(path)[..., 0], DEEP[..., 0] / np.float32(257))
    assert read_image(path).bits == 16


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_colours_are_not_cut_to_eight(suffix: str, tmp_path: Path) -> None:
    path = save_deep(tmp_path / f"a{suffix}", DEEP)
    assert np.asarray(Image.open(path)).dtype == np.uint8
    np.testing.assert_array_equal(seen(path), DEEP / np.float32(257))
    assert read_image(path).bits == 16


def test_opaque_sixteen_bit_alpha_is_dropped(tmp_path: Path) -> None:
    opaque = np.dstack([DEEP, np.full(GREY.shape, 2**16 - 1, np.uint16)])
    np.testing.assert_array_equal(seen(save_deep(tmp_path / "a.png", opaque)), DEEP / np.float32(257))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_applied(suffix: str, orientation: int, tmp_path: Path) -> None:
    plain, path = (tmp_path / f"{name}{suffix}" for name in ("plain", "turned"))
    save(plain, COLOURS)
    save(path, COLOURS, **({"tiffinfo": {274: orientation}} if suffix == ".tif" else {"exif": exif(orientation)}))
    np.testing.assert_array_equal(seen(path), turned(seen(plain), orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_sixteen_bit_colours(orientation: int, tmp_path: Path) -> None:
    rows = [row.astype(">u2").tobytes() for row in DEEP]
    tags = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    png = save_png(tmp_path / "a.png", rows, 7, bits=16, kind=2, extra=chunk(b"eXIf", tags))
    for path in (png, save_tiff(tmp_path / "a.tif", DEEP, orientation=orientation)):
        np.testing.assert_array_equal(seen(path), turned(DEEP, orientation) / np.float32(257))


@pytest.mark.parametrize("place", [8, 33])
def test_png_with_two_headers_that_differ_is_refused(place: int, tmp_path: Path) -> None:
    content = save_deep(tmp_path / "a.png", DEEP).read_bytes()
    other = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(content[:place] + other + content[place:])
    assert "damaged (its first header is not its only one)" in refusal(tmp_path / "a.png")


def test_tiff_whose_strips_lie_beyond_the_file_is_refused(tmp_path: Path) -> None:
    content = save_tiff(tmp_path / "a.tif", DEEP).read_bytes()
    (tmp_path / "a.tif").write_bytes(
        content.replace(struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 1, 900))
    )
    assert "pixels up to byte 1110 in a file of" in refusal(tmp_path / "a.tif")


def test_damaged_exif_is_passed_over_without_a_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", GREY, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\0" * 8)
    assert seen(path).shape == (5, 7, 1)


def test_palette_becomes_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOURS).quantize(8)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(seen(tmp_path / "a.png"), np.asarray(picture.convert("RGB")))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    np.testing.assert_array_equal(seen(save(tmp_path / "a.png", GREY > 99))[..., 0], 255 * (GREY > 99))


@pytest.mark.parametrize("pixels", [COLOURS, GREY], ids=["colours", "grey"])
def test_opaque_alpha_is_dropped(pixels: np.ndarray, tmp_path: Path) -> None:
    opaque = np.dstack([pixels, np.full(GREY.shape, 255, np.uint8)])
    np.testing.assert_array_equal(seen(save(tmp_path / "a.png", opaque)), np.atleast_3d(pixels))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_refused(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(COLOURS).convert(mode)
    picture.putalpha(Image.fromarray(np.where(GREY > 99, 255, 7).astype(np.uint8)))
    picture.save(tmp_path / "a.png")
    share = 100 * float((GREY <= 99).mean())
    assert f": {share:.3g} % of the pixels are transparent" in refusal(tmp_path / "a.png")


def test_transparent_palette_entry_in_use_is_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).quantize(4).save(tmp_path / "a.png", transparency=2)
    assert "are transparent" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("inverted", [False, True])
def test_cmyk_is_refused(inverted: bool, tmp_path: Path) -> None:
    inks = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.frombytes("CMYK", (8, 8), inks.tobytes()).save(tmp_path / "a.jpg")
    if inverted:
        data = (tmp_path / "a.jpg").read_bytes()
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
        (tmp_path / "a.jpg").write_bytes(data[:2] + adobe + data[2:])
    assert refusal(tmp_path / "a.jpg") == (
        ": CMYK colours, meant for printing and often stored inverted. Convert it to RGB and look at it."
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_truncated_picture_is_refused(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{suffix}", RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "the picture is cut short or damaged (" in refusal(path)
    assert "Copy it again from its source." in refusal(path, label=True)


def test_truncated_sixteen_bit_colours_are_refused(tmp_path: Path) -> None:
    path = save_deep(tmp_path / "a.png", RNG.integers(0, 2**16, (80, 80, 3), dtype=np.uint16))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cut short" in refusal(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ": the file is empty."),
        (b"GIF89a" + b"\0" * 60, ": not a PNG, JPEG or TIFF file, it begins with b'GIF89a"),
        (b"\x89PNG\r\n\x1a\n", ": the picture is cut short or damaged"),
        (b"\xff\xd8\xff", ": the picture is cut short or damaged"),
        (b"II*\0", ": the picture is cut short or damaged"),
    ],
)
def test_file_without_a_picture_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert refusal(tmp_path / "a.png").startswith(text)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert "a folder" in refusal(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("fuzz", range(4))
def test_broken_bytes_give_an_image_or_one_line(suffix: str, fuzz: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(fuzz)
    sound = save(tmp_path / f"a{suffix}", COLOURS, exif=exif(6)).read_bytes()
    for _ in range(40):
        data = bytearray(sound)
        for place in rng.integers(4, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        (tmp_path / f"b{suffix}").write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        try:
            assert np.isfinite(read_image(tmp_path / f"b{suffix}").array).all()
        except MedmomError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_line_of_pixels_is_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape))
    assert refusal(path) == f": {shape[1]} x {shape[0]} pixels, not a picture. Give the true picture."


def test_constant_picture_is_refused(tmp_path: Path) -> None:
    assert ": every pixel is 7, the image shows nothing" in refusal(save(tmp_path / "a.png", np.full_like(GREY, 7)))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_huge_picture_is_refused_from_its_header(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "png":
        save_png(path, [], 20000, bits=8, kind=2, num_rows=20000)
    else:
        Image.new("1", (20000, 20000)).save(path, compression="group4")
    expected = ": 20000 x 20000 pixels, more than 134217728. Crop it or save it smaller."
    assert refusal(path) == refusal(path, label=True) == expected


def test_long_picture_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RNG.integers(0, 256, (30, 20000), dtype=np.uint8))
    assert read_image(path).array.shape == (1, 20000, 30, 1)


def test_picture_of_more_pixels_than_pillow_warns_of_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", COLOURS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert seen(path).shape == (5, 7, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_several_pages_are_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS), Image.fromarray(COLOURS // 2)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert ": 3 pages or frames in one file." in refusal(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_pixels_without_a_scale_are_refused(dtype: str, tmp_path: Path) -> None:
    assert "scale is not known" in refusal(save(tmp_path / "a.tif", GREY.astype(dtype)))


def test_sixteen_bit_grey_with_white_as_zero_is_refused(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", DEEP[..., :1], photometric=0)
    assert ": 16-bit grey values with 0 as white" in refusal(path)


def test_other_colour_space_is_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).convert("LAB").save(tmp_path / "a.tif")
    assert ": pixels of the kind LAB" in refusal(tmp_path / "a.tif")


def test_resolution_in_the_file_is_not_read(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.png", GREY, dpi=(300, 300))).geometry.spacing == (1.0, 1.0, 1.0)


def test_channels_in_several_pictures_are_joined(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"a_{k:04d}.png", COLOURS[..., k]) for k in range(3)]
    np.testing.assert_array_equal(read_images(paths).array[..., 0].transpose(2, 1, 0), COLOURS)
