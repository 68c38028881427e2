"""Nothing that arrives is clean: damage and malice give a sound result or one line, soon and in little memory.

A mutant follows from SEED and its number alone. One that fails stays where the message says.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import signal
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fuzzing import Mutant, nifti_mutant, write_mutant
from fuzzing_pictures import picture_mutant
from nibabel import imageglobals
from tiny import save_tiny

from medmom.cli import main
from medmom.data.files import Volume, read_geometry, read_images, read_label
from medmom.errors import MedmomError

SEED = 0
CHUNK = 100
SECONDS = 10
PEAK = 2**27
"""Bytes that reading a mutant of some KiB may take; 64 MiB of them where the voxels begin late."""

# More would be honest work, and seconds of it: voxels of 20 mm become 8000 of 1 mm.
MAX_WORKING_MM3 = 2**16


class TooSlow(BaseException):
    """Not an Exception: none of the code under test may take it for damage."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("fuzz") / "model")


def chunks(count: int, *marks: pytest.MarkDecorator, start: int = 0) -> list[Any]:
    return [pytest.param(first, marks=marks, id=str(first)) for first in range(start, count, CHUNK)]


@contextmanager
def told(mutant: Mutant, folder: Path, number: int) -> Iterator[None]:
    """Names seed, number and place of the mutant where something fails."""
    try:
        yield
    except (Exception, TooSlow) as error:
        what = f"mutant {number} of seed {SEED} ({mutant.how}) in {folder}"
        raise AssertionError(f"{what}: {type(error).__name__} {error}") from error


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where something takes long or much memory."""

    def ring(*_: object) -> None:
        raise TooSlow(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < PEAK, f"took {peak} bytes"
    finally:
        tracemalloc.stop()
        signal.alarm(0)


def one_line(error: MedmomError | str, folder: Path) -> None:
    """A fact and a mend on one line that begins with a file of the mutant."""
    text = str(error)
    assert text.startswith(str(folder)), text
    assert "\n" not in text, text
    assert text.endswith("."), text


def read_or_refused(path: Path) -> Volume | None:
    try:
        return read_images([path], compact=True)
    except MedmomError as error:
        one_line(error, path.parent)
        return None


def told_by_nibabel(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape without trailing ones beyond the third axis, and affine, as nibabel's header class has them."""
    head = next(
        file for file in sorted(path.parent.iterdir()) if file.name.startswith((f"{path.name.split('.')[0]}.",))
    )
    block = head.read_bytes()
    if block.startswith(b"\x1f\x8b"):
        block = gzip.GzipFile(fileobj=io.BytesIO(block)).read(540)
    pair, single = (nib.nifti2.Nifti2PairHeader, nib.Nifti2Header), (nib.nifti1.Nifti1PairHeader, nib.Nifti1Header)
    kind = pair[block[4:8] == b"n+2\0"] if block[5:7] in (b"+2", b"i2") else single[block[344:348] == b"n+1\0"]
    with imageglobals.LoggingOutputSuppressor(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = kind(block[: kind.sizeof_hdr])
        shape, affine = [*header.get_data_shape()], header.get_best_affine()
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    return tuple(shape) if len(shape) > 2 else (*shape, 1), affine


def voxels_of_nibabel(path: Path) -> np.ndarray | None:
    """Scaled voxels, None where nibabel reads less than we do: extensions that lie, names that do."""
    with imageglobals.LoggingOutputSuppressor(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(nib.load(path).dataobj, dtype=np.float64)
        except Exception:
            return None


def check_nifti(number: int, folder: Path) -> Volume | None:
    mutant = nifti_mutant(SEED, number)
    path = write_mutant(mutant, folder)
    with told(mutant, folder, number):
        with bounded():
            volume = read_or_refused(path)
        if volume is None:
            return None
        shape, affine = told_by_nibabel(path)
        assert volume.geometry.shape == shape[:3]
        assert len(volume.array) == (*shape, 1)[3]
        np.testing.assert_allclose(volume.geometry.affine, affine, rtol=0, atol=1e-9)
        voxels = voxels_of_nibabel(path)
        if voxels is not None:
            ours = np.moveaxis(volume.array, 0, 3).reshape(voxels.shape)
            np.testing.assert_allclose(ours, voxels.astype(np.float32), rtol=1e-6)
    return volume


@pytest.mark.parametrize("first", [*chunks(500), *chunks(10_000, pytest.mark.slow, start=500)])
def test_nifti_mutant_is_read_as_nibabel_reads_it_or_refused_in_a_line(first: int, tmp_path: Path) -> None:
    found = 0
    for number in range(first, first + CHUNK):
        found += check_nifti(number, tmp_path / str(number)) is not None
        shutil.rmtree(tmp_path / str(number))
    # Else it would be the door that is tested, and nothing behind it.
    assert 10 < found < 90


def runs_long(path: Path) -> bool:
    """Whether the working grid of a mutant that can be read is large."""
    try:
        grid = read_geometry(path)
    except MedmomError:
        return False
    return float(np.prod(grid.shape) * np.prod(grid.spacing)) > MAX_WORKING_MM3


@pytest.mark.parametrize("first", [*chunks(200), *chunks(4000, pytest.mark.slow, start=200)])
def test_command_gives_a_label_map_on_the_grid_of_the_mutant_or_a_line(
    first: int, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = {}
    for number in range(first, first + CHUNK, 2):
        mutant = nifti_mutant(SEED, number)
        files = {name.replace("scan", f"m{number}"): content for name, content in mutant.files.items()}
        path = write_mutant(mutant._replace(files=files, name=mutant.name.replace("scan", f"m{number}")), tmp_path)
        if not runs_long(path):
            paths[f"m{number}"] = path
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(model), *map(str, paths.values()), "--out", str(out), "--quiet", "--device", "cpu"])
    assert caught.value.code == 2
    assert "Traceback" not in capfd.readouterr().err
    rows = json.loads((out / "cases.json").read_text())["cases"]
    assert [row["name"] for row in rows] == list(paths)
    for row in rows:
        if row["error"] is not None:
            one_line(row["error"], tmp_path)
            continue
        shape, affine = told_by_nibabel(paths[row["name"]])
        label = read_label(out / row["prediction"])
        assert label.array.shape == shape[:3], row
        np.testing.assert_allclose(label.geometry.affine, affine, rtol=0, atol=1e-5, err_msg=str(row))


@pytest.mark.parametrize("number", range(0, 400, 80))
def test_command_refuses_a_mutant_in_one_line(
    number: int, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    number = next(n for n in range(number, number + 80) if check_nifti(n, tmp_path / str(n)) is None)
    path = tmp_path / str(number) / nifti_mutant(SEED, number).name
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(model), str(path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert caught.value.code == 2
    text = capfd.readouterr().err
    assert text.startswith(f"medmom: {path.parent}")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_mutants_are_the_same_every_time() -> None:
    for number in range(20):
        assert nifti_mutant(SEED, number) == nifti_mutant(SEED, number)
        assert picture_mutant(SEED, number) == picture_mutant(SEED, number)


def check_picture(number: int, folder: Path) -> bool:
    mutant = picture_mutant(SEED, number)
    path = write_mutant(mutant, folder)
    with told(mutant, folder, number), bounded():
        volume = read_or_refused(path)
        try:
            read_label(path)
        except MedmomError as error:
            one_line(error, folder)
        if volume is not None:
            assert volume.array.shape[1:] == read_geometry(path).shape
            assert 0 <= volume.array.min() < volume.array.max() <= 255
    return volume is not None


@pytest.mark.parametrize("first", [*chunks(200), *chunks(2000, pytest.mark.slow, start=200)])
def test_picture_mutant_is_read_or_refused_in_a_line(first: int, tmp_path: Path) -> None:
    found = 0
    for number in range(first, first + CHUNK):
        found += check_picture(number, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))
    assert 10 < found < 90
