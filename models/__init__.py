"""Momentum networks for medical images: torch and MONAI."""

from medmom.models.convert import from_host, from_plain_host, to_host
from medmom.models.factorise import to_dense, to_low_rank
from medmom.models.joint import JointMomentumUNet
from medmom.models.low_rank import LowRankConv, LowRankLinear
from medmom.models.momentum import MomentumStage
from medmom.models.paper2d import Paper2D
from medmom.models.plain import PlainUNet
from medmom.models.presets import (
    cls2d_s,
    cls2d_xs,
    cls3d_s,
    mom2d_m,
    mom2d_s,
    mom2d_xs,
    mom3d_deep,
    mom3d_m,
    mom3d_s,
    mom3d_sr,
    mom3d_xs,
    mom3d_xw,
    plan_kernels_and_strides,
)
from medmom.models.resnet import MomentumResNet
from medmom.models.slices import SliceClassifier
from medmom.models.transnetr import TransNetR
from medmom.models.unet import MomentumUNet

__all__ = [
    "JointMomentumUNet",
    "LowRankConv",
    "LowRankLinear",
    "MomentumResNet",
    "MomentumStage",
    "MomentumUNet",
    "Paper2D",
    "PlainUNet",
    "SliceClassifier",
    "TransNetR",
    "cls2d_s",
    "cls2d_xs",
    "cls3d_s",
    "from_host",
    "from_plain_host",
    "mom2d_m",
    "mom2d_s",
    "mom2d_xs",
    "mom3d_deep",
    "mom3d_m",
    "mom3d_s",
    "mom3d_sr",
    "mom3d_xs",
    "mom3d_xw",
    "plan_kernels_and_strides",
    "to_dense",
    "to_host",
    "to_low_rank",
]
