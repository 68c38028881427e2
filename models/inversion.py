"""Gradients of a momentum stage that stores nothing between its blocks.

The way back starts from features and velocity after the last block, computes those before each block anew, and
returns the gradients of all inputs and parameters. With cotangents ``a`` of ``x'`` and ``b`` of ``v'`` of
``v' = g v + c f(x)``, ``x' = x + v'``, and ``h = a + b``:

    dL/dx = a + c h (df/dx)    dL/dtheta = c h (df/dtheta)    dL/dv = g h    dL/dg = sum h v    dL/dc = sum h f
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from medmom.models.recompute import Draws, FrozenBuffers, Precision, check_replay, stand_ins
from medmom.models.states import LOW_PRECISION_UNIT, UNIT, FloatState, IntegerState, Number

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Course:
    """One run through a stage: its blocks and what the way back has to know of the way forth.

    Attributes:
        blocks: Of the stage.
        gate: Of every block, where it is fixed.
        weight: Of every residual, where it is fixed.
        is_exact: Whether the state is kept in integers.
        precision: Autocast of the way forth.
        dtype: In which the blocks are given the features.
        parameters: Those of each block that learn.
        draws: Random numbers of each block.
    """

    blocks: Sequence[nn.Module]
    gate: float
    weight: float
    is_exact: bool
    precision: Precision
    dtype: torch.dtype
    parameters: list[list[nn.Parameter]] = field(init=False)
    draws: list[Draws] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Gathers the parameters.

        Raises:
            RuntimeError: The blocks are copies of ``DataParallel``, which have none.
        """
        if any(getattr(block, "_is_replica", False) for block in self.blocks):
            raise RuntimeError(
                "DataParallel makes copies whose parameters a stage that runs backwards cannot find; take "
                "DistributedDataParallel, or memory plain."
            )
        self.parameters = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]

    def start(self, features: Tensor, velocity: Tensor | None) -> FloatState | IntegerState:
        """State before the first block."""
        if self.is_exact:
            return IntegerState.start(features, velocity, self._unit, has_store=self.gate != 1)
        return FloatState(features, velocity)

    def end(self, saved: Sequence[Tensor]) -> FloatState | IntegerState:
        """State after the last block."""
        if self.is_exact:
            return IntegerState(saved, self._unit, torch.promote_types(self.dtype, torch.float32))
        return FloatState(*saved)

    @property
    def _unit(self) -> float:
        return LOW_PRECISION_UNIT if is_low(self.precision, self.dtype) else UNIT

    def check_parameters(self) -> int:
        """Counts the parameters.

        Raises:
            RuntimeError: The blocks have others by now, so that what they compute would have other gradients.
        """
        for block, parameters in zip(self.blocks, self.parameters, strict=True):
            here = {id(parameter) for parameter in block.parameters()}
            if not all(id(parameter) in here for parameter in parameters):
                raise RuntimeError(
                    "The stage runs backwards with other parameters than forth; leave them in place until the "
                    "backward pass is done, or take memory plain."
                )
        return sum(len(parameters) for parameters in self.parameters)

    def residual(self, block: nn.Module, features: Tensor) -> Tensor:
        """``f(x)``, in the precision of the way forth."""
        with self.precision.again():
            proposal: Tensor = block(features.to(self.dtype))
            return proposal if is_branch(block) else proposal - features


def is_branch(block: nn.Module) -> bool:
    """Whether a block gives ``f(x)`` itself, and not ``x + f(x)``."""
    return getattr(block, "is_branch", False)


