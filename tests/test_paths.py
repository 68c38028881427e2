"""Names that people, scanners and other systems give to files, links, and folders that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import save_image, save_tiny
from tiny_road import run

from medmom.cli import main

SHAPE = (6, 5, 4)

NAMES = (
    "two words",
    " blank at both ends ",
    "Müller_检查_снимок",
    "e\u0301 as two letters",
    "-case",
    "--out",
    'it\'s "quoted"',
    "new\nline",
    "tab\there",
    "back\\slash",
    "$(touch hacked);`touch hacked`|&",
    "100% {0} %s",
    "[abc]?*",
    "ends in a dot.",
    "a.v1.2",
    "cases_",
    "~",
    "#x",
    "🫀" * 20,
    "x" * 240,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "a model", patch=(8, 8, 8))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names start from a folder of the test's own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("medmom: ") and said.count("\n") == 1, said
    assert "Errno" not in said and "Traceback" not in said
    return said


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []  # noqa: PTH208 - hidden ones too


def check(out: Path, name: str, image: Path) -> None:
    """Demands a label map of the case, on its grid, and a sidecar that names the image and the label map's bytes."""
    label, scan = nib.load(out / f"{name}.nii.gz"), nib.load(image)
    assert label.shape == scan.shape
    np.testing.assert_array_equal(label.affine, scan.affine)
    told = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    assert told["image"] == [str(image.absolute())]
    assert told["prediction_sha256"]
    assert [case["name"] for case in json.loads((out / "cases.json").read_text(encoding="utf-8"))["cases"]] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_predicted_scored_and_reported(name: str, model: Path, tmp_path: Path) -> None:
    image, out = save_image(tmp_path / "in" / f"{name}.nii.gz", SHAPE), tmp_path / "out of it"
    assert run("predict", model, image, "--out", out) == 0
    check(out, name, image)
    assert run("predict", model, image, "--out", out, "--skip-existing") == 0
    (tmp_path / "references").mkdir()
    shutil.copy(out / f"{name}.nii.gz", tmp_path / "references")
    assert run("evaluate", out, tmp_path / "references") == 0
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert [case["name"] for case in scores["cases"]] == [name]
    assert not files(Path())


@pytest.mark.parametrize("name", ["-case", "--out", "[abc]?*", "~", "..."])
def test_relative_name_is_taken_as_it_is(name: str, model: Path) -> None:
    # nibabel would take "~" for somebody's home.
    image = Path(save_image(Path(f"{name}.nii.gz").absolute(), SHAPE).name)
    # Behind two dashes nothing is an option; with a folder before it nothing looks like one.
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--out", "first", "--device", "cpu", "--quiet", "--", str(model), image.name])
    assert ended.value.code == 0
    assert run("predict", model, f"./{image.name}", "--out", "second") == 0
    for out in ("first", "second"):
        check(Path(out), name, image.absolute())


