from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from medmom.labels import IGNORE

METRICS = ("dice", "iou", "recall", "precision", "hd95_mm", "nsd")
"""Names of the scores of one structure, in the order in which they are shown."""

Scores = dict[str, float | None]

# Spacings come from affines stored as float32: two voxels of 1 mm may measure 2.0000002 mm.
TOLERANCE_SLACK = 1e-4


def definitions(tolerance: float, unit: str = "mm") -> dict[str, str]:
    """Says in words what each score means, for the files and reports that show them.

    Args:
        tolerance: Of the surface Dice, in ``unit``.
        unit: Of distances: ``"mm"``, or ``"pixels"`` for pictures, whose pixels have no known edge.

    Returns:
        Text by name: the six scores, ``surface``, ``empty``, ``ignored`` and ``mean``.
    """
    return {
        "dice": "2 |P and R| / (|P| + |R|), P the predicted and R the reference voxels of a class.",
        "iou": "|P and R| / |P or R|; its mean over classes is called miou.",
        "recall": "|P and R| / |R|: the share of the reference that was found.",
        "precision": "|P and R| / |P|: the share of the prediction that is right.",
        "hd95_mm": "95th percentile (linear) of the distances from each surface voxel of one mask to the nearest "
        f"surface voxel of the other, in {unit}; the larger of the two directions.",
        "nsd": f"Surface Dice: share of the surface voxels of both masks that lie within {tolerance:g} {unit} of the "
        "other surface.",
        "surface": "Surfaces are boundary voxel centres: voxels of the mask with one of their six neighbours outside; "
        "beyond the image's border counts as outside, and an axis of one voxel has no neighbours. Distances are in "
        f"{unit}, from the voxel spacing along the axes (exact on grids without shear, oblique ones included).",
        "empty": "Both masks empty: no score (null), left out of the means and counted. One mask empty, or the whole "
        "prediction missing: dice, iou, recall, precision and nsd are 0 and hd95_mm is the length of the reference "
        "image's diagonal, so that a missed structure never improves a mean.",
        "ignored": "Reference voxels marked as ignored count in no score and make no surface; where that leaves the "
        "reference without a surface, hd95_mm and nsd are null. Classes not annotated in a case are left out of it.",
        "mean": "Mean over cases for each class, then over classes. Intervals: 95 % percentile bootstrap over "
        "patients, where a draw without a class keeps that class's mean; none for a single patient.",
    }


def missed_scores(diagonal: float) -> Scores:
    """Scores of a structure that was missed altogether.

    Args:
        diagonal: Length of the reference image's diagonal in mm.
    """
    return {"dice": 0.0, "iou": 0.0, "recall": 0.0, "precision": 0.0, "hd95_mm": float(diagonal), "nsd": 0.0}


def score_masks(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    diagonal: float,
    tolerance: float,
    *,
    ignored: np.ndarray | None = None,
) -> Scores:
    """Scores one structure in one pass; ``definitions`` says what the scores mean.

    Args:
        prediction: Binary mask, shape (X, Y, Z) or (X, Y).
        reference: Binary mask of the same shape.
        spacing: Voxel edges in mm, in the order of the axes.
        diagonal: Length of the reference image's diagonal in mm, the worst HD95.
        tolerance: Of the surface Dice, in mm; 0 counts only touching surfaces.
        ignored: Mask of voxels to leave out, same shape, or None.

    Returns:
        A number for each of ``METRICS``. All None where both masks are empty. Where one is empty:
        0, and ``diagonal`` for the HD95. HD95 and NSD are None where ignored voxels hide the whole
        surface of the reference. One shared voxel scores 1 and 0 mm.

    Raises:
        ValueError: The shapes differ, or ``tolerance`` is negative.

    Source:
        Surface Dice: Nikolov et al. 2021, doi:10.2196/26151, here on voxel centres in place of
        surface elements.
    """
    if prediction.shape != reference.shape or len(spacing) != prediction.ndim:
        raise ValueError(f"masks of shape {prediction.shape} and {reference.shape} with spacing {tuple(spacing)}")
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance}; give 0 or more mm")
    hidden = np.zeros(prediction.shape, bool) if ignored is None else ignored.astype(bool)
    found, wanted = prediction.astype(bool) & ~hidden, reference.astype(bool) & ~hidden
    box = _with_margin(_bounding_box(found | wanted), found.shape)
    if box is None:
        return dict.fromkeys(METRICS)
    return _score_box(found[box], wanted[box], hidden[box], _Ruler(found.shape, spacing, diagonal, tolerance))


