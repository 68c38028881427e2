from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tiny_classes import picture_case, write_class_folders, write_items, write_picture, write_volume

from medmom.data import class_survey
from medmom.data.casefiles import CaseFiles
from medmom.data.class_layouts import find_class_cases
from medmom.data.class_survey import ClassSurvey, check_duplicates, survey_classes
from medmom.data.class_targets import check_images
from medmom.data.files import read_image
from medmom.data.folds import Split
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError

UNIT = Preparation(None, "unit")


def survey(folder: Path, cases: list[CaseFiles]) -> dict[str, ClassSurvey]:
    return survey_classes(cases, folder / "cache", quiet=True)


def assert_same(first: dict[str, ClassSurvey], second: dict[str, ClassSurvey]) -> None:
    assert first.keys() == second.keys()
    for name, one in first.items():
        other = second[name]
        assert (one.fingerprint, one.shape, one.path) == (other.fingerprint, other.shape, other.path)
        np.testing.assert_array_equal(one.summary, other.summary)
        np.testing.assert_array_equal(one.values, other.values)


def test_a_summary_is_of_the_voxels_as_they_are(tmp_path: Path) -> None:
    case = picture_case(write_picture(tmp_path / "a.png"), "cat")
    image = read_image(case.images[0]).array
    found = survey(tmp_path, [case])["a"]
    wanted = [image.min(), *np.percentile(image, (1, 50, 99)), image.max(), (image == image.min()).mean()]
    np.testing.assert_allclose(found.summary, wanted, rtol=1e-6)
    assert found.summary.dtype == np.float32
    assert found.shape == (1, 8, 6, 1)
    assert found.num_channels == 1
    assert found.path == case.images[0]
    assert set(found.values) <= set(image.reshape(-1))


def test_values_of_a_ct_are_those_of_the_body(tmp_path: Path) -> None:
    array = np.full((12, 12, 12), -1000.0, np.float32)
    array[3:9, 3:9, 3:9] = np.random.default_rng(0).normal(40, 20, (6, 6, 6))
    path = write_volume(tmp_path / "ct.nii")
    file = nib.load(path)
    nib.save(nib.Nifti1Image(array, np.eye(4), file.header), path)
    found = survey(tmp_path, [picture_case(path, "ct")])["ct"]
    assert found.values.shape == (1000,)
    assert found.values.min() > -500
    assert found.summary[0] == found.summary[2] == -1000


def test_the_shape_is_in_anatomical_order(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)
    file = nib.Nifti1Image(np.random.default_rng(0).normal(size=(7, 6, 1)).astype(np.float32), affine)
    file.header.set_xyzt_units("mm")
    nib.save(file, tmp_path / "a.nii")
    assert survey(tmp_path, [picture_case(tmp_path / "a.nii", "x")])["a"].shape == (1, 1, 7, 6)


