"""Low-rank matrices: directions in which they can move without a change of rank, and what follows a move.

A matrix ``W = U S V^T`` of rank r, with orthonormal U (n, r) and V (m, r), moves within the matrices of rank r along
``U a V^T + b V^T + U c^T``, with b orthogonal to U and c to V. These are the directions of the tangent space at W, and
``a, b, c`` are as many numbers as W has itself; the gradient of a loss, momentum and steps are kept in this form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A matrix ``U S V^T`` of rank r.

    Attributes:
        u: Shape (n, r), orthonormal columns.
        s: Shape (r, r).
        v: Shape (m, r), orthonormal columns.
    """

    u: Tensor
    s: Tensor
    v: Tensor


class Tangent(NamedTuple):
    """A direction ``U a V^T + b V^T + U c^T`` at a matrix ``U S V^T``.

    Attributes:
        a: Shape (r, r).
        b: Shape (n, r), its columns orthogonal to those of U.
        c: Shape (m, r), its columns orthogonal to those of V.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def times(self, factor: float | Tensor) -> Tangent:
        """The direction, longer by a factor."""
        return Tangent(*(part * factor for part in self))

    def plus(self, other: Tangent, factor: float | Tensor = 1.0) -> Tangent:
        """The sum with ``factor`` times another direction at the same matrix."""
        return Tangent(*(mine + theirs * factor for mine, theirs in zip(self, other, strict=True)))

    def square_norm(self) -> Tensor:
        """Of the direction as a matrix: its three parts are orthogonal to each other."""
        return sum((part.square().sum() for part in self), start=self.a.new_zeros(()))


def project(at: Factors, gv: Tensor, gtu: Tensor) -> Tangent:
    """The part of a matrix G that lies in the tangent space, ``U U^T G + G V V^T - U U^T G V V^T``.

    Args:
        at: Where the tangent space is.
        gv: ``G V``, shape (n, r).
        gtu: ``G^T U``, shape (m, r).
    """
    core = at.u.T @ gv
    return Tangent(core, gv - at.u @ core, gtu - at.v @ core.T)


def transport(direction: Tangent, old: Factors, new: Factors) -> Tangent:
    """Projects a direction of one tangent space onto another one.

    Args:
        direction: In the tangent space at ``old``.
        old: A matrix of rank r.
        new: A matrix of the same shape, of any rank.
    """
    a, b, c = direction
    x, y = old.v.T @ new.v, old.u.T @ new.u
    mv = old.u @ (a @ x + c.T @ new.v) + b @ x
    mtu = old.v @ (a.T @ y + b.T @ new.u) + c @ y
    return project(new, mv, mtu)


def move(at: Factors, step: Tangent) -> Factors:
    """The matrix ``W + step``, of rank 2 r at most; S is diagonal and falls.

    Parts of b or c that are smaller than the rest of it by more than half of the digits are left out, and all that is
    rounding beside the whole step: what they point to is not known.

    Args:
        at: W.
        step: In its tangent space.
    """
    least = 10 * torch.finfo(step.a.dtype).eps * step.square_norm().sqrt()
    (qu, ru), (qv, rv) = _beside(at.u, step.b, least), _beside(at.v, step.c, least)
    # W + step = [U, qu] core [V, qv]^T
    core = torch.cat((torch.cat((at.s + step.a, rv.T), dim=1), torch.cat((ru, ru.new_zeros(len(ru), len(rv))), dim=1)))
    p, values, qt = decompose(core)
    return Factors(torch.cat((at.u, qu), dim=1) @ p, torch.diag(values), torch.cat((at.v, qv), dim=1) @ qt.T)


def _beside(basis: Tensor, directions: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns q beside those of a basis, and r with ``directions = q r``; few where these are dependent."""
    q, r = torch.linalg.qr(directions - basis @ (basis.T @ directions))
    p, values, zt = decompose(r)
    # Not too small to be told from the basis: q is orthogonal to it but for rounding over its size.
    kept = int((values > torch.maximum(values[0] * torch.finfo(r.dtype).eps ** 0.5, least)).sum())
    q = q @ p[:, :kept]
    return q - basis @ (basis.T @ q), values[:kept, None] * zt[:kept]


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition ``P, s, Q^T``.

    LAPACK's does not converge on every sound matrix of single precision; these are taken in double.

    Args:
        matrix: Finite, in single precision at least.
    """
    try:
        p, values, qt = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        p, values, qt = (part.to(matrix.dtype) for part in torch.linalg.svd(matrix.double(), full_matrices=False))
    return p, values, qt


def polish(basis: Tensor) -> Tensor:
    """Nearly orthonormal columns, more nearly so: one step of Newton and Schulz, so that rounding does not add up."""
    return 1.5 * basis - 0.5 * basis @ (basis.T @ basis)


def kept_rank(values: Tensor, tolerance: float, lowest: int, highest: int) -> int:
    """Least rank j with ``||s_(j+1..)|| < tolerance ||s||``, within its bounds.

    Args:
        values: Singular values s, falling, shape (r,).
        tolerance: Largest relative error of the matrix in the Frobenius norm; 0 cuts nothing but to ``highest``.
        lowest: Least rank.
        highest: Largest rank; the error is what it is.
    """
    wide = values.double()
    # Tails from rank 0 to r: the last one is empty.
    tails = torch.cat((wide.square().flip(0).cumsum(0).flip(0), wide.new_zeros(1))).sqrt()
    within = tails < tolerance * tails[0]
    rank = int(within.int().argmax()) if bool(within.any()) else len(values)
    return max(min(rank, highest, len(values)), min(lowest, len(values)))


def truncate(matrix: Factors, rank: int) -> Factors:
    """The nearest matrix of a lower rank, of one whose S is diagonal and falls."""
    return Factors(polish(matrix.u[:, :rank]), matrix.s[:rank, :rank], polish(matrix.v[:, :rank]))


def widen(at: Factors, gv: Tensor, gtu: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Bases that hold those of a matrix and the directions in which the loss falls.

    Args:
        at: W.
        gv: ``G V`` of the gradient G.
        gtu: ``G^T U``.
        most: Columns that the bases may have.

    Returns:
        Orthonormal bases of as many columns each, twice the rank where there is room.
    """
    wide = [torch.cat((basis, -grad), dim=1) for basis, grad in ((at.u, gv), (at.v, gtu))]
    columns = min(most, *(min(matrix.shape) for matrix in wide))
    u, v = (torch.linalg.qr(matrix).Q[:, :columns] for matrix in wide)
    return u, v


def turn(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """An r x r matrix in other bases: ``left core right^T``."""
    return left @ core @ right.T


def turn_squares(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Mean squares of an r x r matrix in other bases, its numbers as if uncorrelated: ``left^2 core (right^2)^T``."""
    return turn(core, left.square(), right.square())
