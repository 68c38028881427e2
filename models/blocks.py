"""Blocks of the residual-encoder host: convolution, instance normalisation, leaky ReLU, in 2-D and 3-D.

Activations work in place only on the fresh output of a normalisation, which no operation keeps for its backward pass
(instance normalisation keeps its input); a tensor that came from outside the block is never written to.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

NEGATIVE_SLOPE = 0.01

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_CONVOLUTIONS: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOLS: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int] | None = None,
    *,
    bias: bool = True,
) -> nn.Module:
    """Convolution that keeps the size (divided by its stride), for odd kernels.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Edges by axis, odd; their number says whether it is 2-D or 3-D.
        stride: By axis; 1 where absent.
        bias: Whether it adds a bias.

    Returns:
        The layer.
    """
    padding = tuple(edge // 2 for edge in kernel)
    layer: nn.Module = _CONVOLUTIONS[len(kernel)](
        in_channels, out_channels, tuple(kernel), tuple(stride or [1] * len(kernel)), padding, bias=bias
    )
    return layer


def upsampling(in_channels: int, out_channels: int, stride: Sequence[int]) -> nn.Module:
    """Transposed convolution that multiplies the size by its stride, kernel = stride.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        stride: By axis.

    Returns:
        The layer.
    """
    edges = tuple(stride)
    layer: nn.Module = _TRANSPOSED_CONVOLUTIONS[len(edges)](in_channels, out_channels, edges, edges)
    return layer


def _norm(channels: int, spatial_dims: int) -> nn.Module:
    layer: nn.Module = _NORMS[spatial_dims](channels, eps=1e-5, affine=True)
    return layer


def _activate(fresh: Tensor) -> Tensor:
    return functional.leaky_relu(fresh, NEGATIVE_SLOPE, inplace=True)


class ConvNormAct(nn.Module):
    """Convolution, instance normalisation, leaky ReLU.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Edges by axis, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel)
        self.norm = _norm(out_channels, len(kernel))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size, shape (B, out_channels, *spatial)."""
        return _activate(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """The host's block: ``act(norm(conv(act(norm(conv(x))))) + shortcut(x))``.

    The shortcut is ResNet-D's: average pooling where the block has a stride, then a 1-convolution without bias and a
    normalisation where the channels change; else it is ``x`` itself.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Edges by axis of both convolutions, odd.
        stride: Of the first convolution and the shortcut; 1 where absent.

    Source:
        He et al. 2019, arXiv 1812.01187 (ResNet-D); Isensee et al. 2024, arXiv 2404.09556 (the residual encoder).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        spatial_dims = len(kernel)
        self.conv1 = convolution(in_channels, out_channels, kernel, stride)
        self.norm1 = _norm(out_channels, spatial_dims)
        self.conv2 = convolution(out_channels, out_channels, kernel)
        self.norm2 = _norm(out_channels, spatial_dims)
        self.shortcut = _shortcut(in_channels, out_channels, tuple(stride or [1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, out_channels, *spatial / stride)."""
        branch: Tensor = self.norm2(self.conv2(_activate(self.norm1(self.conv1(x)))))
        branch += self.shortcut(x)
        return _activate(branch)


def _shortcut(in_channels: int, out_channels: int, stride: tuple[int, ...]) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if max(stride) > 1:
        layers["pool"] = _POOLS[len(stride)](stride, stride)
    if in_channels != out_channels:
        layers["conv"] = convolution(in_channels, out_channels, [1] * len(stride), bias=False)
        layers["norm"] = _norm(out_channels, len(stride))
    return nn.Sequential(layers)


def initialise(module: nn.Module) -> None:
    """Weights as the host starts: He's normal ones, biases 0, and the last normalisation of each residual branch 0.

    Args:
        module: Any network made of these blocks; changed in place.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(part.weight, a=NEGATIVE_SLOPE)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, ResidualBlock):
            for parameter in part.norm2.parameters():
                nn.init.zeros_(parameter)
