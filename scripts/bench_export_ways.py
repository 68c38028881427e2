# mypy: disable-error-code="no-untyped-call"
"""Ways from class logits to a label map on the scan's own grid, medmom's and those of other packages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SLAB = 8
"""Planes of logits that medmom is given at once."""


@dataclass(frozen=True)
class Problem:
    """One set of logits and where they belong.

    Attributes:
        path: float16 numbers (K, Z, X, Y), nothing else.
        num_classes: K.
        working: Shape (X, Y, Z) of the grid of the logits, RAS.
        own: Shape of the scan, LPS, of the same extent.
        spacing: Of the logits, mm.
        threads: To compute with.
    """

    path: str
    num_classes: int
    working: tuple[int, int, int]
    own: tuple[int, int, int]
    spacing: float
    threads: int

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the file."""
        x, y, z = self.working
        return self.num_classes, z, x, y

    @property
    def own_spacing(self) -> list[float]:
        """Of the scan, mm."""
        return [self.spacing * coarse / fine for coarse, fine in zip(self.working, self.own, strict=True)]

    def affines(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the logits and of the scan; the outer edges of the voxels coincide."""
        signs = np.array([-1, -1, 1])
        own = np.diag([*(signs * self.own_spacing), 1.0])
        working = np.diag([self.spacing] * 3 + [1.0])
        for axis in range(3):
            half = (self.working[axis] * self.spacing) / 2
            own[axis, 3] = -signs[axis] * (half - self.own_spacing[axis] / 2)
            working[axis, 3] = -(half - self.spacing / 2)
        return working, own

    def logits(self) -> torch.Tensor:
        """All of them, in memory, (K, Z, X, Y)."""
        return torch.from_numpy(np.fromfile(self.path, dtype=np.float16).reshape(self.stored))


Work = Callable[[], np.ndarray]
"""What is measured; gives labels (Z, X, Y), RAS, or as its way says."""


def medmom_way(problem: Problem) -> Work:
    """Slabs through the ``Restorer``, as in prediction; labels (X, Y, Z), LPS."""
    grid = import_module("medmom.geometry").Geometry
    restorer_of = import_module("medmom.inference.restore").Restorer
    affines = problem.affines()
    num_classes, depth, *plane = problem.stored
    size = int(np.prod(plane))

    def work() -> np.ndarray:
        working, own = grid(problem.working, affines[0]), grid(problem.own, affines[1])
        restorer = restorer_of(working, own, num_classes, axis=2)
        for start in range(0, depth, SLAB):
            count = min(SLAB, depth - start)
            slab = np.empty((num_classes, count, *plane), dtype=np.float32)
            for k, part in enumerate(slab):
                offset = 2 * size * (k * depth + start)
                part.flat = np.fromfile(problem.path, dtype=np.float16, count=count * size, offset=offset)
            restorer.push(slice(start, start + count), torch.from_numpy(slab).movedim(1, 3))
        return np.asarray(restorer.finish())

    return work


def nnunet_way(problem: Problem, *, resampler: str) -> Work:
    """nnU-Net's own function, with its default or its torch resampling."""
    resampling = "nnunetv2.preprocessing.resampling"
    resamplers: dict[str, Callable[..., Any]] = {
        "default": partial(
            import_module(f"{resampling}.default_resampling").resample_data_or_seg_to_shape,
            is_seg=False,
            order=1,
            order_z=0,
            force_separate_z=None,
        ),
        "torch": partial(
            import_module(f"{resampling}.resample_torch").resample_torch_fornnunet,
            is_seg=False,
            force_separate_z=False,
            num_threads=problem.threads,
        ),
    }
    export = import_module("nnunetv2.inference.export_prediction")
    manager = import_module("nnunetv2.utilities.label_handling.label_handling").LabelManager
    x, y, z = problem.own
    spacing = problem.own_spacing
    labels = manager({"background": 0, **{f"organ {k}": k for k in range(1, problem.num_classes)}}, None)
    plans = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    configuration = SimpleNamespace(spacing=[problem.spacing] * 3, resampling_fn_probabilities=resamplers[resampler])
    properties = {
        "spacing": [spacing[2], spacing[0], spacing[1]],
        "shape_after_cropping_and_before_resampling": (z, x, y),
        "shape_before_cropping": (z, x, y),
        "bbox_used_for_cropping": [[0, z], [0, x], [0, y]],
    }
    logits = problem.logits()
    return lambda: np.asarray(
        export.convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, labels, properties, num_threads_torch=problem.threads
        )
    )


