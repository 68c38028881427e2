from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_classes import write_class_folders, write_items, write_picture, write_volume

from medmom.data.class_layouts import find_class_cases, with_cases
from medmom.errors import MedmomError

MEDNIST = Path(__file__).parents[1] / "../shared/data/classify-mednist/public"


def write_table(folder: Path, text: str, *, name: str = "list.csv", images: str = "a b c d") -> Path:
    for k, image in enumerate(images.split()):
        write_picture(folder / f"{image}.png", seed=k)
    path = folder / name
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")
    return path


def classes_of(folder: Path) -> dict[str, tuple[str, ...] | None]:
    return {case.name: case.classes for case in find_class_cases(folder).cases}


def fault(folder: Path, **options: str) -> str:
    with pytest.raises(MedmomError) as error:
        find_class_cases(folder, **options)
    (line,) = str(error.value).splitlines()
    return line


# A folder for each class.


def test_a_folder_is_a_class(tmp_path: Path) -> None:
    found = find_class_cases(write_class_folders(tmp_path, {"cat": 2, "dog": 1}))
    assert found.classes.names == ("cat", "dog")
    assert not found.classes.is_multilabel
    assert [(case.name, case.classes) for case in found.cases] == [
        ("cat-0", ("cat",)),
        ("cat-1", ("cat",)),
        ("dog-0", ("dog",)),
    ]
    assert found.cases[0].images == (tmp_path / "cat" / "0.png",)
    assert all(case.label is None and case.group == case.name and case.fold is None for case in found.cases)
    assert found.notes == ("no column patient: each image is a group of its own",)


def test_stems_that_tell_cases_apart_are_their_names(tmp_path: Path) -> None:
    write_picture(tmp_path / "cat" / "one.png")
    write_volume(tmp_path / "dog" / "two.v1.nii.gz")
    assert classes_of(tmp_path) == {"one": ("cat",), "two.v1": ("dog",)}


def test_classes_and_cases_come_in_natural_order(tmp_path: Path) -> None:
    for name in ("grade 10", "grade 9"):
        for stem in ("x_10", "x_9"):
            write_picture(tmp_path / name / f"{name}{stem}.png")
    found = find_class_cases(tmp_path)
    assert found.classes.names == ("grade 9", "grade 10")
    assert [case.name for case in found.cases] == [f"grade {n}x_{k}" for n in (9, 10) for k in (9, 10)]


@pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
def test_parts_of_a_split_set_the_fold(validation: str, tmp_path: Path) -> None:
    for part in ("train", validation, "test"):
        write_class_folders(tmp_path / part, {"cat": 1, "dog": 1})
    found = find_class_cases(tmp_path)
    assert {case.name: case.fold for case in found.cases} == {
        f"{part}-{kind}-0": fold
        for part, fold in (("train", "train"), (validation, "val"), ("test", "test"))
        for kind in ("cat", "dog")
    }
    assert found.classes.names == ("cat", "dog")
    assert "the data come split: 2 test, 2 train, 2 val" in found.notes


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert find_class_cases(write_class_folders(tmp_path, {"train": 1, "plane": 1})).classes.names == ("plane", "train")


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1, ".cache": 1})
    (tmp_path / "cat" / "Thumbs.db").touch()
    (tmp_path / "cat" / "._0.png").touch()
    (tmp_path / "cat" / "more").mkdir()
    write_picture(tmp_path / "loose.png")
    (tmp_path / "README.md").touch()
    found = find_class_cases(tmp_path)
    assert len(found.cases) == 2
    assert found.notes[:3] == (
        "1 files of cat, such as Thumbs.db, are no images: passed over",
        "the folders inside cat, such as more, are not looked into",
        "1 images beside the class folders, such as loose.png, are of no class: left out",
    )


def test_a_pair_of_files_is_one_image(tmp_path: Path) -> None:
    write_volume(tmp_path / "cat" / "a.hdr")
    write_volume(tmp_path / "dog" / "b.nii")
    assert (tmp_path / "cat" / "a.img").is_file()
    found = find_class_cases(tmp_path)
    assert [case.images[0].name for case in found.cases] == ["a.hdr", "b.nii"]
    assert len(found.notes) == 1


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 0})
    assert fault(tmp_path) == (f"{tmp_path}/dog: the class folder holds no file. Add images, or take the folder away.")


