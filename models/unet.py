"""Residual-encoder U-Net whose encoder stages carry momentum."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, cat, nn

from medmom.models.blocks import ConvNormAct, ResidualBlock, convolution, initialise, upsampling
from medmom.models.momentum import Coupling, MomentumStage


class EncoderStage(nn.Module):
    """The host's entry block, which changes channels and size, then blocks of one shape under momentum.

    Args:
        entry: From the stage above to this stage's shape.
        momentum: Blocks that keep it.
    """

    def __init__(self, entry: ResidualBlock, momentum: MomentumStage) -> None:
        super().__init__()
        self.entry = entry
        self.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        """Features of this stage, shape (B, channels, *spatial / stride)."""
        features: Tensor = self.momentum(self.entry(x))
        return features


class MomentumEncoder(nn.Module):
    """Stem and encoder stages.

    Args:
        in_channels: Image channels.
        channels: By stage.
        blocks: Residual blocks by stage, the entry block counted.
        kernels: Edges by axis, by stage; the stem has those of the first.
        strides: By axis, by stage.
        gate: Of every momentum stage.
        coupling: Of every momentum stage.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: Sequence[int],
        blocks: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        gate: float,
        coupling: Coupling,
    ) -> None:
        super().__init__()
        self.stem = ConvNormAct(in_channels, channels[0], kernels[0])
        self.stages = nn.ModuleList()
        before = channels[0]
        for width, depth, kernel, stride in zip(channels, blocks, kernels, strides, strict=True):
            entry = ResidualBlock(before, width, kernel, stride)
            following = [ResidualBlock(width, width, kernel) for _ in range(depth - 1)]
            self.stages.append(EncoderStage(entry, MomentumStage(following, gate, coupling)))
            before = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of every stage, full resolution first."""
        x = self.stem(image)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class DecoderStage(nn.Module):
    """Upsampling of the features below, joined with the encoder's, fused by one convolution.

    Args:
        below: Channels of the stage below.
        channels: Of this stage.
        kernel: Edges by axis of the fusing convolution.
        stride: Between the two stages, by axis.
    """

    def __init__(self, below: int, channels: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.upsample = upsampling(below, channels, stride)
        self.fuse = ConvNormAct(2 * channels, channels, kernel)

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """Features of the size of ``skip``, shape (B, channels, *spatial)."""
        features: Tensor = self.fuse(cat((self.upsample(below), skip), dim=1))
        return features


class Decoder(nn.Module):
    """Decoder stages, from the bottleneck up; stage ``s`` has the resolution of encoder stage ``s``.

    Args:
        channels: Of the encoder, by stage.
        kernels: Of the encoder, by stage.
        strides: Of the encoder, by stage.
    """

    def __init__(
        self, channels: Sequence[int], kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            DecoderStage(channels[s + 1], channels[s], kernels[s], strides[s + 1]) for s in range(len(channels) - 1)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Decoded features of every stage but the bottleneck, full resolution first."""
        *skips, x = features
        decoded = []
        for stage, skip in zip(reversed(self.stages), reversed(skips), strict=True):
            x = stage(x, skip)
            decoded.append(x)
        return decoded[::-1]


class MomentumUNet(nn.Module):
    """Residual-encoder U-Net with momentum between the blocks of an encoder stage.

    Stem, residual blocks and decoder are those of nnU-Net's residual-encoder U-Net, and with gate 0 so is the
    network. The first block of a stage is its entry block, outside the momentum, and every stage starts with zero
    velocity. Parameters do not depend on gate, coupling or deep supervision.

    Args:
        in_channels: Image channels.
        out_channels: Classes, background included; at least 2.
        channels: By encoder stage, full resolution first.
        blocks: Residual blocks by encoder stage, the entry block counted.
        kernels: By stage, edges by axis (x, y, z), odd; two axes make a 2-D network.
        strides: By stage, by axis; 1 in the first stage.
        gate: How much of the velocity a block leaves in place, in [0, 1].
        coupling: Weight of the residuals, see ``medmom.models.momentum.residual_weight``.
        deep_supervision: In training, give logits at every resolution of the decoder.

    Attributes:
        divisor: By axis, what an image's size must be a multiple of.
        arguments: Numbers, strings and lists with which ``MomentumUNet(**arguments)`` gives the same network anew.

    Raises:
        ValueError: The arguments do not describe a network.

    Source:
        Isensee et al. 2024, arXiv 2404.09556 (the host); Sander et al. 2021, arXiv 2102.07870 (momentum).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        blocks: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        gate: float = 0.9,
        coupling: Coupling = "normalised",
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if out_channels < 2:
            raise ValueError(f"out_channels is {out_channels}; background and one class make 2.")
        _check_stages(channels, blocks, kernels, strides)
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "blocks": list(blocks),
            "kernels": [list(kernel) for kernel in kernels],
            "strides": [list(stride) for stride in strides],
            "gate": gate,
            "coupling": coupling,
            "deep_supervision": deep_supervision,
        }
        self.divisor = tuple(prod(by_stage) for by_stage in zip(*strides, strict=True))
        self.deep_supervision = deep_supervision
        self.encoder = MomentumEncoder(
            in_channels,
            channels=channels,
            blocks=blocks,
            kernels=kernels,
            strides=strides,
            gate=gate,
            coupling=coupling,
        )
        self.decoder = Decoder(channels, kernels, strides)
        self.heads = nn.ModuleList(convolution(width, out_channels, [1] * len(self.divisor)) for width in channels[:-1])
        initialise(self)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits of every class.

        Args:
            image: Shape (B, in_channels, *spatial).

        Returns:
            Logits, shape (B, out_channels, *spatial); in training with deep supervision the list of them at every
            resolution of the decoder, full resolution first.

        Raises:
            ValueError: The image has other axes or channels, or a size the strides do not divide.
        """
        self._check(image)
        decoded = self.decoder(self.encoder(image))
        if self.training and self.deep_supervision:
            return [head(features) for head, features in zip(self.heads, decoded, strict=True)]
        logits: Tensor = self.heads[0](decoded[0])
        return logits

    def _check(self, image: Tensor) -> None:
        in_channels, axes = self.arguments["in_channels"], ("x", "y", "z")[: len(self.divisor)]
        if image.ndim != 2 + len(axes) or image.shape[1] != in_channels:
            raise ValueError(
                f"The image has shape ({', '.join(map(str, image.shape))}); "
                f"the network takes (batch, {in_channels}, {', '.join(axes)}): {in_channels} in the place of channels."
            )
        size = image.shape[2:]
        cells = [max(1, -(-edge // divisor)) for edge, divisor in zip(size, self.divisor, strict=True)]
        legal = [cell * divisor for cell, divisor in zip(cells, self.divisor, strict=True)]
        if list(size) != legal:
            by = self.divisor[:1] if len(set(self.divisor)) == 1 else self.divisor
            raise ValueError(f"{_times(size)} is not divisible by {_times(by)}; the next size is {_times(legal)}.")
        if prod(cells) == 1:
            # Instance normalisation of one voxel is 0, whatever the image; torch refuses it deep inside.
            raise ValueError(
                f"{_times(size)} leaves one voxel at the bottleneck, where nothing can be normalised; "
                f"the next size is {_times([2 * edge for edge in legal])}."
            )


def _times(numbers: Sequence[int]) -> str:
    return " x ".join(str(number) for number in numbers)


def _check_stages(
    channels: Sequence[int], blocks: Sequence[int], kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> None:
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
        raise ValueError(f"The first stage has stride {_times(strides[0])}; it works at full resolution, stride 1.")
