"""Segmentation and classification by one encoder."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from medmom.models.blocks import Norm
from medmom.models.encoder import Block, EncoderNetwork, MomentumEncoder, NetworkMemory, Velocity
from medmom.models.gates import Coupling, Gating
from medmom.models.recompute import is_traced
from medmom.models.resnet import ClassificationHead, check_norm
from medmom.models.unet import MomentumUNet

__all__ = ["JointLogits", "JointMomentumUNet"]


class JointLogits(NamedTuple):
    """What ``JointMomentumUNet`` gives.

    Attributes:
        segmentation: Of every voxel, as ``MomentumUNet`` gives them: shape (B, out_channels, *spatial), or in training
            with deep supervision the list of them, full resolution first.
        classification: Of the whole image, shape (B, num_classes).
    """

    segmentation: Tensor | list[Tensor]
    classification: Tensor


class JointMomentumUNet(EncoderNetwork):
    """``MomentumUNet`` with a ``ClassificationHead`` on its bottleneck.

    The head reads the whole of what it is given: on a patch, the patch.

    Args:
        in_channels: Image channels.
        out_channels: Classes of a voxel, background included; at least 2.
        num_classes: Classes of the whole image; 1 or more.
        channels: By encoder stage, full resolution first.
        blocks: Residual blocks by encoder stage, the entry block counted.
        kernels: By stage, edges by axis (x, y, z), odd; two axes make a 2-D network.
        strides: By stage, by axis; 1 in the first stage.
        gate: How much of the velocity a block leaves in place, in [0, 1].
        coupling: Weight of the residuals, see ``medmom.models.gates.residual_weight``.
        gating: Whether gates are fixed or learned, see ``medmom.models.momentum.MomentumStage``.
        velocity: With which a stage starts, see ``medmom.models.encoder.MomentumEncoder``.
        block: ``"postact"``, or ``"preact"`` for stages of 8 blocks or more.
        norm: Of the encoder: ``"group"``, which does not depend on the batch, or ``"batch"``; see
            ``medmom.models.resnet.check_norm``.
        memory: What is kept for the backward pass, as of ``MomentumUNet``.
        deep_supervision: In training, give segmentation logits at every resolution of the decoder.
        dropout: Share of the pooled features that training sets to 0, in [0, 1).

    Attributes:
        unet: The segmentation network; weights of one of the same arguments can be loaded into it.
        divisor: By axis, what an image's size must be a multiple of.

    Raises:
        ValueError: The arguments do not describe a network.

    Source:
        As ``MomentumUNet``; the head on the bottleneck is ours.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int,
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
        norm: Norm = "group",
        memory: NetworkMemory = "plain",
        deep_supervision: bool = True,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_norm(norm)
        self.unet = MomentumUNet(
            in_channels,
            out_channels,
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
            deep_supervision=deep_supervision,
        )
        self.head = ClassificationHead(channels[-1], num_classes, dropout=dropout)
        self.divisor = self.unet.divisor
        self._head_arguments = {"num_classes": num_classes, "dropout": dropout}

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers, strings and lists with which ``JointMomentumUNet(**arguments)`` gives the same network anew."""
        return {**self.unet.arguments, **self._head_arguments}

    @property
    def encoder(self) -> MomentumEncoder:  # type: ignore[override]
        """The segmentation network's."""
        return self.unet.encoder

    def forward(self, image: Tensor) -> JointLogits:
        """Logits of every voxel and of the whole image.

        Args:
            image: Shape (B, in_channels, *spatial).

        Returns:
            Both, by name.

        Raises:
            ValueError: The image has other axes or channels, or a size the strides do not divide.
        """
        if not is_traced():
            self.unet.check(image)
        features = self.encoder(image)
        return JointLogits(self.unet.decode(features), self.head(features[-1]))
