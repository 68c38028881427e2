"""NRRD and MetaImage files, sound and not."""

from __future__ import annotations

import gzip
import logging
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medmom.data.files import (
    content_files,
    is_image,
    read_geometry,
    read_image,
    read_images,
    read_label,
    stem,
    write_label,
)
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels

sitk: Any = SimpleITK

SUFFIXES = [".nrrd", ".nhdr", ".mha", ".mhd"]
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])


def voxels(dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 120, (5, 6, 7)).astype(dtype)


def save(path: Path, array: np.ndarray, *, packed: bool = False) -> np.ndarray:
    """Writes voxels (X, Y, Z), or (X, Y, Z, C) as vectors; gives the affine, RAS+."""
    image: Any = sitk.GetImageFromArray(array.swapaxes(0, 2), isVector=array.ndim == 4)
    image.SetDirection(TURN.ravel())
    image.SetSpacing((1.0, 1.5, 2.5))
    image.SetOrigin((-30.5, 12.25, 7.0))
    sitk.WriteImage(image, str(path), useCompression=packed)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURN * (1.0, 1.5, 2.5), (-30.5, 12.25, 7.0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def refusal(path: Path) -> str:
    with pytest.raises(MedmomError) as caught:
        read_image(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.count(". ") >= 1, "a fact, then a mend"
    return text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_voxels_lie_where_itk_puts_them(suffix: str, packed: bool, tmp_path: Path) -> None:
    path, array = tmp_path / f"a.v1{suffix}", voxels()
    affine = save(path, array, packed=packed)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.geometry.affine, affine, rtol=0, atol=1e-12)
    assert read_geometry(path).is_close(volume.geometry, tolerance=0)
    assert is_image(path)
    assert (stem(path), str(volume.array.dtype), len(volume.series)) == ("a.v1", "float32", 0)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_compact_keeps_integers(dtype: str, tmp_path: Path) -> None:
    save(tmp_path / "a.nrrd", voxels(dtype))
    volume = read_images([tmp_path / "a.nrrd"], compact=True)
    kept = {"int32": "uint8", "uint32": "uint8", "int64": "uint8", "float64": "float32"}.get(dtype, dtype)
    assert volume.array.dtype.itemsize == np.dtype(kept).itemsize
    np.testing.assert_array_equal(volume.array[0], voxels(dtype))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_vectors_are_channels(suffix: str, tmp_path: Path) -> None:
    array = np.stack([voxels("float32"), voxels("float32") + 1000], axis=3)
    save(tmp_path / f"a{suffix}", array)
    volume = read_image(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.array, array.transpose(3, 0, 1, 2))
    assert volume.header.get_data_shape() == (5, 6, 7)


def test_fourth_axis_is_channels(tmp_path: Path) -> None:
    parts = [sitk.GetImageFromArray(voxels().swapaxes(0, 2) + k) for k in range(3)]
    sitk.WriteImage(sitk.JoinSeries(parts), str(tmp_path / "a.mha"))
    volume = read_image(tmp_path / "a.mha")
    np.testing.assert_array_equal(volume.array, np.stack([voxels() + k for k in range(3)]))


def test_flat_image_is_one_slice(tmp_path: Path) -> None:
    flat: Any = sitk.GetImageFromArray(voxels()[..., 0].T)
    flat.SetSpacing((2.0, 3.0))
    sitk.WriteImage(flat, str(tmp_path / "a.mha"))
    volume = read_image(tmp_path / "a.mha")
    np.testing.assert_array_equal(volume.array[0, ..., 0], voxels()[..., 0])
    assert volume.geometry.spacing == (2, 3, 1)


def nrrd(path: Path, *, data: bytes = bytes(range(60)) * 2, **changes: str) -> Path:
    """Writes an NRRD file of 3 x 4 x 5 voxels, int16, field by field; an empty value leaves a field out."""
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "right-anterior-superior",
        "sizes": "3 4 5",
        "space directions": "(1,0,0) (0,2,0) (0,0,3)",
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(1,2,3)",
    }
    fields |= {name.replace("_", " "): value for name, value in changes.items()}
    lines = ["NRRD0005", "# a comment", *(f"{name}: {value}" for name, value in fields.items() if value), "key:=value"]
    path.write_bytes("\n".join(lines).encode() + b"\n\n" + data)
    return path


SIGNS = {"right-anterior-superior": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "LPS": (-1, -1, 1)}


