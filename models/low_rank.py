"""Layers whose weight is kept as three thin factors, ``W = U S V^T``.

A convolution's weight is taken as a matrix, (out_channels, in_channels x kernel). The factors are stored wider than
the rank needs, so that a rule which adapts the rank never changes the shape of a parameter: what lies beyond the rank
is zero. Rules that do so are those of ``medmom.optim`` called low-rank; any other trains the factors as they are.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

Gradients = Literal["factors", "tangent"]


class Ranks(NamedTuple):
    """How a weight is factored.

    Attributes:
        rank: Columns of U and V in use.
        rows: Of the weight as a matrix: features out.
        columns: Of the weight as a matrix: features in, times the kernel.
    """

    rank: int
    rows: int
    columns: int

    @property
    def num_parameters(self) -> int:
        """Of the three factors."""
        return self.rank * (self.rows + self.rank + self.columns)


class LowRankLayer(nn.Module):
    """What both layers share: the factors, and how many of their columns are in use.

    Args:
        rows: Of the weight as a matrix.
        columns: Of the weight as a matrix.
        rank: Columns of the factors that are in use at first.
        lowest: Least rank that a rule may truncate to.
        highest: Largest one that a rule may truncate to; ``rank`` where absent.
        storage: Columns that the factors have; ``highest`` where absent. A rule that widens bases for a while wants
            twice as many.
        bias: Whether there is a bias of ``rows`` numbers.
        gradients: What ``backward`` writes into the gradients of U and V, with G the gradient of the weight.
            ``"factors"``: theirs, ``G V S^T`` and ``G^T U S``, for any rule. ``"tangent"``: ``G V`` and ``G^T U``,
            which say where the weight itself should move and do not vanish with the singular values; the low-rank
            rules want these. The gradient of S is ``U^T G V`` either way.

    Attributes:
        u: Shape (rows, storage), orthonormal columns, zero beyond the rank.
        s: Shape (storage, storage), zero beyond the rank.
        v: Shape (columns, storage), like ``u``.
        mixed: Precision of mixed training on the meta device, which has no autocast; None: that of the factors.
        ranks: Three whole numbers: rank, lowest, highest. A parameter without gradient: it travels with the factors
            wherever parameters go, and tells a rule which of them belong together.

    Raises:
        ValueError: The ranks are not in order, or more than the matrix or the storage has.
    """

    mixed: torch.dtype | None = None

    def __init__(
        self,
        rows: int,
        columns: int,
        rank: int,
        *,
        lowest: int = 1,
        highest: int | None = None,
        storage: int | None = None,
        bias: bool = True,
        gradients: Gradients = "factors",
    ) -> None:
        super().__init__()
        highest = rank if highest is None else highest
        storage = highest if storage is None else storage
        if not 1 <= lowest <= rank <= highest <= storage <= min(rows, columns):
            raise ValueError(
                f"rank {rank}, lowest {lowest}, highest {highest}, storage {storage} for a matrix of {rows} x "
                f"{columns}: they must rise from 1 to {min(rows, columns)} in the order lowest, rank, highest, storage."
            )
        if gradients not in get_args(Gradients):
            raise ValueError(f"gradients is {gradients!r}; it is one of {', '.join(get_args(Gradients))}.")
        self.gradients = gradients
        self.u = nn.Parameter(torch.zeros(rows, storage))
        self.s = nn.Parameter(torch.zeros(storage, storage))
        self.v = nn.Parameter(torch.zeros(columns, storage))
        # Registered right behind them: by its whole numbers a rule finds the U, S and V before it.
        self.ranks = nn.Parameter(torch.tensor([rank, lowest, highest]), requires_grad=False)
        # What was read last of which tensor, at which of its versions.
        self._known: tuple[Tensor | None, int, int] = (None, 0, rank)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    @property
    def rank(self) -> int:
        """Columns of the factors in use; a GPU is waited for only after somebody wrote to ``ranks``."""
        source, version, rank = self._known
        if self.ranks.is_meta:
            return rank
        if self.ranks.is_inference():  # without versions
            return int(self.ranks[0])
        if source is not self.ranks or version != self.ranks._version:
            rank = int(self.ranks[0])
            self._known = (self.ranks, self.ranks._version, rank)
        return rank

    def __getstate__(self) -> dict[str, Any]:
        """Reads the rank for a copy, which could not do so on the meta device; elsewhere it reads its own anew."""
        return {**self.__dict__, "_known": (None, 0, self.rank)}

    @property
    def sizes(self) -> Ranks:
        """Rank, and rows and columns of the weight as a matrix."""
        return Ranks(self.rank, len(self.u), len(self.v))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V as far as they are in use; all of their columns while compiling, for a change of rank."""
        if torch.compiler.is_compiling():
            return self.u, self.s, self.v
        r = self.rank
        return self.u[:, :r], self.s[:r, :r], self.v[:, :r]

    def matrix(self) -> Tensor:
        """The weight as a matrix, ``U S V^T``, shape (rows, columns); without gradients."""
        dtype = self.u.dtype
        with torch.no_grad():
            u, s, v = (factor.to(torch.promote_types(dtype, torch.float32)) for factor in self.factors())
            return (u @ s @ v.T).to(dtype)

    @torch.no_grad()
    def set_matrix(self, matrix: Tensor, *, keep_norm: bool = False) -> None:
        """Takes the nearest weight of the highest rank: a truncated singular value decomposition, in place.

        Args:
            matrix: Shape (rows, columns).
            keep_norm: Whether S is scaled so that the Frobenius norm stays; for weights that were drawn at random,
                whose scale is all that matters.

        Raises:
            ValueError: The matrix has another shape.
        """
        if matrix.shape != (len(self.u), len(self.v)):
            raise ValueError(
                f"a weight of shape {list(matrix.shape)} for factors of {len(self.u)} x {len(self.v)}; give it as a "
                "matrix, with a row for each feature out."
            )
        if self.u.is_meta or matrix.is_meta:
            return
        highest = int(self.ranks[2])
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        u, values, vt = torch.linalg.svd(wide, full_matrices=False)
        kept = values[:highest]
        if keep_norm and bool(kept.norm() > 0):
            kept = kept * (values.norm() / kept.norm())
        for factor, part in ((self.u, u[:, :highest]), (self.s, torch.diag(kept)), (self.v, vt[:highest].T)):
            factor.zero_()
            factor[: len(part), : part.shape[1]] = part.to(factor.dtype)
        self.ranks[0] = highest

    def _cast(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Input, factors and bias in the precision that autocast asks for."""
        u, s, v = self.factors()
        bias: Tensor | None = self.bias
        kind = x.device.type
        dtype = self.mixed if kind == "meta" else None
        # Autocast leaves double precision as it is.
        if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        if dtype is not None:
            x, u, s, v = (tensor.to(dtype) for tensor in (x, u, s, v))
            bias = None if bias is None else bias.to(dtype)
        return x, (u, s, v), bias

    def extra_repr(self) -> str:
        """Sizes, for the printed network."""
        sizes = self.sizes
        return f"rank={sizes.rank}, rows={sizes.rows}, columns={sizes.columns}, gradients={self.gradients}"


class LowRankLinear(LowRankLayer):
    """``nn.Linear`` whose weight is ``U S V^T``.

    Args:
        in_features: Features in.
        out_features: Features out.
        rank: Of the weight at first.
        options: As of ``LowRankLayer``.

    Raises:
        ValueError: As of ``LowRankLayer``.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        super().__init__(out_features, in_features, rank, **options)

    @property
    def weight(self) -> Tensor:
        """The weight multiplied out, shape (out_features, in_features); without gradients."""
        return self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (..., out_features)."""
        x, factors, bias = self._cast(x)
        y: Tensor = _Linear.apply(self.gradients == "tangent", x, *factors)
        return y if bias is None else y + bias


class LowRankConv(LowRankLayer):
    """Convolution whose weight, as a matrix (out_channels, in_channels x kernel), is ``U S V^T``.

    It computes a convolution to ``rank`` channels and a product of these with ``U S``, so that a low rank saves
    operations as well as weights.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Edges by axis; their number, 1 to 3, is that of the axes.
        rank: Of the weight at first.
        stride: By axis.
        padding: By axis, with zeros.
        dilation: By axis.
        options: As of ``LowRankLayer``.

    Raises:
        ValueError: As of ``LowRankLayer``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        rank: int,
        *,
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
        dilation: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(out_channels, in_channels * prod(kernel), rank, **options)
        axes = len(kernel)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = tuple(kernel)
        self.stride = tuple(stride or [1] * axes)
        self.padding = tuple(padding or [0] * axes)
        self.dilation = tuple(dilation or [1] * axes)

    @property
    def weight(self) -> Tensor:
        """The weight multiplied out, shape (out_channels, in_channels, *kernel); without gradients."""
        return self.matrix().reshape(-1, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, out_channels, *spatial)."""
        x, factors, bias = self._cast(x)
        shape = (self.in_channels, *self.kernel_size)
        plan = _Plan(self.gradients == "tangent", shape, self.stride, self.padding, self.dilation)
        y: Tensor = _Conv.apply(plan, x, *factors, *([] if bias is None else [bias]))
        return y


class _Plan(NamedTuple):
    """What a convolution is beside its factors."""

    is_tangent: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def options(self) -> tuple[Any, ...]:
        """Of the convolution with V, as torch's operators take them."""
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), 1

    @property
    def pointwise(self) -> tuple[Any, ...]:
        """Of a product along the channels."""
        axes = len(self.stride)
        return (1,) * axes, (0,) * axes, (1,) * axes, False, (0,) * axes, 1


