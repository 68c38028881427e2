"""Stages that are measured against each other: ours in every memory, and those of other packages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from medmom.models.blocks import PreActivationBranch, ResidualBlock
from medmom.models.encoder import NetworkMemory
from medmom.models.momentum import Memory, MomentumStage
from medmom.models.unet import MomentumUNet

PEERS = ("momentumnet", "memcnn", "revtorch")

PEER_GATE = 0.9
"""Of momentumnet, whose coupling leaves nothing of the blocks at 1."""

NETWORK_MEMORIES: tuple[NetworkMemory, ...] = ("plain", "checkpoint", "reversible", "hybrid", "exact")


@dataclass(frozen=True)
class Contender:
    """One way to run a stage.

    Attributes:
        name: Of its row.
        like: Name of the contender of the same function that stores its activations.
        build: Makes it; raises ImportError where its package is absent, ValueError where the setting is illegal.
        twin: Makes the same function with stored activations over the same parameters; None where none is asked for.
    """

    name: str
    like: str
    build: Callable[[], nn.Module]
    twin: Callable[[], nn.Module] | None = None


class Looped(nn.Module):
    """``v = g v + c (block(x) - x)``, ``x = x + v`` from zero velocity, as it is written.

    Args:
        blocks: Each gives ``x + f(x)``.
        gate: ``g``.
        weight: ``c``.
    """

    def __init__(self, blocks: Iterable[nn.Module], gate: float, weight: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._gate, self._weight = gate, weight

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        v = torch.zeros_like(x)
        for block in self.blocks:
            v = self._gate * v + self._weight * (block(x) - x)
            x = x + v
        return x


class Coupled(nn.Module):
    """Additive coupling of the two halves of the channels: ``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``.

    Args:
        first: ``F`` of every step.
        second: ``G`` of every step.

    Source:
        Gomez et al. 2017, arXiv 1707.04585.
    """

    def __init__(self, first: Iterable[nn.Module], second: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(part for pair in zip(first, second, strict=True) for part in pair)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        x1, x2 = x.chunk(2, dim=1)
        for f, g in zip(self.steps[::2], self.steps[1::2], strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return torch.cat((x1, x2), dim=1)


def stage_contenders(depth: int, channels: int, gate: float, seed: int = 0) -> list[Contender]:
    """All ways to run a 3-D stage; those of one function share their weights.

    The coupled ones have two pre-activation branches on half the channels where the others have one residual block:
    as many convolutions and activations, half the weights.

    Args:
        depth: Blocks.
        channels: Even.
        gate: Of our stage, but for exact, which is shown with 7/8 and 1.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    blocks = [ResidualBlock(channels, channels, [3] * 3) for _ in range(depth)]
    branches = [PreActivationBranch(channels // 2, [3] * 3) for _ in range(2 * depth)]
    return [*_ours(blocks, gate), *_momentumnet(blocks), *_coupled(branches[::2], branches[1::2])]


def _ours(blocks: Sequence[nn.Module], gate: float) -> list[Contender]:
    def stage(memory: Memory, gate: float) -> MomentumStage:
        return MomentumStage(blocks, gate, memory=memory)

    def contender(name: str, memory: Memory, gate: float) -> Contender:
        return Contender(name, "plain", partial(stage, memory, gate), partial(stage, "plain", gate))

    return [
        contender("plain", "plain", gate),
        contender("checkpoint", "checkpoint", gate),
        contender("reversible", "reversible", gate),
        contender("exact, gate 7/8", "exact", 7 / 8),
        contender("exact, gate 1", "exact", 1.0),
    ]


def _momentumnet(blocks: Sequence[nn.Module]) -> list[Contender]:
    def network(use_backprop: bool) -> nn.Module:
        kind = import_module("momentumnet").MomentumNet
        made: nn.Module = kind(list(blocks), gamma=PEER_GATE, use_backprop=use_backprop, is_residual=False)
        return made

    def rounded() -> nn.Module:
        # Its memory-saving mode rounds the gate to a fraction; against 0.9 itself that alone would be an error.
        exact: Any = import_module("momentumnet.exact_rep_pytorch").TorchExactRep
        numerator, denominator = exact.float_to_rational(None, PEER_GATE)
        return Looped(blocks, numerator / denominator, 1 - PEER_GATE)

    name = "momentumnet, stored"
    return [
        Contender(name, name, partial(network, True), partial(Looped, blocks, PEER_GATE, 1 - PEER_GATE)),
        Contender("momentumnet", name, partial(network, False), rounded),
    ]


def _coupled(first: Sequence[nn.Module], second: Sequence[nn.Module]) -> list[Contender]:
    def memcnn() -> nn.Module:
        package = import_module("memcnn")
        couplings = [package.AdditiveCoupling(f, g) for f, g in zip(first, second, strict=True)]
        return nn.Sequential(*(package.InvertibleModuleWrapper(coupling) for coupling in couplings))

    def revtorch() -> nn.Module:
        package = import_module("revtorch")
        steps = [package.ReversibleBlock(f, g) for f, g in zip(first, second, strict=True)]
        made: nn.Module = package.ReversibleSequence(nn.ModuleList(steps))
        return made

    name, stored = "additive coupling, stored", partial(Coupled, first, second)
    return [
        Contender(name, name, stored, stored),
        Contender("memcnn", name, memcnn, stored),
        Contender("revtorch", name, revtorch, stored),
    ]


def network_contenders(depth: int, channels: Sequence[int], gate: float, seed: int = 0) -> list[Contender]:
    """A 3-D network in every memory, all with the same weights; exact has gate 1.

    Args:
        depth: Momentum blocks of every stage, behind its entry block.
        channels: By stage.
        gate: Of the others.
        seed: Of the weights.
    """

    def network(memory: NetworkMemory) -> nn.Module:
        torch.manual_seed(seed)
        return MomentumUNet(
            1,
            3,
            channels=channels,
            blocks=[depth + 1] * len(channels),
            kernels=[[3] * 3] * len(channels),
            strides=[[1] * 3] + [[2] * 3] * (len(channels) - 1),
            gate=1.0 if memory == "exact" else gate,
            memory=memory,
            deep_supervision=False,
        )

    return [Contender(memory, "plain", partial(network, memory)) for memory in NETWORK_MEMORIES]
