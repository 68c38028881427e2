"""Momentum U-Nets of a few thousand weights, and what is compared of two of them, for the tests of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medmom.models import MomentumUNet
from medmom.models.blocks import ResidualBlock

MEMORIES = ("plain", "checkpoint", "reversible", "hybrid", "exact")
AXES: dict[str, dict[str, Any]] = {
    "2-D": {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]},
    "3-D": {"kernels": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
    "flat": {"kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "host": {},
    "gate 1": {"gate": 1.0},
    "ema": {"coupling": "ema"},
    "block gates": {"gating": "block"},
    "channel gates": {"gating": "channel"},
    "learned start": {"velocity": "learned"},
    "carry": {"velocity": "carry"},
    "preact": {"block": "preact"},
    "group": {"norm": "group"},
    "batch": {"norm": "batch"},
    "all at once": {"gating": "channel", "velocity": "carry", "block": "preact", "norm": "batch"},
}


def memories_of(variant: str, *, besides: tuple[str, ...] = ()) -> list[str]:
    """Memories that suit a variant: the exact one knows neither learned gates nor batch normalisation."""
    changes = VARIANTS[variant]
    is_inexact = "gating" in changes or changes.get("norm") == "batch"
    return [name for name in MEMORIES if name not in besides and not (is_inexact and name == "exact")]


PAIRS = [(variant, memory) for variant in VARIANTS for memory in memories_of(variant, besides=("plain",))]


def make_unet(axes: str = "2-D", *, seed: int = 0, **changes: Any) -> MomentumUNet:
    """A network with nothing left at zero, whose gate suits every memory."""
    arguments = {"channels": [4, 6, 8], "blocks": [1, 3, 3], "gate": 0.875, **AXES[axes], **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MomentumUNet(2, 3, **arguments)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            for block in network.modules():
                if isinstance(block, ResidualBlock):
                    nn.init.uniform_(block.norm2.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return network


def make_image(network: MomentumUNet, *, batch: int = 2, cells: int = 4, seed: int = 1) -> Tensor:
    """Noise that leaves ``cells`` voxels an axis at the bottleneck."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, *[cells * divisor for divisor in network.divisor], generator=generator)


def loss_of(outputs: Tensor | list[Tensor]) -> Tensor:
    """A mean over batch and voxels that tells classes and resolutions apart."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    terms = [
        0.5**index * (logits.float() - torch.linspace(-1, 1, 3).view(-1, *[1] * (logits.ndim - 2))).square().mean()
        for index, logits in enumerate(outputs)
    ]
    return torch.stack(terms).sum()


def gradients(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by all parameters."""
    network.zero_grad()
    torch.autograd.backward(loss_of(network(image)))
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