@pytest.mark.parametrize("name", [" two  words", "-out", "ü 检查", "new\nline", "it's", "o.", "x" * 250])
def test_any_name_of_a_folder_is_written_to(name: str, model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.nii.gz", SHAPE)
    assert run("predict", model, image, "--out", tmp_path / name) == 0
    check(tmp_path / name, "a", image)


def test_name_too_long_for_what_lies_beside_it_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = save_image(tmp_path / "in" / f"{'x' * 248}.nii.gz", SHAPE)
    assert run("predict", model, image, "--out", tmp_path / "out") == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    for out in ("out", "new"):
        assert run("predict", model, image, "--out", tmp_path / out, "--preview") == 2
        assert "File name too long" in line(capsys)
    assert files(tmp_path / "out") == before
    assert files(tmp_path / "new") == []


@pytest.mark.parametrize("given", ["x" * 300 + ".nii.gz", "in/" * 2000 + "a.nii.gz"])
def test_name_that_no_file_can_have_is_refused(
    given: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", model, given, "--out", tmp_path / "out") == 2
    line(capsys)
    assert files(tmp_path / "out") == []


def test_error_on_a_name_of_two_lines_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a\nmedmom: all is well.nii.gz").write_bytes(b"")
    assert run("predict", model, tmp_path / "a\nmedmom: all is well.nii.gz", "--out", tmp_path / "out") == 2
    assert "the file is empty" in line(capsys)


def test_names_that_differ_in_letters_of_one_look_are_two_cases(model: Path, tmp_path: Path) -> None:
    for name in ("\u00e9", "e\u0301"):
        save_image(tmp_path / "in" / f"{name}.nii.gz", SHAPE)
    assert run("predict", model, tmp_path / "in", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


# Links


def test_linked_image_has_the_name_of_the_link(model: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "archive" / "0001.nii.gz", SHAPE)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "case.nii.gz").symlink_to("../archive/0001.nii.gz")
    assert run("predict", model, tmp_path / "in", "--out", tmp_path / "out") == 0
    check(tmp_path / "out", "case", tmp_path / "in" / "case.nii.gz")


def test_linked_output_folder_is_written_through(model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.nii.gz", SHAPE)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert run("predict", model, image, "--out", tmp_path / "out") == 0
    check(tmp_path / "disk", "a", image)
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("target", ["nowhere", "nowhere/at all", "out"])
def test_output_folder_that_is_a_dangling_link_is_refused(
    target: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = save_image(tmp_path / "a.nii.gz", SHAPE)
    (tmp_path / "out").symlink_to(tmp_path / target)
    assert run("predict", model, image, "--out", tmp_path / "out") == 2
    assert str(tmp_path / "out") in line(capsys)
    assert (tmp_path / "out").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_link_in_the_place_of_a_label_map_is_not_followed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, precious = save_image(tmp_path / "a.nii.gz", SHAPE), tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "out").mkdir()
    for name in ("a.nii.gz", "a.json", "cases.json", "a_preview.png"):
        link = tmp_path / "out" / name
        link.symlink_to(precious)
        assert run("predict", model, image, "--out", tmp_path / "out", "--preview") == 2
        assert "was not written by medmom predict" in line(capsys)
        assert precious.read_text() == "precious" and link.is_symlink()
        link.unlink()


@pytest.mark.parametrize("name", ["a.nii.gz", "a.json", "cases.json", "run.json"])
def test_dangling_link_in_the_place_of_an_output_makes_no_file_elsewhere(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = save_image(tmp_path / "a.nii.gz", SHAPE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "nowhere")
    assert run("predict", model, image, "--out", tmp_path / "out") == 2
    assert name in line(capsys)
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "out" / name).is_symlink()


def test_input_below_a_link_to_itself_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop.nii.gz").symlink_to(tmp_path / "loop.nii.gz")
    assert run("predict", model, tmp_path / "loop.nii.gz", "--out", tmp_path / "out") == 2
    line(capsys)
    assert files(tmp_path / "out") == []


# What cannot be written


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_folder_that_refuses_is_named_before_any_work(
    call: str, number: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = save_image(tmp_path / "a.nii.gz", SHAPE), tmp_path / "out"
    if call == "open":
        out.mkdir()
    real: Callable[..., Any] = getattr(os, call)

    def refused(path: Any, *more: Any, **options: Any) -> Any:
        is_new = call == "mkdir" or (more and more[0] & os.O_CREAT)
        if is_new and Path(os.fsdecode(path)).is_relative_to(out):
            raise OSError(number, os.strerror(number), path)
        return real(path, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        # As root every folder can be written.
        patch.setattr(os, call, refused)
        patch.setattr("medmom.inference.predictor.Predictor.segment", None)
        assert run("predict", model, image, "--out", out) == 2
    said = line(capsys)
    assert str(out) in said and os.strerror(number) in said
    assert files(out) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = save_image(tmp_path / "a.nii.gz", SHAPE), tmp_path / "out"
    out.mkdir(mode=0o555)
    assert run("predict", model, image, "--out", out) == 2
    assert "Permission denied" in line(capsys)


# Who is on the scan


def test_words_of_a_header_go_nowhere(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    image = nib.load(save_image(tmp_path / "first.nii.gz", SHAPE))
    header = image.header
    header["descrip"], header["db_name"], header["intent_name"] = b"DOE^JANE 19620313", b"JANE DOE", b"Jane_D"
    header["aux_file"] = b"DOE.hdr"
    header.extensions.append(nib.nifti1.Nifti1Extension(6, b"Patient Doe, Jane, 13 March 1962"))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, header), tmp_path / "in.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes((tmp_path / "in.nii.gz").read_bytes()[:-200])
    out = tmp_path / "out"
    words = (model, tmp_path / "in.nii.gz", tmp_path / "bad.nii.gz", "--out", out, "--preview")
    assert run("predict", *words, "--probabilities", "uint8") == 2
    assert run("evaluate", out, out / "in.nii.gz", "--out", tmp_path / "scores.json") in (0, 2)
    said = capfd.readouterr()
    told = {"stdout": said.out, "stderr": said.err, "log": caplog.text}
    told |= {path.name: path.read_bytes().decode("latin-1") for path in out.iterdir() if path.suffix != ".gz"}
    for path in out.glob("*.gz"):
        told[path.name] = str(nib.load(path).header) + str([e.get_content() for e in nib.load(path).header.extensions])
    assert {"run.json", "cases.json", "in.json", "statistics.json", "statistics.csv", "in.nii.gz"} <= told.keys()
    for place, text in told.items():
        for word in ("jane", "doe", "1962", "19620313"):
            assert word not in text.lower(), (place, word)
