from __future__ import annotations

import numpy as np
import pytest

from medmom.interpolation import BLOCK, THICKNESS, along, axis_weights, float_slabs


def weights_of(order: int, source: int = 90, target: int = 170) -> np.ndarray:
    found = axis_weights(source, target, source / target, (source / target - 1) / 2, order)
    assert found is not None
    return found


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("target", [1, BLOCK - 1, BLOCK, BLOCK + 1, 170])
def test_weights_of_a_voxel_sum_to_one(order: int, target: int) -> None:
    np.testing.assert_allclose(weights_of(order, target=target).sum(axis=1), 1, atol=1e-6)


def test_most_of_a_spline_is_left_out() -> None:
    assert np.count_nonzero(weights_of(3, 512, 273)) < 0.1 * 512 * 273


def test_kept_weights_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        weights_of(1)[0] = 0


def test_an_axis_that_stays_has_no_weights() -> None:
    assert axis_weights(5, 5, 1.0, 1e-6, 3) is None
    assert axis_weights(5, 5, 1.0, 0.5, 3) is not None


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("target", [1, BLOCK, BLOCK + 1, 170])
def test_banded_product_equals_the_whole_one(axis: int, order: int, target: int) -> None:
    shape = [2, 3, 4, 5]
    shape[axis] = 90
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights = weights_of(order, target=target)
    expected = np.moveaxis(np.tensordot(weights.astype(np.float64), image, axes=(1, axis)), 0, axis)
    result = along(image, weights, axis)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert result.dtype == np.float32


@pytest.mark.parametrize("depth", [1, THICKNESS, THICKNESS + 1, 50])
def test_slabs_are_float_copies_of_the_whole(depth: int) -> None:
    image = np.random.default_rng(0).integers(0, 99, size=(2, 3, 4, depth)).astype(np.float32)
    stored = np.asfortranarray(image[0])[None]
    for given in (image, image.astype(np.int16), stored):
        slabs = list(float_slabs(given))
        whole = np.concatenate([slab for _, slab in slabs], axis=1).transpose(0, 3, 2, 1)
        np.testing.assert_array_equal(whole, given)
        assert [place.start for place, _ in slabs] == list(range(0, depth, THICKNESS))
        assert slabs[-1][0].stop == depth
        for _, slab in slabs:
            assert slab.dtype == np.float32
            assert slab.flags.c_contiguous
            assert not np.shares_memory(slab, given)
