"""Where the files of predictions go, and what they never replace; label maps alone stand in ``test_predict.py``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import LABELS, save_image

from medmom.data.casefiles import CaseFiles
from medmom.data.files import Volume, read_image
from medmom.errors import MedmomError
from medmom.inference.extras import Wanted
from medmom.inference.manifest import file_sha256
from medmom.inference.outputs import claimed, plan_outputs, sidecar_path, sweep, write_prediction
from medmom.inference.ranks import Ranks

ABOUT: dict[str, Any] = {"labels": {}, "model": {"checksum": "abc"}, "seconds": {"read": 1.5}}
ALL = Wanted(preview=True, probabilities="uint8")


def case(folder: Path, name: str) -> CaseFiles:
    return CaseFiles(name.split(".", maxsplit=1)[0], (folder / name,), None, name)


@pytest.fixture
def image(tmp_path: Path) -> Volume:
    return read_image(save_image(tmp_path / "in" / "a.nii.gz", (5, 4, 3)))


def label_of(image: Volume) -> np.ndarray:
    return np.zeros(image.geometry.shape, np.uint8)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Where files go


def test_each_case_has_files_of_its_name(tmp_path: Path) -> None:
    cases = [case(tmp_path, "a.nii.gz"), case(tmp_path, "b.png")]
    outputs = plan_outputs(cases, tmp_path / "out", wanted=ALL, classes=["background", "left lung"])
    assert [[path.name for path in outputs.also(k)] for k in range(2)] == [
        ["a_preview.png", "a_background.nii.gz", "a_left_lung.nii.gz"],
        ["b_preview.png", "b_background.png", "b_left_lung.png"],
    ]
    assert plan_outputs(cases, tmp_path / "out").also(1) == ()
    assert not (tmp_path / "out").exists()


def test_one_file_has_its_others_beside_it(tmp_path: Path) -> None:
    outputs = plan_outputs([case(tmp_path, "a.nii.gz")], tmp_path / "x.nii.gz", wanted=ALL, classes=["liver"])
    assert outputs.also(0) == (tmp_path / "x_preview.png", tmp_path / "x_liver.nii.gz")
    assert outputs.listing is None
    assert outputs.manifest(Ranks()) is None


def test_each_process_has_a_manifest_of_its_own(tmp_path: Path) -> None:
    outputs = plan_outputs([case(tmp_path, "a.nii.gz")], tmp_path / "out", ranks=Ranks(1, 1, 2))
    assert outputs.manifest(Ranks()) == tmp_path / "out" / "run.json"
    assert outputs.manifest(Ranks(1, 1, 2)) == tmp_path / "out" / "run-1.json"
    assert (tmp_path / "out").is_dir(), "no process may take the folder from under another"


# What is refused


@pytest.mark.parametrize("name", ["cases", "run", "run-0", "run-12", "statistics"])
def test_case_named_like_a_file_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=f"cannot be named '{name}'. Rename"):
        plan_outputs([case(tmp_path, f"{name}.nii.gz")], tmp_path / "out")
    plan_outputs([case(tmp_path, f"{name}x.nii.gz")], tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "options", "file"),
    [
        (("a.png", "a_preview.png"), {"wanted": Wanted(preview=True)}, "a_preview.png"),
        (("a_liver.nii.gz", "a.nii.gz"), {"wanted": ALL, "classes": ["liver"]}, "a_liver.nii.gz"),
    ],
)
def test_two_cases_that_would_write_one_file_are_refused(
    names: tuple[str, str], options: dict[str, Any], file: str, tmp_path: Path
) -> None:
    cases = [case(tmp_path, name) for name in names]
    plan_outputs(cases, tmp_path / "out")
    with pytest.raises(MedmomError, match=rf"{names[1]}: its {file} would replace that of the case .*Rename one"):
        plan_outputs(cases, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "name", ["a_preview.png", "a_liver.nii.gz", "run.json", "statistics.json", "statistics.csv", "cases.json"]
)
def test_file_of_somebody_else_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"cases": []}')
    with pytest.raises(MedmomError, match=rf"{name}: exists and was not written by medmom predict\. Move it"):
        plan_outputs([case(tmp_path, "a.nii.gz")], tmp_path / "out", wanted=ALL, classes=["liver"])


def test_files_of_an_earlier_predict_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a_preview.png", "a_liver.nii.gz", "statistics.json", "statistics.csv"):
        (out / name).touch()
    for name in ("a.json", "cases.json"):
        (out / name).write_text(json.dumps(ABOUT))
    (out / "run.json").write_text(json.dumps({"call": "", "settings": {}, "model": {}, "cases": []}))
    plan_outputs([case(tmp_path, "a.nii.gz")], out, wanted=ALL, classes=["liver"])


@pytest.mark.parametrize("link", ["a_preview.png", "a_liver.nii.gz", "a.json", "statistics.csv", "run.json"])
def test_no_output_replaces_an_input(link: str, tmp_path: Path) -> None:
    given = case(tmp_path, "a.nii.gz")
    given.images[0].write_text("scan")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / link).hardlink_to(given.images[0])
    with pytest.raises(MedmomError, match=rf"{link}: the output would replace the input .*a\.nii\.gz"):
        plan_outputs([given], tmp_path / "out", wanted=ALL, classes=["liver"])


# What is written


def test_sidecar_has_the_checksum_of_the_label_map(image: Volume, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.nii.gz"
    told = write_prediction(path, label_of(image), LABELS, image, ABOUT, also=[path.with_name("a_preview.png")])
    assert told == json.loads(sidecar_path(path).read_text())
    assert told["prediction_sha256"] == file_sha256(path)
    assert told["also"] == ["a_preview.png"]
    assert told["seconds"]["read"] == 1.5
    assert told["seconds"]["write"] >= 0


def test_place_is_ours_before_any_file_is_visible(image: Volume, tmp_path: Path) -> None:
    path, preview = tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "a_preview.png"
    with claimed(path, ABOUT, also=[preview]):
        told = json.loads(sidecar_path(path).read_text())
        assert "prediction_sha256" not in told
        preview.touch()
        plan_outputs([case(tmp_path / "in", "a.nii.gz")], tmp_path / "out", wanted=Wanted(preview=True))
        write_prediction(path, label_of(image), LABELS, image, ABOUT, also=[preview])
    assert files(tmp_path / "out") == ["a.json", "a.nii.gz", "a_preview.png"]


@pytest.mark.parametrize("error", [MedmomError, KeyboardInterrupt])
def test_work_that_fails_leaves_nothing_new(error: type[BaseException], image: Volume, tmp_path: Path) -> None:
    path, preview = tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "a_preview.png"
    with pytest.raises(error), claimed(path, ABOUT, also=[preview]):
        preview.touch()
        write_prediction(path, label_of(image), LABELS, image, ABOUT, also=[preview])
        raise error
    assert files(tmp_path / "out") == []


def test_work_that_fails_leaves_an_earlier_prediction(image: Volume, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.nii.gz"
    write_prediction(path, label_of(image), LABELS, image, ABOUT)
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    with pytest.raises(MedmomError), claimed(path, {**ABOUT, "model": {"checksum": "def"}}):
        assert "prediction_sha256" not in json.loads(sidecar_path(path).read_text()), "nobody takes it for done"
        path.unlink()
        raise MedmomError("no space")
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before
    assert files(tmp_path / "out") == ["a.json", "a.nii.gz"]


def test_files_that_a_later_prediction_has_not_are_gone(image: Volume, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.nii.gz"
    also = [path.with_name(name) for name in ("a_preview.png", "a_liver.nii.gz")]
    with claimed(path, ABOUT, also=also):
        for other in (*also, path.with_name("a_mine.txt")):
            other.touch()
        write_prediction(path, label_of(image), LABELS, image, ABOUT, also=also)
    write_prediction(path, label_of(image), LABELS, image, ABOUT, also=also[:1])
    assert files(tmp_path / "out") == ["a.json", "a.nii.gz", "a_mine.txt", "a_preview.png"]


@pytest.mark.parametrize("name", ["../in/a.nii.gz", "b.nii.gz", "a_/../b.nii.gz", 7])
def test_changed_sidecar_takes_nothing_else_away(name: object, image: Volume, tmp_path: Path) -> None:
    path = tmp_path / "out" / "a.nii.gz"
    write_prediction(path, label_of(image), LABELS, image, ABOUT)
    (tmp_path / "out" / "b.nii.gz").touch()
    sidecar_path(path).write_text(json.dumps({**ABOUT, "also": [name]}))
    write_prediction(path, label_of(image), LABELS, image, ABOUT)
    assert files(tmp_path / "out") == ["a.json", "a.nii.gz", "b.nii.gz"]
    assert image.path.is_file()


def test_only_our_old_unfinished_files_are_swept(tmp_path: Path) -> None:
    ours = [f".{'0a' * 8}.part", f".{'1b' * 8}_12.part"]
    others = [".part", ".notes.part", f"{'0a' * 8}.part", f".{'0a' * 8}.part.txt", f".{'0g' * 8}.part"]
    for name in (*ours, *others, f".{'2c' * 8}.part"):
        (tmp_path / name).touch()
    for name in (*ours, *others):
        os.utime(tmp_path / name, (time.time() - 90_000, time.time() - 90_000))
    (tmp_path / f".{'3d' * 8}.part").mkdir()
    assert sorted(path.name for path in sweep(tmp_path)) == sorted(ours)
    assert files(tmp_path) == sorted([*others, f".{'2c' * 8}.part", f".{'3d' * 8}.part"])
    assert sweep(tmp_path / "absent") == []


def test_class_named_like_another_file_of_its_case_is_refused(tmp_path: Path) -> None:
    wanted = Wanted(entropy=True, probabilities="uint8")
    with pytest.raises(MedmomError, match=r"a_entropy\.nii\.gz: the probabilities of the class 'Entropy' too\. Rename"):
        plan_outputs([case(tmp_path, "a.nii.gz")], tmp_path / "out", wanted=wanted, classes=["Entropy"])
    # A picture of three planes has another suffix than the probabilities of a volume.
    wanted = Wanted(preview=True, probabilities="uint8")
    plan_outputs([case(tmp_path, "a.nii.gz")], tmp_path / "out", wanted=wanted, classes=["preview"])
    with pytest.raises(MedmomError, match=r"b_preview\.png: the probabilities of the class 'preview' too"):
        plan_outputs([case(tmp_path, "b.png")], tmp_path / "out", wanted=wanted, classes=["preview"])
