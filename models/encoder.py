"""Encoder of momentum networks: stem, and stages of an entry block and a momentum stage."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from medmom.models.blocks import (
    ConvNormAct,
    Norm,
    NormAct,
    PreActivationBranch,
    ResidualBlock,
    activate,
    convolution,
    normalisation,
    pooling,
)
from medmom.models.gates import Coupling, Gating, residual_weight
from medmom.models.momentum import MomentumStage, check_choice
from medmom.models.recompute import checkpointed

NetworkMemory = Literal["plain", "checkpoint", "reversible", "hybrid", "exact"]
Velocity = Literal["zero", "learned", "carry"]
Block = Literal["postact", "preact"]

DEEP: dict[str, str] = {"hybrid": "reversible"}
"""What a network's memory means for a stage of two momentum blocks or more, where it is another word."""

SHALLOW: dict[str, str] = {"reversible": "plain", "exact": "plain", "hybrid": "checkpoint"}
"""What it means for one of fewer, which has nothing to gain from inversion."""


CHECKPOINTED = ("checkpoint", "hybrid")
"""With which stem, entry blocks and whatever lies behind the encoder are computed again in the backward pass."""


class LearnedStart(nn.Module):
    """First velocity of a stage from its features: ``norm(conv(x))`` with a 1-convolution; 0 at the start of training.

    Args:
        channels: Of the features.
        spatial_dims: 2 or 3.
        norm: See ``medmom.models.blocks.normalisation``.

    Source:
        Sander et al. 2021, arXiv 2102.07870, section 3: ``v_0 = f_0(x_0)``.
    """

    def __init__(self, channels: int, spatial_dims: int, *, norm: Norm) -> None:
        super().__init__()
        self.conv = convolution(channels, channels, [1] * spatial_dims)
        self.norm = normalisation(channels, spatial_dims, norm)

    def forward(self, x: Tensor) -> Tensor:
        """The velocity, in the shape of ``x``."""
        velocity: Tensor = self.norm(self.conv(x))
        return velocity

    def zero_at_start(self) -> Iterable[nn.Parameter]:
        """The normalisation."""
        return self.norm.parameters()