@pytest.mark.parametrize("space", SIGNS)
def test_every_space_of_nrrd_that_is_read_is_right(space: str, tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.diag([1, 2, 3]), (1, 2, 3)
    expected = np.diag([*SIGNS[space], 1]) @ affine
    np.testing.assert_allclose(read_geometry(nrrd(tmp_path / "a.nrrd", space=space)).affine, expected, atol=1e-12)


def test_nrrd_channels_may_come_first_or_last(tmp_path: Path) -> None:
    data = np.arange(120, dtype="<i2")
    steps = "(1,0,0) (0,2,0) (0,0,3)"
    first = nrrd(
        tmp_path / "first.nrrd",
        data=data.tobytes(),
        dimension="4",
        sizes="2 3 4 5",
        space_directions=f"none {steps}",
        kinds="list domain domain domain",
    )
    last = nrrd(
        tmp_path / "last.nrrd",
        data=data.tobytes(),
        dimension="4",
        sizes="3 4 5 2",
        space_directions=f"{steps} none",
        kinds="domain domain domain list",
    )
    np.testing.assert_array_equal(read_image(first).array, data.reshape(2, 3, 4, 5, order="F"))
    np.testing.assert_array_equal(read_image(last).array, data.reshape(3, 4, 5, 2, order="F").transpose(3, 0, 1, 2))


def test_nrrd_without_space_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = nrrd(tmp_path / "a.nrrd", space="", space_directions="", space_origin="", spacings="1 2 3")
    with caplog.at_level(logging.WARNING):
        volume = read_image(path)
    assert volume.geometry.spacing == (1, 2, 3)
    assert "no space; axes are taken as left, posterior, superior" in caplog.text


BAD_NRRD: dict[str, tuple[dict[str, Any], str]] = {
    "bomb": ({"sizes": "30000 30000 30000"}, "ends before the 54000000000000 bytes"),
    "packed bomb": ({"encoding": "gzip", "data": gzip.compress(bytes(1 << 22))}, "goes on after the 120 bytes"),
    "cut short": ({"data": bytes(100)}, "ends before the 120 bytes"),
    "packed and cut short": ({"encoding": "gzip", "data": gzip.compress(bytes(120))[:-9]}, "ends before the 120"),
    "packed and short": ({"encoding": "gzip", "data": gzip.compress(bytes(99))}, "ends before the 120"),
    "not packed": ({"encoding": "gzip"}, "compressed data are damaged"),
    "text": ({"encoding": "ascii"}, "in the encoding ascii"),
    "colours": ({"kinds": "RGB-color domain domain", "type": "uchar"}, "colours or matrices"),
    "strange space": ({"space": "scanner-xyz"}, "the space scanner-xyz"),
    "sheared": ({"space directions": "(1,0.1,0) (0,2,0) (0,0,3)"}, "not at right angles"),
    "flat axis": ({"space directions": "(0,0,0) (0,2,0) (0,0,3)"}, "."),
    "far away": ({"space origin": "(1e9,0,0)"}, "the first voxel lies at"),
    "no sizes": ({"sizes": ""}, "is no image"),
    "negative sizes": ({"sizes": "3 -4 5"}, "is no image"),
    "sizes in words": ({"sizes": "a b c"}, "header is damaged ('a b c')"),
    "blocks": ({"type": "block"}, "voxels of an unknown type"),
    "constant": ({"data": bytes(120)}, "every voxel is 0"),
    "elsewhere": ({"data file": "../secret.raw"}, "'../secret.raw' does not lie beside it"),
    "absolute": ({"data file": "/etc/passwd"}, "'/etc/passwd' does not lie beside it"),
    "many files": ({"data file": "slice%03d.raw 1 5 1"}, "voxels in several files"),
    "listed files": ({"data file": "LIST"}, "voxels in several files"),
    "gone": ({"data file": "a.raw"}, "no file a.raw lies beside it"),
    "skipped bytes": ({"byte skip": "4"}, "bytes before the voxels are to be skipped"),
    "skipped lines": ({"line skip": "4"}, "lines before the voxels are to be skipped"),
    "line that begins twice": ({"Type": "double"}, "says twice what type is"),
}


@pytest.mark.parametrize("case", BAD_NRRD)
def test_bad_nrrd_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, fact = BAD_NRRD[case]
    assert fact in refusal(nrrd(tmp_path / "a.nrrd", **changes))


def meta(path: Path, *, data: bytes = bytes(range(60)) * 2, **changes: str) -> Path:
    """Writes a MetaImage file of 3 x 4 x 5 voxels, int16, key by key."""
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "CompressedDataSize": "",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "1 2 3",
        "ElementSpacing": "1 2 3",
        "DimSize": "3 4 5",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }
    fields |= changes
    path.write_bytes("".join(f"{name} = {value}\n" for name, value in fields.items() if value).encode() + data)
    return path


