"""Gates of momentum: how they weigh the residuals, what their inversion costs, and where they may be learned."""

from math import ceil, inf, log2
from typing import Literal, TypeVar

from torch import Tensor

Coupling = Literal["normalised", "ema"]
Gating = Literal["fixed", "block", "channel"]
Gate = TypeVar("Gate", float, Tensor)

BITS = 5.0
"""What a stage may lose when its state and its blocks compute in fp32."""

LOW_PRECISION_BITS = 3.0
"""What it may lose when the blocks compute in bf16 or fp16: a last digit of x then flips roundings inside them."""

EXACT_GATES = {1.0: (1, 1), 0.5: (1, 2), 0.75: (3, 4), 0.875: (7, 8), 0.9375: (15, 16)}
"""Gates of the exact mode as fractions p / q."""


def residual_weight(coupling: Coupling, gate: Gate, num_blocks: int) -> Gate:
    """Weight ``c`` of the residuals in ``v' = g v + c f(x)``.

    - ``"ema"``: ``c = 1 - g``.
    - ``"normalised"``: ``c = m / sum_{j=1..m} S_j`` with ``S_j = 1 + g + ... + g^(j-1)`` and ``m`` blocks. From zero
      velocity, block ``k`` then enters the stage's output with weight ``c S_(m-k+1)``, and the mean of these weights
      is 1 for every gate, so the stage has the scale of a residual one: ``c = 1`` at ``g = 0``, ``2 / (m + 1)`` at
      ``g = 1``.

    Args:
        coupling: Which of the two.
        gate: The gate ``g`` in [0, 1]; a tensor of learned gates keeps its gradient.
        num_blocks: ``m``, at least 1.

    Returns:
        ``c``, of the kind and shape of ``gate``.

    Source:
        Sander et al. 2021, arXiv 2102.07870 (``"ema"``, with ``g`` written gamma). ``"normalised"`` is ours.
    """
    if coupling == "ema":
        return 1 - gate
    power = gate**0
    partial = total = 0 * gate
    for _ in range(num_blocks):
        partial = partial + power
        total = total + partial
        power = power * gate
    return num_blocks / total


def lost_bits(gate: float, num_blocks: int) -> float:
    """Binary digits that inverting ``num_blocks`` products with ``gate`` costs: infinite at gate 0, none at 1."""
    return num_blocks * log2(1 / gate) if gate > 0 else inf


def smallest_gate(num_blocks: int, bits: float) -> float:
    """Lowest gate whose inversion over ``num_blocks`` costs no more than ``bits``, rounded up to three places."""
    return ceil(1000 * 2 ** (-bits / num_blocks)) / 1000


def gate_range(coupling: Coupling, num_blocks: int) -> tuple[float, float]:
    """Bounds between which gates are learned.

    The lower one keeps the stage within 3 bits, whatever the gates become. It is the same for every way to keep
    memory, so that a network can change it between two steps without changing its function.

    Args:
        coupling: ``"ema"`` ends at 0.95, as at 1 its blocks would have no weight.
        num_blocks: Of the stage, at least 1.

    Returns:
        Lower and upper bound.
    """
    return 2 ** (-LOW_PRECISION_BITS / num_blocks), 0.95 if coupling == "ema" else 1.0


def check_gate(gate: float, coupling: Coupling) -> None:
    """Refuses what is no gate.

    Raises:
        ValueError: The gate lies outside [0, 1], or with this coupling leaves every block without weight.
    """
    if not 0 <= gate <= 1:
        raise ValueError(f"gate is {gate}; it lies between 0 and 1.")
    if coupling == "ema" and gate == 1:
        raise ValueError("gate 1 with coupling ema gives every block the weight 0; lower it or take normalised.")


def check_learned(gate: float, coupling: Coupling, num_blocks: int) -> None:
    """Refuses a gate from which no learning can start.

    Raises:
        ValueError: It is not strictly within ``gate_range``.
    """
    low, high = gate_range(coupling, num_blocks)
    if not low < gate < high:
        raise ValueError(
            f"gate {gate:g} cannot be learned in a stage of {num_blocks} blocks with coupling {coupling}: the range is "
            f"{low:.3f} to {high:g}, ends excluded. Start within it, or take a fixed gate."
        )


def check_reversible(gate: float, num_blocks: int, bits: float) -> None:
    """Refuses a fixed gate whose inversion in floating point would lose more than ``bits``.

    Raises:
        ValueError: It does; the smallest legal gate is named.
    """
    lost = lost_bits(gate, num_blocks)
    if lost > bits:
        raise ValueError(
            f"gate {gate:g} over {num_blocks} blocks loses {lost:.3g} bits when it is inverted, and the budget is "
            f"{bits:g}{' in low precision' if bits == LOW_PRECISION_BITS else ''}; the smallest legal gate is "
            f"{smallest_gate(num_blocks, bits):g}. Raise it, take gate 1 with coupling normalised (it loses none), or "
            "memory exact."
        )


def check_exact(gate: float, coupling: Coupling) -> None:
    """Refuses a gate that is none of the exact mode's fractions.

    Raises:
        ValueError: It is not one of 1/2, 3/4, 7/8, 15/16 and, unless the coupling is ``"ema"``, 1; the nearest is
            named.
    """
    legal = [each for each in EXACT_GATES if each < 1 or coupling != "ema"]
    if gate not in legal:
        nearest = min(legal, key=lambda each: abs(each - gate))
        raise ValueError(
            f"memory exact needs a gate of 1/2, 3/4, 7/8, 15/16{'' if coupling == 'ema' else ' or 1'}, not {gate:g}; "
            f"the nearest is {nearest:g}."
        )
