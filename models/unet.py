"""Residual-encoder U-Net whose encoder stages carry momentum."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, cat, nn

from medmom.models.blocks import ConvNormAct, Norm, convolution, initialise, upsampling
from medmom.models.encoder import Block, EncoderNetwork, MomentumEncoder, NetworkMemory, Velocity
from medmom.models.gates import Coupling, Gating
from medmom.models.recompute import checkpointed, is_traced
from medmom.models.sizes import check_bottleneck, check_stages


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

    def forward(self, features: Sequence[Tensor], *, is_checkpointed: bool = False) -> list[Tensor]:
        """Decoded features of every stage but the bottleneck, full resolution first.

        Args:
            features: Of the encoder, by stage.
            is_checkpointed: Whether the stages are computed again in the backward pass.
        """
        *skips, x = features
        decoded = []
        for stage, skip in zip(reversed(self.stages), reversed(skips), strict=True):
            x = checkpointed(stage, x, skip) if is_checkpointed else stage(x, skip)
            decoded.append(x)
        return decoded[::-1]


class MomentumUNet(EncoderNetwork):
    """Residual-encoder U-Net with momentum between the blocks of an encoder stage.

    Stem, residual blocks and decoder are those of nnU-Net's residual-encoder U-Net, and with gate 0 so is the
    network. The first block of a stage is its entry block, outside the momentum. Velocity stays in the encoder:
    decoder and heads see features alone. Gate, coupling, memory and deep supervision change no parameter.

    Args:
        in_channels: Image channels.
        out_channels: Classes, background included; at least 2.
        channels: By encoder stage, full resolution first.
        blocks: Residual blocks by encoder stage, the entry block counted.
        kernels: By stage, edges by axis (x, y, z), odd; two axes make a 2-D network.
        strides: By stage, by axis; 1 in the first stage.
        gate: How much of the velocity a block leaves in place, in [0, 1].
        coupling: Weight of the residuals, see ``medmom.models.gates.residual_weight``.
        gating: Whether gates are fixed or learned, see ``medmom.models.momentum.MomentumStage``.
        velocity: With which a stage starts, see ``medmom.models.encoder.MomentumEncoder``.
        block: ``"postact"`` is the host's; ``"preact"`` for stages of 8 blocks or more.
        norm: Of the encoder; ``"instance"`` is the host's.
        memory: What is kept for the backward pass, see ``medmom.models.encoder.MomentumEncoder.memory``; where the
            encoder's other blocks are computed again, so are the decoder's.
        deep_supervision: In training, give logits at every resolution of the decoder.

    Attributes:
        divisor: By axis, what an image's size must be a multiple of.

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
        gating: Gating = "fixed",
        velocity: Velocity = "zero",
        block: Block = "postact",
        norm: Norm = "instance",
        memory: NetworkMemory = "plain",
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if out_channels < 2:
            raise ValueError(f"out_channels is {out_channels}; background and one class make 2.")
        check_stages(channels, blocks, kernels, strides)
        self._shape: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "blocks": list(blocks),
            "kernels": [list(kernel) for kernel in kernels],
            "strides": [list(stride) for stride in strides],
            "coupling": coupling,
            "gating": gating,
            "velocity": velocity,
            "block": block,
            "norm": norm,
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
            gating=gating,
            velocity=velocity,
            block=block,
            norm=norm,
            memory=memory,
        )
        self.decoder = Decoder(channels, kernels, strides)
        self.heads = nn.ModuleList(convolution(width, out_channels, [1] * len(self.divisor)) for width in channels[:-1])
        initialise(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers, strings and lists with which ``MomentumUNet(**arguments)`` gives the same network anew."""
        return {**self._shape, "gate": self.gate, "memory": self.memory}

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
        if not is_traced():
            self.check(image)
        return self.decode(self.encoder(image))

    def decode(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits from the encoder's features of every stage, as ``forward`` gives them."""
        decoded = self.decoder(features, is_checkpointed=self.encoder.is_checkpointed)
        if self.training and self.deep_supervision:
            return [head(by_stage) for head, by_stage in zip(self.heads, decoded, strict=True)]
        logits: Tensor = self.heads[0](decoded[0])
        return logits

    def check(self, image: Tensor) -> None:
        """Refuses an image that the network does not take.

        Raises:
            ValueError: It has other axes or channels, a size the strides do not divide, or one that leaves a single
                voxel at the bottleneck.
        """
        check_bottleneck(image, self._shape["in_channels"], self.divisor)
