from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meanwhile import before_each
from tiny_classes import write_items

from medmom.data import class_items
from medmom.data.class_items import open_items, read_item, unpack_items
from medmom.data.class_layouts import find_class_cases
from medmom.errors import MedmomError


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def grey(count: int = 2) -> np.ndarray:
    return np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)


def fault(path: Path) -> str:
    with pytest.raises(MedmomError) as error:
        find_class_cases(path)
    (line,) = str(error.value).splitlines()
    return line


def test_parts_of_a_file_are_folds_and_items_count_through(tmp_path: Path) -> None:
    path = write_items(tmp_path / "set" / "demo.npz", sizes=(3, 2, 1))
    for given in (path, path.parent):
        found = find_class_cases(given)
        assert found.folder == path
        assert [(case.name, case.item, case.fold) for case in found.cases] == [
            ("demo-000000", 0, "train"),
            ("demo-000001", 1, "train"),
            ("demo-000002", 2, "train"),
            ("demo-000003", 3, "val"),
            ("demo-000004", 4, "val"),
            ("demo-000005", 5, "test"),
        ]
        assert [case.classes for case in found.cases] == [(k,) for k in "010010"]
        assert {case.images for case in found.cases} == {(path,)}
        assert found.classes.names == ("0", "1")
        assert "each is a group of its own" in found.notes[0]


@pytest.mark.parametrize(
    ("stem", "first", "last"),
    [
        ("organamnist", "bladder", "spleen"),
        ("organcmnist_128", "bladder", "spleen"),
        ("OrganSMNIST", "bladder", "spleen"),
        # The volumes number their organs otherwise than the slices.
        ("organmnist3d", "liver", "pancreas"),
        ("pathmnist", "0", "10"),
    ],
)
def test_known_sets_have_names(stem: str, first: str, last: str, tmp_path: Path) -> None:
    labels = np.arange(11)[:, None]
    path = save(tmp_path / f"{stem}.npz", train_images=grey(11), train_labels=labels)
    names = find_class_cases(path).classes.names
    assert (len(names), names[0], names[-1]) == (11, first, last)


def test_numbers_that_do_not_occur_are_no_classes(tmp_path: Path) -> None:
    path = save(tmp_path / "some.npz", train_images=grey(3), train_labels=np.array([1, 4, 1]))
    found = find_class_cases(path)
    assert found.classes.names == ("1", "4")
    assert [case.classes for case in found.cases] == [("1",), ("4",), ("1",)]


def test_columns_of_labels_make_it_multilabel(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=grey(2), train_labels=np.array([[1, 0, 1], [0, 0, 0]]))
    found = find_class_cases(path)
    assert found.classes.is_multilabel
    assert [case.classes for case in found.cases] == [("0", "2"), ()]


def test_a_picture_is_turned_to_columns_and_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=grey(), train_labels=np.arange(2))
    volume = read_item(path, 1)
    assert volume.array.shape == (1, 4, 3, 1)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0, :, :, 0], grey()[1].T)
    np.testing.assert_array_equal(volume.geometry.affine, np.eye(4))
    assert volume.header is None


def test_colour_comes_first_and_depth_last(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    path = save(tmp_path / "rgb.npz", train_images=rgb, train_labels=np.arange(2))
    np.testing.assert_array_equal(read_item(path, 0).array[..., 0], rgb[0].transpose(2, 1, 0))
    deep = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 4), dtype=np.uint8)
    path = save(tmp_path / "deep.npz", train_images=deep, train_labels=np.arange(2))
    array = read_item(path, 0).array
    assert array.shape == (1, 4, 5, 6)
    assert array[0, 3, 2, 1] == deep[0, 1, 2, 3]


def test_16_bits_come_on_the_scale_of_8(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=grey().astype(np.uint16) * 257, train_labels=np.arange(2))
    np.testing.assert_array_equal(read_item(path, 0).array[0, :, :, 0], grey()[0].T)


def test_unpacked_images_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_items(tmp_path / "x.npz")
    folder = unpack_items(path, tmp_path / "cache")
    mapped = open_items(folder)
    assert all(isinstance(part, np.memmap) for part in mapped)
    for item in range(11):
        np.testing.assert_array_equal(read_item(path, item, mapped).array, read_item(path, item).array)
    monkeypatch.setattr(class_items, "_opened", None)  # it is not read a second time
    assert unpack_items(path, tmp_path / "cache") == folder


