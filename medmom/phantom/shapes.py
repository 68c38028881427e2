"""Shapes as distances in mm (negative inside), and the canvas they are painted on."""

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial import cKDTree

KEEP = -1
"""Paint without touching the label: vessels and cysts belong to the organ they lie in."""

STEP = 3.0
"""Distance in mm between two samples of a tube's middle."""


class Canvas:
    """CT numbers and labels of points, painted from back to front with edges as soft as a voxel is wide.

    Attributes:
        points: Shape (3, N), mm, in the patient's own coordinates.
        edge: Width of an edge in mm.
        hu: Shape (N,), what is seen so far.
        label: Shape (N,), channel index of what is on top.
    """

    def __init__(self, points: np.ndarray, *, edge: float, hu: np.ndarray) -> None:
        """Starts with the CT numbers ``hu``, shape (N,), and no label."""
        self.points = points
        self.edge = edge
        self.hu = hu
        self.label = np.zeros(points.shape[1], dtype=np.uint8)
        self._everywhere = np.arange(points.shape[1])

    def paint(self, distance: np.ndarray, hu: float | np.ndarray, label: int = 0, at: np.ndarray | None = None) -> None:
        """Covers what lies inside a shape; where its border crosses a voxel, both are seen in part.

        Args:
            distance: Shape (M,), mm, negative inside.
            hu: CT number of the shape, or one for each point.
            label: What the shape's inside is from now on; ``KEEP`` leaves it as it was.
            at: Indices of the M points; None means all.
        """
        at = self._everywhere if at is None else at
        opacity = np.clip(0.5 - distance / self.edge, 0, 1)
        self.hu[at] += opacity * (hu - self.hu[at])
        if label != KEEP:
            self.label[at[distance < 0]] = label

    def tube(self, course: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance to a tube, computed only for the points near it.

        Args:
            course: Shape (rows, 4): x, y, z and radius along the middle.

        Returns:
            Distance in mm, indices of its points, and for each of them the nearest row of ``course``.
        """
        margin = course[:, 3].max() + self.edge
        low, high = course[:, :3].min(axis=0) - margin, course[:, :3].max(axis=0) + margin
        near = np.ones(len(self._everywhere), dtype=bool)
        for values, least, most in zip(self.points, low, high, strict=True):
            near &= (values > least) & (values < most)
        at = np.flatnonzero(near)
        distance, nearest = cKDTree(course[:, :3]).query(self.points[:, at].T)
        return (distance - course[nearest, 3]).astype(np.float32), at, nearest


def smooth_course(nodes: np.ndarray) -> np.ndarray:
    """Samples the smooth curve through ``nodes`` (x, y, z, radius) every ``STEP`` mm, shape (rows, 4)."""
    along = np.r_[0, np.cumsum(np.linalg.norm(np.diff(nodes[:, :3], axis=0), axis=1))]
    return np.asarray(CubicSpline(along, nodes)(np.arange(0, along[-1], STEP)))


def waves(points: np.ndarray, rng: np.random.Generator, wavelength: float, count: int = 5) -> np.ndarray:
    """A smooth random field, shape (N,), of mean 0 and variance 1: plane waves of about ``wavelength`` mm."""
    directions = rng.normal(size=(count, 3))
    directions *= 2 * np.pi / np.linalg.norm(directions, axis=1, keepdims=True)
    directions /= wavelength * rng.uniform(0.7, 1.4, (count, 1))
    phases = rng.uniform(0, 2 * np.pi, (count, 1))
    field = np.cos(directions.astype(np.float32) @ points + phases.astype(np.float32))
    return np.asarray(field.sum(axis=0) * np.float32(np.sqrt(2 / count)))


def meet(*distances: np.ndarray, round_mm: float) -> np.ndarray:
    """Distance to what lies in all of the shapes, their common edges rounded over ``round_mm``."""
    result = distances[0]
    for other in distances[1:]:
        overlap = np.maximum(round_mm - np.abs(result - other), 0)
        result = np.maximum(result, other) + overlap**2 / (4 * round_mm)
    return result


def outline(points: np.ndarray, width: np.ndarray, depth: np.ndarray, *, power: float) -> np.ndarray:
    """Radial distance to a rounded cross-section in x and y whose half axes (mm) are given at each point."""
    x, y, _ = points
    level = (np.abs(x / width) ** power + np.abs(y / depth) ** power) ** (1 / power)
    return np.asarray(np.hypot(x, y) * (1 - 1 / np.maximum(level, 0.05)))


def domes(points: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """Distance to two domes that merge in the middle and fall away outwards; negative below."""
    x, y, z = points
    heights = [top - 50 * ((x - cx) / 68) ** 2 - 52 * ((y - cy) / 82) ** 2 for cx, cy, top in tops]
    slope = 1.3  # typical, so that differences in height become distances
    return np.asarray((z - 6 * np.logaddexp(heights[0] / 6, heights[1] / 6)) / slope, dtype=np.float32)
