"""Momentum networks for medical images: torch alone."""

from medmom.models.momentum import MomentumStage
from medmom.models.presets import mom2d_xs, mom3d_m, mom3d_s, mom3d_sr, mom3d_xs, plan_kernels_and_strides
from medmom.models.unet import MomentumUNet

__all__ = [
    "MomentumStage",
    "MomentumUNet",
    "mom2d_xs",
    "mom3d_m",
    "mom3d_s",
    "mom3d_sr",
    "mom3d_xs",
    "plan_kernels_and_strides",
]
