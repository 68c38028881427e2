"""Wherever a disk is full or a process dies while files are written, what was there stays and nothing is half there."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from tiny import LABELS, save_image, save_tiny, tiny_network
from write_faults import EXIT, Disk, Kind, broken_disk

from medmom import postprocess
from medmom.cleanup import Cleanup
from medmom.cli import main
from medmom.data.atomic import put_back, write_json, write_text
from medmom.errors import MedmomError
from medmom.evaluation.choose_cleanup import Choice
from medmom.evaluation.nnunet_summary import write_summary
from medmom.evaluation.scores import evaluate
from medmom.inference.predictor import Predictor

EDGES = (4, 4, 4)
VOLATILE = {"started", "ended", "seconds", "peak_ram_mib"}


class Work(NamedTuple):
    """Something that writes files.

    Attributes:
        prepare: Makes in a folder what it needs; the version tells the first time from the second.
        act: Does it; gives the line that it fails with, empty where it does not.
        together: Pattern of the files that appear and change together; each other file does so alone.
        repair: The same as ``act``, as somebody would start it again.
    """

    prepare: Callable[[Path, int], object]
    act: Callable[[Path], str]
    together: str
    repair: Callable[[Path], str] | None = None


def command(*words: str | Path) -> str:
    """Runs a command; gives the line that it ends with, empty where it ends well."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--device", "cpu", "--quiet"])
    assert ended.value.code == (2 if errors.getvalue() else 0), errors.getvalue()
    return errors.getvalue()


def called(function: Callable[[Path], object]) -> Callable[[Path], str]:
    """The line that a function fails with, as the command would tell it."""

    def call(place: Path) -> str:
        try:
            function(place)
        except MedmomError as error:
            return f"medmom: {error}\n"
        return ""

    return call


def save_model(place: Path, version: int) -> Path:
    return save_tiny(place / "model", patch=EDGES, network=tiny_network(seed=version))


