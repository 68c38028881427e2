"""Networks by name, and the kernels and strides that suit a patch.

Every preset takes its kernels and strides by stage from ``plan_kernels_and_strides``, or, where they are absent, has
kernels of 3 on every axis and halves every axis from stage to stage. All other options are those of ``MomentumUNet``
and, for classifiers, ``MomentumResNet``.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

from medmom.models.blocks import Norm
from medmom.models.encoder import Block, NetworkMemory, Velocity
from medmom.models.gates import Coupling, Gating
from medmom.models.resnet import MomentumResNet
from medmom.models.unet import MomentumUNet

__all__ = [
    "cls2d_s",
    "cls2d_xs",
    "cls3d_s",
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
]

ByStage = Sequence[Sequence[int]]


class Size(NamedTuple):
    """What makes a preset: axes, channels by stage, residual blocks by stage."""

    spatial_dims: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]


SIZES = {
    "mom2d_xs": Size(2, (8, 16, 32, 64, 128), (1, 3, 3, 3, 3)),
    "mom2d_s": Size(2, (32, 64, 128, 256, 320), (1, 2, 3, 4, 4)),
    "mom2d_m": Size(2, (32, 64, 128, 256, 512, 512, 512), (1, 3, 4, 6, 6, 6, 6)),
    "mom3d_xs": Size(3, (8, 16, 32, 48), (1, 3, 3, 3)),
    "mom3d_xw": Size(3, (8, 16, 64, 128), (1, 3, 3, 3)),
    "mom3d_s": Size(3, (32, 64, 128, 256), (1, 3, 3, 3)),
    "mom3d_sr": Size(3, (32, 64, 128, 256), (1, 3, 4, 6)),
    "mom3d_m": Size(3, (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)),
    "mom3d_deep": Size(3, (24, 48, 96, 192, 256, 256), (6, 8, 8, 8, 8, 8)),
}
"""Every preset for segmentation by its name."""

CLASSIFIER_SIZES = {
    "cls2d_xs": Size(2, (16, 32, 64, 128), (3, 3, 3, 3)),
    "cls2d_s": Size(2, (64, 128, 256, 512), (3, 3, 3, 3)),
    "cls3d_s": Size(3, (32, 64, 128, 256), (1, 3, 3, 3)),
}
"""Every preset for classification by its name."""


class Options(TypedDict, total=False):
    """Options of ``MomentumUNet`` that every preset takes."""

    gate: float
    coupling: Coupling
    gating: Gating
    velocity: Velocity
    block: Block
    norm: Norm
    memory: NetworkMemory
    deep_supervision: bool


class ClassifierOptions(TypedDict, total=False):
    """Options of ``MomentumResNet`` that every preset takes."""

    stem_stride: Sequence[int] | None
    gate: float
    coupling: Coupling
    gating: Gating
    velocity: Velocity
    block: Block
    norm: Norm
    memory: NetworkMemory
    dropout: float


def mom2d_xs(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """2-D, for the CPU: 1.24 M parameters with one channel and three classes."""
    return _build("mom2d_xs", in_channels, out_channels, (kernels, strides), options)


def mom2d_s(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """2-D, for photographs and slices of 256 x 256: 14.8 M parameters with one channel and three classes."""
    return _build("mom2d_s", in_channels, out_channels, (kernels, strides), options)


def mom2d_m(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """2-D, for slices of 512 x 512: 105.9 M parameters with one channel and three classes."""
    return _build("mom2d_m", in_channels, out_channels, (kernels, strides), options)


def mom3d_xs(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """3-D, for the CPU: 0.64 M parameters with one channel and three classes."""
    return _build("mom3d_xs", in_channels, out_channels, (kernels, strides), options)


def mom3d_xw(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """3-D, for the CPU, wide where the image is small: 3.38 M parameters with one channel and three classes."""
    return _build("mom3d_xw", in_channels, out_channels, (kernels, strides), options)


def mom3d_s(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """3-D, for small structures: 14.4 M parameters with one channel and three classes."""
    return _build("mom3d_s", in_channels, out_channels, (kernels, strides), options)


def mom3d_sr(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """3-D, the host's plan for small structures: 25.9 M parameters with one channel and three classes."""
    return _build("mom3d_sr", in_channels, out_channels, (kernels, strides), options)