class _Linear(torch.autograd.Function):
    """``x (U S V^T)^T`` without the weight, and the products of its gradient with V and U."""

    @staticmethod
    def forward(ctx: Any, is_tangent: bool, *tensors: Tensor) -> Tensor:
        x, u, s, v = tensors
        narrow = x @ v
        ctx.save_for_backward(*tensors, narrow)
        ctx.is_tangent = is_tangent
        return narrow @ (u @ s).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, s, v, narrow = ctx.saved_tensors
        back = grad @ u
        gx = (back @ s) @ v.T
        flat_grad, flat_x, flat_narrow, flat_back = (t.reshape(-1, t.shape[-1]) for t in (grad, x, narrow, back))
        gv = flat_grad.T @ flat_narrow
        gtu = flat_x.T @ flat_back
        return None, gx, *_gradients(ctx.is_tangent, (u, s), gv, gtu)


class _Conv(torch.autograd.Function):
    """The same for a convolution: to ``rank`` channels with V as its kernel, then a product with ``U S``."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> Tensor:
        x, u, s, v, *bias = tensors
        narrow = torch.ops.aten.convolution(x, _kernel(v, plan), None, *plan.options)
        ctx.save_for_backward(x, u, s, v, narrow)
        ctx.plan, ctx.has_bias = plan, bool(bias)
        also = bias[0] if bias else None
        wide: Tensor = torch.ops.aten.convolution(narrow, _pointwise(u @ s, plan), also, *plan.pointwise)
        return wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, u, s, v, narrow = ctx.saved_tensors
        plan, kernel, along = ctx.plan, _kernel(v, ctx.plan), torch.ops.aten.convolution
        backward = torch.ops.aten.convolution_backward
        # Only the product with S tells the way of the gradient to the input from that to V.
        back = along(grad, _pointwise(u.T, plan), None, *plan.pointwise)
        gx = None
        if ctx.needs_input_grad[1]:
            through = along(back, _pointwise(s.T, plan), None, *plan.pointwise)
            gx = backward(through, x, kernel, None, *plan.options, (True, False, False))[0]
        gv = backward(grad, narrow, _pointwise(u, plan), None, *plan.pointwise, (False, True, False))[1].flatten(1)
        gtu = backward(back, x, kernel, None, *plan.options, (False, True, False))[1].flatten(1).T
        gbias = [grad.sum([0, *range(2, grad.ndim)])] if ctx.has_bias else []
        return None, gx, *_gradients(plan.is_tangent, (u, s), gv, gtu), *gbias


def _gradients(
    is_tangent: bool, factors: tuple[Tensor, Tensor], gv: Tensor, gtu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What U, S and V are given, of ``G V`` and ``G^T U``."""
    u, s = factors
    core = u.T @ gv
    return (gv, core, gtu) if is_tangent else (gv @ s.T, core, gtu @ s)


def _kernel(v: Tensor, plan: _Plan) -> Tensor:
    return _laid_out(v.T.reshape(-1, *plan.shape))


def _pointwise(matrix: Tensor, plan: _Plan) -> Tensor:
    return _laid_out(matrix.reshape(*matrix.shape, *[1] * len(plan.stride)))


def _laid_out(kernel: Tensor) -> Tensor:
    """Channels last on a CPU, whatever the features are: its convolutions take a fifth less time so."""
    layout = _CHANNELS_LAST.get(kernel.ndim) if kernel.device.type == "cpu" else None
    return kernel if layout is None else kernel.contiguous(memory_format=layout)
