"""Which predictions are taken for done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmom.data.casefiles import CaseFiles
from medmom.inference.manifest import file_sha256, input_hashes
from medmom.inference.outputs import sidecar_path
from medmom.inference.skipping import is_done, is_standing

SETTINGS = {"overlap": 0.5, "mirrors": (0, 1)}


class Place:
    """A case with two files and its prediction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "in").mkdir()
        images = tuple(folder / "in" / f"a_{k}.nii" for k in range(2))
        for image in images:
            image.write_text(image.name)
        self.case = CaseFiles("a", images, None, "a")
        self.prediction = folder / "a.nii.gz"
        self.prediction.write_text("labels")
        self.tell()

    def tell(self, **changes: Any) -> None:
        about = {
            "image": [str(path.absolute()) for path in self.case.images],
            "labels": {},
            "model": {"checksum": "abc"},
            "inputs": input_hashes(self.case.images),
            "settings": SETTINGS,
            "prediction_sha256": file_sha256(self.prediction),
        }
        sidecar_path(self.prediction).write_text(json.dumps({**about, **changes}))

    def is_done(self, **changes: Any) -> bool:
        return is_done(self.case, self.prediction, **{"checksum": "abc", "settings": SETTINGS, **changes})

    def is_standing(self, **changes: Any) -> bool:
        return is_standing(self.case, self.prediction, **{"checksum": "abc", "settings": SETTINGS, **changes})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_same_inputs_model_and_settings_are_done(place: Place) -> None:
    assert place.is_done()
    assert place.is_standing()


def test_moved_inputs_of_the_same_content_are_done(place: Place) -> None:
    moved = place.folder / "elsewhere"
    shutil.move(place.folder / "in", moved)
    place.case = CaseFiles("a", tuple(moved / path.name for path in place.case.images), None, "a")
    assert place.is_done()
    assert not place.is_standing()


SPOILED: dict[str, Callable[[Place], object]] = {
    "an input changed": lambda place: place.case.images[1].write_text("other"),
    "an input is gone": lambda place: place.case.images[0].unlink(),
    "the prediction changed": lambda place: place.prediction.write_text("label"),
    "the prediction is gone": lambda place: place.prediction.unlink(),
    "the sidecar is gone": lambda place: sidecar_path(place.prediction).unlink(),
    "the sidecar is damaged": lambda place: sidecar_path(place.prediction).write_text('{"model": {'),
    "the sidecar is a list": lambda place: sidecar_path(place.prediction).write_text("[]"),
    "the sidecar nests without end": lambda place: sidecar_path(place.prediction).write_text("[" * 100_000),
    "the sidecar holds a huge number": lambda place: sidecar_path(place.prediction).write_text("1" * 5000),
    "the sidecar has no checksum yet": lambda place: place.tell(prediction_sha256=None),
    "the sidecar names no inputs": lambda place: place.tell(inputs=[]),
    "the inputs are no list": lambda place: place.tell(inputs=7),
    "the inputs lack checksums": lambda place: place.tell(inputs=[{"path": "a"}, {"path": "b"}]),
    "the model is a word": lambda place: place.tell(model="abc"),
    "another model": lambda place: place.tell(model={"checksum": "abd"}),
    "other settings": lambda place: place.tell(settings={"overlap": 0.25, "mirrors": [0, 1]}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_anything_else_is_not_done(what: str, place: Place) -> None:
    SPOILED[what](place)
    assert not place.is_done()


def test_channels_in_another_order_are_not_done(place: Place) -> None:
    place.case = CaseFiles("a", place.case.images[::-1], None, "a")
    assert not place.is_done()


def test_files_asked_for_beside_it_must_be_of_this_prediction(place: Place) -> None:
    preview = place.folder / "a_preview.png"
    assert not place.is_done(also=[preview])
    preview.write_text("of an earlier run")
    assert not place.is_done(also=[preview])
    place.tell(also=[preview.name])
    assert place.is_done(also=[preview])
    assert place.is_done()
    preview.unlink()
    assert not place.is_done(also=[preview])


def test_prediction_stands_until_an_input_is_newer(place: Place) -> None:
    written = sidecar_path(place.prediction).stat().st_mtime
    os.utime(place.case.images[1], (written + 2, written + 2))
    assert not place.is_standing()
    os.utime(place.case.images[1], (written - 2, written - 2))
    assert place.is_standing()


@pytest.mark.parametrize("what", ["another model", "other settings", "the sidecar has no checksum yet"])
def test_prediction_of_other_work_does_not_stand(what: str, place: Place) -> None:
    SPOILED[what](place)
    assert not place.is_standing()