def test_a_class_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 0})
    (tmp_path / "dog" / "a.gif").touch()
    assert "the class folder holds no image, but a.gif for example. Add images" in fault(tmp_path)


def test_the_folder_above_the_classes_is_refused_with_the_right_one(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "public", {"cat": 1, "dog": 1})
    assert fault(tmp_path).endswith(f"Give {tmp_path}/public, or images right inside it.")


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 3})
    assert fault(tmp_path) == (
        f"{tmp_path}: one class only (cat), so there is nothing to tell apart. Add images of another class."
    )


@pytest.mark.parametrize("kind", ["empty", "missing", "text"])
def test_what_is_no_data_folder_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "empty":
        path.mkdir()
    if kind == "text":
        path.touch()
    wanted = {"empty": "no folder of images lies in it", "missing": "no such folder", "text": "no .csv and no .npz"}
    assert wanted[kind] in fault(path)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1})
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "cat" / "0.jpg")
    assert "0.jpg and " in fault(tmp_path)
    assert "would both be called cat-0. Rename one" in fault(tmp_path)


def test_a_table_beside_the_classes_gives_patients(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 2, "dog": 1})
    rows = "file,patient,scanner\ncat/0.png,P1,A\ncat/1,P2,A\ndog/0.png,P1,B\n"
    (tmp_path / "cases.csv").write_text(rows)
    found = find_class_cases(tmp_path)
    assert [case.group for case in found.cases] == ["P1", "P2", "P1"]
    assert found.notes == ()
    assert [case.group for case in find_class_cases(tmp_path, group="scanner").cases] == ["A", "A", "B"]
    assert "no column age among file, patient, scanner" in fault(tmp_path, group="age")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("0.png,P1", "0.png is the name of 2 images"),
        ("cat/0.png,P1", "no patient for dog/0.png"),
        ("cat/0.png,P1\ncat/0,P1", "two rows name cat/0.png"),
    ],
)
def test_a_table_that_does_not_fit_the_folders_is_refused(rows: str, match: str, tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "cases.csv").write_text(f"file,patient\n{rows}\n")
    assert match in fault(tmp_path)


def test_a_group_without_a_table_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1})
    assert "no cases.csv with the column patient" in fault(tmp_path, group="patient")


# A CSV file.


