"""The momentum stage: residual blocks of one shape, coupled by a velocity."""

from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor, nn

Coupling = Literal["normalised", "ema"]


def residual_weight(coupling: Coupling, gate: float, num_blocks: int) -> float:
    """Weight ``c`` of the residuals in ``v' = g v + c f(x)``.

    - ``"ema"``: ``c = 1 - g``.
    - ``"normalised"``: ``c = m / sum_{j=1..m} S_j`` with ``S_j = 1 + g + ... + g^(j-1)`` and ``m`` blocks. From zero
      velocity, block ``k`` then enters the stage's output with weight ``c S_(m-k+1)``, and the mean of these weights
      is 1 for every gate, so the stage has the scale of a residual one: ``c = 1`` at ``g = 0``, ``2 / (m + 1)`` at
      ``g = 1``.

    Args:
        coupling: Which of the two.
        gate: The gate ``g`` in [0, 1].
        num_blocks: ``m``, at least 1.

    Returns:
        ``c``.

    Source:
        Sander et al. 2021, arXiv 2102.07870 (``"ema"``, with ``g`` written gamma). ``"normalised"`` is ours.
    """
    if coupling == "ema":
        return 1.0 - gate
    power, partial, total = 1.0, 0.0, 0.0
    for _ in range(num_blocks):
        partial += power
        total += partial
        power *= gate
    return num_blocks / total


class MomentumStage(nn.Module):
    """Blocks that share one shape, run as ``v' = g v + c f(x)``, ``x' = x + v'`` with ``f(x) = block(x) - x``.

    With gate 0 this is the blocks one after the other. A velocity that starts at zero makes a single block with the
    normalised coupling a plain residual one for every gate; without blocks the stage gives its input.

    Args:
        blocks: Modules from (B, C, *spatial) to the same shape.
        gate: ``g`` in [0, 1]: how much of the velocity a block leaves in place.
        coupling: How ``c`` follows from ``g``, see ``residual_weight``.

    Raises:
        ValueError: The gate lies outside [0, 1], the coupling is unknown, or the two leave every block without weight.

    Source:
        Sander et al. 2021, arXiv 2102.07870, equation 5; the same in arXiv 2408.05692 for segmentation.
    """

    def __init__(self, blocks: Iterable[nn.Module], gate: float = 0.9, coupling: Coupling = "normalised") -> None:
        super().__init__()
        if coupling not in get_args(Coupling):
            raise ValueError(f"coupling is {coupling!r}; it is one of {', '.join(get_args(Coupling))}.")
        if not 0 <= gate <= 1:
            raise ValueError(f"gate is {gate}; it lies between 0 and 1.")
        if coupling == "ema" and gate == 1:
            raise ValueError("gate 1 with coupling ema gives every block the weight 0; lower it or take normalised.")
        self.blocks = nn.ModuleList(blocks)
        self.gate = float(gate)
        self.coupling = coupling
        self.weight = residual_weight(coupling, self.gate, max(1, len(self.blocks)))

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
        """
        for block in self.blocks:
            x, velocity = self._step(block(x), x, velocity)
        return x, velocity

    def _step(self, proposal: Tensor, x: Tensor, velocity: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = proposal - x
        if self.weight == 1 and (velocity is None or self.gate == 0):
            # x + (proposal - x) would round; the host's result is to come out as it is.
            return proposal, residual
        # In place on the fresh difference: a subtraction and a product with a number keep nothing for backward.
        residual *= self.weight
        if velocity is not None:
            residual.add_(velocity, alpha=self.gate)
        return x + residual, residual

    def extra_repr(self) -> str:
        """Gate and coupling, for the printed network."""
        return f"gate={self.gate:g}, coupling={self.coupling}"
