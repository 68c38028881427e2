"""nnU-Net's plain convolutional U-Net, so that what was trained there is at home here."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, cat, nn

from medmom.models.blocks import ConvNormAct, convolution, initialise, upsampling
from medmom.models.recompute import is_traced
from medmom.models.sizes import check_bottleneck, check_stages


class PlainUNet(nn.Module):
    """U-Net of stacked convolutions: convolution, instance normalisation, leaky ReLU, without momentum or residuals.

    The first convolution of a stage has its stride. In the decoder a transposed convolution is joined with the
    encoder's features of that resolution, and convolutions with that stage's kernel follow.

    Args:
        in_channels: Image channels.
        out_channels: Classes, background included; at least 2.
        channels: By encoder stage, full resolution first.
        convolutions: Of each encoder stage.
        decoder_convolutions: Of each decoder stage, full resolution first: one fewer than encoder stages.
        kernels: By stage, edges by axis (x, y, z), odd; two axes make a 2-D network.
        strides: By stage, by axis; 1 in the first stage.
        deep_supervision: In training, give logits at every resolution of the decoder.

    Attributes:
        divisor: By axis, what an image's size must be a multiple of.

    Raises:
        ValueError: The arguments do not describe a network.

    Source:
        Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; as version 2 builds it, ``PlainConvUNet`` of the package
        dynamic-network-architectures.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        convolutions: Sequence[int],
        decoder_convolutions: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        if out_channels < 2:
            raise ValueError(f"out_channels is {out_channels}; background and one class make 2.")
        check_stages(channels, convolutions, kernels, strides)
        if len(decoder_convolutions) != len(channels) - 1 or min(decoder_convolutions) < 1:
            raise ValueError(
                f"decoder_convolutions {list(decoder_convolutions)}: {len(channels)} stages need {len(channels) - 1} "
                "numbers, each 1 or more."
            )
        self._shape: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "convolutions": list(convolutions),
            "decoder_convolutions": list(decoder_convolutions),
            "kernels": [list(kernel) for kernel in kernels],
            "strides": [list(stride) for stride in strides],
        }
        self.deep_supervision = deep_supervision
        self.divisor = tuple(prod(by_stage) for by_stage in zip(*strides, strict=True))
        entering = (in_channels, *channels[:-1])
        self.encoder = nn.ModuleList(
            _stack(*sizes) for sizes in zip(entering, channels, convolutions, kernels, strides, strict=True)
        )
        self.upsample = nn.ModuleList(
            upsampling(channels[s + 1], channels[s], strides[s + 1]) for s in range(len(channels) - 1)
        )
        self.decoder = nn.ModuleList(
            _stack(2 * channels[s], channels[s], count, kernels[s]) for s, count in enumerate(decoder_convolutions)
        )
        self.heads = nn.ModuleList(convolution(width, out_channels, [1] * len(self.divisor)) for width in channels[:-1])
        initialise(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers, strings and lists with which ``PlainUNet(**arguments)`` gives the same network anew."""
        return {**self._shape, "deep_supervision": self.deep_supervision}

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits of every class.

        Args:
            image: Shape (B, in_channels, *spatial).

        Returns:
            Logits, shape (B, out_channels, *spatial); in training with deep supervision the list of them at every
            resolution of the decoder, full resolution first.

        Raises:
            ValueError: The image has other axes or channels, or a size the strides do not divide, or one that leaves
                a single voxel at the bottleneck.
        """
        if not is_traced():
            self.check(image)
        skips, x = [], image
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        decoded, skips = [], skips[:-1]
        for upsample, stage in zip(reversed(self.upsample), reversed(self.decoder), strict=True):
            x = stage(cat((upsample(x), skips.pop()), dim=1))
            decoded.append(x)
        if self.training and self.deep_supervision:
            return [head(by_stage) for head, by_stage in zip(self.heads, reversed(decoded), strict=True)]
        logits: Tensor = self.heads[0](x)
        return logits

    def check(self, image: Tensor) -> None:
        """Refuses an image that the network does not take.

        Raises:
            ValueError: As for ``forward``.
        """
        check_bottleneck(image, self._shape["in_channels"], self.divisor)


def _stack(
    entering: int, channels: int, count: int, kernel: Sequence[int], stride: Sequence[int] | None = None
) -> nn.Sequential:
    """Convolutions one after the other; the first has the stride."""
    first = ConvNormAct(entering, channels, kernel, stride)
    return nn.Sequential(first, *(ConvNormAct(channels, channels, kernel) for _ in range(count - 1)))
