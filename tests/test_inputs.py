"""Cases from CSV files; the other kinds of input stand in ``test_predict.py``."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import save_image, save_tiny

from medmom.errors import MedmomError
from medmom.inference.inputs import find_inputs
from medmom.inference.predict import predict


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_are_cases_with_paths_from_the_tables_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(
        tmp_path / "lists" / "scans.CSV",
        "image,name,patient,hospital",
        "../scans/a.nii.gz,first,p7,x",
        f"{tmp_path}/b.nii.gz,,,y",
    )
    monkeypatch.chdir(tmp_path)
    first, second = find_inputs(["lists/scans.CSV"], 1)
    assert (first.name, first.group, first.label) == ("first", "p7", None)
    assert first.images[0].resolve() == (tmp_path / "scans" / "a.nii.gz").resolve()
    assert (second.name, second.group, second.images) == ("b", "b", (tmp_path / "b.nii.gz",))
    assert path.is_file()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_channels_may_lie_in_files_of_their_own(separator: str, tmp_path: Path) -> None:
    lines = (["image_10", "image_2", "case"], ["t2.nii", "t1.nii", "a"])
    path = table(tmp_path / "scans.csv", *(separator.join(line) for line in lines))
    (case,) = find_inputs([path], 2)
    assert (case.name, case.images) == ("a", (tmp_path / "t1.nii", tmp_path / "t2.nii"))


def test_label_that_is_a_file_is_the_reference(tmp_path: Path) -> None:
    path = table(tmp_path / "scans.csv", "image,label", "a.nii,labels/a.nii", "b.nii,benign", "c.nii,")
    assert [case.label for case in find_inputs([path], 1)] == [tmp_path / "labels" / "a.nii", None, None]


def test_tables_mix_with_files_that_count_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.nii").touch()
    path = table(tmp_path / "scans.csv", "image,name", "b.nii,second")
    cases = find_inputs([path, tmp_path, str(tmp_path / "*.csv")], 1)
    assert [case.name for case in cases] == ["a", "c", "second"]


def test_table_and_folder_give_the_same_prediction(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    save_image(tmp_path / "in" / "a.nii.gz")
    path = table(tmp_path / "scans.csv", "image,name,patient", "in/a.nii.gz,b,p1", "in/gone.nii.gz,c,p2")
    predict(model, [tmp_path / "in"], tmp_path / "plain", quiet=True)
    (first, second), _ = predict(model, [path], tmp_path / "listed", quiet=True)
    assert second.error is not None and "gone.nii.gz: no such file" in second.error
    label_maps = [nib.load(tmp_path / name).get_fdata() for name in ("plain/a.nii.gz", "listed/b.nii.gz")]
    np.testing.assert_array_equal(*label_maps)
    assert first.prediction == tmp_path / "listed" / "b.nii.gz"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,name", "a.nii,a"], r"scans\.csv: no column image among file, name\. Add it"),
        (["image"], r"scans\.csv: no row below the header\. List images"),
        ([""], r"scans\.csv: the first line \[.*\] is no header"),
        (["image,name", ",a"], r"scans\.csv: row 2 has no path in image\. Give"),
        (["image_0,image_1", "a.nii,b.nii", "c.nii"], r"scans\.csv: row 3 has no path in image_1\. Give"),
        (["image", "a\0.nii"], r"scans\.csv: row 2 has no path in image\. Give"),
        (["image,name", "a.nii,x/y"], r"scans\.csv: row 2: the name 'x/y' cannot be that of a file\. Leave out"),
        (["image,name", "a.nii,.."], r"scans\.csv: row 2: the name '\.\.' cannot be that of a file"),
        (["image", "/"], r"scans\.csv: row 2: the name '' cannot be that of a file"),
        (["image", "x/a.nii", "b.nii", "y/a.nii.gz"], r"scans\.csv: rows 2 and 4 have the same name a\. Give each"),
        (["image,name", "a,b.nii,c"], r"scans\.csv: line 2 has 3 cells for 2 columns\. Quote"),
    ],
)
def test_bad_table_is_named_with_row_and_mend(lines: list[str], message: str, tmp_path: Path) -> None:
    path = table(tmp_path / "scans.csv", *lines)
    with pytest.raises(MedmomError, match=message):
        find_inputs([path], 1)


def test_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"gone\.csv: cannot be read"):
        find_inputs([tmp_path / "gone.csv"], 1)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x9d")
    with pytest.raises(MedmomError, match=r"binary\.csv: not a CSV file"):
        find_inputs([tmp_path / "binary.csv"], 1)


def test_row_and_file_of_one_name_are_both_named(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    path = table(tmp_path / "scans.csv", "image", "deeper/a.nii")
    with pytest.raises(MedmomError, match=r"deeper/a\.nii: .*a\.nii has the same name a"):
        find_inputs([path, tmp_path / "a.nii"], 1)
