from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim import kernels
from medmom.optim.batches import Batch, Batches, inner, is_readable
from medmom.optim.two_points import TwoPoints, move_, plan


class ScheduleFreePolyak(TwoPoints):
    """Schedule-free descent whose step size follows from the loss, the gradient and a lower bound (schedulep).

    At y, with the loss f, its gradient g and b for ``momentum``, in the metric D (1, or that of Adam where ``beta2``
    is given)::

        n   = f - lower_bound + b <g, z - x>,  where b (z - x) = z - y
        tau = min(lr, max(n, 0) / max(<g, g / D>, safeguard))
        z  <- z - tau (g / D + weight_decay y)
        x  <- (1 - c) x + c z,  c = 1 / t, but 0 where lr is 0
        y  <- (1 - b) z + b x
        D   = sqrt(v / (1 - beta2^t)) + eps,  v <- beta2 v + (1 - beta2) g^2

    where t counts the steps of the parameter, from 1. x, y and z start at the parameter, which holds y while training
    and x after ``eval()``: see ``TwoPoints``.

    This needs no tuning where the model can reach the bound on every batch. Where it cannot, a batch's loss says little
    about the way still to go: then only ``lr`` keeps the steps from staying long, and a tuned rule is better. The loss
    must belong to the gradients, so do not clip these. Sums run over all groups, each of which has its own lr and
    decay; parameters without a gradient are left out of a step's sums. With ``maximize`` all this holds for the
    negated loss. The state of the first parameter holds the last tau, the largest of the groups that had gradients,
    as ``step_size``, and counts losses below the bound in ``below_bound``; where n is negative there is no step.

    Args:
        params: Parameters, or groups of them.
        lr: Largest tau, for groups each its own; may follow a schedule from outside. 0 stands still.
        momentum: How near y lies to x, in (0, 1).
        beta2: Share of v that is kept, in [0, 1); None: no v, and D is 1.
        eps: Added to the root in D.
        lower_bound: No loss lies below it: 0 for cross-entropy and Dice.
        safeguard: Least denominator, greater than 0.
        weight_decay: Factor of y that is taken off at every step, times tau; the step size knows nothing of it.
        maximize: Whether to climb.

    Raises:
        ValueError: An option is out of its range.

    Source:
        Oikonomou et al. 2026, arXiv:2511.07767v2, of which only restatements were at hand: step size and average
        as derived there from <g, z - x*> >= f(y) - f(x*) + b <g, z - x>; ``lr`` and the decay are additions.
    """

    totals = ("below_bound", "step_size")
    reported = totals
    shared = ("beta2", "eps", "lower_bound", "safeguard", "maximize")
    needs_loss = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        beta2: float | None = None,
        eps: float = 1e-8,
        lower_bound: float = 0.0,
        safeguard: float = 1e-12,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if beta2 is not None and not 0 <= beta2 < 1:
            raise ValueError(f"ScheduleFreePolyak: beta2 is {beta2}; it must lie in [0, 1), or be None.")
        if not safeguard > 0:
            raise ValueError(f"ScheduleFreePolyak: safeguard is {safeguard}; it must be greater than 0.")
        options = {"lr": lr, "momentum": momentum, "beta2": beta2, "eps": eps, "lower_bound": lower_bound}
        extra = {"safeguard": safeguard, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**options, **extra})

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of y - z, and of v where there is one."""
        return ("apart",) if self.param_groups[0]["beta2"] is None else ("apart", "square")

    def update(self, batches: Batches, loss: Tensor | None) -> None:
        """Takes one step of the formulas above."""
        assert loss is not None
        found = []
        for batch in batches:
            # Computed twice: to keep the quotients would take as much memory as the parameters.
            squares = [v.clone() for v in batch.state.get("square", [])]
            apart = batch.state["apart"]
            found.append(inner((batch.grads, apart), (batch.grads, _in_metric(batch, squares or None))))
        products = batches.sums(found)
        ahead = -(products[0] * batches.stacked("unit")).sum()
        taus = self._step_sizes(batches, loss, ahead, products[1].sum())
        counts = batches.stacked("step")
        spans = zip(batches.groups, batches.spans, strict=True)
        weights = torch.cat([(group["lr"] > 0) / counts[span] for group, span in spans])
        for batch, moves in plan(batches, taus, weights):
            move_(batch, _direction(batch), taus[batch.group_index], moves, batch.group["weight_decay"])

    def _step_sizes(self, batches: Batches, loss: Tensor, ahead: Tensor, norm: Tensor) -> Sequence[kernels.Number]:
        """Tau of each group, from <g, z - y> and <g, g / D>: floats where they can be read without waiting."""
        options = self.param_groups[0]
        batches.totals["below_bound"].add_(loss < options["lower_bound"])
        numerator = (loss - options["lower_bound"] + ahead).clamp(min=0)
        quotient = numerator / norm.clamp(min=options["safeguard"])
        taus = torch.stack([quotient.clamp(max=group["lr"]) for group in batches.groups])
        used = [tau for tau, span in zip(taus, batches.spans, strict=True) if span.start < span.stop]
        batches.totals["step_size"].copy_(torch.stack(used).amax())
        return taus.tolist() if is_readable(taus) else taus.unbind()


def _in_metric(batch: Batch, squares: list[Tensor] | None) -> list[Tensor]:
    """The gradient divided by D; brings ``squares`` up to date, where there are any."""
    if squares is None:
        return batch.grads
    group, unkept = batch.group, [torch.zeros_like(p) for p in batch.params]
    # What the kernel would do to a parameter at 0, at a step size of -1.
    found = [torch.zeros_like(p) for p in batch.params]
    betas = (0.0, group["beta2"])
    kernels.adam_(batch, batch.grads, unkept, squares, params=found, lr=-1.0, betas=betas, eps=group["eps"])
    return found


def _direction(batch: Batch) -> list[Tensor]:
    """The gradient divided by D; brings v up to date, where there is one."""
    return _in_metric(batch, batch.state.get("square"))
