from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmom.data.checkup import count_values
from medmom.data.inspect import Inspection, format_inspection, inspect_folder
from medmom.errors import MedmomError

DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "colon": 2}}
SHAPE = (10, 12, 14)


def save(path: Path, array: np.ndarray, *, spacing: float = 2.0, shift: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([spacing, 2, 2, 1.0])
    affine[0, 3] = shift
    nib.Nifti1Image(array, affine, dtype=array.dtype).to_filename(path)
    return path


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 100, shape).astype("float32")


def label() -> np.ndarray:
    array = np.zeros(SHAPE, "uint8")
    array[2:4], array[5, 5, :5] = 1, 2
    return array


def make(folder: Path, num_cases: int = 3) -> Path:
    for k in range(num_cases):
        save(folder / f"images/c{k}.nii.gz", image(k))
        save(folder / f"labels/c{k}.nii.gz", label())
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


def only_fault(inspection: Inspection) -> str:
    (fault,) = inspection.faults
    assert "\n" not in fault.text
    assert fault.text in format_inspection(inspection)
    return fault.text


def test_sound_folder_has_rows_a_proposal_and_no_fault(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    inspection = inspect_folder(make(tmp_path), progress=lambda done, total: steps.append((done, total)))
    assert inspection.faults == ()
    assert steps == [(1, 3), (2, 3), (3, 3)]
    row = inspection.rows[0]
    expected = (image(0).min(), *np.percentile(image(0), (0.5, 50, 99.5)), image(0).max())
    assert row.intensities[0] == pytest.approx(expected)
    assert row.volumes == pytest.approx({"liver": 2 * 12 * 14 * 0.008, "colon": 5 * 0.008})
    assert len(row.foreground) == 2 * 12 * 14 + 5
    assert inspection.proposal
    assert inspection.proposal.preparation.spacing == (2.0, 2.0, 2.0)


def test_text_holds_cases_volumes_and_proposal(tmp_path: Path) -> None:
    text = format_inspection(inspect_folder(make(tmp_path)))
    assert "3 cases in 3 groups; channels CT; labels background 0, liver 1, colon 2" in text
    assert "note: no column patient" in text
    assert "10x12x14" in text
    assert "2x2x2" in text
    assert "no fault found" in text
    assert "preparation.spacing: [2, 2, 2]" in text
    assert "preparation.intensity: ct" in text
    assert text.count("data.patch:") == 2


def test_missing_label_is_a_fault(tmp_path: Path) -> None:
    (make(tmp_path) / "labels/c1.nii.gz").unlink()
    inspection = inspect_folder(tmp_path)
    assert "c1.nii.gz: no label map of this case" in only_fault(inspection)
    assert inspection.faults[0].case == "c1"


def test_folder_without_any_label_has_one_fault(tmp_path: Path) -> None:
    shutil.rmtree(make(tmp_path) / "labels")
    assert "no case has a label map" in only_fault(inspect_folder(tmp_path))


def test_label_without_image_is_a_fault(tmp_path: Path) -> None:
    save(make(tmp_path) / "labels/c9.nii.gz", label())
    assert "c9.nii.gz: a label map without an image" in only_fault(inspect_folder(tmp_path))


def test_other_grid_is_a_fault(tmp_path: Path) -> None:
    path = save(make(tmp_path) / "labels/c1.nii.gz", label(), shift=15)
    text = only_fault(inspect_folder(tmp_path))
    assert text.startswith(f"{path}: another grid than")
    assert "15 mm away" in text


def test_label_value_without_name_is_a_fault(tmp_path: Path) -> None:
    array = label()
    array[array == 2] = 255
    path = save(make(tmp_path) / "labels/c1.nii.gz", array)
    assert only_fault(inspect_folder(tmp_path)).startswith(f"{path}: label value 255 (5 voxels) is not among 0, 1, 2")


def test_label_value_that_is_not_whole_is_a_fault(tmp_path: Path) -> None:
    array = label().astype("float32")
    array[array == 2] = 1.4999
    save(make(tmp_path) / "labels/c1.nii.gz", array)
    assert "5 label values are not whole numbers, such as 1.4999" in only_fault(inspect_folder(tmp_path))


def test_nan_is_a_fault_and_the_other_cases_are_still_read(tmp_path: Path) -> None:
    array = image(1)
    array[0, 0, :2] = np.nan, np.inf
    save(make(tmp_path) / "images/c1.nii.gz", array)
    inspection = inspect_folder(tmp_path)
    assert "c1.nii.gz: 2 voxels are NaN" in only_fault(inspection)
    assert [row.case for row in inspection.rows] == ["c0", "c2"]


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_truncated_file_is_a_fault(tmp_path: Path, folder: str) -> None:
    path = make(tmp_path) / folder / "c1.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert only_fault(inspect_folder(tmp_path)).startswith(f"{path}: the compressed data are cut short")


def test_same_image_in_two_cases_is_a_fault_however_it_is_packed(tmp_path: Path) -> None:
    save(make(tmp_path) / "images/c9.nii", image(0))
    save(tmp_path / "labels/c9.nii.gz", label())
    assert only_fault(inspect_folder(tmp_path)).endswith("c0.nii.gz. Keep one of the two.")


def test_label_without_annotated_class_is_a_fault(tmp_path: Path) -> None:
    save(make(tmp_path) / "labels/c1.nii.gz", np.zeros(SHAPE, "uint8"))
    assert "no voxel of any annotated class (liver, colon)" in only_fault(inspect_folder(tmp_path))


def test_classes_not_annotated_are_no_fault_and_have_no_volume(tmp_path: Path) -> None:
    (make(tmp_path) / "cases.json").write_text('{"cases": {"c1": {"annotated": ["colon"]}}}')
    inspection = inspect_folder(tmp_path)
    assert inspection.faults == ()
    assert inspection.rows[1].volumes == pytest.approx({"colon": 5 * 0.008})
    assert len(inspection.rows[1].foreground) == 5
    assert "  -" in format_inspection(inspection)


def test_other_number_of_channels_is_a_fault(tmp_path: Path) -> None:
    save(make(tmp_path) / "images/c1.nii.gz", image(1, (*SHAPE, 2)))
    assert "2 channels, but dataset.json names 1: CT" in only_fault(inspect_folder(tmp_path))


def test_every_fault_of_a_folder_is_listed(tmp_path: Path) -> None:
    make(tmp_path, 4)
    (tmp_path / "images/c0.nii.gz").write_bytes(b"")
    (tmp_path / "labels/c1.nii.gz").unlink()
    save(tmp_path / "labels/c2.nii.gz", label()[:, :, :13] + 7)
    inspection = inspect_folder(tmp_path)
    assert [fault.case for fault in inspection.faults] == ["c0", "c1", "c2", "c2", "c2"]
    assert "5 faults" in format_inspection(inspection)


def test_folder_without_a_readable_image_has_no_proposal(tmp_path: Path) -> None:
    for path in (make(tmp_path) / "images").iterdir():
        path.write_bytes(b"")
    inspection = inspect_folder(tmp_path)
    assert inspection.proposal is None
    assert len(inspection.faults) == 3
    assert "proposal" not in format_inspection(inspection)


def test_folder_that_cannot_be_understood_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="neither imagesTr"):
        inspect_folder(tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_values_are_counted(dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 100, (6, 7, 8)).astype(dtype)
    if dtype != "uint8":
        array[0, 0, 0] = -3
    if dtype == "int64":
        array[1, 0, 0] = 10**9
    values, counts = np.unique(array, return_counts=True)
    assert count_values(array) == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_inspection_loads_no_torch() -> None:
    code = "import sys; import medmom.data.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0


@pytest.mark.parametrize(
    ("file", "fact"),
    [
        ("label_shape_mismatch", "shape 36 x 52 x 37 instead of 36 x 52 x 38"),
        ("label_affine_mismatch", "voxels up to 15 mm away"),
        ("label_noninteger", "1866 label values are not whole numbers, such as 1.4999"),
        ("label_unexpected_value", "label value 255 (1866 voxels)"),
    ],
)
def test_odd_labels_of_a_real_case_are_faults(tmp_path: Path, shared_data: Path, file: str, fact: str) -> None:
    derived = shared_data / "odd-inputs" / "derived"
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    shutil.copyfile(derived / "base.nii.gz", tmp_path / "images/a.nii.gz")
    shutil.copyfile(derived / f"{file}.nii.gz", tmp_path / "labels/a.nii.gz")
    shutil.copyfile(derived / "base.nii.gz", tmp_path / "images/b.nii.gz")
    shutil.copyfile(derived / "base_label.nii.gz", tmp_path / "labels/b.nii.gz")
    table = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "anterior": 1, "posterior": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    fault, twin = inspect_folder(tmp_path).faults
    assert fact in fault.text
    assert "the same image as" in twin.text


def test_hippocampus_folder_is_sound_and_quickly_inspected(shared_data: Path) -> None:
    start = time.monotonic()
    inspection = inspect_folder(shared_data / "mri-hippocampus-msd04" / "public", group="subject_pair")
    assert time.monotonic() - start < 30
    assert len(inspection.rows) == 194
    assert inspection.faults == ()
    assert inspection.proposal
    assert inspection.proposal.preparation.intensity == "zscore"
    assert {(plan.patch, plan.num_stages) for plan in inspection.proposal.patches} == {((40, 56, 40), 4)}


def test_organ_volumes_equal_those_of_the_collection(shared_data: Path) -> None:
    inspection = inspect_folder(shared_data / "ct-organs-open" / "public")
    assert inspection.faults == ()
    known = json.loads((shared_data / "ct-organs-open" / "cases.json").read_text())["cases"]
    for row in inspection.rows:
        assert row.volumes == pytest.approx(known[row.case]["volumes_ml"], rel=1e-3, abs=0.06)
