"""Matrices of low rank against the same formulas on dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medmom.optim.tangent import (
    Factors,
    Tangent,
    decompose,
    kept_rank,
    move,
    project,
    transport,
    truncate,
    turn,
    turn_squares,
    widen,
)

N, M, R = 9, 7, 3
seeds = pytest.mark.parametrize("seed", range(3))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int, rank: int = R, n: int = N, m: int = M) -> Factors:
    u, v = (torch.linalg.qr(normal(100 * seed + rows, rows, rank)).Q for rows in (n, m))
    return Factors(u, normal(seed, rank, rank), v)


def dense(of: Factors) -> Tensor:
    return of.u @ of.s @ of.v.T


def direction(at: Factors, tangent: Tangent) -> Tensor:
    return at.u @ tangent.a @ at.v.T + tangent.b @ at.v.T + at.u @ tangent.c.T


def projected(at: Factors, matrix: Tensor) -> Tangent:
    return project(at, matrix @ at.v, matrix.T @ at.u)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def assert_orthonormal(basis: Tensor) -> None:
    assert_equal(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype))


@seeds
def test_projection_is_the_dense_formula(seed: int) -> None:
    at, z = factors(seed), normal(seed + 50, N, M)
    left, right = at.u @ at.u.T, at.v @ at.v.T
    found = projected(at, z)
    assert_equal(direction(at, found), left @ z + z @ right - left @ z @ right)
    assert_equal(at.u.T @ found.b, torch.zeros(R, R, dtype=z.dtype))
    assert_equal(at.v.T @ found.c, torch.zeros(R, R, dtype=z.dtype))


@seeds
def test_projection_is_orthogonal(seed: int) -> None:
    at, z, other = factors(seed), normal(seed + 50, N, M), normal(seed + 60, N, M)
    once = direction(at, projected(at, z))
    assert_equal(direction(at, projected(at, once)), once)
    assert_equal((once * other).sum(), (z * direction(at, projected(at, other))).sum())


@seeds
def test_norm_sum_and_multiple_are_those_of_the_matrix(seed: int) -> None:
    at = factors(seed)
    first, second = (projected(at, normal(seed + shift, N, M)) for shift in (50, 60))
    assert_equal(first.square_norm(), direction(at, first).square().sum())
    summed = first.times(0.3).plus(second, -2.0)
    assert_equal(direction(at, summed), 0.3 * direction(at, first) - 2 * direction(at, second))


@seeds
@pytest.mark.parametrize("rank", [2, 3, 5])
def test_transport_is_the_projection_at_the_new_matrix(seed: int, rank: int) -> None:
    old, new = factors(seed), factors(seed + 10, rank)
    tangent = projected(old, normal(seed + 50, N, M))
    found = transport(tangent, old, new)
    assert_equal(direction(new, found), direction(new, projected(new, direction(old, tangent))))
    assert found.a.shape == (rank, rank)


@seeds
def test_transport_to_where_it_is_changes_nothing(seed: int) -> None:
    at = factors(seed)
    tangent = projected(at, normal(seed + 50, N, M))
    for part, same in zip(transport(tangent, at, at), tangent, strict=True):
        assert_equal(part, same)


@pytest.mark.parametrize(("n", "m", "rank"), [(9, 7, 3), (9, 7, 4), (9, 7, 7), (4, 9, 3), (1, 5, 1)])
def test_move_is_exact_and_in_singular_order(n: int, m: int, rank: int) -> None:
    at = factors(1, rank, n, m)
    step = projected(at, normal(2, n, m))
    moved = truncate(move(at, step), min(2 * rank, n, m))
    assert_equal(dense(moved), dense(at) + direction(at, step))
    values = moved.s.diagonal()
    assert_equal(moved.s, torch.diag(values), 0)
    assert (values.diff() <= 0).all()
    assert (values >= 0).all()
    assert_orthonormal(moved.u)
    assert_orthonormal(moved.v)


def test_move_from_zero_by_zero_stays_there() -> None:
    at = factors(1)._replace(s=torch.zeros(R, R, dtype=torch.float64))
    moved = move(at, projected(at, torch.zeros(N, M, dtype=torch.float64)))
    assert_equal(dense(moved), torch.zeros(N, M, dtype=torch.float64), 0)
    assert_orthonormal(moved.u)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3, 1e-9])
def test_truncation_stays_within_its_tolerance_at_the_least_rank(tolerance: float) -> None:
    at = factors(1, 6)._replace(s=torch.diag(torch.logspace(0, -5, 6, dtype=torch.float64)))
    rank = kept_rank(at.s.diagonal(), tolerance, 1, 6)
    whole = dense(at)
    errors = [(dense(truncate(at, r)) - whole).norm() / whole.norm() for r in (rank, rank - 1)]
    assert errors[0] < tolerance
    assert rank == 1 or errors[1] >= tolerance


@pytest.mark.parametrize(
    ("values", "tolerance", "bounds", "rank"),
    [
        ([3.0, 2.0, 1.0], 0.0, (1, 3), 3),
        ([3.0, 2.0, 0.0], 0.0, (1, 3), 3),
        ([3.0, 2.0, 0.0], 1e-9, (1, 3), 2),
        ([3.0, 2.0, 1.0], 0.999, (1, 3), 1),
        ([3.0, 2.0, 1.0], 0.999, (2, 3), 2),
        ([3.0, 2.0, 1.0], 0.0, (1, 2), 2),
        ([0.0, 0.0, 0.0], 0.1, (1, 3), 3),
        ([0.0, 0.0, 0.0], 0.1, (1, 2), 2),
        ([3.0, 2.0], 0.999, (4, 8), 2),
        ([3.0, 2.0], 0.0, (4, 8), 2),
        ([4.0, 3.0], 0.6, (1, 2), 2),
        ([4.0, 3.0], 0.601, (1, 2), 1),
        ([1e-30, 1e-31], 0.2, (1, 2), 1),
    ],
)
def test_kept_rank_at_its_edges(values: list[float], tolerance: float, bounds: tuple[int, int], rank: int) -> None:
    assert kept_rank(torch.tensor(values), tolerance, *bounds) == rank


@pytest.mark.parametrize(
    ("n", "m", "most", "columns"), [(9, 7, 20, 6), (9, 7, 6, 6), (9, 7, 5, 5), (9, 5, 20, 5), (4, 9, 20, 4)]
)
def test_wider_bases_hold_the_old_ones(n: int, m: int, most: int, columns: int) -> None:
    at, grad = factors(1, 3, n, m), normal(5, n, m)
    u, v = widen(at, grad @ at.v, grad.T @ at.u, most)
    assert (u.shape, v.shape) == ((n, columns), (m, columns))
    assert_orthonormal(u)
    assert_orthonormal(v)
    turned = turn(at.s, u.T @ at.u, v.T @ at.v)
    assert_equal(u @ turned @ v.T, dense(at))


def test_wider_bases_hold_the_gradient() -> None:
    at, grad = factors(1), normal(5, N, M)
    gv, gtu = grad @ at.v, grad.T @ at.u
    u, v = widen(at, gv, gtu, 6)
    assert_equal(u @ (u.T @ gv), gv)
    assert_equal(v @ (v.T @ gtu), gtu)


@pytest.mark.parametrize("kind", ["zero", "in the span", "of rank one"])
def test_gradient_that_brings_no_directions_is_harmless(kind: str) -> None:
    at = factors(1)
    grads = {"zero": torch.zeros(N, M, dtype=torch.float64), "in the span": dense(factors(1))}
    grad = grads.get(kind, normal(5, N, 1) @ normal(6, 1, M))
    u, v = widen(at, grad @ at.v, grad.T @ at.u, 6)
    assert_orthonormal(u)
    assert_orthonormal(v)
    assert_equal(u @ turn(at.s, u.T @ at.u, v.T @ at.v) @ v.T, dense(at))
    assert_equal(dense(move(at, projected(at, grad))), dense(at) + direction(at, projected(at, grad)))


def test_moment_and_its_squares_survive_wider_bases() -> None:
    at, grad = factors(1), normal(5, N, M)
    u, v = widen(at, grad @ at.v, grad.T @ at.u, 6)
    left, right, moment, squares = u.T @ at.u, v.T @ at.v, normal(7, R, R), normal(8, R, R).square()
    assert_equal(u @ turn(moment, left, right) @ v.T, at.u @ moment @ at.v.T)
    # Old columns stay what they were but for their sign, and squares know no sign.
    assert_equal(turn_squares(squares, left, right)[:R, :R], squares)
    assert_equal(turn_squares(squares, left, right)[R:], torch.zeros(R, 6, dtype=torch.float64), 1e-20)


def test_squares_turn_as_mean_squares_of_uncorrelated_numbers() -> None:
    squares, left, right = normal(1, 3, 3).square(), normal(2, 4, 3), normal(3, 5, 3)
    drawn = squares.sqrt() * normal(4, 40_000, 3, 3)
    found = (left @ drawn @ right.T).square().mean(0)
    torch.testing.assert_close(turn_squares(squares, left, right), found, rtol=0.05, atol=0)


def test_matrix_that_does_not_converge_in_single_precision_is_taken_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    svd, matrix = torch.linalg.svd, normal(1, 6, 4).float()

    def fails(given: Tensor, **options: Any) -> Any:
        if given.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.svd: not converged")  # type: ignore[attr-defined]
        return svd(given, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    p, values, qt = decompose(matrix)
    assert {p.dtype, values.dtype, qt.dtype} == {torch.float32}
    torch.testing.assert_close(p * values @ qt, matrix)
