from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmom.data import nifti
from medmom.data.files import (
    is_image,
    read_geometry,
    read_image,
    read_images,
    read_json,
    read_label,
    stem,
    write_json,
    write_label,
    write_text,
)
from medmom.errors import MedmomError
from medmom.labels import Labels

LABELS = Labels(("background", "liver", "spleen & co <2>"), (0, 1, 3))
AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
SHAPE = (5, 6, 7)


def ramp(dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(path: Path, array: np.ndarray, *, affine: np.ndarray = AFFINE, kind: type = nib.Nifti1Image) -> Path:
    kind(array, affine, dtype=array.dtype).to_filename(path)
    return path


def header_bytes(array: np.ndarray, **fields: object) -> bytearray:
    """One uncompressed file, with header fields set after nibabel has had its say."""
    image = nib.Nifti1Image(array, AFFINE, dtype=array.dtype)
    for name, value in fields.items():
        image.header[name] = value
    block = bytearray(image.header.binaryblock + b"\0" * 4 + array.tobytes(order="F"))
    struct.pack_into("<f", block, 108, 352.0)
    return block


def refusal(path: Path) -> str:
    with pytest.raises(MedmomError) as caught:
        read_image(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_image_equals_what_nibabel_reads(tmp_path: Path, dtype: str, kind: type) -> None:
    path = save(tmp_path / "a.nii.gz", ramp(dtype) % 100, kind=kind)
    volume = read_image(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], nib.load(path).get_fdata())
    np.testing.assert_array_equal(volume.geometry.affine, nib.load(path).affine)
    assert volume.geometry.shape == SHAPE


def test_scale_factors_are_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp("float64"), AFFINE)
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.5, -100)
    image.to_filename(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz").array[0], ramp() * 0.5 - 100)


def test_large_integers_are_scaled_in_double_precision(tmp_path: Path) -> None:
    block = header_bytes(ramp("int32") + 2**30, scl_slope=1.0, scl_inter=-float(2**30))
    (tmp_path / "a.nii").write_bytes(block)
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").array[0], ramp())


def test_big_endian_is_read(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    image = nib.Nifti1Image(ramp(), AFFINE, header)
    image.header.set_data_dtype(">f4")
    image.to_filename(tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").array[0], ramp())


@pytest.mark.parametrize("factor", [1e-7, 1e6])
def test_tiny_and_huge_intensities_survive(tmp_path: Path, factor: float) -> None:
    path = save(tmp_path / "a.nii.gz", ramp("float64") * factor)
    np.testing.assert_allclose(read_image(path).array[0] / factor, ramp(), rtol=1e-6)


def test_fourth_axis_holds_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", ramp(shape=(*SHAPE, 3)))
    volume = read_image(path)
    assert volume.array.shape == (3, *SHAPE)
    np.testing.assert_array_equal(volume.array[2], ramp(shape=(*SHAPE, 3))[..., 2])


def test_trailing_single_axes_are_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", ramp(shape=(*SHAPE, 1, 1)))
    assert read_image(path).array.shape == (1, *SHAPE)


@pytest.mark.parametrize(
    ("shape", "read"), [((5, 6), (1, 5, 6, 1)), ((5, 6, 1), (1, 5, 6, 1)), ((1, 6, 7), (1, 1, 6, 7))]
)
def test_one_slice_is_read(tmp_path: Path, shape: tuple[int, ...], read: tuple[int, ...]) -> None:
    assert read_image(save(tmp_path / "a.nii.gz", ramp(shape=shape))).array.shape == read


@pytest.mark.parametrize("ending", ["hdr", "img"])
def test_either_half_of_a_pair_opens_it(tmp_path: Path, ending: str) -> None:
    save(tmp_path / "a.img", ramp(), kind=nib.Nifti1Pair)
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}").array[0], ramp())


@pytest.mark.parametrize("ending", ["hdr", "img"])
def test_half_a_pair_alone_is_refused(tmp_path: Path, ending: str) -> None:
    save(tmp_path / "a.img", ramp(), kind=nib.Nifti1Pair)
    (tmp_path / {"hdr": "a.img", "img": "a.hdr"}[ending]).unlink()
    assert "lies beside it" in refusal(tmp_path / f"a.{ending}")


def test_bytes_decide_on_compression_and_not_the_suffix(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.nii", ramp()).read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_image(tmp_path / name).array[0], ramp())


def test_suffix_is_known_in_any_case(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", ramp()).rename(tmp_path / "A.NII.GZ")
    assert read_image(tmp_path / "A.NII.GZ").array.shape == (1, *SHAPE)
    assert [is_image(n) for n in ("A.NII.GZ", "a.hdr", "a.img", "a.gz", "nii")] == [True, True, False, False, False]
    assert [stem(n) for n in ("x/A.b.NII.GZ", "a.nii", "a.hdr", "a.csv")] == ["A.b", "a", "a", "a"]


def test_geometry_is_read_without_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp())
    path.write_bytes(path.read_bytes()[:352])
    assert read_geometry(path).spacing == (1.5, 2.0, 3.0)


def test_voxels_cut_short_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.nii", ramp()).read_bytes()
    (tmp_path / "a.nii").write_bytes(whole[:-8])
    assert "ends before" in refusal(tmp_path / "a.nii")
    for packed in (gzip.compress(whole)[:-12], gzip.compress(whole[:-8])):
        (tmp_path / "a.nii.gz").write_bytes(packed)
        assert "Copy" in refusal(tmp_path / "a.nii.gz")


def test_flipped_byte_in_compressed_voxels_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(save(tmp_path / "a.nii", ramp()).read_bytes(), compresslevel=0))
    packed[-20] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(packed)
    assert "damaged (CRC check failed" in refusal(tmp_path / "a.nii.gz")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "empty"),
        (b"not an image at all" * 40, "not a NIfTI file, it begins with b'not an i'"),
        (struct.pack("<i", 348) + b"\0" * 344, "Analyze"),
        (b"\x5c\x01\0\0" + b"\0" * 340 + b"n+1\0" + b"\0" * 400, "header is damaged (data code 0"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_is_no_nifti_is_refused(tmp_path: Path, content: bytes, fact: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert fact in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("a.dcm", b"\0" * 128 + b"DICM", "a DICOM file"),
        ("scan", b"\0" * 128 + b"DICM", "a DICOM file"),
        ("a.nrrd", b"NRRD0004\n", "an NRRD file"),
        ("a.mha", b"ObjectType = Image\n", "a MetaImage file"),
        ("a.mgz", gzip.compress(b"\0\0\0\1", mtime=0), "not a NIfTI file by its name"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, content: bytes, fact: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert fact in refusal(tmp_path / name)
    assert "Convert it to NIfTI" in refusal(tmp_path / name)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "a.nii")
    assert "a folder" in refusal(tmp_path)


def test_name_that_the_disk_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300 + ".nii.gz")
    assert "cannot be read (File name too long)" in refusal(path)
    like = read_image(save(tmp_path / "in.nii.gz", ramp()))
    with pytest.raises(MedmomError, match="cannot be written"):
        write_label(path, np.zeros(SHAPE), LABELS, like)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_voxel_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    array = ramp("float64")
    array[1, 2, 3] = value
    assert "1 voxels are NaN, infinite" in refusal(save(tmp_path / "a.nii.gz", array))


def test_constant_image_is_refused_but_one_blank_channel_is_read(tmp_path: Path) -> None:
    assert "every voxel is 7" in refusal(save(tmp_path / "a.nii.gz", np.full(SHAPE, 7, "uint8")))
    save(tmp_path / "b.nii.gz", np.stack([ramp(), np.zeros(SHAPE, "float32")], -1))
    assert read_image(tmp_path / "b.nii.gz").array.shape == (2, *SHAPE)
    save(tmp_path / "c.nii.gz", np.zeros(SHAPE, "float32"))
    assert read_images([save(tmp_path / "d.nii.gz", ramp()), tmp_path / "c.nii.gz"]).array.shape == (2, *SHAPE)


@pytest.mark.parametrize(
    ("array", "fact"),
    [
        (ramp("complex64"), "complex numbers"),
        (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
        (ramp(shape=(5, 6, 7, 1, 3)), "5 x 6 x 7 x 1 x 3 is no image volume"),
        (ramp(shape=(1, 5, 6, 7)), "channels first"),
        (ramp(shape=(2000, 1, 1)), "a line of values"),
        (ramp(shape=(9,)), "no image volume"),
    ],
)
def test_what_is_no_grey_volume_is_refused(tmp_path: Path, array: np.ndarray, fact: str) -> None:
    assert fact in refusal(save(tmp_path / "a.nii.gz", array))


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"sform_code": 0, "qform_code": 0, "pixdim": [1, 1, 1, 0, 1, 1, 1, 1]}, "voxel edges of 1 x 1 x 0 mm"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 1, -1, 1, 1, 1, 1, 1]}, "voxel edges of 1 x -1 x 1 mm"),
        ({"srow_x": [0, 0, 0, 0]}, "voxel edges of"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine"),
        ({"srow_x": [1.5, 0, 0, 0], "srow_y": [1.5, 0, 0, 0]}, "voxel edges of"),
        ({"srow_y": [1.5, 1.0, 0, 0]}, "not at right angles"),
        ({"srow_x": [0, -2e6, 0, 0]}, "voxel edges of"),
        ({"srow_x": [0, -2, 0, 1e30]}, "the first voxel lies at 1e+30 x"),
        ({"xyzt_units": 3}, "micrometres"),
        ({"xyzt_units": 1}, "metres"),
        ({"datatype": 7}, "data code 7"),
        ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "the header announces 30000 x 30000 x 30000 voxels"),
        ({"dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "ends before the 4000000000 bytes"),
        ({"dim": [3, 5, -6, 7, 1, 1, 1, 1]}, "no image volume"),
        ({"dim": [9, 5, 6, 7, 1, 1, 1, 1]}, "header is damaged (dim[0] is 9 or 2304, by byte order)"),
        ({"dim": [255, 5, 6, 7, 1, 1, 1, 1]}, "dim[0] is 255 or -256"),
        ({"sform_code": 261}, "sform_code 261 has no meaning"),
        ({"qform_code": -1}, "qform_code -1 has no meaning"),
        ({"qform_code": 1, "pixdim": [-0.5, 2, 1.5, 3, 1, 1, 1, 1]}, "a qform whose pixdim[0] is -0.5"),
        ({"qform_code": 1, "pixdim": [1, 2, np.nan, 3, 1, 1, 1, 1]}, "voxel edges of 2 x nan x 3 mm in the qform"),
        ({"scl_slope": np.inf}, "scl_slope"),
        ({"magic": b"ni1"}, "which its suffix denies"),
        ({"intent_code": 3001}, "CIFTI"),
    ],
)
def test_header_that_cannot_be_used_is_refused(tmp_path: Path, fields: dict[str, object], fact: str) -> None:
    block = header_bytes(ramp(), **fields)
    for name, content in (("a.nii", block), ("a.nii.gz", gzip.compress(block))):
        (tmp_path / name).write_bytes(content)
        assert fact in refusal(tmp_path / name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_random_damage_is_read_or_refused_in_a_line(tmp_path: Path, seed: int, kind: type) -> None:
    whole = save(tmp_path / "a.nii", ramp("int16"), kind=kind).read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(150):
        block = bytearray(whole[: rng.integers(300, len(whole) + 300)])
        for place in rng.integers(min(len(block), 560), size=rng.integers(1, 5)):
            block[place] = rng.integers(256)
        (tmp_path / "a.nii").write_bytes(block)
        for read in (read_image, read_label):
            try:
                read(tmp_path / "a.nii")
            except MedmomError as error:
                assert str(error).startswith(str(tmp_path / "a.nii"))
                assert "\n" not in str(error)


def test_voxels_that_begin_absurdly_late_are_refused(tmp_path: Path) -> None:
    block = header_bytes(ramp())
    struct.pack_into("<f", block, 108, 1e9)
    (tmp_path / "a.nii").write_bytes(block)
    assert "begin at byte 1000000000" in refusal(tmp_path / "a.nii")


def test_announced_gigabytes_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = header_bytes(ramp(), dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(block))
    sizes: list[int] = []
    monkeypatch.setattr(nifti.np, "empty", lambda size, **kwargs: sizes.append(size) or np.zeros(size, **kwargs))
    refusal(tmp_path / "a.nii.gz")
    assert max(sizes) < 1_000_000


def form(**codes: int) -> dict[str, object]:
    return {f"{name}_code": code for name, code in codes.items()}


def test_image_without_orientation_has_the_affine_of_nibabel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.nii").write_bytes(header_bytes(ramp(), **form(qform=0, sform=0)))
    affine = read_image(tmp_path / "a.nii").geometry.affine
    np.testing.assert_array_equal(affine, nib.load(tmp_path / "a.nii").affine)
    assert "no qform and no sform" in caplog.text


def conflicting(path: Path, qform: np.ndarray, sform: np.ndarray, codes: tuple[int, int]) -> Path:
    image = nib.Nifti1Image(ramp(), None)
    image.set_qform(qform, codes[0])
    image.set_sform(sform, codes[1])
    image.to_filename(path)
    return path


def test_forms_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    shifted, mirrored = AFFINE.copy(), AFFINE @ np.diag([-1, 1, 1, 1])
    shifted[:3, 3] += 40
    assert "69.3 mm apart" in refusal(conflicting(tmp_path / "a.nii", shifted, AFFINE, (1, 1)))
    assert "mirror each other" in refusal(conflicting(tmp_path / "b.nii", mirrored, AFFINE, (1, 4)))


def test_sform_of_another_space_counts_before_the_qform(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[:3, 3] += 40
    path = conflicting(tmp_path / "a.nii", shifted, AFFINE, (1, 4))
    np.testing.assert_allclose(read_geometry(path).affine, AFFINE, atol=1e-6)


def test_files_of_one_case_become_channels(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"a_{k}.nii.gz", ramp() * (k + 1)) for k in range(3)]
    np.testing.assert_array_equal(read_images(paths).array[2], 3 * ramp())


@pytest.mark.parametrize(
    ("shape", "affine", "fact"),
    [
        ((5, 6, 8), AFFINE, "shape 5 x 6 x 8 instead of 5 x 6 x 7"),
        (SHAPE, AFFINE @ np.diag([1, 1, 2, 1]), "spacing 1.5 x 2 x 6 mm instead of 1.5 x 2 x 3 mm"),
        (SHAPE, AFFINE + np.outer([15, 0, 0, 0], [0, 0, 0, 1]), "15 mm away"),
    ],
)
def test_channels_on_different_grids_are_refused(
    tmp_path: Path, shape: tuple[int, ...], affine: np.ndarray, fact: str
) -> None:
    first = save(tmp_path / "a.nii.gz", ramp())
    second = save(tmp_path / "b.nii.gz", ramp(shape=shape), affine=affine)
    with pytest.raises(MedmomError, match="another grid than") as caught:
        read_images([first, second])
    assert fact in str(caught.value)
    assert str(caught.value).startswith(str(second))


def test_label_is_read_as_integers(tmp_path: Path) -> None:
    for dtype in ("uint8", "int16", "float32", "float64"):
        volume = read_label(save(tmp_path / "a.nii.gz", ramp(dtype, SHAPE) % 5))
        assert volume.array.dtype.kind in "iu"
        np.testing.assert_array_equal(volume.array, ramp("int64") % 5)


def test_label_that_is_constant_is_read(tmp_path: Path) -> None:
    assert not read_label(save(tmp_path / "a.nii.gz", np.zeros(SHAPE, "uint8"))).array.any()


@pytest.mark.parametrize("value", [1.4999, np.nan, np.inf])
def test_label_value_that_is_not_whole_is_refused(tmp_path: Path, value: float) -> None:
    array = ramp()
    array[0, 0, 0] = value
    with pytest.raises(MedmomError, match=f"1 label values are not whole numbers, such as {value}"):
        read_label(save(tmp_path / "a.nii.gz", array))


def test_label_with_several_volumes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="a label map with 2 volumes"):
        read_label(save(tmp_path / "a.nii.gz", ramp("uint8", (*SHAPE, 2))))


