"""A label map lies in its DICOM Segmentation where it lay on the series, whatever the order of axes and files."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from medmom.data.dicom_seg import write_dicom_seg
from medmom.data.files import read_images
from medmom.errors import MedmomError
from medmom.geometry import Geometry
from medmom.labels import Labels
from tests import dicom_files

hd: Any = pytest.importorskip("highdicom")

LABELS = Labels(("background", "liver", "kidney_left", "liver tumour", "odd thing"), (0, 3, 7, 40, 9), ignore=200)
MODEL = "0123456789abcdef" * 4
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "odd-inputs" / "dicom"


def label_map(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Stored values of which no two slices along any axis are alike; class 9 and some to ignore among them."""
    return np.random.default_rng(seed).choice(np.array([0, 0, 0, 3, 7, 40, 9, 200], dtype=np.uint8), shape)


def write(path: Path, label: np.ndarray, geometry: Geometry, files: list[Path], labels: Labels = LABELS) -> Any:
    write_dicom_seg(path, label, labels, geometry, files, model=MODEL)
    return hd.seg.segread(path)


def masks(segmentation: Any, geometry: Geometry) -> dict[str, np.ndarray]:
    """Masks by name on a grid, each voxel put where the file says that it lies, by nothing but its positions."""
    found: dict[str, np.ndarray] = {}
    to_voxel = np.linalg.inv(geometry.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    orientation = np.array(
        segmentation.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float
    ).reshape(2, 3)
    edges = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    pixels = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
    for frame, about in zip(pixels, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        number = (
            (about if "SegmentIdentificationSequence" in about else segmentation.SharedFunctionalGroupsSequence[0])
            .SegmentIdentificationSequence[0]
            .ReferencedSegmentNumber
        )
        mask = found.setdefault(
            segmentation.SegmentSequence[number - 1].SegmentLabel, np.zeros(geometry.shape, dtype=bool)
        )
        rows, columns = np.nonzero(frame)
        start = np.array(about.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        places = start + np.outer(columns * float(edges[1]), orientation[0])
        places += np.outer(rows * float(edges[0]), orientation[1])
        index = (to_voxel[:3, :3] @ places.T + to_voxel[:3, 3:]).T
        assert np.abs(index - np.rint(index)).max(initial=0) < 1e-3
        mask[tuple(np.rint(index).astype(int).T)] = True
    return found


def assert_same(segmentation: Any, label: np.ndarray, geometry: Geometry, labels: Labels = LABELS) -> None:
    found = masks(segmentation, geometry)
    present = [name for name in labels.foreground if (label == labels.value(name)).any()]
    assert sorted(found) == sorted(present)
    for name in present:
        np.testing.assert_array_equal(found[name], label == labels.value(name))


@pytest.fixture
def series(tmp_path: Path) -> tuple[list[Path], Geometry]:
    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    return dicom_files.write_series(tmp_path / "series", voxels, affine), Geometry(voxels.shape, affine)


@pytest.mark.parametrize("tilt", [0.0, 20.0])
@pytest.mark.parametrize("orientation", ["LPS", "LPI", "RAS", "LSP", "LIA", "PSR", "PIL", "SLP"])
def test_mask_is_read_back_in_place_by_position(tmp_path: Path, orientation: str, tilt: float) -> None:
    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of(orientation, tilt=tilt)
    files = dicom_files.write_series(tmp_path / "series", voxels, affine)
    shuffled = [files[k] for k in np.random.default_rng(1).permutation(len(files))]
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, geometry, shuffled), label, geometry)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "ARI", "IRP"])
@pytest.mark.parametrize("orientation", ["LPS", "PSL"])
def test_label_map_may_have_its_axes_in_any_order(tmp_path: Path, orientation: str, axes: str) -> None:
    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of(orientation, tilt=10.0)
    files = dicom_files.write_series(tmp_path / "series", voxels, affine)
    geometry = Geometry(voxels.shape, affine).reoriented(axes)
    label = label_map(geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, geometry, files), label, geometry)