class CarriedVelocity(nn.Module):
    """Velocity of the stage above on the grid of this one: average pooling and a 1-convolution that begins at 0.

    Args:
        above: Channels of the stage above.
        channels: Of this stage.
        stride: Between the two, by axis.
    """

    def __init__(self, above: int, channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.pool = pooling(stride)
        self.conv = convolution(above, channels, [1] * len(stride), bias=False)

    def forward(self, velocity: Tensor) -> Tensor:
        """Velocity of shape (B, channels, *spatial / stride)."""
        carried: Tensor = self.conv(self.pool(velocity))
        return carried

    def zero_at_start(self) -> Iterable[nn.Parameter]:
        """The convolution: at the start nothing is carried."""
        return self.conv.parameters()


class EncoderStage(nn.Module):
    """The host's entry block, which changes channels and size, then blocks of one shape under momentum.

    Args:
        entry: From the stage above to this stage's shape.
        momentum: Blocks that keep it.
        velocity: Where the first velocity comes from, see ``MomentumEncoder``.
        start: Its layer, where it is learned.
        carry: Its layer, where it is carried; None in the first stage.
        finish: Behind the blocks; None where they end in an activation themselves.

    Attributes:
        is_checkpointed: Whether all but the momentum blocks is computed again in the backward pass.
    """

    def __init__(
        self,
        entry: ResidualBlock,
        momentum: MomentumStage,
        *,
        velocity: Velocity = "zero",
        start: LearnedStart | None = None,
        carry: CarriedVelocity | None = None,
        finish: NormAct | None = None,
    ) -> None:
        super().__init__()
        self.entry, self.momentum = entry, momentum
        self.velocity, self.start, self.carry, self.finish = velocity, start, carry, finish
        self.is_checkpointed = False

    def forward(self, x: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of this stage and their velocity.

        Args:
            x: Features of the stage above.
            velocity: Of the stage above, on its grid; taken up only where velocity is carried.

        Returns:
            Features, shape (B, channels, *spatial / stride), and a velocity of that shape or None.
        """
        # A checkpoint keeps what it is given: no velocity that is not taken up.
        above = velocity if self.velocity == "carry" else None
        x, velocity = checkpointed(self.enter, x, above) if self.is_checkpointed else self.enter(x, above)
        x, velocity = self.momentum.flow(x, velocity)
        if self.finish is not None:
            x = checkpointed(self.finish, x) if self.is_checkpointed else self.finish(x)
        return x, velocity

    def enter(self, x: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features and velocity before the momentum blocks.

        A carried velocity is ``v0 = g D(v) + c r(x)`` and ``x0 = act(S(x) + v0)``, with ``r`` the entry block's
        branch, ``S`` its shortcut, ``D`` the layer ``carry``, ``g`` the stage's gate (where gates are learned, their
        start) and ``c`` the weight of one block.
        """
        if self.velocity != "carry":
            x = self.entry(x)
            return x, None if self.start is None else self.start(x)
        gate = self.momentum.gate
        moved = self.entry.branch(x) * residual_weight(self.momentum.coupling, gate, 1)
        if velocity is not None and self.carry is not None:
            moved = moved + gate * self.carry(velocity)
        return activate(self.entry.shortcut(x) + moved), moved


class MomentumEncoder(nn.Module):
    """Stem and encoder stages.

    Args:
        in_channels: Image channels.
        channels: By stage.
        blocks: Residual blocks by stage, the entry block counted.
        kernels: Edges by axis, by stage; the stem has those of the first.
        strides: By axis, by stage.
        gate: Of every momentum stage, see ``MomentumStage``.
        coupling: As the gate.
        gating: As the gate.
        velocity: With which a stage starts. ``"zero"``: the default, nothing to learn. ``"learned"``: from the
            features by a layer, Sander's other choice. ``"carry"``: from the stage above, where momentum is to run
            through the whole encoder.
        block: ``"postact"``, the host's, takes over its weights; ``"preact"`` for stages of 8 blocks or more.
        norm: See ``medmom.models.blocks.normalisation``; ``"instance"`` erases what a mean over space would tell.
        memory: What is kept for the backward pass, see the property.
        stem_stride: Of the stem; 1 on every axis where absent.

    Raises:
        ValueError: An argument is unknown or does not suit the others.
    """

    def __init__(
        self,
        in_channels: int,
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
        norm: Norm = "instance",
        memory: NetworkMemory = "plain",
        stem_stride: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_choice("velocity", velocity, Velocity)
        check_choice("block", block, Block)
        self.stem = ConvNormAct(in_channels, channels[0], kernels[0], stem_stride, norm=norm)
        self.stages = nn.ModuleList()
        before = channels[0]
        for width, depth, kernel, stride in zip(channels, blocks, kernels, strides, strict=True):
            kind = PreActivationBranch if block == "preact" else partial(ResidualBlock, width)
            following = [kind(width, kernel, norm=norm) for _ in range(depth - 1)]
            dims = len(kernel)
            self.stages.append(
                EncoderStage(
                    ResidualBlock(before, width, kernel, stride, norm=norm),
                    MomentumStage(following, gate, coupling, gating=gating, channels=width),
                    velocity=velocity,
                    start=LearnedStart(width, dims, norm=norm) if velocity == "learned" and following else None,
                    carry=CarriedVelocity(before, width, stride) if velocity == "carry" and self.stages else None,
                    finish=NormAct(width, dims, norm=norm) if block == "preact" and following else None,
                )
            )
            before = width
        self._memory = "plain"
        self.memory = memory

    @property
    def memory(self) -> str:
        """What is kept for the backward pass; it can be changed at any time, and changes nothing else.

        - ``"plain"``: everything. The fastest.
        - ``"checkpoint"``: what goes into the stem and into every block.
        - ``"reversible"``: of stages with two momentum blocks or more features and velocity at their end; else
          everything.
        - ``"hybrid"``: of these stages the same; else what goes into stem and blocks. The least for deep stages.
        - ``"exact"``: as reversible, with a state in integers.

        Raises:
            ValueError: On setting: it is unknown, or does not suit the stages.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        check_choice("memory", memory, NetworkMemory)
        stages: list[Any] = list(self.stages)
        deep = [stage.momentum for stage in stages if len(stage.momentum.blocks) > 1]
        if not deep and memory not in ("plain", "checkpoint"):
            raise ValueError(
                f"memory {memory} needs a stage of two momentum blocks or more behind its entry block, and no stage "
                "has; take memory plain or checkpoint."
            )
        for momentum in deep:
            momentum.check_memory(DEEP.get(memory, memory))
        for stage in stages:
            meaning = DEEP if stage.momentum in deep else SHALLOW
            stage.momentum.memory = meaning.get(memory, memory)
            stage.is_checkpointed = memory in CHECKPOINTED
        self._memory = memory

    @property
    def is_checkpointed(self) -> bool:
        """Whether all that does not run backwards is computed again in the backward pass."""
        return self._memory in CHECKPOINTED

    @property
    def gate(self) -> float:
        """Gate of every momentum stage, or the one at which learned gates started.

        Raises:
            ValueError: On setting: the gates are learned, or it does not suit coupling and memory.
        """
        gate: float = self.stages[0].momentum.gate  # type: ignore[union-attr, assignment]
        return gate

    @gate.setter
    def gate(self, gate: float) -> None:
        stages: list[Any] = list(self.stages)
        for stage in stages:
            stage.momentum.check_gate(gate)
        for stage in stages:
            stage.momentum.gate = gate

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of every stage, full resolution first."""
        x = checkpointed(self.stem, image) if self.is_checkpointed else self.stem(image)
        velocity = None
        features = []
        for stage in self.stages:
            x, velocity = stage(x, velocity)
            features.append(x)
        return features


class EncoderNetwork(nn.Module):
    """Network whose gate and memory are those of its momentum encoder.

    Attributes:
        encoder: To be set by the network.
    """

    encoder: MomentumEncoder

    @property
    def memory(self) -> str:
        """What is kept for the backward pass, as ``MomentumEncoder.memory``; changed at any time.

        Raises:
            ValueError: On setting: it is unknown, or does not suit the stages.
        """
        return self.encoder.memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self.encoder.memory = memory

    @property
    def gate(self) -> float:
        """Gate of every momentum stage, or the one at which learned gates started.

        Raises:
            ValueError: On setting: the gates are learned, or it does not suit coupling and memory.
        """
        return self.encoder.gate

    @gate.setter
    def gate(self, gate: float) -> None:
        self.encoder.gate = gate
