"""Networks by name, and the kernels and strides that suit a patch.

Every preset takes its kernels and strides by stage from ``plan_kernels_and_strides``, or, where they are absent, has
kernels of 3 on every axis and halves every axis from stage to stage. Gate, coupling and deep supervision are those of
``MomentumUNet``.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

from medmom.models.momentum import Coupling
from medmom.models.unet import MomentumUNet

__all__ = ["mom2d_xs", "mom3d_m", "mom3d_s", "mom3d_sr", "mom3d_xs", "plan_kernels_and_strides"]

ByStage = Sequence[Sequence[int]]


class Size(NamedTuple):
    """What makes a preset: axes, channels by stage, residual blocks by stage."""

    spatial_dims: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]


SIZES = {
    "mom2d_xs": Size(2, (8, 16, 32, 64, 128), (1, 3, 3, 3, 3)),
    "mom3d_xs": Size(3, (8, 16, 32, 48), (1, 3, 3, 3)),
    "mom3d_s": Size(3, (32, 64, 128, 256), (1, 3, 3, 3)),
    "mom3d_sr": Size(3, (32, 64, 128, 256), (1, 3, 4, 6)),
    "mom3d_m": Size(3, (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)),
}
"""Every preset by its name."""


class Options(TypedDict, total=False):
    """Options of ``MomentumUNet`` that every preset takes."""

    gate: float
    coupling: Coupling
    deep_supervision: bool


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


def _build(
    name: str, in_channels: int, out_channels: int, plan: tuple[ByStage | None, ByStage | None], options: Options
) -> MomentumUNet:
    kernels, strides = plan
    axes, channels, blocks = SIZES[name]
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=channels,
        blocks=blocks,
        kernels=kernels or [[3] * axes] * len(channels),
        strides=strides or [[1] * axes] + [[2] * axes] * (len(channels) - 1),
        **options,
    )


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
