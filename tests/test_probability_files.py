from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from PIL import Image
from scipy.spatial.transform import Rotation
from tiny import save_image
from tiny_pictures import save

from medmom.data.files import Volume, read_image
from medmom.errors import MedmomError
from medmom.inference import probability_files
from medmom.inference.probability_files import ProbabilityFiles, probability_path
from medmom.labels import Labels

LABELS = Labels(("background", "left lung", "tumour/core", "aorta"), (0, 1, 4, 7))
TURN = Rotation.from_euler("xyz", (10, -5, 20), degrees=True).as_matrix()
AFFINE = from_matvec(TURN @ [[0, 0, 2.5], [-0.8, 0, 0], [0, 0.9, 0]], (-30, 12, 40))
STEPS = {"uint8": 255, "uint16": 65535}


def image_of(folder: Path, shape: tuple[int, ...] = (7, 5, 6)) -> Volume:
    return read_image(save_image(folder / "in" / "scan.nii.gz", shape, affine=AFFINE))


def probabilities(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.exp(rng.normal(0, 3, (LABELS.num_channels, *shape)))
    return np.asarray(found / found.sum(axis=0), dtype=np.float32)


def slabs(size: int, thickness: int, *, rising: bool = True) -> list[slice]:
    places = [slice(start, min(start + thickness, size)) for start in range(0, size, thickness)]
    return places if rising else places[::-1]


def write(files: ProbabilityFiles, values: np.ndarray, axis: int, thickness: int, *, rising: bool = True) -> None:
    for place in slabs(values.shape[1 + axis], thickness, rising=rising):
        files.write(place, values.take(range(place.start, place.stop), axis=1 + axis))


def load(path: Path) -> Any:
    return nib.load(path)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", STEPS)
def test_any_reader_finds_the_probabilities_to_half_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, axis: int, rising: bool
) -> None:
    monkeypatch.setattr(probability_files, "CHUNK", 100)
    image, half = image_of(tmp_path), 0.5 / STEPS[kind] + 1e-7
    values = probabilities(image.geometry.shape)
    with ProbabilityFiles(tmp_path / "out", "scan", LABELS, image, kind=kind) as files:
        write(files, values, axis, 2, rising=rising)
    read = np.stack([load(path).get_fdata() for path in files.paths])
    assert np.abs(read - values).max() <= half
    assert np.abs(read.sum(axis=0) - 1).max() <= len(read) * half
    assert {load(path).get_data_dtype() for path in files.paths} == {np.dtype(kind)}
    assert sorted(files.paths) == sorted((tmp_path / "out").iterdir())


def test_files_are_named_by_case_and_class(tmp_path: Path) -> None:
    image = image_of(tmp_path)
    with ProbabilityFiles(tmp_path, "scan.v1", LABELS, image) as files:
        files.write(slice(0, 6), probabilities(image.geometry.shape))
    names = ["background", "left_lung", "tumour_core", "aorta"]
    assert [path.name for path in files.paths] == [f"scan.v1_{name}.nii.gz" for name in names]
    assert files.paths[2] == probability_path(tmp_path, "scan.v1", "tumour/core")


def test_grid_and_codes_are_those_of_the_image(tmp_path: Path) -> None:
    file, source = load(save_image(tmp_path / "plain.nii", (7, 5, 6))), tmp_path / "scan.nii"
    file.set_qform(AFFINE, code=1)
    file.set_sform(AFFINE, code=4)
    nib.save(file, source)
    image = read_image(source)
    with ProbabilityFiles(tmp_path, "scan", LABELS, image) as files:
        write(files, probabilities(image.geometry.shape), 2, 1)
    for path in files.paths:
        found = load(path)
        np.testing.assert_array_equal(found.affine, load(source).affine)
        assert [int(found.header[name]) for name in ("qform_code", "sform_code")] == [1, 4]
        assert found.header.get_xyzt_units()[0] == "mm"
        assert int(found.header["intent_code"]) == 0
        assert not found.header.extensions
        assert read_image(path).geometry.is_close(image.geometry, tolerance=1e-6)


@pytest.mark.parametrize("kind", [nib.Nifti2Image, nib.Nifti1Image])
def test_nifti_version_and_flat_shape_stay(tmp_path: Path, kind: Any) -> None:
    nib.save(kind(np.arange(35, dtype=np.int16).reshape(7, 5), np.eye(4)), tmp_path / "flat.nii")
    image = read_image(tmp_path / "flat.nii")
    values = probabilities((7, 5, 1))
    with ProbabilityFiles(tmp_path, "flat", LABELS, image) as files:
        write(files, values, 1, 2)
    found = load(files.paths[3])
    assert (type(found), found.shape) == (kind, (7, 5))
    assert np.abs(found.get_fdata() - values[3, ..., 0]).max() <= 1 / 500