def test_a_table_lists_images_and_classes(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label,patient\na.png,cat,P1\nsub/b.png,dog,P1", images="a sub/b")
    for given in (path, tmp_path):
        found = find_class_cases(given)
        assert found.folder == tmp_path
        assert found.classes.names == ("cat", "dog")
        assert [(case.name, case.classes, case.group) for case in found.cases] == [
            ("a", ("cat",), "P1"),
            ("b", ("dog",), "P1"),
        ]
        assert found.notes == ()


def test_other_columns_may_name_the_patient(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label,study\na.png,cat,S1\nb.png,dog,S2")
    assert [case.group for case in find_class_cases(path, group="study").cases] == ["S1", "S2"]
    found = find_class_cases(path)
    assert [case.group for case in found.cases] == ["a", "b"]
    assert "list.csv has image, label, study; --data.group names one" in found.notes[0]


def test_names_and_folds_of_a_table_count(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image;label;name;fold\na.png;cat;one;0\nb.png;dog;two;1.0")
    assert [(case.name, case.fold) for case in find_class_cases(path).cases] == [("one", "0"), ("two", "1")]


def test_an_image_without_a_class_is_left_out_with_a_note(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label\na.png,cat\nb.png,\nc.png,dog")
    found = find_class_cases(path)
    assert [case.name for case in found.cases] == ["a", "c"]
    assert "1 images without a class, such as b.png, are left out" in found.notes


def test_several_classes_in_a_cell_make_it_multilabel(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label\na.png,mass; cyst\nb.png,\nc.png,cyst")
    found = find_class_cases(path)
    assert found.classes.is_multilabel
    assert found.classes.names == ("cyst", "mass")
    assert classes_of(path) == {"a": ("mass", "cyst"), "b": (), "c": ("cyst",)}


def test_a_column_for_each_class_makes_it_multilabel(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label_mass,label_cyst\na.png,1,1\nb.png,0,0.0\nc.png,0,1\nd.png,,")
    found = find_class_cases(path)
    assert found.classes.is_multilabel
    assert found.classes.names == ("mass", "cyst")
    assert classes_of(path) == {"a": ("mass", "cyst"), "b": (), "c": ("cyst",)}
    assert any("d.png" in note for note in found.notes)


def test_channels_may_lie_in_files_of_their_own(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image_0,image_1,label\na.png,b.png,cat\nc.png,d.png,dog")
    assert [[p.name for p in case.images] for case in find_class_cases(path).cases] == [
        ["a.png", "b.png"],
        ["c.png", "d.png"],
    ]


def test_equal_stems_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label\nx/a.png,cat\ny/a.png,dog", images="x/a y/a")
    assert [case.name for case in find_class_cases(path).cases] == ["x-a", "y-a"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,label\na.png,cat\nx.png,dog\ny.png,dog", "row 3 names x.png, which is not there (2 of 3 images are"),
        ("image,label\na.png,cat\n,dog", "row 3 has no path in image"),
        ("image,label\na.png,cat\nb.txt,dog", "row 3 names b.txt, which is no picture or volume"),
        ("image,label\na.png,b.png\nb.png,dog", "the label b.png is a file"),
        ("image,label\na.png,cat\na.png,dog", "a.png is listed 2 times"),
        ("image,label\na.png,cat\nb.png,cat", "one class only (cat)"),
        ("image,label\na.png,\nb.png,", "no class, so there is nothing"),
        ("image,label\n", "no row below the header"),
        ("image,label,fold\na.png,cat,x\nb.png,dog,0", "the fold is 'x'. Write train, val, test or a number"),
        ("image,label,fold\na.png,cat,\nb.png,dog,0", "the case a has no fold, others have"),
        ("image,label,fold\na.png,cat,0\nb.png,dog,train", "Write either numbers, or train, val and test"),
        ("image,label,patient\na.png,cat,\nb.png,dog,P", "row 2 has no patient"),
        ("image,label,name\na.png,cat,../x\nb.png,dog,y", "the name '../x' cannot be that of a file"),
        ("image,label,name\na.png,cat,x\nb.png,dog,x", "would both be called x"),
        ("image,label,label_x\na.png,cat,1\nb.png,dog,0", "both give classes"),
        ("image,label_x\na.png,yes\nb.png,0", "label_x is 'yes'. Write 1"),
        ("image,kind\na.png,cat", "no columns image and label among image, kind"),
        ("case,image,class,probability,flag\na,a.png,cat,0.9,", "predictions"),
    ],
)
def test_a_fault_of_a_table_is_one_line_with_its_mend(text: str, match: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, text, images="a b")
    line = fault(path)
    assert match in line
    assert line.startswith(str(path))


def test_a_column_of_the_command_line_has_to_be_there(tmp_path: Path) -> None:
    path = write_table(tmp_path, "image,label\na.png,cat\nb.png,dog")
    assert "no column study among image, label. Set --data.group to one." in fault(path, group="study")


def test_two_tables_in_a_folder_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, "image,label\na.png,cat\nb.png,dog")
    write_table(tmp_path, "image,label\na.png,cat\nb.png,dog", name="other.csv")
    assert "several data sets (list.csv, other.csv). Give one of the files." in fault(tmp_path)


def test_predictions_beside_class_folders_are_no_data(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "classes.csv").write_text("case,image,class,probability,flag\na,cat/0.png,dog,0.9,\n")
    assert classes_of(tmp_path) == {"cat-0": ("cat",), "dog-0": ("dog",)}


# Lists of a split, as RadImageNet has them.

CLASSES = {"CT/abd/normal": "abd-normal", "CT/abd/cyst": "abd-cyst", "MR/abd/normal": "mr-normal", "US/mass": "us-mass"}


def write_lists(folder: Path, lists: Path, *, labels: dict[str, str] = CLASSES) -> None:
    rows: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for place, label in labels.items():
        for k, part in enumerate(("train", "train", "val", "test")):
            image = folder / place / f"{label}{k:06d}.png"
            write_picture(image, seed=k)
            rows[part].append(f"radiology_ai/{place}/{image.name},{label}")
    lists.mkdir(exist_ok=True)
    for part, lines in rows.items():
        (lists / f"RadiologyAI_{part}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")


@pytest.mark.parametrize("place", ["inside", "above", "renamed"])
def test_radimagenet_is_read_as_published(place: str, tmp_path: Path) -> None:
    top = tmp_path / ("rin" if place == "renamed" else "radiology_ai")
    given = tmp_path if place == "above" else top
    write_lists(top, given)
    found = find_class_cases(given)
    assert found.classes.names == ("ct/abd/cyst", "ct/abd/normal", "mr/abd/normal", "us/mass")
    assert len(found.cases) == 16
    case = next(case for case in found.cases if case.name == "mr-normal000002")
    assert (case.classes, case.fold) == (("mr/abd/normal",), "val")
    assert case.images[0].resolve() == (top / "MR/abd/normal/mr-normal000002.png").resolve()
    assert "the data come split: 4 test, 8 train, 4 val" in found.notes


def test_regions_without_a_folder_are_left_out_with_a_note(tmp_path: Path) -> None:
    write_lists(tmp_path, tmp_path)
    shutil.rmtree(tmp_path / "US")
    shutil.rmtree(tmp_path / "MR" / "abd")
    found = find_class_cases(tmp_path)
    assert found.classes.names == ("ct/abd/cyst", "ct/abd/normal")
    assert "8 listed images are left out: the folders of their regions are not there" in found.notes


def test_a_missing_image_of_a_region_that_is_there_is_refused(tmp_path: Path) -> None:
    write_lists(tmp_path, tmp_path)
    (tmp_path / "CT/abd/cyst/abd-cyst000002.png").unlink()
    assert "RadiologyAI_val.csv: row 3 names radiology_ai/CT/abd/cyst/abd-cyst000002.png, which is not" in fault(
        tmp_path
    )


def test_labels_that_join_folders_are_kept(tmp_path: Path) -> None:
    labels = {"CT/abd/normal": "normal", "CT/abd/cyst": "ill", "CT/abd/mass": "ill", "MR/abd/normal": "normal"}
    write_lists(tmp_path, tmp_path, labels=labels)
    assert find_class_cases(tmp_path).classes.names == ("ct/abd/ill", "ct/abd/normal", "mr/abd/normal")


def test_lists_without_modality_give_their_labels(tmp_path: Path) -> None:
    for part, image in (("train", "a"), ("val", "b")):
        write_table(
            tmp_path,
            f"image,class\n{image}1.png,cat\n{image}2.png,dog",
            name=f"{part}.csv",
            images=f"{image}1 {image}2",
        )
    found = find_class_cases(tmp_path)
    assert found.classes.names == ("cat", "dog")
    assert {case.name: case.fold for case in found.cases} == {"a1": "train", "a2": "train", "b1": "val", "b2": "val"}


def test_an_image_in_two_lists_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_table(tmp_path, "image,class\na.png,cat\nb.png,dog", name=f"{part}.csv")
    assert "stands in the lists of train and val. Keep it in one." in fault(tmp_path)


# All together.


def test_a_class_that_no_case_is_left_of_goes_with_a_note(tmp_path: Path) -> None:
    found = find_class_cases(write_class_folders(tmp_path, {"cat": 2, "dog": 1, "owl": 1}))
    rest = with_cases(found, [case for case in found.cases if case.classes != ("dog",)])
    assert rest.classes.names == ("cat", "owl")
    assert "no case of class dog takes part" in rest.notes
    with pytest.raises(MedmomError, match=r"one class only \(cat\)"):
        with_cases(found, found.cases[:2])


def test_a_table_goes_before_a_packed_file_and_that_before_folders(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1})
    write_items(tmp_path / "items.npz")
    assert len(find_class_cases(tmp_path).cases) == 11
    write_table(tmp_path, "image,label\na.png,red\nb.png,blue")
    assert find_class_cases(tmp_path).classes.names == ("blue", "red")


@pytest.mark.skipif(not MEDNIST.is_dir(), reason="needs the shared data")
def test_mednist_is_read_as_it_is() -> None:
    found = find_class_cases(MEDNIST)
    assert len(found.cases) == 3600
    assert found.classes.names == ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