def test_a_file_that_two_runs_unpack_at_once_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_items(tmp_path / "x.npz")
    others = before_each(monkeypatch, Path, "rename", lambda: unpack_items(path, tmp_path / "cache").stat().st_ino)
    folder = unpack_items(path, tmp_path / "cache")
    assert folder.stat().st_ino == others[0]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_changed_file_is_unpacked_anew(tmp_path: Path) -> None:
    path = write_items(tmp_path / "x.npz")
    first = unpack_items(path, tmp_path / "cache")
    write_items(path, sizes=(4, 3, 2))
    assert unpack_items(path, tmp_path / "cache") != first


def test_a_damaged_file_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    path = write_items(tmp_path / "x.npz", shape=(40, 40))
    raw = bytearray(path.read_bytes())
    raw[600:700] = bytes(100)
    path.write_bytes(raw)
    with pytest.raises(MedmomError, match=r"x\.npz: the array train_images is missing or damaged .* Fetch"):
        unpack_items(path, tmp_path / "cache")
    assert list((tmp_path / "cache" / "items").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(MedmomError, match="the cache cannot be written"):
        unpack_items(write_items(tmp_path / "x.npz"), tmp_path / "cache")


@pytest.mark.parametrize("array", [np.full((2, 3, 4), 7, np.uint8), np.full((2, 3, 4), np.nan)])
def test_an_image_that_shows_nothing_is_refused_by_its_name(array: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=array, train_labels=np.arange(2))
    with pytest.raises(MedmomError, match=r"item 1: .* Leave it out with --data.leave_out '\[x-000001\]'"):
        read_item(path, 1)
    assert find_class_cases(path).cases[1].name == "x-000001"


@pytest.mark.parametrize("item", [-1, 11])
def test_an_item_beyond_the_file_is_refused(item: int, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=f"no item {item}"):
        read_item(write_items(tmp_path / "x.npz"), item)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"images": grey()}, "no array train_images, so not a MedMNIST file"),
        ({"val_images": grey(), "val_labels": np.arange(2)}, "no array train_images"),
        ({"train_images": grey()}, "train_labels is missing or damaged"),
        ({"train_images": grey(), "train_labels": np.arange(3)}, "2 images and 3 labels in train"),
        ({"train_images": grey()[0], "train_labels": np.arange(3)}, r"train_images has shape (3, 4)"),
        ({"train_images": grey(), "train_labels": np.array([-1, 1])}, "reaches from -1 to 1"),
        ({"train_images": grey(), "train_labels": np.array([[0, 2], [1, 0]])}, "reaches from 0 to 2"),
        ({"train_images": grey(), "train_labels": np.array([0.5, 1])}, "type float64"),
        ({"train_images": grey(), "train_labels": np.array(["a", "b"])}, "type <U1"),
        ({"train_images": grey(), "train_labels": np.zeros(2, int)}, "one class only (0)"),
        ({"train_images": grey(0), "train_labels": np.zeros((0, 1), int)}, "train_labels has shape (0, 1)"),
        (
            {
                "train_images": grey(),
                "train_labels": np.arange(2),
                "val_images": grey(),
                "val_labels": np.eye(2, dtype=int),
            },
            "labels of [1, 2] columns",
        ),
        ({"train_images": np.array([None, "x"], dtype=object), "train_labels": np.arange(2)}, "type object"),
    ],
)
def test_a_file_of_another_kind_is_one_line_with_its_mend(arrays: dict[str, Any], match: str, tmp_path: Path) -> None:
    line = fault(save(tmp_path / "x.npz", **arrays))
    assert match in line
    assert line.startswith(f"{tmp_path}/x.npz: ")


def test_labels_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=grey(), train_labels=np.array([{}, {}], dtype=object))
    assert "train_labels is missing or damaged" in fault(path)


@pytest.mark.parametrize("content", ["cut", "text", "array", "empty"])
def test_what_is_no_packed_file_is_refused(content: str, tmp_path: Path) -> None:
    path = write_items(tmp_path / "x.npz")
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "array":
        with path.open("wb") as stream:
            np.save(stream, grey())
    else:
        path.write_text("words" if content == "text" else "")
    line = fault(path)
    assert line.startswith(f"{path}: ")
    assert line.endswith((". Fetch it again.", "numpy.savez."))


def test_a_packed_file_has_no_patients(tmp_path: Path) -> None:
    path = write_items(tmp_path / "x.npz")
    with pytest.raises(MedmomError, match=r"no column patient. Leave out --data.group"):
        find_class_cases(path, group="patient")
