"""Features and velocity of an invertible stage: two ways to keep them, each with its steps forth and back.

A block's step is ``v' = g v + c f(x)``, ``x' = x + v'``. Forth: ``advance``. Back, for each block from the last one:
``step_back`` undoes the second equation, and when ``f(x)`` is known again, ``slow_down`` undoes the first.

``FloatState`` is as exact as fp32 is; ``IntegerState`` is exact to the bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmom.models.gates import EXACT_GATES

Number = float | Tensor

UNIT, LOW_PRECISION_UNIT = 2.0**-20, 2.0**-16
"""What an integer counts: blocks in bf16 or fp16 have no use for the finer one, and reach further with the other."""

LIMIT = 2**30
"""Bound of the integers: the sum of two of them still fits into 32 bits."""

STORE_LIMIT = 255
"""Bound of the store of lost digits, one byte an element."""


def plus(a: Tensor, b: Tensor, factor: Number) -> Tensor:
    """Gives ``a + factor b``, in one pass where the factor is a number."""
    return torch.add(a, b, alpha=factor) if isinstance(factor, float) else a + b * factor


class FloatState:
    """State in floating point, fp32 or wider whatever precision the blocks have.

    Every division by the gate on the way back widens the rounding of the way forth; ``medmom.models.gates`` holds the
    budget. In bf16 or fp16 no gate would do.

    Args:
        features: Shape (B, C, *spatial).
        velocity: Of the same shape; None is zero.
    """

    def __init__(self, features: Tensor, velocity: Tensor | None = None) -> None:
        dtype = torch.promote_types(features.dtype, torch.float32)
        # Detached, or a compiled block would be compiled again for an input with a gradient.
        self.features = features.detach().to(dtype)
        self.velocity = None if velocity is None else velocity.to(dtype)

    def advance(self, residual: Tensor, gate: Number, weight: Number) -> None:
        """Takes the step of one block."""
        # The order of the plain loop: in fp32 both give the same bits.
        moved = residual.to(self.features.dtype) * weight
        self.velocity = moved if self.velocity is None else plus(moved, self.velocity, gate)
        self.features = self.features + self.velocity

    def step_back(self) -> None:
        """Gives ``features`` as they were before the last step."""
        self.features = self.features - self._moving

    def slow_down(self, residual: Tensor, gate: Number, weight: Number) -> None:
        """Gives ``velocity`` as it was before the last step."""
        velocity = plus(self._moving, residual, -weight)
        self.velocity = velocity if isinstance(gate, float) and gate == 1 else velocity.div_(gate)

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """What has to be kept for the way back: features and velocity."""
        return self.features, self._moving

    def end_forth(self) -> None:
        """There is nothing to check."""

    def end_back(self) -> None:
        """There is nothing to check: the budget bounds the error."""

    @property
    def _moving(self) -> Tensor:
        assert self.velocity is not None, "after a step there is a velocity"
        return self.velocity


class IntegerState:
    """State in integers of one unit, with the digits that products with the gate ``p / q`` lose in a byte each.

    Features ``X`` and velocity ``V`` count units; the store ``B`` begins empty and is empty again when all steps are
    undone. With all divisions rounded down and ``F = round(c f(x) / unit)``:

    - forth: ``V = a q + r``; ``B q + r = b p + e``; ``B := b``; ``V := a p + e + F``; ``X := X + V``
    - back: ``X := X - V``; ``V - F = a p + e``; ``B p + e = b q + r``; ``B := b``; ``V := a q + r``

    Gate 1 loses no digits and needs no store.

    Args:
        saved: What ``saved`` gives: ``X`` and ``V`` as int32, shape (B, C, *spatial), the seal of the first ones, and
            ``B`` as uint8, which may be absent.
        unit: What 1 stands for.
        dtype: Of ``features`` and ``velocity``.

    Source:
        The digit store is that of Maclaurin et al. 2015, arXiv 1502.03492, and Sander et al. 2021, arXiv 2102.07870;
        rounding down on both ways, one byte an element and its check are ours.
    """

    def __init__(self, saved: Sequence[Tensor], unit: float, dtype: torch.dtype) -> None:
        self._x, self._v, self._seal = saved[:3]
        self._store = saved[3] if len(saved) > 3 else None
        self._unit, self._dtype = unit, dtype
        self._largest = self._fullest = torch.zeros((), device=self._x.device)

    @classmethod
    def start(cls, features: Tensor, velocity: Tensor | None, unit: float, *, has_store: bool) -> "IntegerState":
        """State before the first block, rounded to whole units; no velocity is zero."""
        x = torch.zeros_like(features, dtype=torch.int32)
        store = [torch.zeros_like(x, dtype=torch.uint8)] if has_store else []
        state = cls([x, x, x, *store], unit, torch.promote_types(features.dtype, torch.float32))
        scaled = [state._scaled(part, 1) for part in (features, velocity) if part is not None]
        for part in scaled:
            state._watch(part)
        state._x, state._v = _whole(scaled[0]), x if velocity is None else _whole(scaled[1])
        state._seal = state._sum_up()
        return state

    @property
    def features(self) -> Tensor:
        """``X`` as floats."""
        return self._x.to(self._dtype) * self._unit

    @property
    def velocity(self) -> Tensor:
        """``V`` as floats."""
        return self._v.to(self._dtype) * self._unit

    def advance(self, residual: Tensor, gate: Number, weight: Number) -> None:
        """Takes the step of one block."""
        p, q = EXACT_GATES[float(gate)]
        scaled = self._scaled(residual, weight)
        self._watch(scaled)
        gain = _whole(scaled)
        if self._store is None:
            self._v = gain.add_(self._v)
        else:
            digits = self._store.to(torch.int32).mul_(q).add_(self._v.bitwise_and(q - 1))
            store = digits.div(p, rounding_mode="floor")
            lost = digits.sub_(store, alpha=p)
            self._v = gain.add_(lost).add_(self._v.bitwise_right_shift(_log2(q)), alpha=p)
            self._fullest = torch.maximum(self._fullest, store.amax())
            self._store = store.to(torch.uint8)
        self._x = self._x + self._v
        self._watch(self._v)
        self._watch(self._x)

    def step_back(self) -> None:
        """Gives the features as they were before the last step."""
        self._x = self._x - self._v

    def slow_down(self, residual: Tensor, gate: Number, weight: Number) -> None:
        """Gives the velocity as it was before the last step."""
        p, q = EXACT_GATES[float(gate)]
        slower = self._v - _whole(self._scaled(residual, weight))
        if self._store is not None:
            kept = slower.div(p, rounding_mode="floor")
            digits = self._store.to(torch.int32).mul_(p).add_(slower.sub_(kept, alpha=p))
            self._store = digits.bitwise_right_shift(_log2(q)).to(torch.uint8)
            slower = kept.mul_(q).add_(digits.bitwise_and_(q - 1))
        self._v = slower

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """What has to be kept for the way back: ``X``, ``V``, the seal and, where there is one, ``B``."""
        kept = (self._x, self._v, self._seal)
        return kept if self._store is None else (*kept, self._store)

    def end_forth(self) -> None:
        """Checks the way forth; on a GPU the one place where it waits.

        Raises:
            OverflowError: A value left the range of the integers, or the lost digits their byte.
        """
        if self._x.is_meta:
            return
        largest, fullest = torch.stack((self._largest, self._fullest)).tolist()
        if not largest < LIMIT:
            raise OverflowError(
                f"In memory exact features and velocity must stay below {LIMIT * self._unit:g} and finite; here one "
                f"reached {largest * self._unit:g}. Take memory reversible or plain."
            )
        if fullest > STORE_LIMIT:
            raise OverflowError(
                f"In memory exact the digits that the gate loses must fit into a byte; here they made {fullest:.0f}. "
                "Take a gate nearer to 1 (1 loses none), fewer blocks a stage, or memory reversible."
            )

    def end_back(self) -> None:
        """Checks the way back.

        Raises:
            RuntimeError: It ends elsewhere than the way forth began, or digits are left over: a block did not compute
                the same bits twice.
        """
        if self._x.is_meta:
            return
        differs = (self._sum_up() != self._seal).any()
        if self._store is not None:
            differs |= self._store.amax() > 0
        if bool(differs):
            raise RuntimeError(
                "Memory exact needs blocks that compute the same bits twice, and one did not. Do not compile "
                "them, on a GPU set torch.backends.cudnn.deterministic to True, or take memory reversible."
            )

    def _sum_up(self) -> Tensor:
        """A few numbers that another ``X`` or ``V`` would hardly have as well: sums, and sums of wrapped squares."""
        sums = [part.sum(dtype=torch.int64) for x in (self._x, self._v) for part in (x, x * x)]
        return torch.stack(sums)

    def _scaled(self, values: Tensor, weight: Number) -> Tensor:
        return values.to(self._dtype) * (weight / self._unit)

    def _watch(self, values: Tensor) -> None:
        low, high = torch.aminmax(values.detach())
        # The maximum with nan is nan, so what is not finite is found as well.
        self._largest = torch.maximum(self._largest, torch.maximum(high.float(), low.float().neg()))


def _whole(scaled: Tensor) -> Tensor:
    return scaled.round_().to(torch.int32)


def _log2(power: int) -> int:
    return power.bit_length() - 1
