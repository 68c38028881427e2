"""What the low-rank rules promise of the weight: laws of the steps, against dense formulas."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from math import isfinite
from typing import Any

import pytest
import torch
from conftest import ROOT
from low_rank_tasks import RULES, bowl, build, make_layer, moment_of, normal, walk, weight_of
from torch import Tensor, nn

from medmom.models import LowRankLinear
from medmom.optim import HeavyBall

sys.path.insert(0, str(ROOT / "scripts"))
repro = import_module("repro_low_rank")
sys.path.pop(0)

each_rule = pytest.mark.parametrize("rule", RULES)
each_form = pytest.mark.parametrize("local_steps", [0, 1, 4])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def dense_walk(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: Iterator[int] | range) -> None:
    for step in steps:
        optimizer.zero_grad()
        torch.autograd.backward(bowl(weight, step))
        optimizer.step()


@pytest.mark.parametrize(
    ("n", "m", "local_steps", "nesterov"),
    [(6, 6, 0, False), (9, 6, 0, True), (6, 6, 1, False), (6, 6, 1, True), (6, 6, 4, True)],
)
def test_heavy_ball_in_complete_bases_is_that_of_torch(n: int, m: int, local_steps: int, nesterov: bool) -> None:
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01}
    layer = make_layer(n, m, 6)
    weight = nn.Parameter(layer.matrix().clone())
    walk(layer, build("heavy ball", layer, tolerance=0.0, local_steps=local_steps, **options), range(300))
    # The first step of a cycle only widens the bases.
    steps = [step for step in range(300) if local_steps < 2 or step % local_steps]
    dense_walk(torch.optim.SGD([weight], **options), weight, steps)  # type: ignore[arg-type]
    assert_close(layer.matrix(), weight.detach(), 1e-12 * weight.abs().max().item())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_in_fixed_bases_is_that_of_torch_on_s(weight_decay: float) -> None:
    layer = make_layer(9, 7, 3)
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    optimizer = build("adam", layer, local_steps=1000, **options)
    walk(layer, optimizer, range(1))
    u, v, s = layer.u.detach().clone(), layer.v.detach().clone(), nn.Parameter(layer.s.detach().clone())
    theirs = torch.optim.AdamW([s], **options)
    walk(layer, optimizer, range(1, 60))
    for step in range(1, 60):
        theirs.zero_grad()
        torch.autograd.backward(bowl(u @ s @ v.T, step))
        theirs.step()
    assert torch.equal(layer.u, u)
    assert_close(layer.s.detach(), s.detach())


@each_rule
def test_widening_the_bases_loses_nothing(rule: str) -> None:
    layer = make_layer(9, 7, 3, storage=6)
    optimizer = build(rule, layer, local_steps=4, weight_decay=0.1, tolerance=0.0)
    for cycle in range(5):
        walk(layer, optimizer, range(4 * cycle, 4 * cycle + 4))
        weight, moment = layer.matrix(), moment_of(optimizer, layer)
        assert layer.rank == 3
        walk(layer, optimizer, range(90, 91))
        assert layer.rank == 6
        assert_close(layer.matrix(), weight)
        assert_close(moment_of(optimizer, layer), moment)
        optimizer.eval()
        assert_close(layer.matrix(), weight)
        assert_close(moment_of(optimizer, layer), moment)


@each_rule
@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.01])
def test_truncation_stays_within_its_tolerance(rule: str, tolerance: float) -> None:
    layer = make_layer(12, 10, 4, highest=5, storage=10)
    optimizer = build(rule, layer, local_steps=8, tolerance=tolerance)
    for start in (0, 10, 20, 30):
        walk(layer, optimizer, range(start, start + 7))
        before = layer.matrix()
        optimizer.eval()
        error = ((layer.matrix() - before).norm() / before.norm()).item()
        nearest = torch.linalg.svdvals(before)[layer.rank :].norm() / before.norm()
        assert error == pytest.approx(nearest.item(), abs=1e-12)
        assert error < tolerance or layer.rank == 5


@each_rule
@pytest.mark.parametrize("local_steps", [0, 4])
def test_bases_stay_orthonormal_in_single_precision(rule: str, local_steps: int) -> None:
    layer = make_layer(20, 16, 4, highest=6, storage=12, dtype=torch.float32)
    walk(layer, build(rule, layer, local_steps=local_steps), range(300))
    for factor in (layer.u, layer.v):
        basis = factor.detach()[:, : layer.rank].double()
        assert (basis.T @ basis - torch.eye(layer.rank)).abs().max() < 1e-6
        assert not factor[:, layer.rank :].any()


def ill_conditioned(gradients: str, dtype: torch.dtype) -> LowRankLinear:
    layer = make_layer(20, 16, 7, storage=14 if gradients == "tangent" else 7, dtype=dtype, gradients=gradients)
    with torch.no_grad():
        layer.s[:7, :7] = torch.logspace(0, -6, 7).diag()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_singular_values_defeat_momentum_on_the_factors_alone(dtype: torch.dtype) -> None:
    values = torch.logspace(1, -1, 7, dtype=torch.float64)
    target = (torch.linalg.qr(normal(1, 20, 7)).Q @ values.diag() @ torch.linalg.qr(normal(2, 16, 7)).Q.T).to(dtype)

    def loss_of(weight: Tensor, _: int) -> Tensor:
        loss: Tensor = (weight - target).square().sum() / 2
        return loss

    lr, losses = 0.1, {}
    for local_steps in (0, 1, 4):
        layer = ill_conditioned("tangent", dtype)
        optimizer = build("heavy ball", layer, lr=lr, local_steps=local_steps, tolerance=1e-6)
        walk(layer, optimizer, range(120), loss_of)
        losses[local_steps] = loss_of(layer.matrix(), 0).item()
    assert max(losses.values()) < 0.01
    for share, is_lost in ((1.0, True), (0.1, False)):
        layer = ill_conditioned("factors", dtype)
        walk(layer, HeavyBall(layer.parameters(), lr=share * lr), range(120), loss_of)
        stalled = loss_of(layer.matrix(), 0).item()
        assert isfinite(stalled) is not is_lost
        assert is_lost or stalled > 20 * max(losses.values())


@pytest.fixture(scope="module")
def problem() -> Any:
    return repro.draw(repro.SEED)


def test_momentum_in_the_tangent_space_is_worth_what_it_is_worth_dense(problem: Any) -> None:
    dense, (ours, rank) = repro.dense(problem, 0.9, (100, 500)), repro.low_rank(problem, (100, 500), local_steps=0)
    assert dense[100] == pytest.approx(2.9e-3, rel=0.02)
    assert dense[500] == pytest.approx(2.4e-11, rel=0.02)
    for steps in (100, 500):
        assert ours[steps] == pytest.approx(dense[steps], rel=0.5)
    assert rank == repro.TRUE_RANK


@pytest.mark.slow
def test_momentum_cut_off_at_every_step_is_worth_nothing(problem: Any) -> None:
    without, (ours, _) = repro.dense(problem, 0.0), repro.low_rank(problem, local_steps=1)
    for steps, noted in zip(repro.AT, (4.0e-1, 2.4e-2, 3.5e-5), strict=True):
        assert 0.1 < ours[steps] / without[steps] < 10
        assert 0.4 < ours[steps] / noted < 2.5


@pytest.mark.slow
def test_ten_steps_in_the_same_bases_bring_momentum_back(problem: Any) -> None:
    assert repro.low_rank(problem, (2000,), local_steps=10)[0][2000] < 1e-9


@pytest.mark.slow
def test_momentum_on_the_factors_diverges_or_comes_late(problem: Any) -> None:
    assert not isfinite(repro.on_factors(problem, repro.LR, (100,))[100])
    late = repro.on_factors(problem, repro.LR / 10)
    for steps, noted in zip(repro.AT, (1.5e-1, 6.1e-3, 5.7e-5), strict=True):
        assert 0.4 < late[steps] / noted < 2.5


def projection(weight: Tensor, rank: int) -> Any:
    u, _, vt = torch.linalg.svd(weight)
    left, right = u[:, :rank] @ u[:, :rank].T, vt[:rank].T @ vt[:rank]
    return lambda z: left @ z + z @ right - left @ z @ right


def nearest(weight: Tensor, tolerance: float, lowest: int, highest: int) -> tuple[Tensor, int]:
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    rank = next(r for r in range(lowest, highest + 1) if r == highest or s[r:].norm() < tolerance * s.norm())
    return u[:, :rank] @ s[:rank].diag() @ vt[:rank], rank


BOUNDS, TOLERANCE = (2, 6), 0.05


def twin(rule: str, weight: Tensor, rank: int, lr: float, steps: int) -> Iterator[tuple[Tensor, int]]:
    """The rules in the tangent space, in dense matrices."""
    moment, square, decay = torch.zeros_like(weight), 0.0, 0.1
    for step in range(steps):
        leaf = weight.clone().requires_grad_()
        torch.autograd.backward(bowl(leaf, step))
        assert leaf.grad is not None
        onto = projection(weight, rank)
        if rule == "heavy ball":
            grad = onto(leaf.grad + decay * weight)
            moment = 0.9 * moment + grad
            moved = weight - lr * (grad + 0.9 * moment)
        else:
            grad, t = onto(leaf.grad), step + 1
            moment = 0.9 * moment + 0.1 * grad
            square = 0.99 * square + 0.01 * grad.square().mean().item()
            root = (square / (1 - 0.99**t)) ** 0.5 + 1e-8
            moved = (1 - lr * decay) * weight - lr * moment / (1 - 0.9**t) / root
        weight, rank = nearest(moved, TOLERANCE, *BOUNDS)
        moment = projection(weight, rank)(moment)
        yield weight, rank


@each_rule
def test_steps_in_the_tangent_space_are_the_dense_formulas(rule: str) -> None:
    layer = make_layer(9, 7, 2, lowest=BOUNDS[0], highest=BOUNDS[1])
    options = {"nesterov": True, "momentum": 0.9} if rule == "heavy ball" else {"betas": (0.9, 0.99)}
    lr = 0.05 if rule == "heavy ball" else 0.3
    optimizer = build(rule, layer, lr=lr, weight_decay=0.1, tolerance=TOLERANCE, local_steps=0, **options)
    ranks = []
    for step, (weight, rank) in enumerate(twin(rule, layer.matrix(), 2, lr, 50)):
        walk(layer, optimizer, range(step, step + 1))
        assert layer.rank == rank
        assert_close(layer.matrix(), weight, 1e-10)
        ranks.append(rank)
    assert len(set(ranks)) > 1


@each_rule
@each_form
def test_rank_follows_the_tolerance_within_its_bounds(rule: str, local_steps: int) -> None:
    layer = make_layer(12, 10, 3, lowest=2, highest=6, storage=10)
    optimizer = build(rule, layer, local_steps=local_steps, tolerance=1e-3, lr=0.2 if rule == "adam" else 0.05)
    ranks = [layer.rank]
    for step in range(120):
        walk(layer, optimizer, range(step, step + 1), lambda weight, _: bowl(weight, 0, rank=5))
        if not optimizer.state[layer.s]["place"]:
            ranks.append(layer.rank)
    assert 2 <= min(ranks) <= max(ranks) <= 6
    assert layer.rank >= 5
    assert any(later > sooner for sooner, later in pairwise(ranks))
    for group in optimizer.param_groups:
        group["tolerance"] = 0.99
    walk(layer, optimizer, range(local_steps or 1))
    optimizer.eval()
    assert layer.rank == 2


@each_rule
@each_form
@pytest.mark.parametrize(("n", "m", "rank"), [(4, 4, 4), (5, 4, 3), (4, 7, 3), (1, 6, 1)])
def test_twice_the_rank_may_be_more_than_there_is(rule: str, local_steps: int, n: int, m: int, rank: int) -> None:
    layer = make_layer(n, m, rank, storage=min(n, m), seed=3)
    optimizer = build(rule, layer, local_steps=local_steps)
    before = bowl(weight_of(layer), 0, rank=1).item()
    walk(layer, optimizer, range(80), lambda weight, _: bowl(weight, 0, rank=1))
    assert bowl(weight_of(layer), 0, rank=1).item() < 0.5 * before


@each_form
def test_decay_of_heavy_ball_is_that_of_the_loss(local_steps: int) -> None:
    ours, theirs = make_layer(storage=6), make_layer(storage=6)
    walk(ours, build("heavy ball", ours, weight_decay=0.3, local_steps=local_steps), range(20))

    def decayed(weight: Tensor, step: int) -> Tensor:
        return bowl(weight, step) + 0.15 * weight.square().sum()

    walk(theirs, build("heavy ball", theirs, local_steps=local_steps), range(20), decayed)
    assert_close(ours.matrix(), theirs.matrix(), 1e-10)
