"""What an image looks like, in a hundred numbers, whatever it shows."""

from __future__ import annotations

import numpy as np

SPANS = {"unit": (0.0, 1.0), "zscore": (-3.0, 3.0), "ct": (-3.0, 3.0)}
"""Where the intensities of prepared images usually lie, by the name of their preparation."""

GREYS, BANDS, CELLS = 32, 16, 8
"""Steps of grey, bands of spatial frequency, and cells of a thumbnail along each edge."""

GREY_WEIGHT, BAND_WEIGHT, CELL_WEIGHT = 3.0, 1.0, 2.0
"""They bring the three parts to about one scale, for a covariance that is shrunk towards a multiple of the identity."""


def appearance(image: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Describes a prepared image by its greys, its texture and its outline.

    - Greys: the square root of the share of voxels in each of 32 steps from one end of the span to the other.
    - Texture: the mean logarithm of the amplitude of the Fourier transform of its slices, in 16 bands from 0 to half a
      cycle a voxel.
    - Outline: a thumbnail of 8 x 8 cells of each channel (of more than three: of their mean), the mean over slices,
      from 0 to 1 over the span.

    Args:
        image: Shape (C, X, Y), or (C, X, Y, Z) of slices or of a volume.
        span: Intensity of black and of white, see ``SPANS``; what lies outside counts as the end.

    Returns:
        float32, shape (48 + 64 C,), or (112,) of more than three channels.
    """
    low, high = span
    scaled = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)
    if scaled.ndim == 3:
        scaled = scaled[..., None]
    greys = np.sqrt(np.histogram(scaled, GREYS, (0, 1))[0] / scaled.size)
    outline = scaled.mean(axis=3)
    if len(outline) > 3:
        outline = outline.mean(axis=0, keepdims=True)
    parts = (GREY_WEIGHT * greys, BAND_WEIGHT * _bands(scaled), CELL_WEIGHT * _cells(outline).reshape(-1))
    return np.concatenate(parts).astype(np.float32)


def _bands(image: np.ndarray) -> np.ndarray:
    amplitude = np.abs(np.fft.rfft2(image, axes=(1, 2), norm="ortho"))
    levels = np.log(amplitude + 1e-3).mean(axis=(0, 3))
    columns, rows = image.shape[1:3]
    radius = np.hypot(np.fft.fftfreq(columns)[:, None], np.fft.rfftfreq(rows)[None])
    band = np.minimum((radius * 2 * BANDS).astype(int), BANDS - 1).reshape(-1)
    counts = np.bincount(band, minlength=BANDS)
    sums = np.bincount(band, levels.reshape(-1), minlength=BANDS)
    # Small images leave bands empty: those continue the band below.
    found = np.flatnonzero(counts)
    means = sums[found] / counts[found]
    return np.asarray(means[np.searchsorted(found, np.arange(BANDS), side="right") - 1])


def _cells(image: np.ndarray) -> np.ndarray:
    """Mean over 8 x 8 cells of about one size, shape (C, 8, 8); smaller images repeat."""
    for axis in (1, 2):
        places = np.array_split(np.arange(image.shape[axis]), CELLS)
        if image.shape[axis] < CELLS:
            places = [np.array([k * image.shape[axis] // CELLS]) for k in range(CELLS)]
        image = np.stack([image.take(place, axis=axis).mean(axis=axis) for place in places], axis=axis)
    return image
