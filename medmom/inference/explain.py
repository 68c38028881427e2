"""Pictures of where in an image a classifier saw its class."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.visualize import GradCAM
from torch import Tensor, nn

from medmom.evaluation.drawing import BACKGROUND
from medmom.models.slices import SliceClassifier

SOFTWARE = "medmom predict"
"""Stands in every picture, so that a later run knows it as one that it may replace."""

INK = "#e8eaed"
HEIGHT_INCHES, CAPTION_INCHES, LETTERS_AN_INCH, DPI = 3.6, 0.62, 14, 120


@dataclass(frozen=True, eq=False)
class Explanation:
    """One slice of what the network saw, and where it saw its class.

    Attributes:
        image: Prepared, shape (C, X, Y).
        heat: In [0, 1], shape (X, Y); 0 everywhere where nothing in the image speaks for the class.
        place: Index of the slice in what the network was given; None of a picture.
    """

    image: np.ndarray
    heat: np.ndarray
    place: int | None


def explain(network: nn.Module, image: Tensor, channel: int, *, is_multilabel: bool = False) -> Explanation:
    """Shows where a classifier saw a class, by the gradient of its logit with respect to the last encoder stage.

    The map has the resolution of that stage, a sixteenth of the image's along each axis in the presets: it tells
    regions, not edges. And each of its cells sees far around itself, the more so in a small image: heat beside a body
    may be about its outline, or about a background that gives the class away. Of a volume that is seen slice by slice,
    the slice that speaks loudest for the class, by weight and probability; of another volume, the slice with the
    highest value.

    Args:
        network: A ``MomentumResNet`` or ``SliceClassifier`` in evaluation mode, whatever its memory.
        image: Shape (1, C, *spatial), on the network's device, as the network takes it.
        channel: Of the class.
        is_multilabel: Whether an image may be of any number of classes.

    Source:
        Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2.
    """
    place = None
    if isinstance(network, SliceClassifier):
        place = _loudest_slice(network, image, channel, is_multilabel=is_multilabel)
        image = image[..., place]
    # A new module is in training mode, to which MONAI would bring all of it back.
    seen = _Seen(network).eval()
    heat = GradCAM(nn_module=seen, target_layers="features", postprocessing=_scaled)(image, class_idx=channel)
    network.zero_grad(set_to_none=True)
    map_, array = heat[0, 0].detach().float().cpu().numpy(), image[0].float().cpu().numpy()
    if map_.ndim == 3:
        place = int(map_.max(axis=(0, 1)).argmax())
        map_, array = map_[..., place], array[..., place]
    return Explanation(array, map_, place)


def draw_explanation(explanation: Explanation, caption: str, *, is_volume: bool) -> bytes:
    """Draws the image, and beside it the same under the heat map.

    Args:
        explanation: What to draw.
        caption: A few lines; what is too long for the picture is cut.
        is_volume: Whether the slice is of a volume, whose axes point to the right (or front) and up; else of a
            picture, whose axes are its columns and rows.

    Returns:
        A PNG.
    """
    image, heat = _shown(explanation.image), explanation.heat.T
    if is_volume:
        # As radiologists look at it: from the feet, or from the front, the patient's right on the left.
        image, heat = image[::-1, ::-1], heat[::-1, ::-1]
    rows, columns = heat.shape
    width = HEIGHT_INCHES * min(max(columns / rows, 0.4), 2.5)
    height = HEIGHT_INCHES + CAPTION_INCHES
    figure = Figure(figsize=(2 * width, height), dpi=DPI, facecolor=BACKGROUND)
    for number in range(2):
        axes = figure.add_axes((number / 2 + 0.005, 0, 0.49, HEIGHT_INCHES / height))
        axes.axis("off")
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        if number:
            axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * np.sqrt(heat), interpolation="bilinear")
    text = "\n".join(textwrap.shorten(line, int(LETTERS_AN_INCH * 2 * width)) for line in caption.splitlines())
    figure.text(0.01, 1 - CAPTION_INCHES / height / 2, text, color=INK, fontsize=8, va="center", parse_math=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=BACKGROUND, metadata={"Software": SOFTWARE})
    return stream.getvalue()


class _Seen(nn.Module):
    """Encoder and head of a classifier, with a place between them where gradients are read.

    The encoder needs none: what its memory is, and whether hooks work there, makes no difference.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.features, self.head = network.encoder, nn.Identity(), network.head

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.encoder(image)[-1]  # type: ignore[operator]
        logits: Tensor = self.head(self.features(features.requires_grad_()))  # type: ignore[operator]
        return logits


def _loudest_slice(network: SliceClassifier, image: Tensor, channel: int, *, is_multilabel: bool) -> int:
    with torch.inference_mode():
        found = network.by_slice(image)
    shares = found.slices.float().sigmoid() if is_multilabel else found.slices.float().softmax(dim=-1)
    return int((found.weights.float() * shares[..., channel])[0].argmax())


def _scaled(heat: Tensor) -> Tensor:
    """To a maximum of 1; MONAI's own turns high into low."""
    top = heat.amax()
    return heat / top if top > 0 else heat


def _shown(image: np.ndarray) -> np.ndarray:
    """Rows from the top, columns from the left, in [0, 1]; colours where there are three channels, else the first."""
    turned = image.transpose(2, 1, 0) if len(image) == 3 else image[0].T
    low, high = np.percentile(turned, (0.5, 99.5))
    scaled: np.ndarray = np.clip((turned - low) / max(high - low, 1e-6), 0, 1)
    return scaled
