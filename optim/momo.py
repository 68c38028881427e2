from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from medmom.optim.batches import Batches, inner
from medmom.optim.engine import MomentumOptimizer


class MoMo(MomentumOptimizer):
    """Momentum with a Polyak step: as far as an averaged linear model of the loss reaches down to a lower bound.

    With averages over the steps (share ``momentum`` of the old one) f of the loss, d of the gradient and s of
    <g, w>, and rho the sum of their weights (1, or 1 - momentum^k with ``bias_correction``)::

        n   = (1 + lr weight_decay) (f - rho l - s) + <d, w>
        tau = min(lr / rho, max(n, 0) / <d, d>)
        w  <- (w - tau d) / (1 + lr weight_decay)

    l is ``lower_bound``. With ``online_lower_bound`` (MoMo*) l is estimated, never below ``lower_bound``: where
    u = f - s + <d, w> / (1 + lr weight_decay) lies below rho l, l <- u / (2 rho) before the step; after it,
    l <- (f + <d, w> - s - tau/2 <d, d>) / rho.

    The loss must belong to the gradients: clipping these breaks the model, whose step is bounded anyway. Where the
    model already lies below l there is no step; the state of the first parameter holds l as ``bound`` and counts the
    losses below it in ``below_bound``. With ``maximize`` all this holds for the negated loss. Sums run over all groups,
    each of which has its own lr and weight decay; then l is estimated from these sums group by group, once a step,
    where the authors' code estimates it once a group. Parameters without a gradient are left out of a step's sums.

    Args:
        params: Parameters, or groups of them.
        lr: Largest step, for groups each its own; may follow a schedule.
        momentum: Share of the averages that is kept, in [0, 1).
        weight_decay: Strength of the pull towards zero, taken into account in the step size.
        lower_bound: No loss lies below it: 0 for cross-entropy and Dice.
        online_lower_bound: Whether to estimate a better bound during the training.
        bias_correction: Whether averages start from zero; else they start from the first loss and gradient.
        maximize: Whether to climb.

    Source:
        Schaipp et al. 2024, arXiv:2305.07583; defaults and start of the averages as in momo-opt 0.1.0.
    """

    buffers = ("grad_average",)
    scalars = ("slope",)
    totals = ("loss_average", "weight", "bound", "below_bound")
    shared = ("momentum", "lower_bound", "online_lower_bound", "bias_correction", "maximize")
    needs_loss = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lower_bound: float = 0.0,
        online_lower_bound: bool = False,
        bias_correction: bool = False,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lower_bound": lower_bound}
        switches = {"online_lower_bound": online_lower_bound, "bias_correction": bias_correction}
        super().__init__(params, {**options, **switches, "maximize": maximize})

    def start(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """The average starts from the first gradient, unless it is corrected for its start from zero."""
        return {} if group["bias_correction"] else {"grad_average": grad}

    def update(self, batches: Batches, loss: Tensor | None) -> None:
        """Takes one step of the formulas above."""
        assert loss is not None
        share = 1 - self.param_groups[0]["momentum"]
        found = []
        for batch in batches:
            d, g, w = batch.state["grad_average"], batch.grads, batch.params
            torch._foreach_lerp_(d, g, share)
            found.append(inner((g, w), (d, w), (d, d)))
        gw, dw, dd = batches.sums(found)
        taus = self._step_sizes(batches, loss, self._slope(batches, gw), dw, dd)
        for batch in batches:
            tau = taus[batch.group_index].to(batch.params[0])
            torch._foreach_addcmul_(batch.params, batch.state["grad_average"], [tau] * len(batch.params), value=-1)
            if batch.group["weight_decay"]:
                torch._foreach_div_(batch.params, _shrinkage(batch.group))

    def _share(self, like: Tensor, is_first: Tensor) -> Tensor:
        """Weight of what is new in an average: 1 where it is the first, unless that is corrected for."""
        share = torch.full_like(like, 1 - self.param_groups[0]["momentum"])
        return share if self.param_groups[0]["bias_correction"] else share.masked_fill_(is_first, 1.0)

    def _slope(self, batches: Batches, gw: Tensor) -> Tensor:
        """The sum of s over the parameters, brought up to date."""
        steps = torch.stack([step.to(gw.device) for step in batches.scalars["step"]])
        slopes = torch.stack([slope.to(gw) for slope in batches.scalars["slope"]])
        slopes = slopes.lerp(gw, self._share(slopes, steps <= 1))
        torch._foreach_copy_(batches.scalars["slope"], list(slopes.unbind()))
        return slopes.sum()

    def _step_sizes(self, batches: Batches, loss: Tensor, s: Tensor, dw: Tensor, dd: Tensor) -> list[Tensor]:
        """Step size of each group; brings the averages and the bound up to date."""
        f, rho, bound = (batches.totals[name] for name in ("loss_average", "weight", "bound"))
        lowest, online = (self.param_groups[0][name] for name in ("lower_bound", "online_lower_bound"))
        bound.copy_(torch.where(rho > 0, bound, lowest) if online else torch.full_like(bound, lowest))
        batches.totals["below_bound"].add_(loss < bound)
        share = self._share(rho, rho == 0)
        f.lerp_(loss, share)
        rho.lerp_(torch.ones_like(rho), share)
        groups = list(zip(self.param_groups, batches.spans, strict=True))
        if online:
            u = f - s + sum(dw[span].sum() / _shrinkage(group) for group, span in groups)
            bound.copy_(torch.where(u < rho * bound, (u / (2 * rho)).clamp(min=lowest), bound))
        taus = []
        for group, _ in groups:
            n = _shrinkage(group) * (f - rho * bound - s) + dw.sum()
            quotient = (n.clamp(min=0) / dd.sum()).masked_fill(dd.sum() == 0, 0.0)
            taus.append(torch.minimum(quotient, group["lr"] / rho))
        if online:
            fall = sum(tau * dd[span].sum() / 2 for tau, (_, span) in zip(taus, groups, strict=True))
            bound.copy_(((f + dw.sum() - s - fall) / rho).clamp(min=lowest))
        return taus


def _shrinkage(group: dict[str, Any]) -> float:
    factor: float = 1 + group["lr"] * group["weight_decay"]
    return factor