def test_library_reads_the_same_volume(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    label = label_map(geometry.shape)
    volume = write(tmp_path / "seg.dcm", label, geometry, files).get_volume(combine_segments=True)
    grid = Geometry(volume.array.shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine)
    values = np.array([0, 3, 7, 40, 9])[volume.array]
    index = (np.linalg.inv(geometry.affine) @ grid.affine @ _indices(grid.shape))[:3]
    np.testing.assert_array_equal(label[tuple(np.rint(index).astype(int))] % 200, values.ravel())


def test_frames_refer_to_the_slice_they_lie_on(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    label = label_map(geometry.shape)
    segmentation = write(tmp_path / "seg.dcm", label, geometry, files[::-1])
    names = [str(dcmread(file).SOPInstanceUID) for file in files]
    pixels = segmentation.get_pixels_by_source_instance(names, segment_numbers=[1])[..., 0]
    np.testing.assert_array_equal(pixels, (label == 3).transpose(2, 1, 0))


def test_series_as_medmom_reads_it(tmp_path: Path) -> None:
    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LSP", tilt=5.0)
    dicom_files.write_series(tmp_path / "series", voxels, affine)
    volume = read_images([tmp_path / "series"])
    label = label_map(volume.geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, volume.geometry, list(volume.series)), label, volume.geometry)


def test_single_slice(tmp_path: Path) -> None:
    voxels, affine = dicom_files.example_voxels((9, 7, 1)), dicom_files.affine_of("LPS", tilt=20.0)
    files = dicom_files.write_series(tmp_path / "series", voxels, affine)
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, geometry, files), label, geometry)


def test_multi_frame_source_with_frames_in_disorder(tmp_path: Path) -> None:
    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("PSL", tilt=20.0)
    file = dicom_files.write_multiframe(tmp_path / "mr.dcm", voxels, affine, order=(3, 0, 5, 1, 4, 2))
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    segmentation = write(tmp_path / "seg.dcm", label, geometry, [file])
    assert_same(segmentation, label, geometry)
    frames = dcmread(file).PerFrameFunctionalGroupsSequence
    for about in segmentation.PerFrameFunctionalGroupsSequence:
        number = int(about.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber)
        place, wanted = (item.PlanePositionSequence[0].ImagePositionPatient for item in (about, frames[number - 1]))
        assert list(place) == list(wanted)


def test_multi_frame_source_that_tells_its_plane_frame_by_frame(tmp_path: Path) -> None:
    def apart(item: Dataset) -> None:
        shared = item.SharedFunctionalGroupsSequence[0]
        for frame in item.PerFrameFunctionalGroupsSequence:
            frame.PlaneOrientationSequence = shared.PlaneOrientationSequence
            frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
        del shared.PlaneOrientationSequence, shared.PixelMeasuresSequence

    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    file = dicom_files.write_multiframe(tmp_path / "mr.dcm", voxels, affine, change=apart)
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, geometry, [file]), label, geometry)


def test_classes_that_were_not_found_are_left_out(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    label = np.zeros(geometry.shape, dtype=np.uint8)
    label[2:4, 3, 1], label[5, 5, 2] = 7, 200
    segmentation = write(tmp_path / "seg.dcm", label, geometry, files)
    assert [(s.SegmentNumber, s.SegmentLabel) for s in segmentation.SegmentSequence] == [(1, "kidney_left")]
    assert_same(segmentation, label, geometry)


@pytest.mark.parametrize("is_multiframe", [False, True])
def test_nothing_found_is_one_empty_frame_a_class(tmp_path: Path, is_multiframe: bool) -> None:
    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    files = (
        [dicom_files.write_multiframe(tmp_path / "mr.dcm", voxels, affine)]
        if is_multiframe
        else dicom_files.write_series(tmp_path / "series", voxels, affine)
    )
    geometry = Geometry(voxels.shape, affine)
    segmentation = write(tmp_path / "seg.dcm", np.zeros(voxels.shape, dtype=np.uint8), geometry, files)
    assert [s.SegmentLabel for s in segmentation.SegmentSequence] == list(LABELS.foreground)
    assert segmentation.NumberOfFrames == 4
    assert segmentation.pixel_array.max() == 0
    assert segmentation.get_volume(combine_segments=True).array.max() == 0
    assert len(segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(files)


def test_segments_carry_codes_sides_regions_and_colours(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    segmentation = write(tmp_path / "seg.dcm", label_map(geometry.shape), geometry, files)
    liver, kidney, tumour, odd = segmentation.SegmentSequence
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert liver.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodeValue, side.CodeMeaning) == ("7771000", "Left")
    assert tumour.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert tumour.AnatomicRegionSequence[0].CodeMeaning == "Liver"
    assert odd.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99MEDMOM"
    assert segmentation.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99MEDMOM"
    assert {s.SegmentAlgorithmType for s in segmentation.SegmentSequence} == {"AUTOMATIC"}
    colour = hd.color.CIELabColor.from_dicom_value(kidney.RecommendedDisplayCIELabValue).to_rgb(clip=True)
    np.testing.assert_allclose(colour, LABELS.colour("kidney_left"), atol=1)


def test_file_says_what_made_it_and_is_new_each_time(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    label = label_map(geometry.shape)
    one, two = (write(tmp_path / name, label, geometry, files) for name in ("one.dcm", "two.dcm"))
    assert (one.Manufacturer, one.DeviceSerialNumber, one.SegmentationType) == ("medmom", MODEL[:16], "BINARY")
    assert one.SOPInstanceUID != two.SOPInstanceUID
    assert one.SeriesInstanceUID != two.SeriesInstanceUID
    source = dcmread(files[0])
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert one[keyword].value == source[keyword].value


def test_names_in_any_script_and_the_patients_own(tmp_path: Path) -> None:
    def japanese(_: int, item: Dataset) -> None:
        item.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        item.PatientName = "Yamada^Tarou=山田^太郎"

    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    files = dicom_files.write_series(tmp_path / "series", voxels, affine, change=japanese)
    labels = Labels(("background", "опухоль\\" + 70 * "ü"), (0, 3))
    label = np.where(label_map(voxels.shape) == 3, np.uint8(3), np.uint8(0))
    segmentation = write(tmp_path / "seg.dcm", label, Geometry(voxels.shape, affine), files, labels)
    assert segmentation.SegmentSequence[0].SegmentLabel == ("опухоль/" + 70 * "ü")[:63]
    assert segmentation.PatientName.ideographic == "山田^太郎"


BARE = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator"),
)


def test_anonymised_series_without_patient_study_and_frame_of_reference(tmp_path: Path) -> None:
    def strip(_: int, item: Dataset) -> None:
        for keyword in BARE:
            delattr(item, keyword)

    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    files = dicom_files.write_series(tmp_path / "series", voxels, affine, change=strip)
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, geometry, files), label, geometry)


