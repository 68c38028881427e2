"""Networks by name, and the kernels and strides that suit a patch.

Every preset takes its kernels and strides by stage from ``plan_kernels_and_strides``, or, where they are absent, has
kernels of 3 on every axis and halves every axis from stage to stage. Gate, coupling and deep supervision are those of
``MomentumUNet``.
"""

from collections.abc import Sequence

from medmom.models.momentum import Coupling
from medmom.models.unet import MomentumUNet

__all__ = ["mom2d_xs", "mom3d_m", "mom3d_s", "mom3d_sr", "mom3d_xs", "plan_kernels_and_strides"]

ByStage = Sequence[Sequence[int]]


def mom2d_xs(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    gate: float = 0.9,
    coupling: Coupling = "normalised",
    deep_supervision: bool = True,
) -> MomentumUNet:
    """2-D, for the CPU: 1.24 M parameters with one channel and three classes."""
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=(8, 16, 32, 64, 128),
        blocks=(1, 3, 3, 3, 3),
        kernels=kernels or _cubes(5, spatial_dims=2),
        strides=strides or _halvings(5, spatial_dims=2),
        gate=gate,
        coupling=coupling,
        deep_supervision=deep_supervision,
    )


def mom3d_xs(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    gate: float = 0.9,
    coupling: Coupling = "normalised",
    deep_supervision: bool = True,
) -> MomentumUNet:
    """3-D, for the CPU: 0.64 M parameters with one channel and three classes."""
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=(8, 16, 32, 48),
        blocks=(1, 3, 3, 3),
        kernels=kernels or _cubes(4, spatial_dims=3),
        strides=strides or _halvings(4, spatial_dims=3),
        gate=gate,
        coupling=coupling,
        deep_supervision=deep_supervision,
    )


def mom3d_s(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    gate: float = 0.9,
    coupling: Coupling = "normalised",
    deep_supervision: bool = True,
) -> MomentumUNet:
    """3-D, for small structures: 14.4 M parameters with one channel and three classes."""
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=(32, 64, 128, 256),
        blocks=(1, 3, 3, 3),
        kernels=kernels or _cubes(4, spatial_dims=3),
        strides=strides or _halvings(4, spatial_dims=3),
        gate=gate,
        coupling=coupling,
        deep_supervision=deep_supervision,
    )


def mom3d_sr(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    gate: float = 0.9,
    coupling: Coupling = "normalised",
    deep_supervision: bool = True,
) -> MomentumUNet:
    """3-D, the host's plan for small structures: 25.9 M parameters with one channel and three classes."""
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=(32, 64, 128, 256),
        blocks=(1, 3, 4, 6),
        kernels=kernels or _cubes(4, spatial_dims=3),
        strides=strides or _halvings(4, spatial_dims=3),
        gate=gate,
        coupling=coupling,
        deep_supervision=deep_supervision,
    )


def mom3d_m(
    in_channels: int,
    out_channels: int,
    *,
    kernels: ByStage | None = None,
    strides: ByStage | None = None,
    gate: float = 0.9,
    coupling: Coupling = "normalised",
    deep_supervision: bool = True,
) -> MomentumUNet:
    """3-D, the host's plan for organs in CT: 102.4 M parameters with one channel and three classes."""
    return MomentumUNet(
        in_channels,
        out_channels,
        channels=(32, 64, 128, 256, 320, 320),
        blocks=(1, 3, 4, 6, 6, 6),
        kernels=kernels or _cubes(6, spatial_dims=3),
        strides=strides or _halvings(6, spatial_dims=3),
        gate=gate,
        coupling=coupling,
        deep_supervision=deep_supervision,
    )


def _cubes(num_stages: int, *, spatial_dims: int) -> ByStage:
    return [[3] * spatial_dims] * num_stages


def _halvings(num_stages: int, *, spatial_dims: int) -> ByStage:
    return [[1] * spatial_dims] + [[2] * spatial_dims] * (num_stages - 1)


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