def written(tmp_path: Path, image: nib.Nifti1Image, name: str = "out.nii.gz") -> nib.Nifti1Image:
    image.to_filename(tmp_path / "in.nii.gz")
    like = read_image(tmp_path / "in.nii.gz")
    write_label(tmp_path / name, np.full(like.geometry.shape, 3), LABELS, like)
    return nib.load(tmp_path / name)


@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 4), (0, 0), (2, 2)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii", "OUT.NII.GZ"])
def test_written_label_has_affine_codes_and_units_of_the_image(
    tmp_path: Path, codes: tuple[int, int], kind: type, name: str
) -> None:
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    image = kind(ramp(), rotation @ AFFINE)
    image.set_qform(rotation @ AFFINE, codes[0])
    image.set_sform(rotation @ AFFINE, codes[1])
    image.header.set_xyzt_units("mm")
    out = written(tmp_path, image, name)
    again = nib.load(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(out.affine, again.affine)
    assert (int(out.header["qform_code"]), int(out.header["sform_code"])) == codes
    assert out.header.get_zooms() == again.header.get_zooms()
    assert out.header.get_xyzt_units() == ("mm", "unknown")
    assert type(out) is kind
    assert out.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(out.dataobj), np.full(SHAPE, 3))


def test_written_label_has_numbers_where_the_image_has_none(tmp_path: Path) -> None:
    fields = {"pixdim": [1, np.nan, 0, -3, 1, 1, 1, 1], "quatern_b": np.nan, "qoffset_x": np.inf, "qform_code": 0}
    (tmp_path / "in.nii").write_bytes(header_bytes(ramp(), sform_code=1, **fields))
    like = read_image(tmp_path / "in.nii")
    write_label(tmp_path / "out.nii", np.full(SHAPE, 3), LABELS, like)
    out = nib.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(out.affine, AFFINE)
    assert out.header.get_zooms() == (1.5, 2, 3)
    assert [float(out.header[name]) for name in ("quatern_b", "qoffset_x")] == [0, 0]


