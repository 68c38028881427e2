"""Classifier of volumes that reads them slice by slice with a 2-D network."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from medmom.models.blocks import Norm, initialise
from medmom.models.encoder import Block, EncoderNetwork, NetworkMemory, Velocity
from medmom.models.gates import Coupling, Gating
from medmom.models.momentum import check_choice
from medmom.models.recompute import is_exported, is_recorded, is_traced
from medmom.models.resnet import MomentumResNet, check_batch
from medmom.models.sizes import check_image

__all__ = ["GatedAttention", "Pooling", "SliceClassifier", "SliceLogits"]

Pooling = Literal["mean", "attention"]

SLICES_AT_ONCE = 16
"""Slices whose activations lie in memory together where no gradients are asked for."""

WIDTH = 128
"""Of the layer inside the attention, as in the paper."""


class SliceLogits(NamedTuple):
    """What ``SliceClassifier.by_slice`` gives.

    Attributes:
        volume: Logits of the volumes, shape (B, out_channels).
        slices: Logits of each of their slices, shape (B, S, out_channels).
        weights: Of the slices in a volume, shape (B, S); 0 or more, 1 in sum. In evaluation the logits of a volume
            are the sum of its slices' by these weights.
    """

    volume: Tensor
    slices: Tensor
    weights: Tensor


class GatedAttention(nn.Module):
    """Weights of the slices of a volume: ``a = softmax_s(w . (tanh(V h_s) * sigmoid(U h_s)))``; equal at the start.

    Args:
        channels: Of the slices' features.

    Source:
        Ilse et al. 2018, arXiv 1802.04712, equation 9. Departures: V and U have biases, w begins at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.signal = nn.Linear(channels, WIDTH)
        self.gate = nn.Linear(channels, WIDTH)
        self.score = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Weights, shape (B, S), 1 in sum over S, from features of shape (B, S, channels)."""
        scores: Tensor = self.score(self.signal(features).tanh() * self.gate(features).sigmoid())
        return scores.squeeze(-1).softmax(dim=1)

    def zero_at_start(self) -> Iterable[nn.Parameter]:
        """The scores: training begins at the mean of the slices."""
        return self.score.parameters()


class SliceClassifier(EncoderNetwork):
    """A 2-D ``MomentumResNet`` on every slice of a volume, and one decision from all of them.

    A slice's features are those that the network's head has before its linear layer: the mean over space, normalised.
    Their mean over the slices, or their sum weighted by attention, goes through that layer. As it is linear, this is
    the same as the mean (the weighted sum) of the slices' logits, but that dropout acts once on a volume.

    Encoder and head have the keys and shapes of the ``MomentumResNet``, whose weights load into them.

    Args:
        in_channels: Image channels.
        out_channels: Classes; 1 or more.
        pooling: ``"mean"``: all slices count the same. ``"attention"``: a ``GatedAttention`` learns which of them do.
        channels: By stage, first stage first.
        blocks: Residual blocks by stage, the entry block counted.
        kernels: By stage, edges by axis (x, y), odd.
        strides: By stage, by axis; 1 in the first stage.
        stem_stride: Of the stem, by axis; 1 where absent.
        gate: As of ``MomentumResNet``, as are the rest.
        coupling: See there.
        gating: See there.
        velocity: See there.
        block: See there.
        norm: See there; with ``"batch"`` all slices of a batch count as its images.
        memory: See there.
        dropout: Share of the pooled features that training sets to 0, in [0, 1).

    Attributes:
        divisor: By axis of a slice, what its size must be a multiple of. Any number of slices will do.

    Raises:
        ValueError: The arguments do not describe a network for slices.

    Source:
        As ``MomentumResNet``; Ilse et al. 2018, arXiv 1802.04712 (attention).
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
        pooling: Pooling = "mean",
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
        check_choice("pooling", pooling, Pooling)
        if any(len(by_axis) != 2 for by_axis in (*kernels, *strides)):
            raise ValueError("kernels and strides have other than 2 axes; a slice has 2. Take a 2-D network.")
        network = MomentumResNet(
            in_channels,
            out_channels,
            channels=channels,
            blocks=blocks,
            kernels=kernels,
            strides=strides,
            stem_stride=stem_stride,
            gate=gate,
            coupling=coupling,
            gating=gating,
            velocity=velocity,
            block=block,
            norm=norm,
            memory=memory,
            dropout=dropout,
        )
        self._shape: dict[str, Any] = {**network.arguments, "pooling": pooling}
        self.divisor = network.divisor
        self.encoder, self.head = network.encoder, network.head
        self.attention = GatedAttention(channels[-1]) if pooling == "attention" else None
        if self.attention is not None:
            initialise(self.attention)

    @property
    def arguments(self) -> dict[str, Any]:
        """Numbers, strings and lists with which ``SliceClassifier(**arguments)`` gives the same network anew."""
        return {**self._shape, "gate": self.gate, "memory": self.memory}

    def forward(self, image: Tensor) -> Tensor:
        """Logits of every class.

        Args:
            image: Shape (B, in_channels, x, y, S); the number of slices may differ from call to call.

        Returns:
            Logits, shape (B, out_channels), in training and after.

        Raises:
            ValueError: The image has other axes or channels, no slice, a size the strides do not divide, or in training
                with batch normalisation one value a channel.
        """
        features = self.features(image)
        return self._logits(_pooled(features, self._weights(features)))

    def by_slice(self, image: Tensor) -> SliceLogits:
        """Logits of volumes, of their slices, and the slices' weights, from one look at the image.

        Args:
            image: As for ``forward``, which gives the same logits of the volumes.

        Returns:
            The three, by name.

        Raises:
            ValueError: As ``forward``.
        """
        features = self.features(image)
        weights = self._weights(features)
        return SliceLogits(self._logits(_pooled(features, weights)), self._logits(features), weights)

    def slice_logits(self, image: Tensor) -> Tensor:
        """Logits of each slice, shape (B, S, out_channels), from an image as for ``forward``."""
        return self._logits(self.features(image))

    def slice_weights(self, image: Tensor) -> Tensor:
        """How much each slice counts, shape (B, S), 1 in sum over S, from an image as for ``forward``."""
        return self._weights(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        """Features of each slice before the head's linear layer.

        In evaluation without gradients a few slices at a time are looked at, whose activations then go.

        Args:
            image: As for ``forward``.

        Returns:
            Shape (B, S, channels of the last stage).

        Raises:
            ValueError: As ``forward``.
        """
        if not is_traced():
            self._check(image)
        slices = image.movedim(4, 1)
        # In training all of them: batch normalisation has to see the whole batch, with gradients or without.
        if self.training or is_recorded() or is_exported():
            return self._encode(slices)
        at_once = max(1, SLICES_AT_ONCE // len(image))
        return torch.cat([self._encode(part) for part in slices.split(at_once, dim=1)], dim=1)

    def _encode(self, slices: Tensor) -> Tensor:
        last = self.encoder(slices.flatten(0, 1))[-1]
        features: Tensor = self.head.norm(last.mean(dim=(2, 3))).unflatten(0, slices.shape[:2])
        return features

    def _weights(self, features: Tensor) -> Tensor:
        if self.attention is None:
            return torch.full_like(features[..., 0], 1 / features.shape[1])
        weights: Tensor = self.attention(features)
        return weights

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head.linear(self.head.dropout(features))
        return logits

    def _check(self, image: Tensor) -> None:
        channels = self._shape["in_channels"]
        if image.ndim != 5 or image.shape[1] != channels or not image.shape[-1]:
            raise ValueError(
                f"The image has shape ({', '.join(map(str, image.shape))}); the network takes "
                f"(batch, {channels}, x, y, slices), with one slice or more."
            )
        cells = check_image(image[..., 0], channels, self.divisor)
        if self.training and self._shape["norm"] == "batch":
            check_batch(image.shape[0] * image.shape[-1], image.shape[2:4], cells)


def _pooled(features: Tensor, weights: Tensor) -> Tensor:
    return (weights[..., None] * features).sum(dim=1)
