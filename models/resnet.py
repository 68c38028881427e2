"""Classifier whose stages carry momentum: the encoder of ``MomentumUNet`` under a head for the whole image."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from medmom.models.blocks import Norm, initialise
from medmom.models.encoder import Block, EncoderNetwork, MomentumEncoder, NetworkMemory, Velocity
from medmom.models.gates import Coupling, Gating
from medmom.models.recompute import is_traced
from medmom.models.sizes import check_image, check_stages, times

__all__ = ["ClassificationHead", "MomentumResNet", "check_batch", "check_norm"]


class ClassificationHead(nn.Module):
    """Logits of the whole image: mean over space, layer normalisation, dropout, one linear layer.

    Args:
        channels: Of the features.
        out_channels: Classes; 1 or more.
        dropout: Share of the pooled features that training sets to 0, in [0, 1).

    Raises:
        ValueError: There is no class, or dropout lies outside its range.
    """

    def __init__(self, channels: int, out_channels: int, *, dropout: float = 0.2) -> None:
        super().__init__()
        if out_channels < 1:
            raise ValueError(f"The head has {out_channels} classes; it needs 1 or more.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it is 0 or more and below 1.")
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, shape (B, out_channels), from features of shape (B, channels, *spatial)."""
        logits: Tensor = self.linear(self.dropout(self.norm(features.mean(dim=tuple(range(2, features.ndim))))))
        return logits


class MomentumResNet(EncoderNetwork):
    """Residual classifier with momentum between the blocks of a stage.

    Stem and stages are those of ``medmom.models.unet.MomentumUNet``, but that the stem may have a stride; a
    ``ClassificationHead`` reads the last stage. Gate, coupling and memory change no parameter.

    Args:
        in_channels: Image channels.
        out_channels: Classes; 1 or more.
        channels: By stage, first stage first.
        blocks: Residual blocks by stage, the entry block counted.
        kernels: By stage, edges by axis (x, y, z), odd; two axes make a 2-D network.
        strides: By stage, by axis; 1 in the first stage.
        stem_stride: Of the stem, by axis; 1 where absent.
        gate: How much of the velocity a block leaves in place, in [0, 1].
        coupling: Weight of the residuals, see ``medmom.models.gates.residual_weight``.
        gating: Whether gates are fixed or learned, see ``medmom.models.momentum.MomentumStage``.
        velocity: With which a stage starts, see ``medmom.models.encoder.MomentumEncoder``.
        block: ``"postact"``, or ``"preact"`` for stages of 8 blocks or more.
        norm: ``"group"``, which does not depend on the batch, or ``"batch"``; see ``check_norm``.
        memory: What is kept for the backward pass, see ``medmom.models.encoder.MomentumEncoder.memory``.
        dropout: Share of the pooled features that training sets to 0, in [0, 1).

    Attributes:
        divisor: By axis, what an image's size must be a multiple of.

    Raises:
        ValueError: The arguments do not describe a network.

    Source:
        He et al. 2016, arXiv 1512.03385 (residual classifiers); Sander et al. 2021, arXiv 2102.07870 (momentum).
        Stem and blocks depart from the first: see ``medmom.models.blocks.ResidualBlock``. So do layer normalisation
        and dropout in the head.
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
        stem_stride: Sequence[int] | None = None,
        gate: float = 0.9,
        coupling: Coupling = "normalised",
        gating: Gating = "fixed",
        velocity: Velocity = "zero",
        block: Block = "postact",
        norm: Norm = "group",
        memory: NetworkMemory = "plain",
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_norm(norm)
        check_stages(channels, blocks, kernels, strides)
        stem = [1] * len(strides[0]) if stem_stride is None else list(stem_stride)
        _check_stem(stem, strides[0])
        self._shape: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "blocks": list(blocks),
            "kernels": [list(kernel) for kernel in kernels],
            "strides": [list(stride) for stride in strides],
            "stem_stride": stem,
            "coupling": coupling,
            "gating": gating,
            "velocity": velocity,
            "block": block,
            "norm": norm,
            "dropout": dropout,
        }
        self.divisor = tuple(prod(by_stage) for by_stage in zip(stem, *strides, strict=True))
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
            stem_stride=stem,
        )
        self.head = ClassificationHead(channels[-1], out_channels, dropout=dropout)
        initialise(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers, strings and lists with which ``MomentumResNet(**arguments)`` gives the same network anew."""
        return {**self._shape, "gate": self.gate, "memory": self.memory}

    def forward(self, image: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            image: Shape (B, in_channels, *spatial).

        Returns:
            Logits, shape (B, out_channels), in training and after.

        Raises:
            ValueError: The image has other axes or channels, a size the strides do not divide, or in training with
                batch normalisation one value a channel.
        """
        if not is_traced():
            self._check(image)
        logits: Tensor = self.head(self.encoder(image)[-1])
        return logits

    def _check(self, image: Tensor) -> None:
        cells = check_image(image, self._shape["in_channels"], self.divisor)
        if self.training and self._shape["norm"] == "batch":
            check_batch(image.shape[0], image.shape[2:], cells)


def check_batch(num_images: int, size: Sequence[int], cells: Sequence[int]) -> None:
    """Refuses a batch that batch normalisation cannot train on.

    Args:
        num_images: In the batch.
        size: Of each, by axis.
        cells: Size of the last features, by axis.

    Raises:
        ValueError: There is one value a channel, whose normalised value is 0 whatever it is.
    """
    if num_images * prod(cells) == 1:
        raise ValueError(
            f"A batch of one image of {times(size)} leaves one value a channel, which batch normalisation cannot "
            f"train on; take two images or more, the next size {times([2 * edge for edge in size])}, or norm group."
        )


def check_norm(norm: Norm) -> None:
    """Refuses the normalisation that erases what the head reads, the mean over space.

    Behind an instance normalisation the mean of a channel is the same for every image. The activation that follows
    lets some of the difference through again: in networks at random weights half of what group normalisation leaves,
    or less.

    Raises:
        ValueError: It is ``"instance"``.
    """
    if norm == "instance":
        raise ValueError(
            "norm is 'instance', which gives a channel the same mean in every image, and means are what the head "
            "reads; take group or batch."
        )


def _check_stem(stride: Sequence[int], of_first_stage: Sequence[int]) -> None:
    if len(stride) != len(of_first_stage) or min(stride) < 1:
        raise ValueError(f"stem_stride is {list(stride)}; it needs {len(of_first_stage)} axes of 1 or more.")
