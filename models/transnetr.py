"""TransNetR, with attention over the tokens of one image and not over the images of a batch."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, cat, nn
from torch.nn import functional

from medmom.models.recompute import is_traced
from medmom.models.sizes import check_image

__all__ = ["ProjectedBlock", "ResNet50Taps", "StripTransformer", "TransNetR"]

WIDTH = 64
TAPS = (64, 256, 512, 1024)
"""Channels of the encoder's features, at 1/2, 1/4, 1/8 and 1/16 of the image."""
STRIP = (16, 256)
"""Pixels of the image under one token."""


def _conv_norm(in_channels: int, out_channels: int, edge: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, edge, padding=edge // 2)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))


def _activate(fresh: Tensor) -> Tensor:
    return functional.leaky_relu(fresh, 0.1, inplace=True)


class ResNet50Taps(nn.Module):
    """First three layers of MONAI's 2-D ResNet-50, with the names and the arithmetic of torchvision's.

    Args:
        in_channels: Image channels.

    Source:
        He et al. 2016, arXiv 1512.03385; the stride lies in a bottleneck's 3 x 3 convolution, as in torchvision.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        # Here, because it takes seconds, which every start of a program that names this room would pay.
        from monai.networks.nets import ResNet  # noqa: PLC0415

        # MONAI's own options differ: a first stride of 1 and a bias in the shortcut. It always builds a fourth layer;
        # one of a single plane costs nothing, and is left behind.
        resnet = ResNet(
            "bottleneck",
            [3, 4, 6, 1],
            [64, 128, 256, 1],
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_stride=2,
            shortcut_type="B",
            bias_downsample=False,
            feed_forward=False,
        )
        self.conv1, self.bn1, self.act, self.maxpool = resnet.conv1, resnet.bn1, resnet.act, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features at 1/2, 1/4, 1/8 and 1/16 of the image, with ``TAPS`` channels."""
        half: Tensor = self.act(self.bn1(self.conv1(image)))
        quarter: Tensor = self.layer1(self.maxpool(half))
        eighth: Tensor = self.layer2(quarter)
        return [half, quarter, eighth, self.layer3(eighth)]


class ProjectedBlock(nn.Module):
    """TransNetR's residual block: ``act(norm(conv(act(norm(conv(x))))) + norm(conv1(x)))``.

    The shortcut has its 1-convolution even where the channels stay.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = _conv_norm(in_channels, out_channels, 3)
        self.second = _conv_norm(out_channels, out_channels, 3)
        self.shortcut = _conv_norm(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size, shape (B, out_channels, H, W)."""
        branch: Tensor = self.second(_activate(self.first(x)))
        return _activate(branch + self.shortcut(x))


class StripTransformer(nn.Module):
    """A convolution and self-attention between strips of its channels, beside a shortcut.

    ``act(norm(conv1(transform(act(norm(conv(x)))))) + norm(conv1(x)))``. Every channel is cut into strips; a strip,
    its rows one after the other, is a token. Two transformer layers of four heads (normalisation after each, inner
    width 2048, dropout .1) let all tokens of an image attend to each other. They know no positions.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        strip: Edges of a strip, which must divide the features'; their product is the width of a token.
    """

    def __init__(self, in_channels: int, out_channels: int, strip: tuple[int, int]) -> None:
        super().__init__()
        self.strip = strip
        self.fuse = _conv_norm(in_channels, out_channels, 3)
        layer = nn.TransformerEncoderLayer(strip[0] * strip[1], nhead=4, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.project = _conv_norm(out_channels, out_channels, 1)
        self.shortcut = _conv_norm(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same size, shape (B, out_channels, H, W)."""
        features = _activate(self.fuse(x))
        batch, channels, height, width = features.shape
        h, w = self.strip
        strips = features.reshape(batch, channels, height // h, h, width // w, w).transpose(3, 4)
        tokens = self.transformer(strips.reshape(batch, -1, h * w))
        mixed = tokens.reshape(strips.shape).transpose(3, 4).reshape(features.shape)
        return _activate(self.project(mixed) + self.shortcut(x))


class DecoderStage(nn.Module):
    """Upsampling by two, joined with the encoder's features, then ``entry`` and residual blocks of one shape.

    Args:
        entry: From twice the width to the width.
        num_residual: Residual blocks after it.
    """

    def __init__(self, entry: nn.Module, num_residual: int) -> None:
        super().__init__()
        self.entry = entry
        blocks = nn.Sequential(*(ProjectedBlock(WIDTH, WIDTH) for _ in range(num_residual)))
        # One level deeper than needed: a momentum stage in this place then has the same keys.
        self.residual: nn.Module = nn.Sequential(OrderedDict(blocks=blocks))

    def forward(self, below: Tensor, skip: Tensor) -> Tensor:
        """Features of the size of ``skip``, twice that of ``below``."""
        features: Tensor = self.residual(self.entry(cat((_double(below), skip), dim=1)))
        return features


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class TransNetR(nn.Module):
    """Transformer-based residual network for 2-D images, the baseline of arXiv 2408.05692.

    A ResNet-50 gives features at 1/2, 1/4, 1/8 and 1/16, each brought to 64 channels. From the lowest up, each stage
    doubles the size and joins the next features: two stages with a transformer and a residual block, at 1/8 and 1/4,
    one with a residual block at 1/2; then the size is doubled once more and a 1-convolution gives the logits.

    As in the authors' code: the layers above and their sizes, with one residual block by stage, batch normalisation
    and leaky ReLU of slope .1; the cut of 256 x 256 images into 1024 tokens of 64 and of 256 values; PyTorch's start
    of all but the encoder.

    Otherwise than there:

    - Attention runs over the tokens of an image. There the batch lies on the axis of the sequence: attention mixes
      images, the logits of one depend on its batch mates, and alone it has nothing to attend to.
    - The encoder's fourth layer, 14.96 M of 27.27 M parameters there, never used, is absent.
    - The encoder starts at random until ``load_torchvision``; there it has ImageNet's weights.
    - Any number of image channels and classes; there three channels and one logit.
    - Other sizes than 256 x 256: a token stays 16 x 256 pixels of the image, as it is there, and a larger image has
      more of them. Without code for positions, parameters do not depend on their number.

    So figures published for TransNetR are not those of this network. They were reached at 256 x 256 with Adam, step
    1e-4, batch 8, the sum of cross-entropy and soft Dice, and values divided by 255.

    Args:
        in_channels: Image channels.
        out_channels: Logits; one for a sigmoid, else classes with the background counted.
        num_blocks: Residual blocks in each decoder stage.

    Attributes:
        divisor: By axis, what an image's size must be a multiple of.
        arguments: Numbers with which ``TransNetR(**arguments)`` gives the same network anew.

    Raises:
        ValueError: A number is below 1.

    Source:
        Jha et al. 2023, arXiv 2303.07428, and the code its authors published.
    """

    def __init__(self, in_channels: int, out_channels: int, *, num_blocks: int = 1) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_blocks": num_blocks,
        }
        for name, number in self.arguments.items():
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be 1 or more.")
        self.divisor = STRIP
        self.encoder = ResNet50Taps(in_channels)
        self.reduce = nn.ModuleList(_conv_norm(channels, WIDTH, 1) for channels in TAPS)
        eighth, quarter = [(STRIP[0] // scale, STRIP[1] // scale) for scale in (8, 4)]
        self.stages = nn.ModuleList(
            [
                DecoderStage(StripTransformer(2 * WIDTH, WIDTH, eighth), num_blocks),
                DecoderStage(StripTransformer(2 * WIDTH, WIDTH, quarter), num_blocks),
                DecoderStage(ProjectedBlock(2 * WIDTH, WIDTH), num_blocks - 1),
            ]
        )
        self.head = nn.Conv2d(WIDTH, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            image: Shape (B, in_channels, x, y).

        Returns:
            Logits, shape (B, out_channels, x, y), in training and after.

        Raises:
            ValueError: The image has other axes or channels, or a size the divisor does not divide.
        """
        if not is_traced():
            check_image(image, self.arguments["in_channels"], self.divisor)
        *skips, x = [_activate(layer(tap)) for layer, tap in zip(self.reduce, self.encoder(image), strict=True)]
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        logits: Tensor = self.head(_double(x))
        return logits

    def load_torchvision(self, state: Mapping[str, Tensor]) -> None:
        """Give the encoder the weights of torchvision's ResNet-50, whose features it then has.

        Args:
            state: The state_dict of ``torchvision.models.resnet50``; ``layer4`` and ``fc`` may be absent and are not
                looked at, and so may the batch normalisations' count of batches, which nothing depends on.

        Raises:
            ValueError: A weight is missing, too many or of another shape; the encoder is left as it was.
        """
        own = self.encoder.state_dict()
        given = {key: value for key, value in state.items() if not key.startswith(("layer4.", "fc."))}
        faults = [f"{key} is missing" for key in own if key not in given and not key.endswith("num_batches_tracked")]
        faults += [f"{key} is unknown" for key in given if key not in own]
        faults += [
            f"{key} has shape {tuple(value.shape)} instead of {tuple(own[key].shape)}"
            for key, value in given.items()
            if key in own and value.shape != own[key].shape
        ]
        if faults:
            more = f" and {len(faults) - 3} faults more" if len(faults) > 3 else ""
            raise ValueError(
                f"These are not the weights of this encoder: {', '.join(faults[:3])}{more}. "
                "Give the state_dict of torchvision's resnet50, to a network with 3 image channels."
            )
        self.encoder.load_state_dict({**own, **given})
