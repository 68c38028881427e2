from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim.batches import Batches
from medmom.optim.engine import MomentumOptimizer
from medmom.optim.kernels import sgd_


class HeavyBall(MomentumOptimizer):
    """Gradient descent with Polyak's momentum.

    v <- momentum v + g, w <- w - lr v, with v = 0 at first; g is the gradient plus ``weight_decay`` w.
    With ``nesterov``: w <- w - lr (g + momentum v).

    Args:
        params: Parameters, or groups of them.
        lr: Step size.
        momentum: Share of v that is kept, in [0, 1).
        nesterov: Whether to look one momentum step ahead.
        weight_decay: Factor of w that is added to the gradient.
        maximize: Whether to climb.

    Source:
        Polyak 1964, doi:10.1016/0041-5553(64)90137-5; Nesterov's form and the kernel as in ``torch.optim.SGD``.
    """

    buffers = ("velocity",)
    fused = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize})

    def update(self, batches: Batches, loss: Tensor | None) -> None:
        """Takes one step of the formula above."""
        heavy_ball_(batches)


def heavy_ball_(batches: Batches) -> None:
    """One step of ``HeavyBall`` on every batch, by the options of its group.

    Args:
        batches: With a buffer ``velocity``.
    """
    for batch in batches:
        options = {name: batch.group[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
        sgd_(batch, batch.state["velocity"], **options)
