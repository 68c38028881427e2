"""Blocks of the residual-encoder host: convolution, normalisation, leaky ReLU, in 2-D and 3-D.

Activations work in place only on the fresh output of a normalisation, which no operation keeps for its backward pass
(instance normalisation keeps its input); a tensor that came from outside the block is never written to.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from medmom.models.recompute import is_exported

Norm = Literal["instance", "group", "batch"]

NEGATIVE_SLOPE = 0.01

_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_CONVOLUTIONS: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_INSTANCE_NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BATCH_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
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


def normalisation(channels: int, spatial_dims: int, norm: Norm = "instance") -> nn.Module:
    """Normalisation with a scale and a shift a channel, eps 1e-5.

    Args:
        channels: Of the features.
        spatial_dims: 2 or 3.
        norm: ``"instance"``, the host's, over the space of each channel; ``"group"`` over groups of 8 channels (the
            next more where 8 do not divide them); ``"batch"`` over the batch, with running statistics.

    Returns:
        The layer.

    Raises:
        ValueError: There is no such normalisation.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm is {norm!r}; it is one of {', '.join(get_args(Norm))}.")
    if norm == "group":
        groups = max(groups for groups in range(1, max(1, channels // 8) + 1) if channels % groups == 0)
        return nn.GroupNorm(groups, channels, eps=1e-5)
    kinds = _INSTANCE_NORMS if norm == "instance" else _BATCH_NORMS
    layer: nn.Module = kinds[spatial_dims](channels, eps=1e-5, affine=True)
    return layer


def activate(fresh: Tensor) -> Tensor:
    """Leaky ReLU in place, for a fresh sum or the fresh output of a normalisation."""
    return functional.leaky_relu(fresh, NEGATIVE_SLOPE, inplace=True)


def normalise_and_activate(norm: nn.Module, x: Tensor) -> Tensor:
    """Leaky ReLU of a normalisation, to the bit as one after the other.

    Torch's instance normalisation is a batch normalisation of (1, B C, *spatial) and gives a view of it. Written to
    in place, a view costs three tensors of its size in the backward pass; so it is written to before it is one. Hooks
    of an instance normalisation are not called.
    """
    if not isinstance(norm, _InstanceNorm) or is_exported():
        return activate(norm(x))
    flat = x.contiguous().view(1, -1, *x.shape[2:])
    scale, shift = norm.weight.repeat(len(x)), norm.bias.repeat(len(x))
    fresh = functional.batch_norm(flat, None, None, scale, shift, training=True, momentum=0.0, eps=norm.eps)
    return activate(fresh).view(x.shape)


class NormAct(nn.Module):
    """Normalisation and leaky ReLU.

    Args:
        channels: Of the features.
        spatial_dims: 2 or 3.
        norm: See ``normalisation``.
    """

    def __init__(self, channels: int, spatial_dims: int, *, norm: Norm = "instance") -> None:
        super().__init__()
        self.norm = normalisation(channels, spatial_dims, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        return normalise_and_activate(self.norm, x)


class ConvNormAct(nn.Module):
    """Convolution, normalisation, leaky ReLU.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Edges by axis, odd.
        stride: Of the convolution, by axis; 1 where absent.
        norm: See ``normalisation``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        *,
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel, stride)
        self.norm = normalisation(out_channels, len(kernel), norm)

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, out_channels, *spatial / stride)."""
        return normalise_and_activate(self.norm, self.conv(x))


class ResidualBlock(nn.Module):
    """The host's block: ``act(norm(conv(act(norm(conv(x))))) + shortcut(x))``.

    The shortcut is ResNet-D's: average pooling where the block has a stride, then a 1-convolution without bias and a
    normalisation where the channels change; else it is ``x`` itself.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Edges by axis of both convolutions, odd.
        stride: Of the first convolution and the shortcut; 1 where absent.
        norm: See ``normalisation``.

    Source:
        He et al. 2019, arXiv 1812.01187 (ResNet-D); Isensee et al. 2024, arXiv 2404.09556 (the residual encoder).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        *,
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        spatial_dims = len(kernel)
        self.conv1 = convolution(in_channels, out_channels, kernel, stride)
        self.norm1 = normalisation(out_channels, spatial_dims, norm)
        self.conv2 = convolution(out_channels, out_channels, kernel)
        self.norm2 = normalisation(out_channels, spatial_dims, norm)
        self.shortcut = _shortcut(in_channels, out_channels, tuple(stride or [1] * spatial_dims), norm)

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, out_channels, *spatial / stride)."""
        # A new sum: the branch may be a view, see normalise_and_activate.
        return activate(self.branch(x) + self.shortcut(x))

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the shortcut, before the last activation."""
        features: Tensor = self.norm2(self.conv2(normalise_and_activate(self.norm1, self.conv1(x))))
        return features

    def zero_at_start(self) -> Iterable[nn.Parameter]:
        """The last normalisation: the block begins as its shortcut."""
        return self.norm2.parameters()


class PreActivationBranch(nn.Module):
    """Residual of a pre-activation block, ``conv(act(norm(conv(act(norm(x))))))``: the stream itself stays linear.

    For stages of 8 blocks or more, where a stream that is clipped at every block loses signal. A stage of these needs
    a normalisation and activation behind it.

    Args:
        channels: In and out.
        kernel: Edges by axis of both convolutions, odd.
        norm: See ``normalisation``.

    Attributes:
        is_branch: True: the result is ``f(x)`` and not ``x + f(x)``.

    Source:
        He et al. 2016, arXiv 1603.05027, figure 4 (e).
    """

    is_branch = True

    def __init__(self, channels: int, kernel: Sequence[int], *, norm: Norm = "instance") -> None:
        super().__init__()
        self.norm1 = normalisation(channels, len(kernel), norm)
        self.conv1 = convolution(channels, channels, kernel)
        self.norm2 = normalisation(channels, len(kernel), norm)
        self.conv2 = convolution(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """The residual, in the shape of ``x``."""
        features = self.conv1(normalise_and_activate(self.norm1, x))
        residual: Tensor = self.conv2(normalise_and_activate(self.norm2, features))
        return residual

    def zero_at_start(self) -> Iterable[nn.Parameter]:
        """The last convolution: the block begins as the identity."""
        return self.conv2.parameters()


def _shortcut(in_channels: int, out_channels: int, stride: tuple[int, ...], norm: Norm) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if max(stride) > 1:
        layers["pool"] = pooling(stride)
    if in_channels != out_channels:
        layers["conv"] = convolution(in_channels, out_channels, [1] * len(stride), bias=False)
        layers["norm"] = normalisation(out_channels, len(stride), norm)
    return nn.Sequential(layers)


def pooling(stride: Sequence[int]) -> nn.Module:
    """Mean over cells of the size of the stride.

    Args:
        stride: By axis; all 1 makes it the identity.

    Returns:
        The layer.
    """
    if max(stride) == 1:
        return nn.Identity()
    layer: nn.Module = _POOLS[len(stride)](tuple(stride), tuple(stride))
    return layer


def initialise(module: nn.Module) -> None:
    """Weights as the host starts: He's normal ones, biases 0, and the last layer of each residual branch 0.

    Args:
        module: Any network made of these blocks; changed in place. Whatever part has a method ``zero_at_start`` that
            gives parameters begins with these at 0.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(part.weight, a=NEGATIVE_SLOPE)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        zero_at_start = getattr(part, "zero_at_start", None)
        for parameter in zero_at_start() if callable(zero_at_start) else ():
            nn.init.zeros_(parameter)