def save_label(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.random.default_rng(seed).choice(LABELS.values, size=EDGES).astype(np.uint8)
    nib.save(nib.Nifti1Image(label, np.eye(4)), path)
    return path


def prepare_predict(place: Path, version: int) -> None:
    save_image(place / "case.nii.gz", EDGES)
    save_model(place, version)


def segment(place: Path, *options: str) -> str:
    words = ("predict", place / "model", place / "case.nii.gz", "--out", place / "out")
    return command(*words, "--preview", "--probabilities", "uint8", *options)


def prepare_folders(place: Path, version: int) -> None:
    save_label(place / "wanted" / "a.nii.gz", 100)
    save_label(place / "found" / "a.nii.gz", version)


def prepare_report(place: Path, version: int) -> None:
    prepare_folders(place, version)
    write_json(place / "scores.json", evaluate(place / "found", place / "wanted"))


def prepare_postprocess(place: Path, version: int) -> None:
    if version == 0:
        save_tiny(place / "run" / "model", patch=EDGES)
        save_label(place / "label.nii.gz", 0)
        save_image(place / "case.nii.gz", EDGES, affine=np.eye(4))
        (place / "cases.csv").write_text("image,label\ncase.nii.gz,label.nii.gz\n")
        words = ("predict", place / "run", place / "cases.csv", "--out", place / "run" / "validation")
        assert command(*words) == ""
    # What the choice will be; patched below.
    (place / "largest").write_text(("head", "body")[version % 2])


def chosen(matching: Any, *, progress: bool = False) -> Choice:
    place = matching.cases[0].prediction.parents[2]
    return Choice(Cleanup(largest=((place / "largest").read_text(),)), (), 1, 1, ())


def summarise(place: Path) -> None:
    write_summary(place / "summary.json", evaluate(place / "found", place / "wanted"))


WORKS = {
    "predict": Work(
        prepare_predict, segment, r"out/case[._].*", lambda place: segment(place, "--skip-existing")
    ),
    "package": Work(
        lambda place, version: (place / "version").write_text(str(version)),
        called(lambda place: save_model(place, int((place / "version").read_text()))),
        "model/.*",
    ),
    "postprocess": Work(prepare_postprocess, lambda place: command("postprocess", place / "run"), "run/model/.*"),
    "bundle": Work(
        save_model, lambda place: command("export", place / "model", "--to", "monai-bundle", "--out", place / "b"),
        "b/.*",
    ),
    "evaluate": Work(prepare_folders, lambda place: command("evaluate", place / "found", place / "wanted"), ""),
    "summary": Work(prepare_folders, called(summarise), ""),
    "report": Work(
        prepare_report, lambda place: command("report", place / "scores.json", "--out", place / "r.html"), ""
    ),
}  # fmt: skip
ONCE = ("bundle",)
"""Works that replace nothing."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares what is not about files: the network, the drawing, the look for versions."""
    segment, kept = Predictor.segment, dict[str, Any]()

    def remembered(self: Predictor, given: Any, **options: Any) -> Any:
        if self.package.checksum not in kept:
            slabs: list[tuple[slice, np.ndarray]] = []
            sink = lambda place, values: slabs.append((place, values.copy()))  # noqa: E731
            kept[self.package.checksum] = segment(self, given, **{**options, "probabilities": sink}), slabs
        found, slabs = kept[self.package.checksum]
        for slab in slabs if options.get("probabilities") else ():
            options["probabilities"](*slab)
        return found

    monkeypatch.setattr(Predictor, "segment", remembered)
    monkeypatch.setattr("medmom.inference.predict.preview", lambda label, *_: b"\x89PNG" + label.tobytes())
    monkeypatch.setattr(importlib.metadata, "version", functools.cache(importlib.metadata.version))
    monkeypatch.setattr(postprocess, "choose_cleanup", chosen)


def steady(data: Any) -> Any:
    """Without what differs from one run to the next."""
    if isinstance(data, Mapping):
        return {key: steady(value) for key, value in data.items() if key not in VOLATILE}
    return [steady(value) for value in data] if isinstance(data, list) else data


def content(path: Path, place: Path) -> Any:
    text = path.read_bytes()
    if path.suffix == ".json":
        return steady(json.loads(text.replace(str(place).encode(), b"PLACE")))
    return text.replace(str(place).encode(), b"PLACE")


def contents(place: Path) -> dict[str, Any]:
    """What is visible below a folder, by path; a file of JSON that is half there raises."""
    found = {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.is_file()}
    return {str(name): content(path, place) for name, path in found.items() if not is_hidden(name)}


def is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


class Scene:
    """A work before and after, and how many steps it takes.

    Attributes:
        before: What was visible before.
        after: The same when all went well.
        steps: Of the good run.
    """

    def __init__(self, work: Work, folder: Path, *, again: bool, kind: Kind) -> None:
        self.work, self.folder, self.number = work, folder, 0
        self.template = folder / "template"
        self.template.mkdir()
        work.prepare(self.template, 0)
        if again:
            assert work.act(self.template) == ""
            work.prepare(self.template, 1)
        place = self.place()
        self.before = contents(place)
        disk = Disk(place, kind=kind)
        with broken_disk(disk):
            assert work.act(place) == ""
        self.after, self.steps = contents(place), disk.steps
        assert self.after != self.before

    def place(self) -> Path:
        # One place for all: absolute paths stand in files.
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.template, place)
        for path in place.rglob("*.json"):
            if str(self.template) in (text := path.read_text()) and "model" not in path.parts:
                path.write_text(text.replace(str(self.template), str(place)))
        return place

    def check(self, place: Path, step: str) -> None:
        """Demands each file as it was or as it would be, and what belongs together alike."""
        now = contents(place)
        assert self.before.keys() <= now.keys() <= self.before.keys() | self.after.keys(), step
        names = self.before.keys() | self.after.keys()
        together = {name for name in names if re.fullmatch(self.work.together, name)}
        for group in (together, *({name} for name in names - together)):
            changed = [
                sorted(name for name in group if now.get(name) != side.get(name)) for side in (self.before, self.after)
            ]
            assert not all(changed), f"{step}: neither as before ({changed[0]}) nor as after ({changed[1]})"


def modes(*kinds: Kind) -> list[Any]:
    cases = [(name, again, kind) for name in WORKS for again in (False, True) for kind in kinds]
    return [case for case in cases if not (case[0] in ONCE and case[1])]


