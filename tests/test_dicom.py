"""DICOM series, sound and not; ``dicom_files.py`` writes them."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import (
    PATIENT,
    PATIENT_ID,
    affine_of,
    example_voxels,
    position_of,
    save,
    set_pixels,
    write_multiframe,
    write_series,
)
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, JPEGLSLossless, RLELossless, SegmentationStorage
from tiny import save_tiny

from medmom.cli import main
from medmom.data.case import read_case
from medmom.data.casefiles import CaseFiles
from medmom.data.files import (
    content_files,
    find_series,
    is_image,
    read_geometry,
    read_image,
    read_images,
    read_label,
    series_name,
    stem,
    write_label,
)
from medmom.data.layouts import read_layout
from medmom.errors import MedmomError
from medmom.inference.inputs import find_inputs
from medmom.inference.manifest import input_hashes
from medmom.inference.skipping import is_done, is_standing
from medmom.labels import Labels

Change = Callable[[int, Dataset], None]
AXIAL = affine_of("LPS")


def refusal(path: Path) -> str:
    with pytest.raises(MedmomError) as caught:
        read_image(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.count(". ") >= 1, "a fact, then a mend"
    assert "SECRET" not in text
    return text


def in_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turned = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.float64), affine))
    return turned.get_fdata(), turned.affine


ORIENTATIONS = ["LPS", "LPI", "RAS", "PIR", "PIL", "LIP", "LSA", "SAR"]


@pytest.mark.parametrize("tilt", [0.0, 17.0])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_voxel_lies_where_the_series_says(orientation: str, tilt: float, tmp_path: Path) -> None:
    voxels, affine = example_voxels(), affine_of(orientation, tilt=tilt)
    files = write_series(tmp_path / "scan", voxels, affine)
    volume = read_image(tmp_path / "scan")
    ours, ours_affine = in_ras(volume.array[0], volume.geometry.affine)
    theirs, theirs_affine = in_ras(voxels, affine)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours_affine, theirs_affine, rtol=0, atol=1e-6)
    assert read_geometry(tmp_path / "scan").is_close(volume.geometry, tolerance=0)
    assert sorted(volume.series) == sorted(files)
    rows = np.array([pydicom.dcmread(path).ImagePositionPatient for path in volume.series], dtype=float) * (-1, -1, 1)
    first = volume.geometry.affine @ np.array([[0, 0, k, 1] for k in range(6)]).T
    np.testing.assert_allclose(rows, first[:3].T, atol=1e-6)


@pytest.mark.parametrize("orientation", ["LPS", "PIR"])
def test_multiframe_file_is_sorted_by_position(orientation: str, tmp_path: Path) -> None:
    voxels, affine = example_voxels(), affine_of(orientation, tilt=5)
    path = write_multiframe(tmp_path / "a.dcm", voxels, affine, order=(3, 1, 0, 5, 4, 2))
    volume = read_image(path)
    for ours, theirs in zip(in_ras(volume.array[0], volume.geometry.affine), in_ras(voxels, affine), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert volume.series == (path,)


def test_slope_and_intercept_count_slice_by_slice(tmp_path: Path) -> None:
    voxels = example_voxels()

    def change(k: int, item: Dataset) -> None:
        item.RescaleSlope, item.RescaleIntercept = 1.5 + k, k - 3.25

    for modality in ("CT", "MR"):
        write_series(tmp_path / modality, voxels, AXIAL, modality=modality, change=change)
        expected = voxels * (1.5 + np.arange(6)) + np.arange(6) - 3.25
        np.testing.assert_array_equal(read_image(tmp_path / modality).array[0], expected)


@pytest.mark.parametrize("slopes", [(2.0, 3.0, 4.0, 5.0, 6.0, 7.0), (0.5, 0.25, 0.3, 0.7, 0.11, 0.9)])
def test_slopes_of_frames_count_frame_by_frame(slopes: tuple[float, ...], tmp_path: Path) -> None:
    voxels = example_voxels()
    path = write_multiframe(tmp_path / "a.dcm", voxels, AXIAL, slopes=slopes, order=(2, 1, 0, 3, 4, 5))
    np.testing.assert_allclose(read_image(path).array[0], voxels * np.array(slopes), rtol=1e-6)


def test_slope_beside_the_frames_counts_too(tmp_path: Path) -> None:
    def change(item: Dataset) -> None:
        item.RescaleSlope, item.RescaleIntercept = 0.5, 0.25

    path = write_multiframe(tmp_path / "a.dcm", example_voxels(), AXIAL, change=change)
    np.testing.assert_array_equal(read_images([path], compact=True).array[0], example_voxels() * 0.5 + 0.25)


KEPT = [("int16", 0.0, "int16"), ("int16", -1024.0, "int16"), ("uint16", 0.0, "uint16"), ("uint16", -1024.0, "int32")]
KEPT += [("uint8", 0.0, "uint8"), ("uint8", -1024.0, "int16"), ("int16", 0.5, "float32")]


@pytest.mark.parametrize(("dtype", "intercept", "kept"), KEPT)
def test_compact_keeps_integers(dtype: str, intercept: float, kept: str, tmp_path: Path) -> None:
    voxels = np.clip(example_voxels().astype(np.int64) * 30, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    voxels[..., 0] = 0
    write_series(tmp_path / "a", voxels, AXIAL, intercept=intercept)
    volume = read_images([tmp_path / "a"], compact=True)
    np.testing.assert_array_equal(volume.array[0], voxels.astype(np.float64) + intercept)
    if dtype != "int16" or intercept >= 0:
        assert volume.array.dtype == kept
    np.testing.assert_array_equal(read_image(tmp_path / "a").array, volume.array)


def test_bits_beside_the_pixel_do_not_count(tmp_path: Path) -> None:
    def change(_: int, item: Dataset) -> None:
        item.BitsStored, item.HighBit = 12, 11
        values = np.frombuffer(item.PixelData, np.uint16) & 0x0FFF
        item.PixelData = (values | 0x8000).astype(np.uint16).tobytes()

    write_series(tmp_path / "a", example_voxels(), AXIAL, change=change)
    np.testing.assert_array_equal(read_image(tmp_path / "a").array[0], example_voxels())


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_slices_are_decoded(syntax: str, tmp_path: Path) -> None:
    write_series(tmp_path / "a", example_voxels(), AXIAL, change=lambda _, item: item.compress(syntax))
    np.testing.assert_array_equal(read_image(tmp_path / "a").array[0], example_voxels())


def at(k: int, change: Callable[[Dataset], None]) -> Change:
    """A change of one slice alone."""
    return lambda number, item: change(item) if number == k else None


def moved(*offset: float) -> Callable[[Dataset], None]:
    """Moves a slice by so many mm."""

    def change(item: Dataset) -> None:
        item.ImagePositionPatient = [float(a) + b for a, b in zip(item.ImagePositionPatient, offset, strict=True)]

    return change


def tilted(k: int, item: Dataset) -> None:
    moved(0, 0.5 * k, 0)(item)


def with_value(name: str, value: Any) -> Callable[[Dataset], None]:
    return lambda item: setattr(item, name, value)


def without(name: str) -> Callable[[Dataset], None]:
    return lambda item: delattr(item, name)


def everywhere(change: Callable[[Dataset], None]) -> Change:
    return lambda _, item: change(item)


def smaller(item: Dataset) -> None:
    set_pixels(item, example_voxels((8, 12, 1))[..., 0])


REFUSED: dict[str, tuple[Change, str]] = {
    "uneven": (at(5, moved(0, 0, 0.5)), "irregular gaps between slices, 2 to 2.5 mm, where 2 mm are usual"),
    "a gap": (
        lambda k, item: moved(0, 0, 4)(item) if k > 2 else None,
        "2 missing of 8 slices, behind (31.25, -12.5, -136.75) mm (6 mm to the next, where 2 mm are usual)",
    ),
    "in one place": (
        at(3, moved(0, 0, -2)),
        "1 of 6 slices lie where another does, such as at (31.25, -12.5, -136.75) mm",
    ),
    "aside": (at(3, moved(0.5, 0, 0)), "a slice lies 0.5 mm beside the line of the others"),
    "gantry tilt": (tilted, "the axes of the grid meet at 76.0 degrees"),
    "mixed orientation": (
        at(2, with_value("ImageOrientationPatient", [1, 0, 0, 0, 0, -1])),
        "slices of mixed orientation, 1 of 6 run otherwise",
    ),
    "sizes": (at(4, smaller), "slices of several sizes, such as 8 x 12 and 10 x 12 pixels"),
    "spacings": (
        at(4, with_value("PixelSpacing", [1.5, 1.1])),
        "several pixel spacings, such as 1.5 x 1 and 1.5 x 1.1",
    ),
    "no position": (at(4, without("ImagePositionPatient")), "1 of 6 slices have no ImagePositionPatient"),
    "no orientation": (everywhere(without("ImageOrientationPatient")), "6 of 6 slices have no ImageOrientationPatient"),
    "no spacing": (everywhere(without("PixelSpacing")), "6 of 6 slices have no PixelSpacing"),
    "cosines": (
        everywhere(with_value("ImageOrientationPatient", [2, 0, 0, 0, 1, 0])),
        "directions of length 2 x 1 in ImageOrientationPatient",
    ),
    "colours": (everywhere(with_value("PhotometricInterpretation", "YBR_FULL")), "are colours (YBR_FULL)"),
    "palette": (everywhere(with_value("PhotometricInterpretation", "PALETTE COLOR")), "are colours (PALETTE COLOR)"),
    "inverted": (everywhere(with_value("PhotometricInterpretation", "MONOCHROME1")), "are brighter the lower they are"),
    "no scale": (at(1, with_value("RescaleSlope", 0)), "RescaleSlope 0 and RescaleIntercept 0"),
    "bits": (everywhere(with_value("BitsAllocated", 12)), "pixels of 12 bits"),
    "bomb": (everywhere(with_value("Columns", 60000)), "ends before the 1440000 bytes of pixels"),
    "frames": (everywhere(with_value("NumberOfFrames", 2**31 - 1)), "a DICOM file with a damaged header"),
    "constant": (lambda _, item: setattr(item, "PixelData", bytes(240)), "every voxel is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_series_that_is_no_volume_is_refused_in_one_line(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, fact = REFUSED[case]
    write_series(tmp_path / "scan", example_voxels(), AXIAL, change=change)
    text = refusal(tmp_path / "scan")
    assert fact in text
    assert text.startswith(f"{tmp_path / 'scan'}")
    assert capfd.readouterr() == ("", ""), "no library speaks past us"


def test_gaps_may_differ_a_little(tmp_path: Path) -> None:
    write_series(tmp_path / "a", example_voxels(), AXIAL, change=at(3, moved(0.02, 0.02, 0.04)))
    assert read_image(tmp_path / "a").geometry.is_close(_geometry_of(tmp_path), tolerance=1e-6)


def _geometry_of(folder: Path) -> Any:
    write_series(folder / "even", example_voxels(), AXIAL)
    return read_geometry(folder / "even")


@pytest.mark.parametrize("count", [1, 2])
def test_one_slice_or_two_are_read(count: int, tmp_path: Path) -> None:
    voxels = example_voxels()[..., :count]
    write_series(tmp_path / "a", voxels, AXIAL)
    volume = read_image(tmp_path / "a")
    np.testing.assert_array_equal(volume.array[0], voxels)
    np.testing.assert_allclose(volume.geometry.spacing, (1, 1.5, 2), atol=1e-9)


@pytest.mark.parametrize("keep", [0, 100, 131, 140, 300, 500, 700, 900])
def test_file_cut_short_is_refused_wherever_it_lies(keep: int, tmp_path: Path) -> None:
    for k in (0, 5):
        files = write_series(tmp_path / f"{k}", example_voxels(), AXIAL)
        files[k].write_bytes(files[k].read_bytes()[:keep])
        refusal(tmp_path / f"{k}")


# The last bytes of compressed pixels only say that they end.
@pytest.mark.parametrize(
    ("syntax", "cut"), [(None, 1), (None, 100), *((s, cut) for s in (RLELossless, JPEGLSLossless) for cut in (20, 100))]
)
def test_pixels_cut_short_are_refused(syntax: str | None, cut: int, tmp_path: Path) -> None:
    def change(_: int, item: Dataset) -> None:
        if syntax:
            item.compress(syntax)

    files = write_series(tmp_path / "a", example_voxels(), AXIAL, change=change)
    files[3].write_bytes(files[3].read_bytes()[:-cut])
    assert refusal(tmp_path / "a").startswith(f"{files[3]}: ")


def test_transfer_syntax_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "a", example_voxels(), AXIAL):
        item = pydicom.dcmread(path)
        item.file_meta.TransferSyntaxUID = MPEG2MPML
        item.PixelData = pydicom.encaps.encapsulate([item.PixelData])
        item["PixelData"].is_undefined_length = True
        item.save_as(path)
    assert "cannot be decoded (transfer syntax MPEG2 Main Profile / Main Level)" in refusal(tmp_path / "a")


def test_foreign_file_with_the_suffix_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a", example_voxels(), AXIAL)
    (tmp_path / "a" / "other.dcm").write_text("hello")
    assert "other.dcm: not a DICOM file, without DICM" in refusal(tmp_path / "a")


def test_other_files_beside_the_slices_do_not_matter(tmp_path: Path) -> None:
    write_series(tmp_path / "a", example_voxels(), AXIAL)
    for name in ("README.txt", ".hidden.dcm", "._slice001.dcm"):
        (tmp_path / "a" / name).write_text("hello")
    assert find_series(tmp_path / "a") == [tmp_path / "a"]
    assert read_image(tmp_path / "a").array.shape == (1, 10, 12, 6)


def test_file_without_suffix_is_known_by_its_mark(tmp_path: Path) -> None:
    for k, path in enumerate(write_series(tmp_path / "a", example_voxels(), AXIAL)):
        path.rename(path.with_name(f"IM-1.2.{k}"))
    assert is_image(tmp_path / "a" / "IM-1.2.3")
    np.testing.assert_array_equal(read_image(tmp_path / "a").array[0], example_voxels())


def test_any_file_stands_for_its_series(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a", example_voxels(), AXIAL)
    np.testing.assert_array_equal(read_image(files[4]).array, read_image(tmp_path / "a").array)
    assert content_files(files[4]) == content_files(tmp_path / "a") == sorted(files)


def add_others(folder: Path) -> None:
    """Puts what is no volume beside a series."""
    write_series(folder, example_voxels()[..., :1], AXIAL, number=7, start=100)
    write_series(
        folder,
        example_voxels()[..., :2],
        affine_of("PIR"),
        number=8,
        start=200,
        change=everywhere(with_value("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    )
    for number, (modality, kind) in enumerate((("SEG", SegmentationStorage), ("SR", "1.2.840.10008.5.1.4.1.1.88.33"))):
        item = pydicom.dcmread(folder / "slice001.dcm")
        item.Modality, item.SOPClassUID, item.SeriesInstanceUID = modality, kind, f"1.2.3.{number}"
        if modality == "SR":
            del item.Rows, item.Columns, item.PixelData
        save(item, folder / f"object{number}.dcm")


def test_what_is_no_volume_is_left_out_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path / "a", example_voxels(), AXIAL)
    add_others(tmp_path / "a")
    with caplog.at_level(logging.INFO):
        assert find_series(tmp_path / "a") == [tmp_path / "a"]
    assert "1 localiser, 1 segmentation (SEG), 1 single image, 1 structured report (SR)" in caplog.text
    np.testing.assert_array_equal(read_image(tmp_path / "a").array[0], example_voxels())
    assert "a DICOM segmentation (SEG), not an image" in refusal(tmp_path / "a" / "object0.dcm")
    assert "a DICOM structured report (SR), not an image" in refusal(tmp_path / "a" / "object1.dcm")


def test_what_is_no_volume_of_a_study_is_left_out_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(tmp_path / "study" / "ct", example_voxels(), AXIAL)
    for inner in ("others", "more"):
        files = write_series(tmp_path / "study" / inner, example_voxels(), AXIAL)
        add_others(tmp_path / "study" / inner)
        for file in files:
            file.unlink()
    write_series(tmp_path / "study" / "uneven", example_voxels(), AXIAL, change=REFUSED["uneven"][0])
    with caplog.at_level(logging.INFO):
        cases = find_inputs([tmp_path / "study"], 1)
    assert [case.name for case in cases] == ["ct", "uneven"]
    assert f"{tmp_path / 'study'}: left out, no volumes: 2 single image" in caplog.text
    # Alone they are asked for, and refused when they are read.
    assert find_inputs([tmp_path / "study" / "others"], 1)


def test_several_series_in_one_folder_are_several_cases(tmp_path: Path) -> None:
    folder = tmp_path / "scan"
    for number in (3, 11):
        write_series(folder, example_voxels(seed=number), AXIAL, number=number, start=100 * number)
    paths = find_series(folder)
    assert paths == [folder / "slice1101.dcm", folder / "slice301.dcm"]
    assert [series_name(path) for path in paths] == ["scan_11", "scan_3"]
    np.testing.assert_array_equal(read_image(paths[1]).array[0], example_voxels(seed=3))
    assert "2 DICOM series lie in this folder. Give a file of the one" in refusal(folder)
    assert sorted(case.name for case in find_inputs([folder], 1)) == ["scan_11", "scan_3"]
    write_series(folder, example_voxels(seed=1), AXIAL, number=3, start=900)
    assert sorted(map(series_name, find_series(folder))) == ["scan_11", "scan_3-1", "scan_3-2"]


def test_files_of_a_series_are_one_case_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scan.v1"
    files = write_series(folder, example_voxels(), AXIAL)
    for given in ([folder], files, files[2:3], [folder, *files], [str(folder / "*.dcm")], [str(tmp_path / "*")]):
        (case,) = find_inputs(given, 1)
        assert (case.name, case.images, case.label) == ("scan.v1", (folder,), None)
    monkeypatch.chdir(folder)
    assert [case.name for case in find_inputs(["."], 1)] == ["scan.v1"]
    assert [case.name for case in find_inputs(["slice001.dcm"], 1)] == ["scan.v1"]


def test_multiframe_file_is_named_by_itself_where_it_is_given(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "scan" / "a.v1.dcm", example_voxels(), AXIAL)
    assert [(case.name, case.images) for case in find_inputs([path], 1)] == [("a.v1", (path,))]
    assert [case.name for case in find_inputs([path.parent], 1)] == ["scan"]
    write_multiframe(tmp_path / "scan" / "b.dcm", example_voxels(seed=1), AXIAL)
    assert [case.name for case in find_inputs([path.parent], 1)] == ["a.v1", "b"]


def test_study_gives_every_series_three_folders_deep(tmp_path: Path) -> None:
    for place in ("p1/ct", "p2/ct", "p2/x/mr", "p3/x/y/deep"):
        write_series(tmp_path / place, example_voxels(), AXIAL)
    (tmp_path / "notes.txt").write_text("notes")
    assert sorted(case.name for case in find_inputs([tmp_path], 1)) == ["mr", "p1_ct", "p2_ct"]
    assert [case.name for case in find_inputs([tmp_path / "p3"], 1)] == ["deep"]
    with pytest.raises(MedmomError, match=r"p0: there is no DICOM series, no NIfTI image"):
        (tmp_path / "p0").mkdir()
        find_inputs([tmp_path / "p0"], 1)


def test_row_of_a_table_names_a_series(tmp_path: Path) -> None:
    for name in ("t1", "t2"):
        write_series(tmp_path / name, example_voxels(), AXIAL)
    (tmp_path / "list.csv").write_text("image\nt1\nt2/slice003.dcm\n")
    cases = find_inputs([tmp_path / "list.csv", tmp_path / "t1"], 1)
    assert [(case.name, case.images) for case in cases] == [("t1", (tmp_path / "t1",)), ("t2", (tmp_path / "t2",))]
    (tmp_path / "pairs.csv").write_text("image_0,image_1,name\nt1,t2,both\n")
    (case,) = find_inputs([tmp_path / "pairs.csv"], 2)
    assert read_images(case.images).array.shape == (2, 10, 12, 6)


def test_damaged_series_does_not_stop_the_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_series(tmp_path / name, example_voxels(), AXIAL)
    (tmp_path / "b" / "slice001.dcm").write_bytes(b"")
    assert [case.name for case in find_inputs([tmp_path], 1)] == ["a", "b"]
    assert [case.name for case in find_inputs([tmp_path / "b"], 1)] == ["b"]


def done(case: CaseFiles, prediction: Path) -> tuple[bool, bool]:
    return (
        is_done(case, prediction, checksum="abc", settings={}),
        is_standing(case, prediction, checksum="abc", settings={}),
    )


def test_prediction_is_done_until_a_slice_changes(tmp_path: Path) -> None:
    files = write_series(tmp_path / "scan", example_voxels(), AXIAL)
    (case,) = find_inputs([tmp_path / "scan"], 1)
    (entry,) = input_hashes(case.images)
    prediction = tmp_path / "out.nii.gz"
    prediction.write_text("labels")
    about = {
        "image": [str(tmp_path / "scan")],
        "model": {"checksum": "abc"},
        "settings": {},
        "inputs": [entry],
        "prediction_sha256": input_hashes([prediction])[0]["sha256"],
    }
    (tmp_path / "out.json").write_text(json.dumps(about))
    assert done(case, prediction) == (True, True)
    shutil.copytree(tmp_path / "scan", tmp_path / "copy")
    for k, path in enumerate(sorted((tmp_path / "copy").iterdir(), reverse=True)):
        path.rename(path.with_name(f"x{k}.dcm"))
    assert input_hashes([tmp_path / "copy"])[0]["sha256"] == entry["sha256"], "names do not matter"
    item = pydicom.dcmread(files[2])
    item.PixelData = item.PixelData[:-2] + b"\1\1"
    save(item, files[2])
    assert done(case, prediction) == (False, False)


def test_slice_that_is_gone_is_noticed(tmp_path: Path) -> None:
    files = write_series(tmp_path / "scan", example_voxels(), AXIAL)
    before = input_hashes([tmp_path / "scan"])
    files[5].unlink()
    assert input_hashes([tmp_path / "scan"]) != before


def test_predict_segments_a_series_and_tells_nothing_of_the_patient(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "scan", example_voxels((16, 16, 12)), affine_of("PIR", (1.0, 1.0, 1.0), tilt=10))
    model = save_tiny(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(model), str(tmp_path / "scan"), "--out", str(tmp_path / "out"), "--quiet"])
    assert ended.value.code == 0
    written = read_label(tmp_path / "out" / "scan.nii.gz")
    assert written.geometry.is_close(read_geometry(tmp_path / "scan"), tolerance=1e-4)
    told = "".join(capfd.readouterr()) + "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert PATIENT not in told and PATIENT_ID not in told


def test_odd_values_make_no_noise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(_: int, item: Dataset) -> None:
        item.add_new("PatientAge", "AS", "SECRET")
        item.add_new("SeriesDate", "DA", "SECRET")

    with pydicom.config.disable_value_validation():
        write_series(tmp_path / "a", example_voxels(), AXIAL, change=change)
    read_image(tmp_path / "a")
    assert "SECRET" not in caplog.text


def test_result_is_written_as_nifti_on_the_series_grid(tmp_path: Path) -> None:
    write_series(tmp_path / "a", example_voxels(), affine_of("LIP", tilt=20))
    volume = read_image(tmp_path / "a")
    mask = (volume.array[0] > 500).astype(np.uint8)
    write_label(tmp_path / "out.nii.gz", mask, Labels(("background", "one"), (0, 1)), volume)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, volume.geometry.affine, atol=1e-5)
    assert volume.header.get_sform(coded=True)[1] == 1


def test_folder_of_series_is_a_dataset(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    for k, name in enumerate(("case1", "case2.b")):
        write_series(tmp_path / "images" / name, example_voxels(seed=k), AXIAL)
        volume = read_image(tmp_path / "images" / name)
        mask = (volume.array[0] > 500).astype(np.uint8)
        write_label(labels / f"{name}.nii.gz", mask, Labels(("background", "one"), (0, 1)), volume)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "one": 1}, "file_ending": ".dcm"})
    )
    layout = read_layout(tmp_path)
    assert [(entry.name, entry.images[0].name) for entry in layout.entries] == [("case1",) * 2, ("case2.b",) * 2]
    for entry in layout.entries:
        assert entry.label == labels / f"{entry.name}.nii.gz"
        files = CaseFiles(entry.name, entry.images, entry.label, entry.name)
        assert read_case(files, layout.dataset.labels).image.shape == (1, 10, 12, 6)
    assert not layout.unused


@pytest.mark.parametrize("library", ["pydicom", "SimpleITK"])
def test_missing_library_names_the_extra(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path / "scan", example_voxels(), AXIAL)
    monkeypatch.setitem(sys.modules, library, None)
    text = refusal(tmp_path / "scan")
    assert f"a DICOM file, which is read through {library}. Install" in text
    assert text.endswith("pip install 'medmom[dicom]'.")
    assert len(find_inputs([tmp_path / "scan"], 1)) == 1


def test_who_reads_nifti_loads_no_optional_reader(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(example_voxels(), AXIAL), tmp_path / "a.nii.gz")
    code = (
        f"import sys; from medmom.data.files import read_image; read_image({str(tmp_path / 'a.nii.gz')!r});"
        # nibabel loads pydicom itself.
        "assert not {'SimpleITK', 'highdicom'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_stem_of_a_folder_is_its_whole_name(tmp_path: Path) -> None:
    (tmp_path / "1.2.840.99").mkdir()
    assert stem(tmp_path / "1.2.840.99") == "1.2.840.99"
    assert position_of(np.eye(4), 3) == [0, 0, 3]
