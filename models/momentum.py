"""The momentum stage: residual blocks of one shape, coupled by a velocity."""

from collections.abc import Iterable
from math import log
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medmom.models.gates import (
    BITS,
    LOW_PRECISION_BITS,
    Coupling,
    Gating,
    check_exact,
    check_gate,
    check_learned,
    check_reversible,
    gate_range,
    residual_weight,
    smallest_gate,
)
from medmom.models.inversion import invertible_flow, is_branch, is_low
from medmom.models.recompute import Precision, checkpointed, is_recorded
from medmom.models.states import Number, plus

Memory = Literal["plain", "checkpoint", "reversible", "exact"]


class MomentumStage(nn.Module):
    """Blocks that share one shape, run as ``v' = g v + c f(x)``, ``x' = x + v'``.

    With gate 0 this is the blocks one after the other. A velocity that starts at zero makes a single block with the
    normalised coupling a plain residual one for every gate; without blocks the stage gives its input.

    What is kept for the backward pass, with the same parameters and the same keys, changed at any time:

    - ``"plain"``: all activations. The fastest; for stages of few blocks.
    - ``"checkpoint"``: the input of every block; about a third more time. For 2 to 4 blocks, or gate 0.
    - ``"reversible"``: features and velocity after the last block, whatever the number of blocks; the time of
      ``"checkpoint"``. For 5 blocks or more. Inverting the products with the gate costs ``m log2(1 / g)`` bits:
      5 are allowed, 3 where the blocks compute in bf16 or fp16. Gate 1 costs none.
    - ``"exact"``: the same in integers with a store for the lost digits, so that the blocks see the same bits on
      both ways. For gates that reversible refuses, and where gradients must not depend on rounding. Features stay
      below 1024 (16384 in low precision).

    Without gradients, in evaluation as in export, every one of them is the plain loop.

    Args:
        blocks: Modules from (B, C, *spatial) to the same shape. One with ``is_branch = True`` gives ``f(x)``; any
            other gives ``x + f(x)``.
        gate: ``g`` in [0, 1]: how much of the velocity a block leaves in place; where gates are learned, their start.
        coupling: How ``c`` follows from ``g``, see ``medmom.models.gates.residual_weight``. ``"normalised"`` keeps
            the scale of a residual stage for every gate; ``"ema"`` is the papers', for comparisons with them.
        gating: ``"fixed"`` is the choice without evidence for another; ``"block"`` learns a gate a block, to see what
            depth wants; ``"channel"`` one a channel, where channels differ in kind. Learned gates stay within
            ``medmom.models.gates.gate_range``.
        channels: ``C``; needed for channel gates alone.
        memory: What is kept, as above.

    Raises:
        ValueError: An argument is unknown, the gate lies outside its range, or the memory does not suit the stage.

    Source:
        Sander et al. 2021, arXiv 2102.07870, equation 5; the same in arXiv 2408.05692 for segmentation.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        gate: float = 0.9,
        coupling: Coupling = "normalised",
        *,
        gating: Gating = "fixed",
        channels: int | None = None,
        memory: Memory = "plain",
    ) -> None:
        super().__init__()
        check_choice("coupling", coupling, Coupling)
        check_choice("gating", gating, Gating)
        check_gate(gate, coupling)
        self.blocks = nn.ModuleList(blocks)
        self.coupling, self.gating = coupling, gating
        self._gate, self._memory = float(gate), "plain"
        self.rho = nn.ParameterList(self._first_rho(channels))
        self.memory = memory

    @property
    def gate(self) -> float:
        """The fixed gate, or the one at which learned gates started.

        Raises:
            ValueError: On setting: learned gates are not set, or the gate does not suit coupling and memory.
        """
        return self._gate

    @gate.setter
    def gate(self, gate: float) -> None:
        self.check_gate(gate)
        self._gate = float(gate)

    @property
    def memory(self) -> str:
        """What is kept for the backward pass.

        Raises:
            ValueError: On setting: it is unknown or does not suit the stage.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self.check_memory(memory)
        self._memory = memory

    @property
    def weight(self) -> float:
        """``c`` of a fixed gate."""
        return residual_weight(self.coupling, self._gate, max(1, len(self.blocks)))

    def learned_gates(self) -> Tensor:
        """Gates as they are now, shape (m, 1) or (m, C); empty where they are fixed.

        ``g = low + (high - low) sigmoid(rho)`` with the bounds of ``medmom.models.gates.gate_range``.
        """
        if not len(self.rho):
            return torch.empty(0, 1)
        low, high = gate_range(self.coupling, len(self.blocks))
        return low + (high - low) * torch.sigmoid(torch.stack(list(self.rho)))

    def forward(self, x: Tensor) -> Tensor:
        """Features after all blocks, from zero velocity; shape (B, C, *spatial) in and out."""
        return self.flow(x)[0]

    def flow(self, x: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features and velocity after all blocks.

        Args:
            x: Features, shape (B, C, *spatial).
            velocity: Of the same shape; None is zero.

        Returns:
            Both, each of the shape of ``x``; the velocity is None as long as nothing has moved.

        Raises:
            ValueError: In reversible mode the blocks compute in bf16 or fp16, and the gate suits fp32 alone.
            OverflowError: In exact mode a value is too large.
        """
        if not self.blocks:
            return x, velocity
        gates, weights = self._learned()
        fixed = self._gate, self.weight
        if self._memory in ("reversible", "exact") and is_recorded():
            self._check_precision(x)
            flow: tuple[Tensor, Tensor] = invertible_flow(
                tuple(self.blocks),
                x,
                velocity,
                pair=fixed,
                gates=gates,
                weights=weights,
                is_exact=self._memory == "exact",
            )
            return flow
        for index, block in enumerate(self.blocks):
            pair: tuple[Number, Number] = fixed
            if gates is not None and weights is not None:
                shape = (1, -1, *[1] * (x.ndim - 2))
                pair = (gates[index].view(shape).to(x.dtype), weights[index].view(shape).to(x.dtype))
            x, velocity = self._step(block, x, velocity, *pair)
        return x, velocity

    def _step(
        self, block: nn.Module, x: Tensor, velocity: Tensor | None, gate: Number, weight: Number
    ) -> tuple[Tensor, Tensor]:
        proposal = checkpointed(block, x) if self._memory == "checkpoint" else block(x)
        is_fixed = isinstance(weight, float)
        if is_branch(block):
            moved = proposal * weight
        elif is_fixed and weight == 1 and (velocity is None or gate == 0):
            # x + (proposal - x) would round; the host's result is to come out as it is.
            return proposal, proposal - x
        else:
            # In place on the fresh difference where nothing is kept of it: not where the weight is learned.
            moved = (proposal - x).mul_(weight) if is_fixed else (proposal - x) * weight
        if velocity is not None:
            moved = plus(moved, velocity, gate)
        return x + moved, moved

    def _learned(self) -> tuple[Tensor | None, Tensor | None]:
        if not len(self.rho):
            return None, None
        gates = self.learned_gates()
        return gates, residual_weight(self.coupling, gates, len(self.blocks))

    def _first_rho(self, channels: int | None) -> list[nn.Parameter]:
        if self.gating == "fixed" or not self.blocks:
            return []
        if self.gating == "channel" and channels is None:
            raise ValueError("gating channel needs the number of channels; give channels.")
        check_learned(self._gate, self.coupling, len(self.blocks))
        low, high = gate_range(self.coupling, len(self.blocks))
        share = (self._gate - low) / (high - low)
        start = log(share / (1 - share))
        num_gates = channels if self.gating == "channel" and channels else 1
        return [nn.Parameter(torch.full((num_gates,), start)) for _ in self.blocks]

    def check_gate(self, gate: float) -> None:
        """Refuses a gate that cannot be set.

        Raises:
            ValueError: Gates are learned, or this one does not suit coupling and memory.
        """
        if self.gating != "fixed":
            raise ValueError(f"gating {self.gating} learns the gate; only a fixed one can be set.")
        check_gate(gate, self.coupling)
        self._check_pair(self._memory, gate)

    def check_memory(self, memory: str) -> None:
        """Refuses a memory that cannot be set.

        Raises:
            ValueError: It is unknown or does not suit blocks and gate.
        """
        check_choice("memory", memory, Memory)
        self._check_pair(memory, self._gate)

    def _check_pair(self, memory: str, gate: float) -> None:
        if memory not in ("reversible", "exact"):
            return
        if len(self.blocks) < 2:
            raise ValueError(
                f"memory {memory} needs two blocks or more, and this stage has {len(self.blocks)}; "
                "take memory plain or checkpoint."
            )
        if gate == 0:
            smallest = 0.5 if memory == "exact" else smallest_gate(len(self.blocks), BITS)
            raise ValueError(
                f"gate 0 forgets the velocity, which memory {memory} needs to run backwards; take gate {smallest:g} or "
                "more, or memory plain or checkpoint."
            )
        if memory == "exact":
            self._check_exact(gate)
        elif self.gating == "fixed":
            check_reversible(gate, len(self.blocks), BITS)

    def _check_exact(self, gate: float) -> None:
        if self.gating != "fixed":
            raise ValueError(f"memory exact needs a fixed gate, and gating {self.gating} learns it; take reversible.")
        if any(isinstance(part, _BatchNorm) for part in self.blocks.modules()):
            raise ValueError(
                "memory exact cannot run batch normalisation back to the bit; take group normalisation, or memory "
                "reversible."
            )
        check_exact(gate, self.coupling)

    def _check_precision(self, x: Tensor) -> None:
        if self._memory == "reversible" and self.gating == "fixed" and is_low(Precision.now(x.device.type), x.dtype):
            check_reversible(self._gate, len(self.blocks), LOW_PRECISION_BITS)

    def extra_repr(self) -> str:
        """Gate, coupling and memory, for the printed network."""
        return f"gate={self._gate:g}, coupling={self.coupling}, gating={self.gating}, memory={self._memory}"


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuses a word that is none of a ``Literal``'s.

    Raises:
        ValueError: It is not; the legal ones are named.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(get_args(choices))}.")
