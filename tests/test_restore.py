from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medmom.data.preparation import restore
from medmom.geometry import Geometry, resample
from medmom.inference import restore as module
from medmom.inference.restore import Restorer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
Watch = import_module("bench_measure").Watch
# Not on the path for the other tests.
sys.path.pop(0)

ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(pairs, flips, strict=True))
    for pairs in permutations(("RL", "AP", "SI"))
    for flips in product((0, 1), repeat=3)
]


def oblique(shape: tuple[int, ...], spacing: Sequence[float], orientation: str = "RAS", seed: int = 0) -> Geometry:
    """A grid that is tilted a little, so that its orientation keeps its name."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(np.eye(3) + rng.normal(scale=0.1, size=(3, 3)))
    rotation *= np.sign(np.diag(rotation))
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = rng.normal(scale=50, size=3)
    return Geometry(shape, affine).reoriented(orientation)


def organs(shape: tuple[int, ...], num_classes: int, seed: int = 0) -> np.ndarray:
    """Logits as of a network that is sure inside of organs and less so at their edges."""
    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    seeds = rng.uniform(0, shape, size=(2 * num_classes, 3))
    label = np.linalg.norm(index[..., None, :] - seeds, axis=-1).argmin(axis=-1) % num_classes
    logits = [10 * gaussian_filter((label == k).astype(np.float32), 1) for k in range(num_classes)]
    return (np.stack(logits) + rng.normal(scale=0.2, size=(num_classes, *shape))).astype(np.float32)


def streamed(
    logits: np.ndarray, working: Geometry, own: Geometry, *, axis: int = 2, slab: int = 3, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    restorer = Restorer(working, own, len(logits), axis=axis, **options)
    for start in range(0, working.shape[axis], slab):
        place = slice(start, min(start + slab, working.shape[axis]))
        cut = tuple(place if a == axis else slice(None) for a in range(3))
        # A buffer that is used again, as that of a stream.
        part = torch.from_numpy(logits[:, *cut].copy())
        restorer.push(place, part)
        part.fill_(np.nan)
    return restorer.finish(), restorer.confidence


def assert_same(label: np.ndarray, logits: np.ndarray, working: Geometry, own: Geometry) -> None:
    """Equal to the restoration of the whole, but where two classes are nearly equal."""
    expected = restore(logits, working, own)
    assert label.shape == own.shape
    assert label.dtype == np.uint8
    differs = label != expected
    if differs.any():
        values = np.sort(resample(logits, working, own, order=1)[:, differs], axis=0)
        assert (values[-1] - values[-2]).max() < 1e-5
        assert differs.sum() <= max(1, 1e-5 * label.size)


# Labels


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_labels_come_back_to_every_orientation(orientation: str) -> None:
    own = oblique((13, 11, 9), (0.8, 0.9, 2.5), orientation)
    working = own.reoriented("RAS").with_spacing((1.3, 1.2, 1.9))
    assert own.orientation == orientation
    logits = organs(working.shape, 4)
    for axis in range(3):
        label, _ = streamed(logits, working, own, axis=axis)
        assert_same(label, logits, working, own)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("spacing", [(1.1, 0.9, 5.0), (0.4, 0.5, 0.6), (1.1, 1.7, 2.0), (3.0, 1.7, 2.0), (9, 9, 9)])
@pytest.mark.parametrize("kind", ["organs", "noise"])
def test_labels_are_those_of_the_whole(kind: str, spacing: tuple[float, ...], axis: int) -> None:
    own = oblique((17, 14, 12), (1.1, 1.7, 2.0), "PSL", seed=1)
    working = own.reoriented("RAS").with_spacing(spacing)
    noise = np.random.default_rng(0).normal(size=(5, *working.shape)).astype(np.float32)
    logits = noise if kind == "noise" else organs(working.shape, 5)
    label, _ = streamed(logits, working, own, axis=axis, slab=2)
    assert_same(label, logits, working, own)


@pytest.mark.parametrize("num_classes", [1, 2, 25, 256])
def test_any_number_of_classes_comes_back(num_classes: int) -> None:
    own = oblique((9, 10, 8), (1, 1, 1), "LPS")
    working = own.reoriented("RAS").with_spacing((1.4, 1.5, 1.6))
    logits = np.random.default_rng(0).normal(size=(num_classes, *working.shape)).astype(np.float32)
    label, _ = streamed(logits, working, own)
    assert_same(label, logits, working, own)
    assert label.max() == restore(logits, working, own).max()


def test_logits_on_the_own_grid_are_only_compared() -> None:
    own = oblique((6, 7, 5), (1, 2, 3))
    logits = organs(own.shape, 3)
    np.testing.assert_array_equal(streamed(logits, own, own)[0], logits.argmax(axis=0))


@pytest.mark.parametrize("shape", [(12, 9, 1), (1, 1, 1), (1, 8, 1), (2, 1, 7)])
@pytest.mark.parametrize("axis", range(3))
def test_single_slices_come_back(shape: tuple[int, ...], axis: int) -> None:
    own = oblique(shape, (1, 1, 1), "LSA")
    for working in (own.reoriented("RAS").with_shape((5, 4, 3)), own.reoriented("RAS").with_spacing((2.2, 0.7, 3.0))):
        logits = organs(working.shape, 3)
        label, _ = streamed(logits, working, own, axis=axis)
        assert_same(label, logits, working, own)


@pytest.mark.parametrize("num_classes", [3, 8, 25])
def test_equal_logits_go_to_the_smaller_index(num_classes: int) -> None:
    own = oblique((8, 8, 8), (1, 1, 1))
    working = own.with_spacing((1.5, 1.5, 1.5))
    logits = np.random.default_rng(0).normal(size=(num_classes, *working.shape)).astype(np.float32)
    logits[-1] = logits[0]
    label, _ = streamed(logits, working, own)
    assert (label == 0).any()
    assert not (label == num_classes - 1).any()
    # Small whole numbers: most voxels have several largest.
    whole = logits.round()
    np.testing.assert_array_equal(streamed(whole, working, working)[0], whole.argmax(axis=0))
    for value in (1, 0, -1e30):
        assert not streamed(np.full_like(logits, value), working, own)[0].any()


@pytest.mark.parametrize("axis", range(3))
def test_slabs_of_any_height_give_the_same_bits(axis: int) -> None:
    own = oblique((31, 29, 27), (1, 1, 1), "SLP")
    working = own.reoriented("RAS").with_spacing((1.45, 1.55, 1.6))
    for logits in (organs(working.shape, 5), np.random.default_rng(0).normal(size=(5, *working.shape))):
        given = logits.astype(np.float32)
        first, sure = streamed(given, working, own, axis=axis, slab=1)
        for slab in (2, 5, 100):
            label, confidence = streamed(given, working, own, axis=axis, slab=slab)
            np.testing.assert_array_equal(label, first)
            np.testing.assert_array_equal(confidence, sure)


@pytest.mark.parametrize("axis", range(3))
def test_any_layout_of_memory_gives_the_same_bits(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = oblique((19, 17, 15), (1, 1, 1), "LPS")
    working = own.reoriented("RAS").with_spacing((1.45, 1.55, 1.6))
    logits = organs(working.shape, 4)
    # Copied in blocks of two planes.
    monkeypatch.setattr(module, "BLOCK", 2 * logits[0].size * 4 // working.shape[axis])
    labels = []
    for order in permutations(range(4)):
        part = torch.from_numpy(logits.transpose(order).copy()).permute(*np.argsort(order))
        restorer = Restorer(working, own, 4, axis=axis)
        restorer.push(slice(0, working.shape[axis]), part)
        labels.append(restorer.finish())
    assert all(np.array_equal(label, labels[0]) for label in labels)
    assert_same(labels[0], logits, working, own)


def test_number_of_threads_changes_no_bit_and_stays() -> None:
    own = oblique((39, 37, 15), (1, 1, 1), "LPS")
    working = own.reoriented("RAS").with_spacing((1.45, 1.55, 1.6))
    logits = organs(working.shape, 4)
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            found.append(streamed(logits, working, own, slab=5))
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_voxels_far_from_an_edge_need_no_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    own = oblique((24, 24, 24), (1, 1, 1))
    working = own.with_spacing((2, 2, 2))
    halves = np.zeros((2, *working.shape), dtype=np.float32)
    halves[0, :6], halves[1, 6:] = 1, 1
    num_voxels = []
    inner = torch.nn.functional.embedding_bag

    def counted(rows: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        num_voxels.append(len(rows))
        return inner(rows, *args, **options)

    monkeypatch.setattr("medmom.inference.cells.embedding_bag", counted)
    label, _ = streamed(halves, working, own)
    # Two own voxels across the edge, in every plane.
    assert sum(num_voxels) == 2 * 24 * 24
    np.testing.assert_array_equal(label, np.arange(24)[:, None, None] >= np.full((1, 24, 24), 12))


def test_label_map_lies_in_memory_as_a_file_wants_it() -> None:
    own = oblique((6, 7, 8), (1, 1, 1), "PIR")
    label, _ = streamed(organs(own.reoriented("RAS").shape, 2), own.reoriented("RAS"), own, axis=0)
    assert label.T.flags.c_contiguous


def test_memory_stays_at_a_few_planes() -> None:
    own = Geometry((96, 96, 32), np.diag([1, 1, 1, 1]))
    working = own.with_shape((64, 64, 16))
    for logits in (organs((64, 64, 4), 8), np.random.default_rng(0).normal(size=(8, 64, 64, 4))):
        part = torch.from_numpy(logits.astype(np.float32))
        restorer = Restorer(working, own, 8, axis=2)
        with Watch([part]) as watch:
            for start in range(0, 16, 4):
                restorer.push(slice(start, start + 4), part)
        restorer.finish()
        num_planes = watch.peak / (8 * 96 * 96 * 4)
        assert num_planes < 8


# Confidence


def test_confidence_is_the_mean_probability_of_the_winners() -> None:
    own = oblique((9, 9, 9), (1, 1, 1), "LPS")
    working = own.reoriented("RAS").with_spacing((1.5, 1.4, 1.3))
    logits = organs(working.shape, 4)
    # One class never wins.
    logits[2] = -50
    probabilities = torch.from_numpy(logits).double().softmax(0).numpy()
    _, confidence = streamed(logits, working, own)
    for index in (0, 1, 3):
        wins = logits.argmax(axis=0) == index
        assert confidence[index] == pytest.approx(probabilities[index][wins].mean(), rel=1e-5)
    assert np.isnan(confidence[2])


def test_huge_logits_are_sure() -> None:
    own = oblique((3, 3, 3), (1, 1, 1))
    logits = np.stack([np.full(own.shape, 3e38), np.full(own.shape, -3e38)]).astype(np.float32)
    label, confidence = streamed(logits, own, own)
    assert not label.any()
    np.testing.assert_array_equal(confidence, [1, np.nan])


# Probabilities


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "ASR", "SPL"])
@pytest.mark.parametrize("axis", range(3))
def test_probabilities_are_the_softmax_of_interpolated_logits(orientation: str, axis: int) -> None:
    own = oblique((11, 12, 13), (1, 1.2, 0.9), orientation)
    working = own.reoriented("RAS").with_spacing((1.5, 1.6, 1.7))
    logits = organs(working.shape, 3)
    direction = (np.linalg.inv(working.affine) @ own.affine)[axis, :3]
    own_axis = int(np.abs(direction).argmax())
    rises = direction[own_axis] > 0
    places, parts = [], []

    def keep(place: slice, values: np.ndarray) -> None:
        places.append(place.start)
        parts.append(values.copy())

    label, _ = streamed(logits, working, own, axis=axis, probabilities=keep)
    assert places == sorted(range(own.shape[own_axis]), reverse=not rises)
    found = np.concatenate(parts if rises else parts[::-1], axis=1 + own_axis)
    expected = torch.from_numpy(resample(logits, working, own, order=1)).softmax(0).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(label, streamed(logits, working, own, axis=axis)[0])


# Errors


def test_planes_out_of_order_or_missing_are_refused() -> None:
    own = oblique((4, 5, 6), (1, 1, 1))
    logits = torch.zeros(2, 4, 5, 2)
    restorer = Restorer(own, own, 2, axis=2)
    with pytest.raises(ValueError, match="planes 2 to 4: the next one is 0"):
        restorer.push(slice(2, 4), logits)
    restorer.push(slice(0, 2), logits)
    with pytest.raises(ValueError, match="2 of 6 planes have come"):
        restorer.finish()
    with pytest.raises(ValueError, match=r"expected \(2, 4, 5, 2\)"):
        restorer.push(slice(2, 4), logits[:, :3])
    with pytest.raises(ValueError, match="the next one is 2"):
        restorer.push(slice(2, 8), torch.zeros(2, 4, 5, 6))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    own = oblique((4, 5, 6), (1, 1, 1))
    logits = torch.zeros(2, 4, 5, 6)
    logits[1, 2, 2, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        Restorer(own, own, 2, axis=2).push(slice(0, 6), logits)


@pytest.mark.parametrize("num_classes", [0, 257])
def test_classes_that_no_byte_tells_apart_are_refused(num_classes: int) -> None:
    own = oblique((4, 5, 6), (1, 1, 1))
    with pytest.raises(ValueError, match=f"{num_classes} classes"):
        Restorer(own, own, num_classes, axis=2)


def test_grids_with_other_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not share their axes"):
        Restorer(oblique((9, 9, 9), (1, 1, 1)), oblique((9, 9, 9), (1, 1, 1), seed=5), 2, axis=2)