def test_series_without_thickness_and_class(tmp_path: Path) -> None:
    def strip(_: int, item: Dataset) -> None:
        del item.SliceThickness
        item.SpacingBetweenSlices = 77

    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS", tilt=10.0)
    files = dicom_files.write_series(tmp_path / "series", voxels, affine, change=strip)
    for file in files:
        item = dcmread(file)
        item.SOPClassUID = ""
        item.save_as(file)
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    segmentation = write(tmp_path / "seg.dcm", label, geometry, files)
    assert_same(segmentation, label, geometry)
    measures = segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == pytest.approx(2, rel=1e-5)
    assert measures.SpacingBetweenSlices == pytest.approx(2, rel=1e-5)


def test_odd_patient_data_neither_stop_nor_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(_: int, item: Dataset) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            item.PatientName, item.PatientSex = "SECRETNAME", "UNKNOWN"
            item.PatientBirthDate, item.StudyDate, item.StudyTime = "SECRET19", "00000000", "25:99"

    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = dicom_files.write_series(tmp_path / "series", voxels, affine, change=spoil)
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    with caplog.at_level(logging.DEBUG, logger="medmom"):
        segmentation = write(tmp_path / "seg.dcm", label, geometry, files)
    assert (segmentation.PatientSex, segmentation.StudyDate) == ("", "")
    assert "SECRET" not in caplog.text + "".join(capsys.readouterr())


def test_orientation_that_differs_in_its_last_digit_is_one(tmp_path: Path) -> None:
    def jitter(k: int, item: Dataset) -> None:
        item.ImageOrientationPatient = [1, k * 1e-7, 0, -k * 1e-7, 1, 0]

    voxels, affine = dicom_files.example_voxels(), dicom_files.affine_of("LPS")
    files = dicom_files.write_series(tmp_path / "series", voxels, affine, change=jitter)
    geometry = Geometry(voxels.shape, affine)
    label = label_map(geometry.shape)
    assert_same(write(tmp_path / "seg.dcm", label, geometry, files), label, geometry)


def moved(geometry: Geometry, change: np.ndarray) -> Geometry:
    return Geometry(geometry.shape, geometry.affine @ change)


SHIFT, SCALE, FLIP, TURN = np.eye(4), np.diag([1.2, 1, 1, 1]), np.diag([1.0, 1.0, -1.0, 1.0]), np.eye(4)
SHIFT[0, 3] = 1
TURN[:2, :2] = [[0.999, -0.04], [0.04, 0.999]]


@pytest.mark.parametrize("change", [SHIFT, SCALE, FLIP, TURN])
def test_another_grid_is_refused(tmp_path: Path, series: tuple[list[Path], Geometry], change: np.ndarray) -> None:
    files, geometry = series
    with pytest.raises(MedmomError, match=r"seg\.dcm: the label map does not lie on the slices of .*Give the series"):
        write(tmp_path / "seg.dcm", label_map(geometry.shape), moved(geometry, change), files)
    assert not (tmp_path / "seg.dcm").exists()