def test_label_of_a_flat_image_keeps_two_axes(tmp_path: Path) -> None:
    out = written(tmp_path, nib.Nifti1Image(ramp(shape=(5, 6)), AFFINE))
    assert out.shape == (5, 6)
    np.testing.assert_array_equal(out.affine, nib.load(tmp_path / "in.nii.gz").affine)


def test_written_label_carries_class_names(tmp_path: Path) -> None:
    out = written(tmp_path, nib.Nifti1Image(ramp(), AFFINE))
    (extension,) = out.header.extensions
    table = extension.get_content().decode()
    assert '<Label Key="1"' in table
    assert ">spleen &amp; co &lt;2&gt;</Label>" in table


def test_written_label_is_read_back_voxel_for_voxel(tmp_path: Path) -> None:
    like = read_image(save(tmp_path / "in.nii.gz", ramp()))
    label = np.random.default_rng(0).choice([0, 1, 3], SHAPE)
    write_label(tmp_path / "out.nii.gz", label, LABELS, like)
    again = read_label(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(again.array, label)
    assert again.geometry.is_close(like.geometry, 0)


@pytest.mark.parametrize(("values", "dtype"), [((0, 255), "uint8"), ((0, 300), "uint16"), ((0, -1), "int8")])
def test_written_type_holds_the_labels_and_no_more(tmp_path: Path, values: tuple[int, int], dtype: str) -> None:
    like = read_image(save(tmp_path / "in.nii.gz", ramp()))
    label = np.zeros(SHAPE, int)
    label[0] = values[1]
    write_label(tmp_path / "out.nii.gz", label, Labels(("background", "a"), values), like)
    assert nib.load(tmp_path / "out.nii.gz").get_data_dtype() == dtype
    np.testing.assert_array_equal(read_label(tmp_path / "out.nii.gz").array, label)


def test_same_label_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    like = read_image(save(tmp_path / "in.nii.gz", ramp()))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label(tmp_path / name, np.ones(SHAPE), LABELS, like)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    # The four bytes of gzip's time of writing.
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == bytes(4)


def test_label_never_replaces_its_image(tmp_path: Path) -> None:
    path = save(tmp_path / "in.nii.gz", ramp())
    before, like = path.read_bytes(), read_image(path)
    (tmp_path / "link.nii.gz").symlink_to(path)
    os.link(path, tmp_path / "hard.nii.gz")
    for name in ("in.nii.gz", "link.nii.gz", "hard.nii.gz", "../" + tmp_path.name + "/in.nii.gz"):
        with pytest.raises(MedmomError, match="would replace its own input"):
            write_label(tmp_path / name, np.zeros(SHAPE), LABELS, like)
    assert path.read_bytes() == before


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    like = read_image(save(tmp_path / "in.nii.gz", ramp()))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.nii.gz").mkdir()
    for name in ("file/out.nii.gz", "folder.nii.gz"):
        with pytest.raises(MedmomError, match="cannot be written"):
            write_label(tmp_path / name, np.zeros(SHAPE), LABELS, like)
    with pytest.raises(MedmomError, match="are written as"):
        write_label(tmp_path / "out.mha", np.zeros(SHAPE), LABELS, like)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.nii.gz", "in.nii.gz"]


def test_label_of_another_shape_or_range_is_an_error_of_the_caller(tmp_path: Path) -> None:
    like = read_image(save(tmp_path / "in.nii.gz", ramp()))
    for label in (np.zeros((5, 6, 8)), np.full(SHAPE, 256), np.full(SHAPE, 0.5)):
        with pytest.raises(ValueError, match="a label map"):
            write_label(tmp_path / "out.nii.gz", label, LABELS, like)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MedmomError, match=r"a.txt: cannot be written \(No space left on device\)"):
        write_text(tmp_path / "a.txt", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_json_is_read_back_and_faults_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"name": "ünï", "values": [1, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"name": "ünï", "values": [1, None]}
    (tmp_path / "b.json").write_text('{"a": 1,\n ]')
    with pytest.raises(MedmomError, match=r"b.json: not valid JSON at line 2, column 2"):
        read_json(tmp_path / "b.json")
    with pytest.raises(MedmomError, match="cannot be read"):
        read_json(tmp_path / "c.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
