from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmom.data.files import read_geometry, read_image, read_images, read_label
from medmom.errors import MedmomError
from medmom.labels import Labels

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "odd-inputs"

# Decisions on what the collection leaves open; they stand in the docstring of read_image.
READ = {
    "formats/air.hdr.gz",
    "formats/air2.hdr.gz",
    "derived/single_slice.nii.gz",
    "derived/two_d.nii.gz",
    "derived/qform_sform_both_zero.nii.gz",
    "derived/not_gzipped.nii.gz",
    "derived/gzipped.nii",
    "dicom/two-slices-only",
}
REFUSED = {
    "formats/shear.nii.gz": "not at right angles",
    "formats/wm.mgz": "Convert it to NIfTI",
    "formats/test.mgz": "Convert it to NIfTI",
    "formats/scaled+tlrc.HEAD": "Convert it to NIfTI",
    "formats/small.mnc": "Convert it to NIfTI",
    "formats/tiny.mnc": "Convert it to NIfTI",
    "formats/minc2_baddim.mnc": "Convert it to NIfTI",
    "formats/phantom_EPI_asc_CLEAR_2_1.PAR": "Convert it to NIfTI",
    "derived/zeros.nii.gz": "every voxel is 0",
    "derived/constant.nii.gz": "every voxel is 7",
    "derived/zero_pixdim.nii.gz": "voxel edges of 1 x 1 x 0 mm",
    "derived/qform_sform_conflict.nii.gz": "mirror each other",
    "derived/sheared.nii.gz": "not at right angles",
    "derived/analyze75.hdr": "Analyze 7.5",
}
# Sound images of several channels: it is the model that has another number and refuses them.
CHANNELS = {
    "formats/mpld_asl.nii.gz": 25,
    "formats/V1.nii.gz": 3,
    "formats/functional.nii": 20,
    "formats/example4d.nii.gz": 2,
    "formats/example_nifti2.nii.gz": 2,
    "derived/four_d_two.nii.gz": 2,
}


def entries(*expected: str) -> list[Any]:
    """Paths of the manifest with one of these expectations; one skipped entry without the collection."""
    if not (FOLDER / "manifest.csv").is_file():
        return [pytest.param("", marks=pytest.mark.skip(reason="no real data"))]
    with (FOLDER / "manifest.csv").open(encoding="utf-8", newline="") as stream:
        return [row["path"] for row in csv.DictReader(stream) if row["expect"] in expected]


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz", ".hdr", ".hdr.gz"))


def assert_read_like_nibabel(path: Path) -> None:
    volume = read_image(path)
    assert volume.array.dtype == np.float32
    if is_nifti(path) and path.name not in ("not_gzipped.nii.gz", "gzipped.nii"):
        twin = nib.load(path)
        data = np.asarray(twin.dataobj, dtype=np.float32).reshape(volume.geometry.shape)
        np.testing.assert_allclose(volume.array[0], data, rtol=1e-6)
        np.testing.assert_allclose(volume.geometry.affine, twin.affine, rtol=0, atol=1e-9)


def assert_refused(path: Path, fact: str = "") -> None:
    with pytest.raises(MedmomError) as caught:
        read_image(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert fact in text
    assert "\n" not in text
    # A fact and a mend are two sentences.
    assert re.search(r"\. [A-Z].*\.$", text)


@pytest.mark.parametrize("path", entries("predict", "equals base"))
def test_unusual_image_is_read_as_nibabel_reads_it(path: str) -> None:
    assert_read_like_nibabel(FOLDER / path)


@pytest.mark.parametrize("path", entries("refuse"))
def test_image_that_is_not_usable_is_refused(path: str) -> None:
    if path in CHANNELS:
        assert len(read_image(FOLDER / path).array) == CHANNELS[path]
    else:
        assert_refused(FOLDER / path)


# Size, orientation, spacing (mm) and range of what the optional readers give.
OPTIONAL = {
    "formats/FLAIR.nrrd": ((124, 160, 140), "RAS", (1, 1, 1), (0, 255)),
    "formats/mha.mha": ((64, 64, 37), "LAS", (3.4375, 3.4375, 3.8), (0, 6690)),
    "formats/enh.dcm": ((64, 64, 6), "LPS", (3.375, 3.375, 2.4), (0, 1195)),
    "dicom/rle": ((256, 256, 4), "PIR", (1, 1, 1), (0, 254)),
    "dicom/jpeg2000": ((256, 256, 4), "PIR", (1, 1, 1), (0, 254)),
    "dicom/oblique-anisotropic": ((64, 28, 4), "LPS", (6.39996, 4, 0.5), (33.4438, 96.468)),
    "dicom/hitachi-oblique": ((64, 64, 4), "PIR", (2.34375, 2.34375, 4), (0, 1537)),
    "dicom/hyperfine-multiframe": ((112, 138, 8), "LPS", (1.59, 1.61, 5), (0, 254)),
    "dicom/ts-ct-series": ((512, 512, 20), "LPS", (0.976562, 0.976562, 2), (-1024, 1839)),
    "dicom/dcmqi-ct-3slice": ((512, 512, 3), "LPS", (0.810547, 0.810547, 1), (-3024, 1381)),
    "dicom/mr-hippocampus-crop-1": ((35, 51, 32), "LPS", (1, 1, 1), (2, 154)),
    "dicom/mr-hippocampus-crop-2": ((36, 48, 35), "LPS", (1, 1, 1), (0, 5076)),
    "dicom/mr-hippocampus-crop-3": ((34, 50, 40), "LPS", (1, 1, 1), (2, 194)),
}


@pytest.mark.parametrize("path", entries("extra"))
def test_image_of_an_optional_reader_is_read(path: str) -> None:
    volume = read_images([FOLDER / path], compact=True)
    shape, orientation, spacing, ends = OPTIONAL[path]
    assert (volume.geometry.shape, volume.geometry.orientation) == (shape, orientation)
    np.testing.assert_allclose(volume.geometry.spacing, spacing, rtol=1e-5)
    np.testing.assert_allclose((volume.array.min(), volume.array.max()), ends, rtol=1e-5)
    assert volume.array.dtype.itemsize <= 2 or path in ("dicom/oblique-anisotropic", "formats/mha.mha")


@pytest.mark.parametrize(
    ("series", "converted"),
    [
        ("oblique-anisotropic", "generic_002_non_isotropic_ground_truth"),
        ("hitachi-oblique", "hitachi_001_ground_truth"),
    ],
)
def test_series_agrees_with_its_known_conversion(series: str, converted: str, shared_data: Path) -> None:
    folder = shared_data / "odd-inputs" / "dicom"
    ours = nib.as_closest_canonical(_as_nibabel(folder / series))
    theirs = nib.as_closest_canonical(nib.load(folder / "ground-truth" / f"{converted}.nii.gz"))
    # A step of five decimals, and single precision in the file.
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=0, atol=5e-5)
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), rtol=1e-6)