TYPES = {"float32": torch.float32, "float64": torch.float64}


def monai_way(problem: Problem, *, dtype: str) -> Work:
    """What ``Invertd`` makes of ``Spacingd`` and ``Orientationd``, then ``AsDiscreted``; labels (X, Y, Z), LPS."""
    transforms = import_module("monai.transforms")
    working, own = (torch.from_numpy(affine) for affine in problem.affines())
    logits = import_module("monai.data").MetaTensor(
        problem.logits().permute(0, 2, 3, 1).float().contiguous(), affine=working
    )
    resample = transforms.SpatialResample(mode="bilinear", padding_mode="border", dtype=TYPES[dtype])

    def work() -> np.ndarray:
        restored = resample(logits, dst_affine=own, spatial_size=problem.own)
        return np.asarray(transforms.AsDiscrete(argmax=True)(restored)[0], dtype=np.uint8)

    return work


def totalsegmentator_way(problem: Problem) -> Work:
    """Labels on the grid of the logits, then its smooth resampling of label maps."""
    resample = import_module("totalsegmentator.resampling").resample_one_hot_crop
    x, y, z = problem.own
    logits = problem.logits().numpy()

    def work() -> np.ndarray:
        labels = logits.argmax(0).astype(np.uint8)
        return np.asarray(resample(labels, (z, x, y), order=1, nr_cpus=problem.threads))

    return work


@dataclass(frozen=True)
class Way:
    """One way to a label map.

    Attributes:
        title: In the table.
        package: That is needed.
        start: Gives the work.
        need: Bytes of logits and all else, of (K, w, o); None: it is bounded.
        formula: The same in words.
        is_lps: The labels come as (X, Y, Z), LPS; else as (Z, X, Y), RAS.
    """

    title: str
    package: str
    start: Callable[[Problem], Work]
    need: Callable[[int, int, int], int] | None = None
    formula: str = ""
    is_lps: bool = False


WAYS: Mapping[str, Way] = {
    "medmom": Way("medmom", "medmom", medmom_way, is_lps=True),
    "nnunet": Way(
        "nnU-Net, default",
        "nnunetv2",
        partial(nnunet_way, resampler="default"),
        lambda k, w, o: 2 * k * w + max(8 * k * w + 2 * k * o + 16 * o, 4 * k * o + 8 * o),
        "float16 logits 2Kw, and the larger of: float64 copy 8Kw, result 2Ko, one class in float64 twice 16o; "
        "result 2Ko, its copy in argmax 2Ko, int64 labels 8o",
    ),
    "nnunet-torch": Way(
        "nnU-Net, torch resampling",
        "nnunetv2",
        partial(nnunet_way, resampler="torch"),
        lambda k, w, o: 2 * k * w + 4 * k * o + max(4 * k * w, 8 * o),
        "float16 logits 2Kw, result 4Ko, and the larger of a float32 copy 4Kw and int64 labels 8o",
    ),
    "monai": Way(
        "MONAI, as Invertd (float64)",
        "monai",
        partial(monai_way, dtype="float64"),
        lambda k, w, o: 4 * k * w + 8 * k * o + max(8 * k * w + 24 * o, 4 * k * o),
        "float32 logits 4Kw, result 8Ko, and the larger of: float64 copy 8Kw and coordinates 24o; float32 result 4Ko",
        is_lps=True,
    ),
    "monai-float32": Way(
        "MONAI, the same in float32",
        "monai",
        partial(monai_way, dtype="float32"),
        lambda k, w, o: 4 * k * w + 4 * k * o + 12 * o,
        "float32 logits 4Kw, result 4Ko, coordinates or labels 12o",
        is_lps=True,
    ),
    "totalsegmentator": Way(
        "TotalSegmentator, label map (order 1)",
        "TotalSegmentator",
        totalsegmentator_way,
        lambda k, w, o: 2 * k * w + max(2 * k * w + 8 * w, 36 * o),
        "float16 logits 2Kw, and the larger of: their copy in argmax 2Kw, int64 labels 8w; coordinates of the "
        "largest organ up to 36o",
    ),
}
