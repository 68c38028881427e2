from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmom.data.case import CaseFiles, find_cases, read_case
from medmom.errors import MedmomError
from medmom.labels import Labels

PLAIN = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "colon": 2}}


def save(path: Path, array: np.ndarray | None = None, *, shift: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.arange(60, dtype="float32").reshape(3, 4, 5) if array is None else array
    affine = np.eye(4)
    affine[0, 3] = shift
    nib.Nifti1Image(array, affine, dtype=array.dtype).to_filename(path)
    return path


def make(folder: Path, files: Mapping[str, str | None] | list[str], dataset: object = PLAIN) -> Path:
    """Writes a data folder: empty images suffice for a listing; text where there is some."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((files[name] or "") if isinstance(files, Mapping) else "")
    if dataset is not None:
        (folder / "dataset.json").write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
    return folder


PAIRS = ["images/a.nii.gz", "images/b.v1.nii.gz", "labels/a.nii.gz", "labels/b.v1.nii.gz"]


def test_plain_folder_is_read(tmp_path: Path) -> None:
    found = find_cases(make(tmp_path, PAIRS))
    assert [case.name for case in found.cases] == ["a", "b.v1"]
    assert found.cases[0] == CaseFiles("a", (tmp_path / PAIRS[0],), tmp_path / PAIRS[2], "a", None)
    assert found.labels == Labels(("background", "liver", "colon"), (0, 1, 2))
    assert found.channels == ("CT",)
    assert found.notes == ("no column patient: each case is a group of its own",)


def test_hidden_files_and_other_formats_are_passed_over(tmp_path: Path) -> None:
    extra = ["images/._a.nii.gz", "images/.DS_Store", "images/readme.txt", "labels/._a.nii.gz"]
    found = find_cases(make(tmp_path, [*PAIRS, *extra]))
    assert len(found.cases) == 2
    assert found.unused == ()


def test_missing_and_extra_labels_are_listed_not_raised(tmp_path: Path) -> None:
    found = find_cases(make(tmp_path, [*PAIRS[:3], "labels/c.nii.gz"]))
    assert [case.label is None for case in found.cases] == [False, True]
    assert found.unused == (tmp_path / "labels/c.nii.gz",)


def test_image_and_label_may_differ_in_suffix(tmp_path: Path) -> None:
    found = find_cases(make(tmp_path, ["images/a.NII.GZ", "labels/a.nii"]))
    assert found.cases[0].label == tmp_path / "labels/a.nii"


MSD = {
    "modality": {"0": "FLAIR", "1": "T1w"},
    "labels": {"0": "background", "2": "edema", "1": "tumour core"},
    "training": [
        {"image": "./imagesTr/x_2.nii.gz", "label": "./labelsTr/x_2.nii.gz"},
        {"image": "./imagesTr/x_1.nii.gz", "label": "./labelsTr/x_1.nii.gz"},
    ],
    "test": ["./imagesTs/x_9.nii.gz"],
    "numTraining": 3,
}
MSD_FILES = [f"{folder}/x_{k}.nii.gz" for folder in ("imagesTr", "labelsTr") for k in (1, 2)]


def test_decathlon_folder_is_read(tmp_path: Path) -> None:
    found = find_cases(make(tmp_path, [*MSD_FILES, "imagesTr/._x_1.nii.gz", "imagesTs/x_9.nii.gz"], MSD))
    assert [case.name for case in found.cases] == ["x_1", "x_2"]
    assert found.cases[1].images == (tmp_path / "imagesTr/x_2.nii.gz",)
    assert found.cases[1].label == tmp_path / "labelsTr/x_2.nii.gz"
    assert found.labels == Labels(("background", "tumour core", "edema"), (0, 1, 2))
    assert found.channels == ("FLAIR", "T1w")
    assert "announces 3 cases" in found.notes[0]


def test_decathlon_file_that_is_not_listed_is_unused(tmp_path: Path) -> None:
    found = find_cases(make(tmp_path, [*MSD_FILES, "labelsTr/x_3.nii.gz"], MSD))
    assert found.unused == (tmp_path / "labelsTr/x_3.nii.gz",)


def test_decathlon_list_finds_files_with_channel_numbers(tmp_path: Path) -> None:
    files = [f"imagesTr/x_{k}_000{c}.nii.gz" for k in (1, 2) for c in (0, 1)]
    found = find_cases(make(tmp_path, [*files, *MSD_FILES[2:]], MSD))
    assert found.cases[0].images == tuple(tmp_path / name for name in files[:2])


NNUNET = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "liver": 1, "colon": 2, "ignore": 3},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
NNUNET_FILES = [f"imagesTr/x_00{k}_000{c}.nii.gz" for k in (1, 2) for c in (0, 1)]


def test_nnunet_folder_is_read(tmp_path: Path) -> None:
    files = [*NNUNET_FILES, "labelsTr/x_001.nii.gz", "labelsTr/x_002.nii.gz"]
    found = find_cases(make(tmp_path, files, NNUNET))
    assert [case.name for case in found.cases] == ["x_001", "x_002"]
    assert found.cases[0].images == (tmp_path / NNUNET_FILES[0], tmp_path / NNUNET_FILES[1])
    assert found.cases[0].label == tmp_path / "labelsTr/x_001.nii.gz"
    assert found.labels == Labels(("background", "liver", "colon"), (0, 1, 2), ignore=3)


def test_channel_that_is_missing_is_still_named(tmp_path: Path) -> None:
    files = [*NNUNET_FILES[:3], "imagesTr/x_001_0002.nii.gz", "labelsTr/x_001.nii.gz", "labelsTr/x_002.nii.gz"]
    found = find_cases(make(tmp_path, files, NNUNET))
    assert found.cases[1].images[1] == tmp_path / NNUNET_FILES[3]
    assert found.unused == (tmp_path / "imagesTr/x_001_0002.nii.gz",)


def test_four_digits_of_a_case_name_are_no_channel(tmp_path: Path) -> None:
    one = find_cases(make(tmp_path / "one", ["images/scan_0000.nii.gz", "labels/scan_0000.nii.gz"]))
    assert one.cases[0].name == "scan_0000"
    names = ["images/scan_0001.nii.gz", "images/scan_0002.nii.gz"]
    assert [c.name for c in find_cases(make(tmp_path, names)).cases] == ["scan_0001", "scan_0002"]
    found = find_cases(make(tmp_path, [*names, "images/scan_0000.nii.gz", "labels/scan_0000.nii.gz"]))
    assert [c.name for c in found.cases] == ["scan_0000", "scan_0001", "scan_0002"]


def test_table_of_files_is_read(tmp_path: Path) -> None:
    rows = "in/a.nii.gz,out/a.nii.gz,p1,liver;colon\nin/b.nii.gz,,p1,1\n/x/c.nii,o.nii,p2,\n"
    make(tmp_path, {"t.csv": "\ufeffimage,label,patient,annotated\n" + rows})
    for place in (tmp_path / "t.csv", tmp_path):
        found = find_cases(place)
        assert [(c.name, c.group, c.annotated) for c in found.cases] == [
            ("a", "p1", ("liver", "colon")),
            ("b", "p1", ("liver",)),
            ("c", "p2", None),
        ]
        assert found.cases[0].images == (tmp_path / "in/a.nii.gz",)
        assert found.cases[1].label is None
        assert found.cases[2].images == (Path("/x/c.nii"),)
        assert found.notes == ("t.csv does not list c: all classes count as annotated",)


def test_table_may_name_cases_and_give_channels_by_file(tmp_path: Path) -> None:
    rows = "name;image_0;image_2;image_10\np1;a/t1.nii;a/t2.nii;a/t3.nii\np2;b/t1.nii;b/t2.nii;b/t3.nii\n"
    found = find_cases(make(tmp_path, {"t.csv": rows}) / "t.csv")
    assert [case.name for case in found.cases] == ["p1", "p2"]
    assert [path.name for path in found.cases[0].images] == ["t1.nii", "t2.nii", "t3.nii"]


@pytest.mark.parametrize("column", ["file", "name", "case"])
@pytest.mark.parametrize("value", ["{}.nii.gz", "{}", "images/{}.nii.gz"])
def test_group_is_read_from_the_table_beside_images(tmp_path: Path, column: str, value: str) -> None:
    rows = f"{column},patient,site\n{value.format('b.v1')},7,x\n{value.format('a')},8,x\n"
    make(tmp_path, {**dict.fromkeys(PAIRS), "cases.csv": rows})
    assert [case.group for case in find_cases(tmp_path, group="patient").cases] == ["8", "7"]
    assert [case.group for case in find_cases(tmp_path, group="site").cases] == ["x", "x"]


def test_case_names_that_differ_behind_a_dot_are_told_apart(tmp_path: Path) -> None:
    files = dict.fromkeys(["images/scan.1.nii.gz", "images/scan.2.nii.gz"])
    make(tmp_path, {**files, "cases.csv": "case,patient\nscan.1,x\nscan.2,y\n"})
    assert [case.group for case in find_cases(tmp_path).cases] == ["x", "y"]


@pytest.mark.parametrize(
    ("rows", "group", "text"),
    [
        ("file,site\na,1\nb.v1,2\n", "patient", "cases.csv: no column patient among file, site"),
        ("file,site\na,1\n", "site", "cases.csv: no site for the case b.v1"),
        ("file,site\na,1\nb.v1,\n", "site", "cases.csv: no site for the case b.v1"),
        ("file,site\na,1\na.nii.gz,2\nb.v1,2\n", "site", "cases.csv: two rows name the case a.nii.gz"),
        ("scan,site\na,1\nb.v1,2\n", "site", "cases.csv: none of the columns scan, site names the case"),
        ("file,site\na,1,2\n", "site", "cases.csv: line 2 has 3 cells for 2 columns"),
        ("", "site", "cases.csv: the first line"),
        (None, "site", "no cases.csv with the column site"),
    ],
)
def test_group_that_cannot_be_read_is_refused(tmp_path: Path, rows: str | None, group: str, text: str) -> None:
    make(tmp_path, PAIRS if rows is None else {**dict.fromkeys(PAIRS), "cases.csv": rows})
    with pytest.raises(MedmomError) as caught:
        find_cases(tmp_path, group=group)
    assert text in str(caught.value)


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_annotated_classes_are_read_from_json(tmp_path: Path, above: bool, nested: bool) -> None:
    make(tmp_path / "public", PAIRS)
    cases = {"a": {"annotated": [2, "liver"], "source": "x"}, "other": {"annotated": [1]}}
    place = tmp_path / "cases.json" if above else tmp_path / "public" / "cases.json"
    place.write_text(json.dumps({"cases": cases} if nested else cases))
    found = find_cases(tmp_path / "public")
    assert [case.annotated for case in found.cases] == [("liver", "colon"), None]
    assert found.notes[-1] == "cases.json does not list b.v1: all classes count as annotated"


def test_json_above_about_other_cases_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path / "public", PAIRS)
    (tmp_path / "cases.json").write_text('{"cases": {"z": {"annotated": [9]}}}')
    found = find_cases(tmp_path / "public")
    assert [case.annotated for case in found.cases] == [None, None]
    assert len(found.notes) == 1
    (tmp_path / "public" / "cases.json").write_text('{"cases": [{"name": "a", "annotated": ["liver"]}]}')
    assert [case.annotated for case in find_cases(tmp_path / "public").cases] == [None, None]


def test_annotated_class_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    make(tmp_path, {**dict.fromkeys(PAIRS), "cases.csv": "file,annotated\na,livr\n"})
    with pytest.raises(MedmomError, match="'livr' is annotated in case a, but the classes are liver, colon"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (None, "dataset.json: no such file. Write one"),
        ('{"labels": {', "dataset.json: not valid JSON at line 1, column 13"),
        ("[]", "dataset.json: a list, not an object"),
        ({"channel_names": {"0": "CT"}}, 'dataset.json: no "labels"'),
        ({"labels": {"background": 0, "liver": 1}}, 'dataset.json: no "channel_names"'),
        ({**PLAIN, "labels": {"background": 0, "whole": [1, 2]}}, '"whole" is a region of values [1, 2]'),
        ({**PLAIN, "labels": {"background": 0, "liver": "1"}}, "\"liver\" has the value '1'"),
        ({**PLAIN, "labels": {"background": 0, "liver": 1.5}}, '"liver" has the value 1.5'),
        ({**PLAIN, "labels": {"liver": 1, "colon": 2}}, "no background"),
        ({**PLAIN, "labels": {"background": 0, "liver": 1, "colon": 1}}, "dataset.json: label values"),
        ({**PLAIN, "labels": {"0": "background", "1": "liver", "2": "liver"}}, 'two label values are named "liver"'),
    ],
)
def test_dataset_that_cannot_be_understood_is_refused(tmp_path: Path, dataset: object, text: str) -> None:
    with pytest.raises(MedmomError) as caught:
        find_cases(make(tmp_path, PAIRS, dataset))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("files", "dataset", "text"),
    [
        ([], PLAIN, "neither imagesTr, images"),
        (["images/a.dcm"], PLAIN, "no NIfTI file and no picture, but a.dcm for example"),
        (["images/a.nii", "images/a.nii.gz"], PLAIN, "a.nii beside it has the same case name"),
        ([], {**MSD, "training": []}, "no case is listed"),
        ([], {**MSD, "training": [{"label": "x"}]}, "names no image"),
        ([], {**MSD, "training": [{"image": "1/a.nii"}, {"image": "2/a.nii"}]}, "the case name a belongs to"),
        ({"t.csv": "image,label\n,x\n"}, PLAIN, "case 1 has an empty cell in image"),
    ],
)
def test_folder_that_cannot_be_understood_is_refused(
    tmp_path: Path, files: list[str], dataset: object, text: str
) -> None:
    with pytest.raises(MedmomError) as caught:
        find_cases(make(tmp_path, files, dataset))
    assert text in str(caught.value)


def test_place_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="no such folder"):
        find_cases(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    with pytest.raises(MedmomError, match="a file, not a folder"):
        find_cases(tmp_path / "a.txt")
    make(tmp_path, {"b.csv": "file,patient\n"})
    with pytest.raises(MedmomError, match="no column image among file, patient"):
        find_cases(tmp_path / "b.csv")


LABELS = Labels(("background", "liver", "colon"), (0, 1, 5), ignore=9)


def stored(*values: int) -> np.ndarray:
    return np.resize(np.array(values, dtype="uint8"), (3, 4, 5))


def test_case_is_read_with_channels_for_stored_values(tmp_path: Path) -> None:
    image, label = save(tmp_path / "i.nii.gz"), save(tmp_path / "l.nii.gz", stored(0, 1, 5, 9))
    case = read_case(CaseFiles("a", (image,), label, "a"), LABELS)
    assert case.image.shape == (1, 3, 4, 5)
    assert case.label is not None
    assert case.label.dtype == np.uint8
    assert case.label.ravel()[:4].tolist() == [0, 1, 2, 255]
    assert case.annotated == (True, True, True)


def test_classes_not_annotated_become_background(tmp_path: Path) -> None:
    image, label = save(tmp_path / "i.nii.gz"), save(tmp_path / "l.nii.gz", stored(0, 1, 5, 9))
    case = read_case(CaseFiles("a", (image,), label, "a", ("colon",)), LABELS)
    assert case.label is not None
    assert case.label.ravel()[:4].tolist() == [0, 0, 2, 255]
    assert case.annotated == (True, False, True)


def test_case_without_label_is_read(tmp_path: Path) -> None:
    case = read_case(CaseFiles("a", (save(tmp_path / "i.nii.gz"),), None, "a"), LABELS)
    assert case.label is None


def test_label_of_another_grid_or_value_is_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "i.nii.gz")
    for label, text in (
        (save(tmp_path / "moved.nii.gz", stored(0, 1), shift=15), "voxels up to 15 mm away"),
        (save(tmp_path / "short.nii.gz", stored(0, 1)[:, :, :4]), "shape 3 x 4 x 4 instead of 3 x 4 x 5"),
        (save(tmp_path / "value.nii.gz", stored(0, 2)), "label value 2 is not among"),
    ):
        with pytest.raises(MedmomError) as caught:
            read_case(CaseFiles("a", (image,), label, "a"), LABELS)
        assert str(caught.value).startswith(str(label))
        assert text in str(caught.value)


def test_rounding_of_an_affine_is_no_other_grid(tmp_path: Path) -> None:
    image, label = save(tmp_path / "i.nii.gz"), save(tmp_path / "l.nii.gz", stored(0, 1), shift=0.01)
    assert read_case(CaseFiles("a", (image,), label, "a"), LABELS).label is not None


def test_real_folders_are_read_as_they_are(shared_data: Path) -> None:
    found = find_cases(shared_data / "mri-hippocampus-msd04" / "public", group="subject_pair")
    assert len(found.cases) == 194
    assert found.labels.names == ("background", "anterior", "posterior")
    groups = {case.group for case in found.cases}
    assert len(groups) == 127
    organs = find_cases(shared_data / "ct-organs-open" / "public")
    assert {case.name: len(case.annotated or ()) for case in organs.cases} == {
        "cip-ct64-chest": 2,
        "lungfcp-01-upper-chest": 2,
        "slicer-ctchest": 2,
        "ts-abdomen-pelvis": 12,
    }