def mom3d_m(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """3-D, the host's plan for organs in CT: 102.4 M parameters with one channel and three classes."""
    return _build("mom3d_m", in_channels, out_channels, (kernels, strides), options)


def mom3d_deep(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[Options],
) -> MomentumUNet:
    """3-D, 46 residual blocks in little memory: 84.0 M parameters with one channel and three classes.

    Depth is paid for in time: its memory is ``"hybrid"`` unless said otherwise.
    """
    return _build("mom3d_deep", in_channels, out_channels, (kernels, strides), {"memory": "hybrid", **options})


def cls2d_xs(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[ClassifierOptions],
) -> MomentumResNet:
    """2-D classifier for the CPU, its stem halves the image: 1.1 M parameters with one channel."""
    return _build_classifier(
        "cls2d_xs", in_channels, out_channels, (kernels, strides), {"stem_stride": (2, 2), **options}
    )


def cls2d_s(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[ClassifierOptions],
) -> MomentumResNet:
    """2-D classifier for images and slices: 17.5 M parameters with one channel."""
    return _build_classifier("cls2d_s", in_channels, out_channels, (kernels, strides), options)


def cls3d_s(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    **options: Unpack[ClassifierOptions],
) -> MomentumResNet:
    """3-D classifier for small volumes: 12.9 M parameters with one channel."""
    return _build_classifier("cls3d_s", in_channels, out_channels, (kernels, strides), options)


def _build(
    name: str, in_channels: int, out_channels: int, plan: tuple[ByStage | None, ByStage | None], options: Options
) -> MomentumUNet:
    size = SIZES[name]
    kernels, strides = _plan(name, size, plan)
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=size.channels,
        blocks=size.blocks,
        kernels=kernels,
        strides=strides,
        **options,
    )


def _build_classifier(
    name: str,
    in_channels: int,
    out_channels: int,
    plan: tuple[ByStage | None, ByStage | None],
    options: ClassifierOptions,
) -> MomentumResNet:
    size = CLASSIFIER_SIZES[name]
    kernels, strides = _plan(name, size, plan)
    return MomentumResNet(
        in_channels,
        out_channels,
        channels=size.channels,
        blocks=size.blocks,
        kernels=kernels,
        strides=strides,
        **options,
    )


def _plan(name: str, size: Size, given: tuple[ByStage | None, ByStage | None]) -> tuple[ByStage, ByStage]:
    """Kernels and strides that were given, else 3 and 2 on every axis."""
    axes, stages = size.spatial_dims, len(size.channels)
    for by_axis in (by_axis for by_stage in given if by_stage for by_axis in by_stage):
        if len(by_axis) != axes:
            raise ValueError(
                f"{name} has {axes} axes, and kernels or strides are given for {len(by_axis)}: {list(by_axis)}. "
                f"Give {axes} numbers a stage, or take a preset of {len(by_axis)}-D."
            )
    kernels, strides = given
    return kernels or [[3] * axes] * stages, strides or [[1] * axes] + [[2] * axes] * (stages - 1)


def plan_kernels_and_strides(
    patch: Sequence[int], spacing: Sequence[float], num_stages: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Kernels and strides by stage that bring the voxels towards cubes before they mix all axes.

    An axis has kernel 1 while its spacing is twice the smallest or more, then 3; the last stage has 3 on every axis.
    An axis is halved while its edge is 8 or more, so that 4 remain, and its spacing is less than twice the smallest
    of the axes that are still long enough; the only axis left to halve needs an edge of 12. A patch that its strides
    do not divide has the plan of the next one that they do.

    Args:
        patch: Edges in voxels, by axis; two or three axes.
        spacing: Voxel edges in mm, in the same order.
        num_stages: Stages of the network; with fewer than the patch can carry the bottleneck stays larger.

    Returns:
        Kernels and strides, each by stage and then by axis.

    Raises:
        ValueError: Patch and spacing do not match, or the patch is too small for that many stages.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z, and nnU-Net version 2.
    """
    if len(patch) != len(spacing) or min(*patch, *spacing) <= 0:
        raise ValueError(f"patch {list(patch)} and spacing {list(spacing)} need one positive number an axis each.")
    edges, widths = list(patch), list(spacing)
    kernel = [1] * len(patch)
    kernels: list[tuple[int, ...]] = []
    strides: list[tuple[int, ...]] = [(1,) * len(patch)]
    while len(strides) < num_stages:
        stride = _next_stride(edges, widths)
        if max(stride) == 1:
            raise ValueError(
                f"A patch of {' x '.join(map(str, patch))} carries {len(strides)} stages, the network has "
                f"{num_stages}; take a larger patch or a network of {len(strides)} stages."
            )
        kernel = [3 if k == 3 or width < 2 * min(widths) else 1 for k, width in zip(kernel, widths, strict=True)]
        edges = [-(-edge // step) for edge, step in zip(edges, stride, strict=True)]
        widths = [width * step for width, step in zip(widths, stride, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(stride)
    return (*kernels, (3,) * len(patch)), tuple(strides)


def _next_stride(edges: Sequence[int], widths: Sequence[float]) -> tuple[int, ...]:
    finest = min((width for edge, width in zip(edges, widths, strict=True) if edge >= 8), default=0.0)
    halved = [edge >= 8 and width < 2 * finest for edge, width in zip(edges, widths, strict=True)]
    if sum(halved) == 1 and edges[halved.index(True)] < 12:
        return (1,) * len(edges)
    return tuple(2 if is_halved else 1 for is_halved in halved)
