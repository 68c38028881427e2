"""An encoder of a few weights and an image for it, for the tests of the encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medmom.models.encoder import EncoderStage, MomentumEncoder

# Stages with none, one, two and three momentum blocks.
BLOCKS = (1, 2, 3, 4)
CHANNELS = (4, 6, 8, 8)
VELOCITIES = ["zero", "learned", "carry"]
MEMORIES = ["checkpoint", "reversible", "hybrid", "exact"]


def make_encoder(spatial_dims: int = 2, *, seed: int = 0, **options: Any) -> MomentumEncoder:
    """An encoder of random weights, none of them zero, so that every path carries something."""
    arguments: dict[str, Any] = {
        "channels": CHANNELS,
        "blocks": BLOCKS,
        "kernels": [[3] * spatial_dims] * 4,
        "strides": [[1] * spatial_dims, *[[2] * spatial_dims] * 2, [1] * (spatial_dims - 1) + [2]],
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MomentumEncoder(2, **arguments)


def stages_of(encoder: MomentumEncoder) -> list[EncoderStage]:
    return list(encoder.stages)  # type: ignore[arg-type]


def make_image(spatial_dims: int = 2, edge: int = 16) -> Tensor:
    return torch.randn(2, 2, *[edge] * spatial_dims, generator=torch.Generator().manual_seed(5))
