"""Classifiers of a few thousand weights, for the tests of more than one module."""

from __future__ import annotations

from typing import Any

import torch

from medmom.models import MomentumResNet, SliceClassifier


def tiny_3d(num_classes: int = 2, **changes: Any) -> MomentumResNet:
    sizes: dict[str, Any] = {"channels": [8, 16], "blocks": [1, 3], "stem_stride": [2, 2, 2], "dropout": 0.0}
    sizes |= {"kernels": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], **changes}
    torch.manual_seed(0)
    return MomentumResNet(1, num_classes, **sizes)


def tiny_slices(num_classes: int = 2, **changes: Any) -> SliceClassifier:
    sizes: dict[str, Any] = {"channels": [8, 16], "blocks": [1, 3], "pooling": "attention", "dropout": 0.0}
    sizes |= {"kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]], "stem_stride": [2, 2], **changes}
    torch.manual_seed(0)
    return SliceClassifier(1, num_classes, **sizes)


def tiny_2d(num_classes: int = 2, **changes: Any) -> MomentumResNet:
    return tiny_3d(num_classes, kernels=[[3, 3]] * 2, strides=[[1, 1], [2, 2]], stem_stride=[2, 2], **changes)