def test_images_are_the_same_by_what_they_show(tmp_path: Path) -> None:
    first = picture_case(write_picture(tmp_path / "a.png"), "cat")
    Image.open(tmp_path / "a.png").save(tmp_path / "b.tif")
    Image.open(tmp_path / "a.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    found = survey(tmp_path, [first, picture_case(tmp_path / "b.tif", "cat"), picture_case(tmp_path / "c.png", "cat")])
    assert found["a"].fingerprint == found["b"].fingerprint != found["c"].fingerprint


def test_items_of_a_file_are_surveyed_one_by_one(tmp_path: Path) -> None:
    cases = list(find_class_cases(write_items(tmp_path / "x.npz")).cases)
    found = survey(tmp_path, cases)
    assert len({each.fingerprint for each in found.values()}) == 11
    assert_same(found, survey(tmp_path, cases))


def test_a_second_survey_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(find_class_cases(write_class_folders(tmp_path / "data", {"cat": 3, "dog": 2})).cases)
    found = survey(tmp_path, cases)
    monkeypatch.setattr(class_survey, "read_class_case", None)
    assert_same(found, survey(tmp_path, cases))
    assert_same({name: found[name] for name in ("cat-1", "dog-0")}, survey(tmp_path, [cases[1], cases[3]]))
    assert len(list((tmp_path / "cache" / "class-surveys").iterdir())) == 1


def test_a_changed_image_is_read_again(tmp_path: Path) -> None:
    cases = list(find_class_cases(write_class_folders(tmp_path / "data", {"cat": 2, "dog": 2})).cases)
    first = survey(tmp_path, cases)
    write_picture(cases[0].images[0], seed=99)
    os.utime(cases[0].images[0], ns=(0, 1))
    second = survey(tmp_path, cases)
    assert [name for name in first if first[name].fingerprint != second[name].fingerprint] == ["cat-0"]


@pytest.mark.parametrize("damage", ["cut", "bits", "text"])
def test_a_damaged_survey_is_made_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = list(find_class_cases(write_class_folders(tmp_path / "data", {"cat": 2, "dog": 2})).cases)
    first = survey(tmp_path, cases)
    (path,) = (tmp_path / "cache" / "class-surveys").iterdir()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes({"cut": bytes(raw[:-200]), "bits": bytes(raw), "text": b"words"}[damage])
    caplog.clear()
    assert_same(first, survey(tmp_path, cases))
    assert "the images are read again" in caplog.text


def test_what_was_read_before_a_fault_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_survey, "BATCH", 2)
    cases = list(find_class_cases(write_class_folders(tmp_path / "data", {"cat": 3, "dog": 2})).cases)
    whole = cases[-1].images[0].read_bytes()
    stat = cases[-1].images[0].stat()
    cases[-1].images[0].write_bytes(whole[:-30])
    with pytest.raises(MedmomError, match=r"1\.png"):
        survey(tmp_path, cases)
    cases[-1].images[0].write_bytes(whole)
    os.utime(cases[-1].images[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    read = []
    real = class_survey.read_class_case
    monkeypatch.setattr(
        class_survey, "read_class_case", lambda case, arrays: (read.append(case.name), real(case, arrays))[1]
    )
    survey(tmp_path, cases)
    assert read == ["dog-1"]


def test_a_hundred_thousand_surveys_are_read_in_seconds(tmp_path: Path) -> None:
    one = ClassSurvey("ab" * 32, (1, 8, 8, 1), np.zeros(6, np.float32), np.zeros(16, np.float32))
    known = {k.to_bytes(16, "big"): one for k in range(100_000)}
    class_survey._store(tmp_path / "x.npz", known, list(known))
    start = time.process_time()
    found = class_survey._load(tmp_path / "x.npz")
    assert time.process_time() - start < 3
    assert found.keys() == known.keys()


def test_old_surveys_do_not_pile_up(tmp_path: Path) -> None:
    one = ClassSurvey("ab" * 32, (1, 8, 8, 1), np.zeros(6, np.float32), np.zeros(16, np.float32))
    known = {k.to_bytes(16, "big"): one for k in range(100)}
    class_survey._store(tmp_path / "x.npz", known, list(known)[:10])
    assert list(class_survey._load(tmp_path / "x.npz")) == list(known)[:20]


def test_a_missing_image_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"a\.png: No such file or directory. Put the file back"):
        survey(tmp_path, [picture_case(tmp_path / "a.png", "cat")])


def test_no_cases_are_no_survey(tmp_path: Path) -> None:
    assert survey(tmp_path, []) == {}


# Twins.


@pytest.fixture
def twins(tmp_path: Path) -> list[CaseFiles]:
    cases = list(find_class_cases(write_class_folders(tmp_path / "data", {"cat": 3, "dog": 3})).cases)
    for name, twin in (("cat/1.png", "cat/0.png"), ("dog/2.png", "cat/2.png")):
        shutil.copy(tmp_path / "data" / twin, tmp_path / "data" / name)
    return cases


def test_an_image_on_both_sides_is_refused(twins: list[CaseFiles], tmp_path: Path) -> None:
    split = Split(("cat-0", "cat-2", "dog-0"), ("cat-1", "dog-1", "dog-2"))
    with pytest.raises(MedmomError) as error:
        check_duplicates(survey(tmp_path, twins), split, twins)
    data = tmp_path / "data"
    assert str(error.value) == (
        f"{data}/cat/1.png (validation) holds the same image as {data}/cat/0.png (training), one of 2 such "
        "pairs. Give both one patient, or leave one out with --data.leave_out."
    )


def test_twins_on_one_side_are_told(twins: list[CaseFiles], tmp_path: Path) -> None:
    split = Split(("cat-0", "cat-1", "cat-2", "dog-0", "dog-2"), ("dog-1",))
    data = tmp_path / "data"
    assert check_duplicates(survey(tmp_path, twins), split, twins) == (
        f"2 images occur more than once, such as {data}/cat/0.png and {data}/cat/1.png",
        f"1 images are listed under different classes, such as {data}/cat/2.png and {data}/dog/2.png",
    )


def test_twins_that_take_no_part_are_not_told(twins: list[CaseFiles], tmp_path: Path) -> None:
    assert check_duplicates(survey(tmp_path, twins), Split(("cat-0", "dog-0"), ("dog-1",)), twins) == ()


def test_twins_in_one_file_are_told_by_their_items(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 4), dtype=np.uint8)
    images = np.concatenate([image, image, 255 - image])
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.array([0, 0, 1]))
    cases = list(find_class_cases(tmp_path / "x.npz").cases)
    with pytest.raises(MedmomError, match=r"x\.npz item 1 \(validation\) holds the same image as .*x\.npz item 0"):
        check_duplicates(survey(tmp_path, cases), Split(("x-000000", "x-000002"), ("x-000001",)), cases)