def test_series_lies_on_the_grid_of_the_label_made_from_it(shared_data: Path) -> None:
    folder = shared_data / "odd-inputs" / "dicom"
    label = read_geometry(folder / "ts-ct-series-label" / "example_seg_dicom.nii.gz")
    assert read_geometry(folder / "ts-ct-series").reoriented().is_close(label.reoriented(), tolerance=1e-4)


def test_lossless_compressions_of_one_series_agree(shared_data: Path) -> None:
    folder = shared_data / "odd-inputs" / "dicom"
    one, other = read_image(folder / "rle"), read_image(folder / "jpeg2000")
    np.testing.assert_array_equal(one.array, other.array)


@pytest.mark.parametrize("path", entries("either"))
def test_doubtful_image_is_treated_as_documented(path: str) -> None:
    if path in READ:
        assert_read_like_nibabel(FOLDER / path)
    else:
        assert_refused(FOLDER / path, REFUSED[path])


@pytest.mark.parametrize("path", entries("equals base"))
def test_variant_of_the_base_case_holds_its_voxels(path: str) -> None:
    base, other = (nib.as_closest_canonical(_as_nibabel(FOLDER / p)) for p in ("derived/base.nii.gz", path))
    scale = {"derived/huge_scale.nii.gz": 1e6, "derived/tiny_scale.nii.gz": 1e-7}.get(path, 1.0)
    np.testing.assert_allclose(other.get_fdata() / scale, base.get_fdata(), rtol=1e-5)


@pytest.mark.parametrize("path", entries("companion"))
def test_companion_never_fails_without_a_line(path: str) -> None:
    try:
        read_image(FOLDER / path)
    except MedmomError as error:
        assert str(error).startswith(str(FOLDER / path))


@pytest.mark.parametrize("path", entries("reference"))
def test_reference_in_nifti_is_read(path: str) -> None:
    if is_nifti(FOLDER / path):
        read = read_label if "label" in path else read_image
        assert min(read(FOLDER / path).array.shape) >= 1
    else:
        assert_refused(FOLDER / path)


def test_base_and_its_label_make_a_pair(shared_data: Path) -> None:
    folder = shared_data / "odd-inputs" / "derived"
    label = read_label(folder / "base_label.nii.gz")
    assert label.geometry.is_close(read_geometry(folder / "base.nii.gz"))
    assert np.unique(label.array).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("path", "fact"),
    [
        ("label_shape_mismatch", "shape 36 x 52 x 37"),
        ("label_affine_mismatch", "mm away"),
        ("label_noninteger", "such as 1.4999"),
        ("label_unexpected_value", "label value 255 is not among"),
    ],
)
def test_label_that_does_not_fit_is_refused(shared_data: Path, path: str, fact: str) -> None:
    folder = shared_data / "odd-inputs" / "derived"
    file = folder / f"{path}.nii.gz"
    with pytest.raises((MedmomError, ValueError)) as caught:
        Labels(("background", "anterior", "posterior"), (0, 1, 2)).to_channels(read_label(file).array)
        read_images([folder / "base.nii.gz", file])
    assert fact in str(caught.value)


def test_all_orientations_show_one_brain(shared_data: Path) -> None:
    paths = sorted((shared_data / "odd-inputs" / "orientations").glob("*.nii.gz"))
    assert len(paths) == 48
    first = nib.as_closest_canonical(_as_nibabel(paths[0]))
    for path in paths:
        assert read_geometry(path).orientation == path.name[:3]
        other = nib.as_closest_canonical(_as_nibabel(path))
        np.testing.assert_array_equal(other.get_fdata(), first.get_fdata())


def _as_nibabel(path: Path) -> nib.Nifti1Image:
    volume = read_image(path)
    return nib.Nifti1Image(volume.array[0], volume.geometry.affine)