def check_full_disk(work: Work, folder: Path, *, again: bool, kind: Kind) -> None:
    scene = Scene(work, folder, again=again, kind=kind)
    for number, name in enumerate(scene.steps):
        place, step = scene.place(), f"{number} {name}"
        disk = Disk(place, at=number, kind=kind)
        with broken_disk(disk):
            line = work.act(place)
        assert disk.is_broken, step
        assert line.startswith("medmom: ") and line.count("\n") == 1, (step, line)
        assert "No space left on device" in line and str(place) in line, (step, line)
        assert not [path for path in place.rglob("*") if is_hidden(path.relative_to(place))], step
        scene.check(place, step)
        # Each time is for the long tests.
        if work.repair is not None and (kind != "once" or number % 8 == 0):
            assert work.repair(place) == "", step
            assert contents(place).keys() == scene.after.keys(), step


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "again", "kind"), modes("once"))
def test_step_that_finds_the_disk_full_changes_nothing(name: str, again: bool, kind: Kind, tmp_path: Path) -> None:
    check_full_disk(WORKS[name], tmp_path, again=again, kind=kind)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "again", "kind"), modes("full"))
def test_disk_that_stays_full_changes_nothing(name: str, again: bool, kind: Kind, tmp_path: Path) -> None:
    check_full_disk(WORKS[name], tmp_path, again=again, kind=kind)


# Several files at once


@pytest.mark.parametrize("error", [MedmomError, KeyboardInterrupt])
def test_files_are_put_back_where_the_work_on_them_fails(error: type[BaseException], tmp_path: Path) -> None:
    old, gone, new = paths = [tmp_path / name for name in ("old", "gone", "new")]
    for path in (old, gone):
        path.write_text("before")
    node = old.stat().st_ino
    with pytest.raises(error), put_back([*paths, old, tmp_path / "not here" / "a"]):
        for path in (old, new):
            write_text(path, "after")
        gone.unlink()
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "before", "gone": "before"}
    assert old.stat().st_ino == node, "the file itself, not a copy"


def test_files_stay_as_the_work_left_them_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    (tmp_path / "gone").write_text("before")
    with put_back(tmp_path / name for name in ("old", "gone", "new")):
        write_text(tmp_path / "old", "after")
        write_text(tmp_path / "new", "after")
        (tmp_path / "gone").unlink()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "after", "new": "after"}


def test_link_is_put_back_as_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(MedmomError), put_back([tmp_path / "link"]):
        write_text(tmp_path / "link", "after")
        raise MedmomError("no space")
    assert [path.readlink() for path in tmp_path.iterdir()] == [Path("nowhere")]


@pytest.mark.parametrize(("number", "is_refused"), [(errno.EPERM, False), (errno.ENOTSUP, False), (errno.ENOSPC, True)])
def test_disk_without_second_names_loses_nothing(
    number: int, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *more: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), path)

    (tmp_path / "old").write_text("before")
    monkeypatch.setattr(os, "link", refused)
    with (
        pytest.raises(MedmomError, match="cannot be written" if is_refused else "no space"),
        put_back([tmp_path / "old"]),
    ):
        write_text(tmp_path / "old", "after")
        raise MedmomError("no space")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"old": "before" if is_refused else "after"}


def die_at(work: Work, place: Path, number: int) -> None:
    """Does the work in a process that ends, without a word, at one of its steps."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            with broken_disk(Disk(place, at=number, kind="kill")):
                work.act(place)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT


def is_open(about: Any) -> bool:
    """Whether a sidecar says that the work on its case has not ended."""
    return isinstance(about, dict) and "also" in about and "prediction_sha256" not in about


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "again", "kind"), modes("kill"))
def test_killed_work_leaves_whole_files_and_is_done_by_a_second_start(
    name: str, again: bool, kind: Kind, tmp_path: Path
) -> None:
    work = WORKS[name]
    scene = Scene(work, tmp_path, again=again, kind=kind)
    for number, step in enumerate(scene.steps):
        place = scene.place()
        die_at(work, place, number)
        now = contents(place)
        for file in now:
            sides = [side[file] for side in (scene.before, scene.after) if file in side]
            assert now[file] in sides or is_open(now[file]), f"{number} {step}: {file}"
        lost = scene.before.keys() - now.keys()
        # Two renames exchange a folder; between them the old one has another name.
        kept = {path.name for path in place.rglob(".old-*/*")}
        assert {Path(file).name for file in lost} <= kept, f"{number} {step}: {lost}"
        if not lost:
            assert (work.repair or work.act)(place) == "", f"{number} {step}"
            again_there = contents(place)
            # What was skipped is told so.
            differing = {file for file in scene.after if again_there.get(file) != scene.after[file]}
            assert again_there.keys() == scene.after.keys() and differing <= {"out/run.json"}, f"{number}: {differing}"