def score_classes(
    prediction: np.ndarray,
    reference: np.ndarray,
    channels: Iterable[int],
    spacing: Sequence[float],
    *,
    diagonal: float,
    tolerance: float,
) -> dict[int, Scores]:
    """Scores several classes of two label maps, each within its own bounding box.

    Args:
        prediction: Channel indices, ``uint8``, shape (X, Y, Z) or (X, Y).
        reference: Channel indices, same shape; voxels of 255 are left out of every score.
        channels: The channels to score, 1 or larger.
        spacing: Voxel edges in mm, in the order of the axes.
        diagonal: Length of the reference image's diagonal in mm.
        tolerance: Of the surface Dice, in mm.

    Returns:
        The scores of ``score_masks`` by channel.
    """
    wanted_boxes, found_boxes = (
        ndimage.find_objects(reference, IGNORE - 1),
        ndimage.find_objects(prediction, IGNORE - 1),
    )
    hidden = reference == IGNORE
    ruler = _Ruler(reference.shape, spacing, diagonal, tolerance)
    scores: dict[int, Scores] = {}
    for channel in channels:
        box = _with_margin(_joint(wanted_boxes[channel - 1], found_boxes[channel - 1]), reference.shape)
        scores[channel] = dict.fromkeys(METRICS)
        if box is not None:
            found = (prediction[box] == channel) & ~hidden[box]
            scores[channel] = _score_box(found, reference[box] == channel, hidden[box], ruler)
    return scores


Box = tuple[slice, ...]


class _Ruler:
    """What turns voxels into mm, with the axes that have more than one voxel."""

    def __init__(self, shape: Sequence[int], spacing: Sequence[float], diagonal: float, tolerance: float) -> None:
        # A single slice is a 2-D image: along its third axis every voxel would be surface.
        self.single = tuple(axis for axis, size in enumerate(shape) if size == 1) if max(shape) > 1 else ()
        self.spacing = np.array([edge for axis, edge in enumerate(spacing) if axis not in self.single])
        self.diagonal = diagonal
        self.tolerance = tolerance


def _score_box(found: np.ndarray, wanted: np.ndarray, hidden: np.ndarray, ruler: _Ruler) -> Scores:
    num_found, num_wanted = int(np.count_nonzero(found)), int(np.count_nonzero(wanted))
    if num_found + num_wanted == 0:
        return dict.fromkeys(METRICS)
    if num_found == 0 or num_wanted == 0:
        return missed_scores(ruler.diagonal)
    num_both = int(np.count_nonzero(found & wanted))
    found, wanted, hidden = (mask.squeeze(ruler.single) for mask in (found, wanted, hidden))
    hd95, nsd = _surface_scores(_surface(found, hidden), _surface(wanted, hidden), ruler)
    return {
        "dice": 2 * num_both / (num_found + num_wanted),
        "iou": num_both / (num_found + num_wanted - num_both),
        "recall": num_both / num_wanted,
        "precision": num_both / num_found,
        "hd95_mm": hd95,
        "nsd": nsd,
    }


def _surface_scores(found: np.ndarray, wanted: np.ndarray, ruler: _Ruler) -> tuple[float | None, float | None]:
    """HD95 and surface Dice of two masks of surface voxels."""
    if not wanted.any():
        # Decided by the reference alone, so that no prediction can choose to be left out.
        return None, None
    if not found.any():
        return ruler.diagonal, 0.0
    there, back = _distances(found, wanted, ruler.spacing), _distances(wanted, found, ruler.spacing)
    hd95 = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    within = np.count_nonzero(there <= ruler.tolerance + TOLERANCE_SLACK)
    within += np.count_nonzero(back <= ruler.tolerance + TOLERANCE_SLACK)
    return min(hd95, ruler.diagonal), float(within / (there.size + back.size))


def _surface(mask: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Voxels of ``mask`` with a neighbour that is known to lie outside."""
    solid = np.pad(mask | hidden, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for start, stop in ((0, -2), (2, None)):
            inner &= solid[tuple(slice(start, stop) if a == axis else slice(1, -1) for a in range(mask.ndim))]
    return np.asarray(mask & ~inner)


def _distances(start: np.ndarray, goal: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each voxel of ``start`` to the nearest of ``goal``, in no particular order."""
    # A tree over the surface voxels alone is several times faster than a distance transform of the
    # whole box, and voxels on both surfaces need no search.
    distances = np.zeros(np.count_nonzero(start))
    apart = np.argwhere(start & ~goal) * spacing
    if len(apart):
        tree = cKDTree(np.argwhere(goal) * spacing, balanced_tree=False, compact_nodes=False)
        distances[: len(apart)] = tree.query(apart)[0]
    return distances


def _bounding_box(mask: np.ndarray) -> Box | None:
    return ndimage.find_objects(mask.view(np.uint8), 1)[0]  # type: ignore[no-any-return]


def _joint(one: Box | None, other: Box | None) -> Box | None:
    if one is None or other is None:
        return one or other
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


def _with_margin(box: Box | None, shape: Sequence[int]) -> Box | None:
    """Adds one voxel on each side, so that ignored neighbours are seen."""
    if box is None:
        return None
    return tuple(slice(max(b.start - 1, 0), min(b.stop + 1, size)) for b, size in zip(box, shape, strict=True))
