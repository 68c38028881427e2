from __future__ import annotations

import numpy as np
import pytest

from medmom.inference.appearance import BANDS, CELLS, GREYS, appearance

SPAN = (-1.0, 3.0)


def parts(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = appearance(image, SPAN)
    return found[:GREYS] / 3, found[GREYS : GREYS + BANDS], found[GREYS + BANDS :] / 2


def uniform(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 3, shape).astype(np.float32)


def test_greys_are_roots_of_shares_and_what_lies_outside_counts_at_the_ends() -> None:
    image = np.array([-50.0, -1.0, 1.01, 1.01, 2.99, 70.0], np.float32).reshape(1, 3, 2)
    greys, _, _ = parts(image)
    expected = np.zeros(GREYS)
    expected[[0, GREYS // 2, -1]] = np.sqrt([2 / 6, 2 / 6, 2 / 6])
    np.testing.assert_allclose(greys, expected, atol=1e-6)


@pytest.mark.parametrize("cycles, band", [(2, 1), (8, 5), (15, 10)])
def test_wave_is_found_in_its_band(cycles: int, band: int) -> None:
    x = np.arange(48) / 48
    image = 1 + 2 * np.sin(2 * np.pi * cycles * x)[None, :, None] * np.ones((1, 1, 40))
    _, bands, _ = parts(image)
    # The mean of the picture is in band 0.
    assert 1 + bands[1:].argmax() == band == int(cycles / 48 * 2 * BANDS)


def test_cells_are_means_of_columns_and_rows() -> None:
    image = uniform(1, 32, 24)
    _, _, cells = parts(image)
    means = image.reshape(CELLS, 4, CELLS, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(cells.reshape(CELLS, CELLS), (means + 1) / 4, atol=1e-6)


@pytest.mark.parametrize(
    "shape, width", [((1, 9, 9), 112), ((3, 40, 20), 240), ((5, 8, 30), 112), ((1, 12, 9, 7), 112)]
)
def test_width_hangs_on_the_channels_alone(shape: tuple[int, ...], width: int) -> None:
    found = appearance(uniform(*shape), SPAN)
    assert found.shape == (width,)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 50), (1, 3, 3, 1)])
def test_tiny_images_have_an_appearance_too(shape: tuple[int, ...]) -> None:
    assert np.isfinite(appearance(uniform(*shape), SPAN)).all()


def test_order_of_slices_does_not_matter() -> None:
    image = uniform(1, 16, 16, 6)
    np.testing.assert_allclose(appearance(image, SPAN), appearance(image[..., ::-1], SPAN), rtol=1e-5, atol=1e-6)