def test_the_same_slabs_give_the_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    image = image_of(tmp_path)
    values = probabilities(image.geometry.shape)
    found = []
    for thickness in (1, 4):
        with ProbabilityFiles(tmp_path, "scan", LABELS, image) as files:
            write(files, values, 2, thickness)
        found.append([path.read_bytes() for path in files.paths])
    assert found[0] == found[1]


@pytest.mark.parametrize("axis", [0, 2])
def test_nothing_is_visible_before_the_end_or_after_an_error(tmp_path: Path, axis: int) -> None:
    image, out = image_of(tmp_path), tmp_path / "out"
    values = probabilities(image.geometry.shape)
    with pytest.raises(KeyError), ProbabilityFiles(out, "scan", LABELS, image) as files:
        write(files, values, axis, 1)
        left = [path.name for path in out.iterdir()]
        assert left
        assert all(name.startswith(".") and name.endswith(".part") for name in left)
        raise KeyError
    assert not list(out.iterdir())


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("during", ["slabs", "end"])
def test_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: int, during: str
) -> None:
    image, out, append = image_of(tmp_path), tmp_path / "out", probability_files._append

    def full(path: Path, data: bytes, *, last: bool = False) -> None:
        if during == "slabs" or last:
            append(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, data)

    monkeypatch.setattr(probability_files, "_append", full)
    line = r"out/scan_background\.nii\.gz: cannot be written \(No space left on device\)\. Choose another place\."
    files = ProbabilityFiles(out, "scan", LABELS, image)
    with pytest.raises(MedmomError, match=line):
        write(files, probabilities(image.geometry.shape), axis, 1)
        files.close()
    assert not list(out.iterdir())


def test_a_name_that_cannot_be_given_takes_the_others_back(tmp_path: Path) -> None:
    image, out = image_of(tmp_path), tmp_path / "out"
    blocked = probability_path(out, "scan", "tumour/core")
    blocked.mkdir(parents=True)
    with pytest.raises(MedmomError, match="scan_tumour_core"), ProbabilityFiles(out, "scan", LABELS, image) as files:
        files.write(slice(0, 6), probabilities(image.geometry.shape))
    assert list(out.iterdir()) == [blocked]


def test_missing_slabs_are_noticed(tmp_path: Path) -> None:
    image, out = image_of(tmp_path), tmp_path / "out"
    values = probabilities(image.geometry.shape)
    with pytest.raises(ValueError, match="do not cover"), ProbabilityFiles(out, "scan", LABELS, image) as files:
        files.write(slice(0, 2), values[..., :2])
    assert not list(out.iterdir())
    with pytest.raises(ValueError, match="slab"), ProbabilityFiles(out, "scan", LABELS, image) as files:
        files.write(slice(0, 2), values[..., :2])
        files.write(slice(3, 5), values[..., 3:5])
    assert not list(out.iterdir())


@pytest.mark.parametrize("names", [("left lung", "left_lung"), ("Liver", "liver"), ("a/b", "a b")])
def test_classes_that_would_share_a_file_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    labels = Labels(("background", *names), (0, 1, 2))
    with pytest.raises(MedmomError, match=f"of class '{names[1]}' and of '{names[0]}'"):
        ProbabilityFiles(tmp_path, "scan", labels, image_of(tmp_path))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", STEPS)
def test_a_picture_gets_upright_grey_pictures(tmp_path: Path, axis: int, kind: Any) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = read_image(save(tmp_path / "photo.png", colours))
    values = probabilities((7, 5, 1))
    with ProbabilityFiles(tmp_path / "out", "photo", LABELS, image, kind=kind) as files:
        write(files, values, axis, 3)
    assert files.paths[1].name == "photo_left_lung.png"
    assert len(list((tmp_path / "out").iterdir())) == LABELS.num_channels
    for path, wanted in zip(files.paths, values[..., 0], strict=True):
        with Image.open(path) as picture:
            assert picture.mode == {"uint8": "L", "uint16": "I;16"}[kind]
            assert np.abs(np.asarray(picture) / STEPS[kind] - wanted.T).max() <= 0.5 / STEPS[kind] + 1e-7