# One network for all.


def checked(
    found: dict[str, ClassSurvey], cases: list[CaseFiles], preparation: Preparation = UNIT, **options: object
) -> int:
    return check_images(found, cases, preparation, **{"patch": (8, 8), "slices": None, **options})  # type: ignore[arg-type]


def test_grey_and_colour_need_a_word(tmp_path: Path) -> None:
    cases = [picture_case(write_picture(tmp_path / f"{k}.png", colour=k > 1, seed=k), "x") for k in range(4)]
    found = survey(tmp_path, cases)
    assert checked(found, cases[:2]) == 1
    assert checked(found, cases[2:]) == 3
    assert checked(found, cases, replace(UNIT, colour="grey")) == 1
    assert checked(found, cases, replace(UNIT, colour="rgb")) == 3
    with pytest.raises(MedmomError, match=r"2\.png: 3 channels, .*0\.png has 1. Set --preparation.colour grey or rgb"):
        checked(found, cases)


def test_volumes_need_slices_or_three_edges(tmp_path: Path) -> None:
    cases = [picture_case(write_volume(tmp_path / "a.nii"), "x")]
    found = survey(tmp_path, cases)
    assert checked(found, cases, slices=3) == checked(found, cases, patch=(8, 8, 8)) == 1
    with pytest.raises(MedmomError, match=r"a\.nii: a volume of 6 axial slices, .* Set --data.slices, or"):
        checked(found, cases)
    with pytest.raises(MedmomError, match="a volume of 8 sagittal slices"):
        checked(found, cases, replace(UNIT, plane="sagittal"))


@pytest.mark.parametrize("options", [{"slices": 3}, {"patch": (8, 8, 8)}])
def test_pictures_need_two_edges(options: dict[str, object], tmp_path: Path) -> None:
    cases = [picture_case(write_picture(tmp_path / "a.png"), "x")]
    with pytest.raises(MedmomError, match=r"a\.png: one slice only, and data.* is for volumes. Set a patch of two"):
        checked(survey(tmp_path, cases), cases, **options)