def test_missing_slices_of_the_series_are_refused(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    with pytest.raises(MedmomError, match="10 x 12 x 6 voxels, and 5 slices of 12 x 10 pixels"):
        write(tmp_path / "seg.dcm", label_map(geometry.shape), geometry, files[1:])
    with pytest.raises(MedmomError, match=r"slices at the places 2 to 6|beside the grid"):
        write(tmp_path / "seg.dcm", label_map(geometry.shape), geometry, [*files[1:], files[1]])


def test_files_of_two_series_are_refused(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    other = dicom_files.write_series(tmp_path / "other", dicom_files.example_voxels(), geometry.affine)
    with pytest.raises(MedmomError, match=r"another StudyInstanceUID than slice.*Give the files of one series"):
        write(tmp_path / "seg.dcm", label_map(geometry.shape), geometry, [*files[:5], other[5]])


def test_what_is_no_series_is_told_in_a_line(tmp_path: Path, series: tuple[list[Path], Geometry]) -> None:
    files, geometry = series
    label = label_map(geometry.shape)
    with pytest.raises(MedmomError, match="lies on a DICOM series, and there is none"):
        write(tmp_path / "seg.dcm", label, geometry, [])
    with pytest.raises(MedmomError, match=r"none\.dcm: cannot be read"):
        write(tmp_path / "seg.dcm", label, geometry, [*files[:5], tmp_path / "none.dcm"])
    (tmp_path / "text.dcm").write_text("no DICOM" * 100)
    with pytest.raises(MedmomError, match=r"text\.dcm: not a DICOM file"):
        write(tmp_path / "seg.dcm", label, geometry, [*files[:5], tmp_path / "text.dcm"])


def test_failure_of_the_library_names_the_series_and_no_value(
    tmp_path: Path, series: tuple[list[Path], Geometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, geometry = series

    def fail(**_: Any) -> None:
        raise ValueError("SECRET^NAME is odd")

    monkeypatch.setattr(hd.seg, "Segmentation", fail)
    with pytest.raises(MedmomError, match=r"no DICOM Segmentation can be made") as caught:
        write(tmp_path / "seg.dcm", label_map(geometry.shape), geometry, files)
    assert "SECRET" not in str(caught.value)


def test_failing_write_leaves_the_old_file(
    tmp_path: Path, series: tuple[list[Path], Geometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, geometry = series
    (tmp_path / "seg.dcm").write_bytes(b"old")

    def full(self: Any, stream: Any, **_: Any) -> None:
        stream.write(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hd.seg.Segmentation, "save_as", full)
    with pytest.raises(MedmomError, match=r"seg\.dcm: cannot be written \(No space left on device\)"):
        write(tmp_path / "seg.dcm", label_map(geometry.shape), geometry, files)
    assert (tmp_path / "seg.dcm").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg.dcm", "series"]


def test_extra_is_named_where_it_is_missing(
    tmp_path: Path, series: tuple[list[Path], Geometry], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, geometry = series
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MedmomError, match=r"pip install 'medmom\[dicom\]'"):
        write_dicom_seg(tmp_path / "seg.dcm", label_map(geometry.shape), LABELS, geometry, files, model=MODEL)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("name", ["liver.dcm", "partial_overlaps.dcm"])
def test_frames_equal_those_of_a_reference_file(tmp_path: Path, name: str) -> None:
    volume = read_images([SHARED / "dcmqi-ct-3slice"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = hd.seg.segread(SHARED / "dcmqi-seg" / name)
    labels = Labels(
        ("background", *(s.SegmentLabel for s in reference.SegmentSequence)),
        tuple(range(6))[: 1 + len(reference.SegmentSequence)],
    )
    wanted = masks(reference, volume.geometry)
    label = np.zeros(volume.geometry.shape, dtype=np.uint8)
    for segment, mask in wanted.items():
        label[mask] = labels.value(segment)
    found = masks(write(tmp_path / "seg.dcm", label, volume.geometry, list(volume.series), labels), volume.geometry)
    for segment in wanted:
        # Where segments overlap a label map holds the last.
        np.testing.assert_array_equal(found[segment], label == labels.value(segment))


def _indices(shape: tuple[int, ...]) -> np.ndarray:
    index = np.indices(shape).reshape(3, -1)
    return np.concatenate([index, np.ones((1, index.shape[1]))])
