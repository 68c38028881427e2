from __future__ import annotations

from itertools import permutations, product
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medmom import cleanup as module
from medmom.cleanup import Cleanup, apply
from medmom.geometry import Geometry
from medmom.labels import Labels

LABELS = Labels(("background", "liver", "lung", "vessel"), (0, 1, 4, 7))
ALL = Cleanup(("liver", "lung"), (("liver", 1.2), ("lung", 1.2), ("vessel", 0.8)))
ORIENTATIONS = [
    nib.orientations.axcodes2ornt(codes) for names in permutations(("RL", "AP", "SI")) for codes in product(*names)
]


def grid(shape: tuple[int, ...], *edges: float) -> Geometry:
    return Geometry(shape, np.diag([*(edges or (1.0, 1.0, 1.0)), 1.0]))


def blobs(seed: int = 0, shape: tuple[int, int, int] = (18, 15, 12)) -> np.ndarray:
    """Ragged regions of all classes, with islands and holes."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.zoom(rng.integers(0, 4, [n // 3 for n in shape]), 3, order=0)
    coarse[rng.random(shape) < 0.3] = 0
    return np.array(LABELS.values, np.uint8)[coarse]


def cleaned(label: np.ndarray, cleanup: Cleanup, *edges: float, labels: Labels = LABELS) -> np.ndarray:
    return apply(label.copy(order="K"), grid(label.shape, *edges), labels, cleanup)


def naive_largest(label: np.ndarray, value: int) -> np.ndarray:
    """The whole array at once, scanned from the feet up."""
    parts = ndimage.label((label == value).T, np.ones((3, 3, 3)))[0].T
    sizes = np.bincount(parts.ravel())[1:]
    return np.where((label == value) & (parts != 1 + sizes.argmax()), 0, label) if sizes.size else label


def naive_smooth(label: np.ndarray, widths: dict[int, float], spacing: tuple[float, ...]) -> np.ndarray:
    """The definition, class by class on the whole array, in double precision."""

    def share(value: int, mm: float) -> np.ndarray:
        sigmas = [mm / edge for edge in spacing]
        mask = (label == value).astype(float)
        radius = [int(3 * sigma + 0.5) for sigma in sigmas]
        return np.asarray(ndimage.gaussian_filter(mask, sigmas, mode="nearest", radius=radius))

    result, best = label.copy(), np.full(label.shape, 0.5 + 1e-6)
    for value, mm in sorted(widths.items()):
        found = share(value, mm)
        takes = (found > best) & np.isin(label, [0, *widths])
        result[takes], best[takes] = value, found[takes]
    for value, mm in widths.items():
        lost = (label == value) & (share(value, mm) < 0.5 - 1e-6) & (best <= 0.5 + 1e-6)
        shares = np.stack([share(other, mm) for other in LABELS.values])
        winner = (shares >= shares.max(0) - 1e-6).argmax(0)
        result[lost] = np.array(LABELS.values)[winner][lost]
    return result


@pytest.mark.parametrize("slab", [1, 400, 2**22])
@pytest.mark.parametrize("seed", range(4))
def test_largest_parts_are_those_of_the_whole_array(slab: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", slab)
    label = blobs(seed)
    want = naive_largest(naive_largest(label, 1), 7)
    np.testing.assert_array_equal(cleaned(label, Cleanup(("vessel", "liver"))), want)
    assert (want != label).any()


def test_part_that_winds_through_many_slabs_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", 1)
    label = np.zeros((9, 3, 12), np.uint8)
    # Two towers that meet at the top alone, and a block that is larger than either of them.
    label[0, 1, :], label[4, 1, :], label[:5, 1, 11] = 1, 1, 1
    label[6:9, :, 0:2] = 1
    want = label.copy()
    want[6:9] = 0
    np.testing.assert_array_equal(cleaned(label, Cleanup(("liver",))), want)


def test_plane_that_two_slabs_share_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", 1)
    label = np.zeros((5, 5, 9), np.uint8)
    label[:, :2, 8], label[:4, 2:4, 3] = 1, 1
    assert [int(plane.sum()) for plane in cleaned(label, Cleanup(("liver",))).T if plane.any()] == [10]


@pytest.mark.parametrize("step", [(1, 1, 1), (1, -1, 1), (-1, 1, 0)])
def test_corners_connect(step: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", 1)
    label = np.zeros((7, 7, 7), np.uint8)
    for k in (-1, 0, 1):
        label[tuple(3 + k * np.array(step))] = 1
    np.testing.assert_array_equal(cleaned(label, Cleanup(("liver",))), label)


def test_lowest_of_equal_parts_is_kept() -> None:
    label = np.zeros((5, 5, 5), np.uint8)
    label[0, 4, 4] = label[4, 4, 0] = label[4, 0, 4] = 1
    kept = cleaned(label, Cleanup(("liver",)))
    assert np.argwhere(kept).tolist() == [[4, 4, 0]]


@pytest.mark.parametrize("slab", [1, 400, 2**22])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.0, 2.5)])
def test_smoothing_is_its_definition(slab: int, spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", slab)
    label = blobs()
    for widths in ({1: 1.2}, {1: 1.2, 4: 1.2, 7: 1.2}, {1: 0.9, 7: 1.6}):
        names = tuple((LABELS.names[LABELS.values.index(value)], mm) for value, mm in widths.items())
        want = naive_smooth(label, widths, spacing)
        np.testing.assert_array_equal(cleaned(label, Cleanup((), names), *spacing), want)
        assert (want != label).any()


def test_smoothing_takes_single_voxels_and_fills_holes_but_leaves_flat_borders() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[:, :, :10] = 1
    flat = label.copy()
    label[10, 10, 4], label[4, 4, 16] = 0, 1
    np.testing.assert_array_equal(cleaned(label, Cleanup((), (("liver", 1.0),))), flat)


def test_smoothing_keeps_a_round_organ_as_round_in_mm_on_thick_slices() -> None:
    spacing = np.array((1.0, 1.0, 4.0))
    distance = np.linalg.norm((np.indices((41, 41, 11)).T - (20, 20, 5)) * spacing, axis=-1).T
    label = np.where(distance < 17, 1, 0).astype(np.uint8)
    result = cleaned(label, Cleanup((), (("liver", 2.0),)), *spacing)
    assert np.abs(distance[result != label] - 17).max(initial=0) < 2
    # A slice of 4 mm is thin under a Gaussian of 4 mm, one of 40 mm is not.
    lone = np.zeros((41, 41, 11), np.uint8)
    lone[10:30, 10:30, 5] = 1
    assert cleaned(lone, Cleanup((), (("liver", 4.0),)), *spacing).sum() == 0
    assert cleaned(lone, Cleanup((), (("liver", 4.0),)), 1, 1, 40)[20, 20, 5] == 1


def test_class_that_is_not_chosen_keeps_every_voxel() -> None:
    label = blobs()
    result = cleaned(label, Cleanup(("liver",), (("liver", 1.5), ("lung", 1.5))))
    assert (result[label == 7] == 7).all()
    assert (result != label).any()
    speck = np.ones((9, 9, 9), np.uint8)
    speck[4, 4, 4] = 7
    np.testing.assert_array_equal(cleaned(speck, Cleanup((), (("liver", 1.0),))), speck)


def test_more_than_half_under_a_wide_gaussian_is_more_than_any_share_under_a_narrow_one() -> None:
    label = np.full((15, 15, 15), 4, np.uint8)
    label[6:9, 6:9, 6:9] = 0
    label[7, 7, 7] = 1
    assert (cleaned(label, Cleanup((), (("liver", 0.6), ("lung", 3.0)))) == 4).all()


def test_voxel_that_a_neighbour_surrounds_goes_to_it_and_not_to_the_background() -> None:
    label = np.full((9, 9, 9), 7, np.uint8)
    label[4, 4, 4] = 1
    assert (cleaned(label, Cleanup((), (("liver", 1.0),))) == 7).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_label_map_is_changed_in_place_and_keeps_its_memory_order(order: Any) -> None:
    label = np.array(blobs(), order=order)
    want = cleaned(blobs(), ALL)
    result = apply(label, grid(label.shape), LABELS, ALL)
    assert result is label
    assert result.flags[f"{order}_CONTIGUOUS"]
    np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("turn", ORIENTATIONS, ids=lambda ornt: "".join(nib.orientations.ornt2axcodes(ornt)))
def test_same_voxels_change_in_all_orientations(turn: np.ndarray) -> None:
    label, affine = blobs(shape=(12, 9, 9)), np.diag([0.8, 1.0, 2.0, 1.0])
    # Equal parts, so that the rule for ties is asked too.
    label[:, :, 3:6] = 0
    want = apply(label.copy(), Geometry(label.shape, affine), LABELS, ALL)
    turned = nib.orientations.apply_orientation(label, turn).copy()
    geometry = Geometry(turned.shape, affine @ nib.orientations.inv_ornt_aff(turn, label.shape))
    got = apply(turned, geometry, LABELS, ALL)
    np.testing.assert_array_equal(nib.orientations.apply_orientation(want, turn), got)


def test_classes_may_be_named_in_any_order() -> None:
    turned = Cleanup(ALL.largest[::-1], ALL.smoothing[::-1])
    assert turned == ALL
    other = Labels(("background", "vessel", "lung", "liver"), (0, 7, 4, 1))
    np.testing.assert_array_equal(cleaned(blobs(), turned, labels=other), cleaned(blobs(), ALL))


def test_picture_has_eight_neighbours_and_pixels_for_mm() -> None:
    label = np.zeros((30, 20, 1), np.uint8)
    label[2:12, 2:12] = label[12, 12] = label[20:23, 15] = 4
    result = cleaned(label, Cleanup(("lung",)))
    assert (result[12, 12, 0], result[20:23, 15].any()) == (4, False)
    smooth = cleaned(label, Cleanup((), (("lung", 1.0),)))
    assert (smooth[12, 12, 0], smooth[20:23, 15].any(), smooth[6, 6, 0]) == (0, False, 4)


@pytest.mark.parametrize(
    "labels", [LABELS, Labels(LABELS.names, (0, -3, 300, 7)), Labels(LABELS.names, (0, 70000, 2, 9))]
)
def test_any_stored_values_do(labels: Labels) -> None:
    channels = LABELS.to_channels(blobs())
    result = cleaned(labels.to_values(channels), ALL, labels=labels)
    assert result.dtype == labels.dtype
    np.testing.assert_array_equal(labels.to_channels(result), LABELS.to_channels(cleaned(blobs(), ALL)))


@pytest.mark.parametrize("value", [0, 1, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 4), (6, 5, 4)])
def test_empty_and_full_maps_stay(value: int, shape: tuple[int, int, int]) -> None:
    label = np.full(shape, value, np.uint8)
    np.testing.assert_array_equal(cleaned(label, ALL), label)


def test_cleanup_survives_json_and_says_what_it_does() -> None:
    assert Cleanup.from_dict(ALL.as_dict(), LABELS) == ALL
    assert str(Cleanup(("lung", "liver"), (("liver", 1.5),))) == "largest part of liver, lung; liver smoothed by 1.5 mm"
    assert (str(Cleanup()), bool(Cleanup()), bool(ALL)) == ("nothing", False, True)


@pytest.mark.parametrize(
    "data",
    [
        {"largest": ["spleen"], "smoothing": {}},
        {"largest": ["background"], "smoothing": {}},
        {"largest": ["liver", "liver"], "smoothing": {}},
        {"largest": [], "smoothing": {"liver": 0}},
        {"largest": [], "smoothing": {"liver": float("nan")}},
        {"largest": [], "smoothing": {"liver": "wide"}},
        {"largest": [], "smoothing": {"liver": 1}, "holes": ["liver"]},
        {"largest": [3], "smoothing": {}},
    ],
)
def test_unknown_classes_and_widths_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a cleanup of|a smoothing of"):
        Cleanup.from_dict(data, LABELS)