PACKED = zlib.compress(bytes(range(60)) * 2)
BAD_META: dict[str, tuple[dict[str, Any], str]] = {
    "bomb": ({"DimSize": "30000 30000 30000"}, "ends before the 54000000000000 bytes"),
    "packed bomb": ({"CompressedData": "True", "data": zlib.compress(bytes(1 << 22))}, "goes on after the 120"),
    "cut short": ({"data": bytes(100)}, "ends before the 120 bytes"),
    "packed and cut short": ({"CompressedData": "True", "data": PACKED[:-2]}, "ends before the 120 bytes"),
    "packed with a wrong bit": ({"CompressedData": "True", "data": PACKED[:-1] + b"?"}, "compressed data are damaged"),
    "packed without a size": ({"CompressedData": "True", "data": PACKED}, "where CompressedDataSize is 0. Save"),
    "text": ({"BinaryData": "False"}, "stored as text"),
    "unknown type": ({"ElementType": "MET_OTHER"}, "voxels of an unknown type"),
    "no size": ({"DimSize": ""}, "is no image"),
    "elsewhere": ({"ElementDataFile": "../a.raw"}, "'../a.raw' does not lie beside it"),
    "listed": ({"ElementDataFile": "LIST"}, "voxels in several files"),
    "pattern": ({"ElementDataFile": "a.%03d 1 5 1"}, "voxels in several files"),
    "gone": ({"ElementDataFile": "a.raw"}, "no file a.raw lies beside it"),
    "sheared": ({"TransformMatrix": "1 0 0 0.2 0.98 0 0 0 1"}, "."),
    "flat": ({"TransformMatrix": "0 0 0 0 1 0 0 0 1"}, "."),
    "huge edges": ({"ElementSpacing": "1e6 1 1"}, "voxel edges of"),
    "constant": ({"data": bytes(120)}, "every voxel is 0"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_bad_metaimage_is_refused_in_one_line(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes, fact = BAD_META[case]
    assert fact in refusal(meta(tmp_path / "a.mha", **changes))
    assert capfd.readouterr() == ("", ""), "no library speaks past us"


def test_sound_metaimage_of_the_same_pen_is_read(tmp_path: Path) -> None:
    stored = np.frombuffer(bytes(range(60)) * 2, "<i2").reshape(3, 4, 5, order="F")
    packed: dict[str, Any] = {"CompressedData": "True", "CompressedDataSize": str(len(PACKED)), "data": PACKED}
    for name, changes in {"a.mha": {}, "b.mha": packed}.items():
        np.testing.assert_array_equal(read_image(meta(tmp_path / name, **changes)).array[0], stored)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", bytes(500), b"NRRD0005\n", b"a = b\n"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_foreign_content_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert refusal(tmp_path / f"a{suffix}").startswith(f"{tmp_path / f'a{suffix}'}: ")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_file_is_named(suffix: str, tmp_path: Path) -> None:
    assert "no such file. Check" in refusal(tmp_path / f"gone{suffix}")


def test_voxel_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    array = voxels("float32")
    array[1, 2, 3] = np.nan
    save(tmp_path / "a.mha", array)
    assert "1 voxels are NaN" in refusal(tmp_path / "a.mha")
    array[1, 2, 3] = 1.5
    save(tmp_path / "b.mha", array)
    with pytest.raises(MedmomError, match=r"1 label values are not whole numbers, such as 1\.5"):
        read_label(tmp_path / "b.mha")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_label_map_keeps_its_values(suffix: str, dtype: str, tmp_path: Path) -> None:
    save(tmp_path / f"a{suffix}", voxels(dtype), packed=True)
    label = read_label(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(label.array, voxels(dtype))
    assert label.array.dtype.kind in "iu"


def test_label_map_of_several_channels_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.nrrd", np.stack([voxels()] * 2, axis=3))
    with pytest.raises(MedmomError, match="a label map with 2 channels"):
        read_label(tmp_path / "a.nrrd")


def test_result_is_written_as_nifti_on_the_same_grid(tmp_path: Path) -> None:
    affine = save(tmp_path / "a.nrrd", voxels())
    volume, labels = read_image(tmp_path / "a.nrrd"), Labels(("background", "one"), (0, 1))
    write_label(tmp_path / "out.nii.gz", (voxels() > 50).astype(np.uint8), labels, volume)
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 0)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert Geometry(written.shape, written.affine).is_close(read_geometry(tmp_path / "out.nii.gz"))


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_detached_voxels_are_content_too(suffix: str, tmp_path: Path) -> None:
    save(tmp_path / f"a{suffix}", voxels())
    assert [path.name for path in content_files(tmp_path / f"a{suffix}")] == [f"a{suffix}", "a.raw"]


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.nrrd", voxels())
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert "an NRRD file, which is read through SimpleITK. Install" in refusal(tmp_path / "a.nrrd")
    assert "pip install 'medmom[dicom]'" in refusal(tmp_path / "a.nrrd")
