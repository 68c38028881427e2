"""Entropy maps: their formula, their place on the own grid, and their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_image, save_tiny, tiny_network
from tiny_pictures import save

from medmom.data.files import read_image
from medmom.data.preparation import Preparation, restore
from medmom.errors import MedmomError
from medmom.geometry import Geometry, resample
from medmom.inference import predictor as room
from medmom.inference.cells import Scores
from medmom.inference.entropy_file import EntropyFile, entropy_path
from medmom.inference.predictor import Predictor
from medmom.inference.probability_files import ProbabilityFiles
from medmom.inference.restore import Restorer

OWN = Geometry((11, 12, 13), np.array([[0, -1.2, 0, 5], [0.9, 0, 0, -7], [0, 0, -1.1, 2], [0, 0, 0, 1.0]]))
WORKING = OWN.reoriented("RAS").with_spacing((1.6, 1.5, 1.7))


def entropy_of(probabilities: np.ndarray) -> np.ndarray:
    """A naive twin, in double precision."""
    p = probabilities.astype(np.float64)
    return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=0) / np.log(len(p)))


class Planes:
    """A sink that keeps what it is told, on one grid."""

    def __init__(self) -> None:
        self.told: list[tuple[slice, np.ndarray]] = []

    def __call__(self, place: slice, values: np.ndarray) -> None:
        assert values.dtype == np.float32
        self.told.append((place, values.copy()))

    def whole(self, shape: tuple[int, ...]) -> np.ndarray:
        result = np.full((*self.told[0][1].shape[:-3], *shape), np.nan, np.float32)
        (axis,) = {a for a in (-3, -2, -1) if self.told[0][1].shape[a] != shape[a]}
        for place, values in self.told:
            np.moveaxis(result, axis, 0)[place] = np.moveaxis(values, axis, 0)
        return result


def some_scores(scores: Scores, num_classes: int = 4, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, (num_classes, *WORKING.shape)).astype(np.float32)
    return logits if scores == "logits" else torch.from_numpy(logits).softmax(dim=0).numpy()


def restored(values: np.ndarray, *, axis: int = 2, **options: Any) -> Restorer:
    restorer = Restorer(WORKING, OWN, len(values), axis=axis, **options)
    for start in range(0, WORKING.shape[axis], 3):
        place = slice(start, min(start + 3, WORKING.shape[axis]))
        cut = tuple(place if a == axis else slice(None) for a in range(3))
        restorer.push(place, torch.from_numpy(values[:, *cut].copy()))
    return restorer


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
@pytest.mark.parametrize("axis", range(3))
def test_entropy_is_that_of_the_interpolated_probabilities(axis: int, scores: Scores) -> None:
    values, entropy, probabilities = some_scores(scores), Planes(), Planes()
    restored(values, axis=axis, scores=scores, entropy=entropy, probabilities=probabilities)
    moved = torch.from_numpy(resample(values, WORKING, OWN, order=1))
    wanted = (moved.softmax(dim=0) if scores == "logits" else moved).numpy()
    assert [place for place, _ in entropy.told] == [place for place, _ in probabilities.told]
    np.testing.assert_allclose(probabilities.whole(OWN.shape), wanted, atol=1e-5)
    np.testing.assert_allclose(entropy.whole(OWN.shape), entropy_of(wanted), atol=2e-5)


def test_entropy_alone_is_what_it_is_beside_probabilities() -> None:
    values, alone, beside = some_scores("logits"), Planes(), Planes()
    label = restored(values, entropy=alone).finish()
    restored(values, entropy=beside, probabilities=Planes())
    np.testing.assert_array_equal(alone.whole(OWN.shape), beside.whole(OWN.shape))
    np.testing.assert_array_equal(label, restored(values).finish())


@pytest.mark.parametrize(
    ("scores", "values", "wanted"),
    [
        ("logits", [0, 0, 0, 0, 0], 1),
        ("logits", [-1e30, 1e30, 0, 0, 0], 0),
        ("probabilities", [0.2, 0.2, 0.2, 0.2, 0.2], 1),
        ("probabilities", [0, 1, 0, 0, 0], 0),
        ("probabilities", [0.5, 0.5, 0, 0, 0], np.log(2) / np.log(5)),
    ],
)
def test_it_is_0_where_a_class_is_sure_and_1_where_all_are_equal(
    scores: Scores, values: list[float], wanted: float
) -> None:
    sink = Planes()
    restored(
        np.tile(np.array(values, np.float32)[:, None, None, None], (1, *WORKING.shape)), scores=scores, entropy=sink
    )
    found = sink.whole(OWN.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert 0 <= found.min() <= found.max() <= 1


def test_a_single_class_is_sure() -> None:
    sink = Planes()
    restored(some_scores("logits", 1), entropy=sink)
    assert not sink.whole(OWN.shape).any()


def test_probabilities_are_interpolated_as_they_are() -> None:
    values = some_scores("probabilities")
    restorer = restored(values, scores="probabilities")
    label, expected = restorer.finish(), restore(values, WORKING, OWN)
    ordered = np.sort(resample(values, WORKING, OWN, order=1), axis=0)
    assert (ordered[-1] - ordered[-2])[label != expected].max(initial=0) < 1e-6
    for index, sure in enumerate(restorer.confidence):
        assert sure == pytest.approx(values[index][values.argmax(axis=0) == index].mean(), rel=1e-5)


# Of a model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny(folder / str(seed), network=tiny_network(seed=seed)) for seed in range(2)]


@pytest.mark.parametrize("num_models", [1, 2])
def test_a_prediction_tells_its_entropy(models: list[Path], num_models: int, tmp_path: Path) -> None:
    scan = save_image(tmp_path / "scan.nii.gz", (21, 18, 13))
    predictor = Predictor(models[:num_models], device="cpu")
    given, entropy, probabilities = predictor.read([scan]), Planes(), Planes()
    found = predictor.segment(given, entropy=entropy, probabilities=probabilities)
    shape = found.label.shape
    wanted = entropy_of(probabilities.whole(shape))
    np.testing.assert_allclose(entropy.whole(shape), wanted, atol=1e-5)
    assert 0.01 < wanted.mean() < 1
    np.testing.assert_array_equal(found.label, predictor.segment(given).label)


def test_what_a_sink_took_is_not_told_again(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(models[0], device="cpu")
    given = predictor.read([save_image(tmp_path / "scan.nii.gz")])
    large = replace(given, plan=(replace(given.plan[0], batch=4, on_device=True), ""))

    tries: list[str] = []

    def full(*_: Any, **__: Any) -> Any:
        tries.append("")
        raise torch.OutOfMemoryError

    monkeypatch.setattr(room, "stream_logits", full)
    with pytest.raises(MedmomError, match="memory is too small"):
        predictor.segment(large, entropy=Planes())
    assert len(tries) == 1


# Files


@pytest.mark.parametrize("axis", range(3))
def test_any_reader_finds_the_entropy_to_half_a_step(tmp_path: Path, axis: int) -> None:
    image = read_image(save_image(tmp_path / "in" / "scan.nii.gz", (7, 5, 6), affine=OWN.affine))
    values = np.random.default_rng(0).uniform(size=(7, 5, 6)).astype(np.float32)
    values[0], values[1] = 0, 1
    with EntropyFile(tmp_path / "out", "scan.v1", image) as file:
        for start in range(0, values.shape[axis], 2):
            place = slice(start, min(start + 2, values.shape[axis]))
            file.write(place, values.take(range(place.start, place.stop), axis=axis))
    (path,) = (tmp_path / "out").iterdir()
    assert (path,) == file.paths == (entropy_path(tmp_path / "out", "scan.v1"),)
    assert path.name == "scan.v1_entropy.nii.gz"
    found: Any = nib.load(path)
    assert np.abs(found.get_fdata() - values).max() <= 0.5 / 255 + 1e-7
    np.testing.assert_array_equal(found.affine, image.header.get_best_affine())
    assert found.get_data_dtype() == np.uint8


def test_of_a_picture_it_is_a_grey_picture(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = read_image(save(tmp_path / "photo.png", colours))
    values = np.linspace(0, 1, 35, dtype=np.float32).reshape(7, 5, 1)
    with EntropyFile(tmp_path / "out", "photo", image) as file:
        file.write(slice(0, 1), values)
    with Image.open(tmp_path / "out" / "photo_entropy.png") as picture:
        assert picture.mode == "L"
        assert np.abs(np.asarray(picture) / 255 - values[..., 0].T).max() <= 0.5 / 255 + 1e-7


def test_a_prediction_writes_it_beside_probabilities(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", preparation=Preparation((1.0, 1.0, 1.0), "zscore"))
    predictor, out = Predictor(model, device="cpu"), tmp_path / "out"
    given = predictor.read([save_image(tmp_path / "scan.nii.gz", (15, 18, 9))])
    with (
        EntropyFile(out, "scan", given.image) as entropy,
        ProbabilityFiles(out, "scan", predictor.labels, given.image, kind="uint16") as probabilities,
    ):
        predictor.segment(given, entropy=entropy.write, probabilities=probabilities.write)
    read = [nib.load(path).get_fdata() for path in probabilities.paths]
    found: Any = nib.load(entropy.paths[0])
    assert np.abs(found.get_fdata() - entropy_of(np.stack(read))).max() < 0.5 / 255 + 1e-3
