from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medmom.data import nifti
from medmom.data.files import read_image, read_images
from medmom.errors import MedmomError

SHAPE = (5, 6, 37)


def ramp(low: int, high: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Whole numbers over a range, both ends included."""
    return np.rint(np.linspace(low, high, int(np.prod(shape)))).astype(np.int64).reshape(shape)


def save(path: Path, stored: np.ndarray, dtype: str, slope: float = 1, inter: float = 0, *, endian: str = "<") -> Path:
    """Writes stored numbers and scale factors as they are; nibabel would choose its own."""
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_shape(stored.shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.diag([-0.8, -0.8, 1.5, 1]), code=1)
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["magic"], header["vox_offset"] = b"n+1", 352
    data = stored.astype(np.dtype(dtype).newbyteorder(endian)).tobytes(order="F")
    path.write_bytes(header.binaryblock + b"\0" * 4 + data)
    return path


def compact(path: Path) -> np.ndarray:
    """The array, after a look at whether it holds the values of ``read_image``."""
    array = read_images([path], compact=True).array
    np.testing.assert_array_equal(array.astype(np.float32), read_image(path).array)
    assert array.dtype.isnative
    return array


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        ("uint8", 0, 255, "uint8"),
        ("uint8", 0, 9, "uint8"),
        ("int8", -128, 127, "int8"),
        ("int16", -1024, 3071, "int16"),
        ("int16", 0, 9, "int16"),
        ("uint16", 0, 4095, "uint16"),
        ("uint16", 0, 65535, "uint16"),
        ("int32", -1024, 3071, "int16"),
        ("int32", 0, 255, "uint8"),
        ("int32", -(2**31), 2**31 - 1, "int32"),
        ("uint32", 0, 65535, "uint16"),
        ("uint32", 0, 2**31, "float32"),
        ("int64", -129, 5, "int16"),
        ("int64", -(2**40), 2**40, "float32"),
        ("uint64", 7, 2**31 - 1, "int32"),
        ("float32", -1024, 3071, "float32"),
        ("float64", -1024, 3071, "float32"),
    ],
)
def test_integers_stay_integers(*, dtype: str, low: int, high: int, expected: str, endian: str, tmp_path: Path) -> None:
    array = compact(save(tmp_path / "a.nii", ramp(low, high), dtype, endian=endian))
    assert array.dtype == expected


@pytest.mark.parametrize(
    ("dtype", "low", "high", "slope", "inter", "expected"),
    [
        ("int16", 0, 4095, 1, -1024, "int16"),
        ("uint16", 0, 4095, 1, -1024, "int16"),
        ("uint16", 60000, 65535, 1, -60000, "uint16"),
        ("uint16", 0, 65535, 1, -1024, "int32"),
        ("int16", -32768, 32767, 1, -1, "int32"),
        ("int16", -32768, 32767, 1, 32768, "uint16"),
        ("uint8", 0, 255, 1, -1024, "int16"),
        ("uint8", 0, 255, 1, -128, "int8"),
        ("int8", -128, 127, 1, 128, "uint8"),
        ("int32", 2**31 - 9, 2**31 - 1, 1, -(2.0**31), "int8"),
        ("int32", -(2**31), 2**31 - 1, 1, 1, "float32"),
        ("uint32", 2**32 - 5000, 2**32 - 1, 1, -(2.0**31), "int32"),
        ("int16", 0, 4095, 1, 2.0**33, "float32"),
        ("uint64", 2**62, 2**62 + 50_000, 1, -(2.0**62), "float32"),
        ("int16", 0, 4095, 1, -0.5, "float32"),
        ("int16", 0, 4095, 2, 0, "float32"),
        ("int16", 0, 4095, -1, 0, "float32"),
        ("float32", 0, 4095, 1, -1024, "float32"),
        ("int16", 0, 4095, 0, -1024, "int16"),
        ("float32", 0, 4095, 0, 0, "float32"),
    ],
)
def test_whole_intercepts_are_added_to_integers(
    *, dtype: str, low: int, high: int, slope: float, inter: float, expected: str, tmp_path: Path
) -> None:
    array = compact(save(tmp_path / "a.nii", ramp(low, high), dtype, slope, inter))
    assert array.dtype == expected
    if slope == 1:
        assert np.float32(array.min()) == np.float32(low + inter)
    if slope == 0:
        assert array.min() == low, "a slope of 0 asks for no scaling"


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_volumes_of_one_file_are_channels_in_the_order_of_the_file(dtype: str, tmp_path: Path) -> None:
    array = compact(save(tmp_path / "a.nii", ramp(-500, 499, (*SHAPE, 3)), dtype))
    assert array.shape == (3, *SHAPE)
    assert array.transpose(0, 3, 2, 1).flags.c_contiguous


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (("int16", "int16"), "int16"),
        (("uint8", "int16"), "int16"),
        (("int16", "uint16"), "int32"),
        (("uint8", "int8", "uint16"), "int32"),
        (("uint16", "float32"), "float32"),
    ],
)
def test_channels_of_several_files_get_a_type_that_holds_all(
    types: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    paths = [save(tmp_path / f"{k}.nii", ramp(k, 99 + k), name) for k, name in enumerate(types)]
    volume = read_images(paths, compact=True)
    assert volume.array.dtype == expected
    np.testing.assert_array_equal(volume.array.astype(np.float32), read_images(paths).array)


def test_wide_integers_beside_floats_become_float32(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / "a.nii", ramp(-(2**31), 2**31 - 1), "int32"),
        save(tmp_path / "b.nii", ramp(0, 9), "float32"),
    ]
    found = read_images(paths, compact=True).array
    np.testing.assert_array_equal(found, read_images(paths).array, strict=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("dtype", "slope"), [("float32", 1), ("float64", 1), ("float32", 2)])
def test_voxels_that_are_no_numbers_are_refused(value: float, dtype: str, slope: float, tmp_path: Path) -> None:
    stored = ramp(0, 99).astype(np.float64)
    stored[1, 2, 3:5] = value
    path = save(tmp_path / "a.nii", stored, dtype, slope)
    with pytest.raises(MedmomError, match=r"a.nii: 2 voxels are NaN, infinite or beyond 32-bit range"):
        read_images([path], compact=True)


def test_constant_image_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.full(SHAPE, 7), "int16", 1, -1024)
    with pytest.raises(MedmomError, match=r"every voxel is -1017, the image shows nothing"):
        read_images([path], compact=True)


def test_picture_is_float32_all_the_same(tmp_path: Path) -> None:
    Image.fromarray(ramp(0, 255, (7, 5)).astype(np.uint8)).save(tmp_path / "a.png")
    array = read_images([tmp_path / "a.png"], compact=True).array
    np.testing.assert_array_equal(array, read_images([tmp_path / "a.png"]).array, strict=True)


@pytest.mark.parametrize(
    ("dtype", "inter", "endian", "copies"),
    [("int16", 0, "<", 1), ("int16", -1024, "<", 1), ("uint16", -1024, ">", 1), ("float32", 0, ">", 1),
     ("int32", 0, "<", 1.5), ("uint8", -1024, "<", 3)],
)  # fmt: skip
def test_voxels_are_held_once(
    *, dtype: str, inter: float, endian: str, copies: float, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(nifti, "CHUNK", 1 << 14)
    path = save(tmp_path / "a.nii", ramp(0, 200, (64, 64, 256)), dtype, 1, inter, endian=endian)
    stored = 64 * 64 * 256 * np.dtype(dtype).itemsize
    read_images([save(tmp_path / "b.nii", ramp(0, 200), dtype)], compact=True)
    tracemalloc.start()
    try:
        read_images([path], compact=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    slabs = 8 * 64 * 64 * 16 * 2
    assert peak < 1.02 * copies * stored + slabs
