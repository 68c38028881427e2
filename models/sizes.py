"""Sizes of networks and images: what makes a network, and which images it takes."""

from collections.abc import Sequence
from math import prod

from torch import Tensor


def times(numbers: Sequence[int]) -> str:
    """Numbers as people write a size: ``40 x 56 x 40``."""
    return " x ".join(str(number) for number in numbers)


def check_stages(
    channels: Sequence[int], blocks: Sequence[int], kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> None:
    """Refuses stages that do not make a network.

    Raises:
        ValueError: They are fewer than two or not one of each, a number is below 1, axes differ, a kernel is even, or
            the first stage has a stride.
    """
    given = {"channels": channels, "blocks": blocks, "kernels": kernels, "strides": strides}
    if len({len(by_stage) for by_stage in given.values()}) > 1 or len(channels) < 2:
        counts = ", ".join(f"{len(by_stage)} {name}" for name, by_stage in given.items())
        raise ValueError(f"A network of 2 or more stages needs one of each for every stage; here {counts}.")
    if min(*channels, *blocks) < 1:
        raise ValueError(f"channels {list(channels)} and blocks {list(blocks)} must be 1 or more.")
    if {len(by_axis) for by_axis in (*kernels, *strides)} not in ({2}, {3}):
        raise ValueError("kernels and strides need the same 2 or 3 axes in every stage.")
    if any(edge % 2 == 0 for kernel in kernels for edge in kernel):
        raise ValueError(f"kernels {[list(kernel) for kernel in kernels]} must be odd, or sizes would change.")
    if any(step != 1 for step in strides[0]):
        raise ValueError(f"The first stage has stride {times(strides[0])}; it has the stem's resolution, stride 1.")


def check_image(image: Tensor, in_channels: int, divisor: Sequence[int]) -> tuple[int, ...]:
    """Refuses an image that a network does not take.

    Args:
        image: Shape (B, in_channels, *spatial) if it fits.
        in_channels: What the network takes.
        divisor: By axis, what the size must be a multiple of.

    Returns:
        By axis, how many times the divisor is in the size.

    Raises:
        ValueError: Axes or channels differ, or the size is no multiple; the next one that is is named.
    """
    axes = ("x", "y", "z")[: len(divisor)]
    if image.ndim != 2 + len(axes) or image.shape[1] != in_channels:
        raise ValueError(
            f"The image has shape ({', '.join(map(str, image.shape))}); "
            f"the network takes (batch, {in_channels}, {', '.join(axes)}): {in_channels} in the place of channels."
        )
    size = image.shape[2:]
    cells = tuple(max(1, -(-edge // step)) for edge, step in zip(size, divisor, strict=True))
    legal = [cell * step for cell, step in zip(cells, divisor, strict=True)]
    if list(size) != legal:
        by = divisor[:1] if len(set(divisor)) == 1 else divisor
        raise ValueError(f"{times(size)} is not divisible by {times(by)}; the next size is {times(legal)}.")
    return cells


def check_bottleneck(image: Tensor, in_channels: int, divisor: Sequence[int]) -> None:
    """Refuses an image that a U-Net with instance normalisation does not take.

    Args:
        image: As of ``check_image``.
        in_channels: As of ``check_image``.
        divisor: As of ``check_image``.

    Raises:
        ValueError: As ``check_image``; or a single voxel would be left where the image is smallest.
    """
    if prod(check_image(image, in_channels, divisor)) == 1:
        # Instance normalisation of one voxel is 0, whatever the image; torch refuses it deep inside.
        raise ValueError(
            f"{times(image.shape[2:])} leaves one voxel at the bottleneck, where nothing can be normalised; "
            f"the next size is {times([2 * edge for edge in image.shape[2:]])}."
        )