def is_low(precision: Precision, dtype: torch.dtype) -> bool:
    """Whether blocks compute in bf16 or fp16."""
    return dtype in LOW_PRECISION or (precision.is_low and precision.dtype in LOW_PRECISION)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def invertible_flow(
    blocks: Sequence[nn.Module],
    x: Tensor,
    velocity: Tensor | None,
    *,
    pair: tuple[float, float],
    gates: Tensor | None = None,
    weights: Tensor | None = None,
    is_exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features and velocity after all blocks, of which alone the backward pass computes everything anew.

    Blocks may be compiled; this function itself is not, or the compiler would store what it is there to leave out.

    Args:
        blocks: From (B, C, *spatial) to the same shape.
        x: Features, shape (B, C, *spatial).
        velocity: Of the same shape; None is zero.
        pair: Gate and weight of every block; where gates are learned, those at the start, which are not used.
        gates: Learned ones of each block, shape (m, 1) or (m, C), fp32.
        weights: As ``gates``.
        is_exact: Whether the state is kept in integers.

    Returns:
        Both, in the shape and type of ``x``; their second derivative is not defined.

    Raises:
        OverflowError: In integers, a value is too large.
        RuntimeError: Blocks draw random numbers that cannot be drawn again.
    """
    check_replay(blocks, x.device)
    precision = Precision.now(x.device.type)
    dtype = torch.promote_types(x.dtype, torch.float32) if precision.is_low else x.dtype
    course = Course(blocks, *pair, is_exact=is_exact, precision=precision, dtype=dtype)
    parameters = [parameter for by_block in course.parameters for parameter in by_block]
    features, moved = _Inversion.apply(  # type: ignore[no-untyped-call]
        course, x, velocity, gates, weights, *parameters
    )
    return features, moved


class _Inversion(torch.autograd.Function):
    """The stage as one operation of autograd."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands everything on by position
        ctx: Any,
        course: Course,
        x: Tensor,
        velocity: Tensor | None,
        gates: Tensor | None,
        weights: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        state = course.start(x, velocity)
        for index, block in enumerate(course.blocks):
            draws = Draws(x.device)
            residual = course.residual(block, state.features)
            draws.end()
            course.draws.append(draws)
            state.advance(residual, *_pair(course, gates, weights, index, x.ndim))
        state.end_forth()
        ctx.course, ctx.has_velocity = course, velocity is not None
        # Parameters are saved so that torch refuses those that were changed in between.
        ctx.save_for_backward(gates, weights, *parameters, *state.saved)
        assert state.velocity is not None, "there is a block"
        return state.features.to(x.dtype), state.velocity.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad_v: Tensor | None) -> tuple[Any, ...]:
        course: Course = ctx.course
        gates, weights, *saved = ctx.saved_tensors
        saved = saved[course.check_parameters() :]
        if grad_x is None and grad_v is None:
            return (None,) * len(ctx.needs_input_grad)
        # The state takes over: from here on each tensor lives as long as the way back needs it.
        ctx.maybe_clear_saved_tensors()
        way = _WayBack(course, course.end(saved), grad_x, grad_v, ctx.has_velocity)
        num_axes = saved[0].ndim
        del saved, grad_x, grad_v
        for index in reversed(range(len(course.blocks))):
            way.undo(index, *_pair(course, gates, weights, index, num_axes))
        way.state.end_back()
        gate_grads = tuple(torch.stack(grads[::-1]) for grads in zip(*way.by_gate, strict=True)) or (None, None)
        parameters = (grad for grads in reversed(way.by_block) for grad in grads)
        return None, way.a, way.b if ctx.has_velocity else None, *gate_grads, *parameters


class _WayBack:
    """State and cotangents on the way from the last block to the first.

    Args:
        course: What is known of the way forth.
        state: After the last block.
        a: Cotangent of the features; None is zero.
        b: Cotangent of the velocity; None is zero.
        has_velocity: Whether the stage was given a velocity.

    Attributes:
        by_block: Gradients of each block's parameters, last block first.
        by_gate: Gradients of each learned gate and its weight, last block first.
    """

    def __init__(
        self, course: Course, state: FloatState | IntegerState, a: Tensor | None, b: Tensor | None, has_velocity: bool
    ) -> None:
        self.course, self.state, self.has_velocity = course, state, has_velocity
        # In the precision of the stage's outputs, as in the plain loop; the state alone has to be exact.
        self.a, self.b = a, b
        self.by_block: list[list[Tensor | None]] = []
        self.by_gate: list[tuple[Tensor, Tensor]] = []

    def undo(self, index: int, gate: Number, weight: Number) -> None:
        """Goes back over one block."""
        h = _sum(self.a, self.b)
        self.b = None
        self.state.step_back()
        residual, grad = self._differentiate(index, h, weight)
        self.a = _sum(self.a, None if grad is None else grad.to(h.dtype))
        del grad
        is_at_rest = index == 0 and not self.has_velocity
        if not is_at_rest or self.course.is_exact:
            self.state.slow_down(residual, gate, weight)
        if isinstance(gate, Tensor):
            before = None if is_at_rest else self.state.velocity
            moved = torch.zeros_like(gate) if before is None else _like_gate(h * before, gate)
            self.by_gate.append((moved.view(-1), _like_gate(h * residual, gate)))
        self.b = None if is_at_rest else h * gate

    def _differentiate(self, index: int, h: Tensor, weight: Number) -> tuple[Tensor, Tensor | None]:
        """Computes a block anew, notes the gradients of its parameters, and gives its residual and its input's."""
        block = self.course.blocks[index]
        leaf = self.state.features.detach().requires_grad_()
        with (
            torch.enable_grad(),
            self.course.draws[index].again(),
            FrozenBuffers(block),
            stand_ins(block, self.course.parameters[index]) as parameters,
        ):
            residual = self.course.residual(block, leaf)
        sources = [leaf, *parameters]
        grads: tuple[Tensor | None, ...] = (None,) * len(sources)
        if residual.requires_grad:
            grads = torch.autograd.grad(residual, sources, (h * weight).to(residual.dtype), allow_unused=True)
        self.by_block.append(list(grads[1:]))
        return residual.detach(), grads[0]


def _pair(
    course: Course, gates: Tensor | None, weights: Tensor | None, index: int, num_axes: int
) -> tuple[Number, Number]:
    """Gate and weight of a block, ready to be multiplied with features."""
    if gates is None or weights is None:
        return course.gate, course.weight
    shape = (1, -1, *[1] * (num_axes - 2))
    return gates[index].view(shape), weights[index].view(shape)


def _like_gate(products: Tensor, gate: Tensor) -> Tensor:
    """Sums over all that shares a gate: everything, or batch and space of each channel."""
    over = [axis for axis in range(products.ndim) if axis != 1 or gate.shape[1] == 1]
    return products.sum(over).view(-1)


def _sum(a: Tensor | None, b: Tensor | None) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return a + b
