"""A network of a few thousand weights in a package, and small images, for the tests of several rooms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from medmom.data.preparation import Preparation
from medmom.labels import Labels
from medmom.models import MomentumUNet
from medmom.package import save_package

LABELS = Labels(("background", "head", "body"), (0, 1, 4))
MRI = Preparation((1.0, 1.0, 1.0), "zscore")


def tiny_network(in_channels: int = 1, out_channels: int = 3, *, seed: int = 0) -> MomentumUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MomentumUNet(
            in_channels,
            out_channels,
            channels=(4, 6),
            blocks=(1, 3),
            kernels=[[3, 3, 3]] * 2,
            strides=[[1, 1, 1], [2, 2, 2]],
        )


def save_tiny(
    folder: Path,
    *,
    channels: Sequence[str] = ("MRI",),
    preparation: Preparation = MRI,
    patch: Sequence[int] = (16, 16, 16),
    network: MomentumUNet | None = None,
    data: dict[str, Any] | None = None,
) -> Path:
    save_package(
        folder,
        network or tiny_network(len(channels)),
        labels=LABELS,
        preparation=preparation,
        patch=patch,
        channels=channels,
        recipe={"evaluation": {"nsd_tolerance": 1.0}, "data": data or {}},
    )
    return folder


def save_image(
    path: Path, shape: Sequence[int] = (12, 10, 8), *, affine: np.ndarray | None = None, seed: int = 0
) -> Path:
    """Writes smooth noise, so that the network has something to find."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=shape).astype(np.float32)
    image += np.sin(np.linspace(0, 6, shape[0], dtype=np.float32)).reshape(-1, *[1] * (len(shape) - 1)) * 3
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(image, np.diag([1.0, 1.5, 2.0, 1.0]) if affine is None else affine)
    file.header.set_xyzt_units("mm")
    nib.save(file, path)
    return path
