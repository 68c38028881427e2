"""The low-rank rules beside other parameters: bad gradients, groups, saved states, half precision."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from low_rank_tasks import RULES, bowl, build, make_layer, normal, walk, weight_of
from torch import Tensor, nn

from medmom.models import LowRankLinear
from medmom.models.low_rank import LowRankLayer
from medmom.optim import HeavyBall, LowRankAdam, LowRankHeavyBall
from medmom.optim.low_rank import LowRankRule

each_rule = pytest.mark.parametrize("rule", RULES)
each_form = pytest.mark.parametrize("local_steps", [0, 1, 4])


def values(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def make_network(**options: Any) -> Any:
    """Two low-rank layers with biases, and a dense one."""
    first = make_layer(9, 7, 3, storage=6, bias=True, **options)
    second = make_layer(8, 9, 2, storage=4, bias=True, seed=1, **options)
    torch.manual_seed(0)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(8, 1).to(first.u.dtype))


def inputs(step: int = 0) -> Tensor:
    return torch.randn(12, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def backward(network: nn.Module, step: int = 0) -> Tensor:
    network.zero_grad()
    loss: Tensor = (network(inputs(step)) - 1).square().mean()
    torch.autograd.backward(loss)
    return loss.detach()


def factors(network: Any, place: int) -> list[Tensor]:
    return values(network[place])[:4]


@each_rule
@each_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_with_a_bad_gradient_is_left_alone(rule: str, local_steps: int, bad: float) -> None:
    network = make_network()
    optimizer = build(rule, network, local_steps=local_steps)
    for step in range(3):
        optimizer.step(loss=backward(network, step))
    before, state = values(network), copy.deepcopy(optimizer.state_dict()["state"])
    loss = backward(network, 5)
    network[0].v.grad[0, 0] = bad
    optimizer.step(loss=loss)
    assert same(factors(network, 0), before[:4])
    # Its bias and the other layer go on.
    assert not torch.equal(network[0].bias, before[4])
    assert not same(factors(network, 2), before[5:9])
    assert optimizer.report()["skipped"] == 1
    after = optimizer.state_dict()["state"]
    torch.testing.assert_close({**after[0], "skipped": 0.0}, {**state[0], "skipped": 0.0}, rtol=0, atol=0)
    torch.testing.assert_close(after[1], state[1], rtol=0, atol=0)


@each_rule
@each_form
def test_bad_loss_moves_nothing(rule: str, local_steps: int) -> None:
    network = make_network()
    optimizer = build(rule, network, local_steps=local_steps)
    for step in range(3):
        before = values(network)
        optimizer.step(loss=backward(network, step) * float("nan"))
        assert same(values(network), before)
        assert optimizer.report()["skipped"] == step + 1
        optimizer.step(loss=backward(network, step))
        assert not same(values(network), before)


@each_rule
@each_form
def test_zero_gradient_changes_no_weight(rule: str, local_steps: int) -> None:
    layer = make_layer(9, 7, 3, highest=4, storage=7)
    before = layer.matrix()
    optimizer = build(rule, layer, local_steps=local_steps, tolerance=0.0)
    for _ in range(6):
        for p in (layer.u, layer.s, layer.v):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    optimizer.eval()
    torch.testing.assert_close(layer.matrix(), before, rtol=0, atol=1e-12)
    walk(layer, optimizer, range(4))
    assert layer.matrix().isfinite().all()


@each_rule
@each_form
def test_maximizing_is_minimizing_the_negative(rule: str, local_steps: int) -> None:
    down, up = make_layer(storage=6), make_layer(storage=6)
    walk(down, build(rule, down, local_steps=local_steps), range(9))
    climber = build(rule, up, local_steps=local_steps, maximize=True)
    walk(up, climber, range(9), lambda weight, step: -bowl(weight, step))
    assert same(values(down), values(up))


@each_rule
@each_form
def test_schedule_changes_the_step(rule: str, local_steps: int) -> None:
    layer = make_layer(storage=6)
    optimizer = build(rule, layer, local_steps=local_steps, tolerance=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 6))
    for step in range(12):
        walk(layer, optimizer, range(step, step + 1))
        scheduler.step()
        if step == 5:
            optimizer.eval()
            ended = layer.matrix()
    optimizer.eval()
    torch.testing.assert_close(layer.matrix(), ended, rtol=0, atol=1e-6)
    assert not torch.equal(layer.matrix(), make_layer(storage=6).matrix())


@each_rule
def test_gradients_of_the_factors_are_refused(rule: str) -> None:
    layer = make_layer(gradients="factors")
    with pytest.raises(RuntimeError, match='make the layers with gradients="tangent"'):
        walk(layer, build(rule, layer), range(1))


@each_rule
def test_factors_out_of_order_are_refused(rule: str) -> None:
    layer = make_layer()
    for params in ([layer.s, layer.u, layer.v, layer.ranks], [layer.u, layer.s, layer.ranks], [layer.ranks]):
        with pytest.raises(ValueError, match="takes U, S, V and ranks of a layer one after the other"):
            RULES[rule](params)


@each_rule
@pytest.mark.parametrize(("option", "bad"), [("tolerance", 1.0), ("tolerance", -0.1), ("local_steps", -1)])
def test_option_out_of_range_is_refused(rule: str, option: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{RULES[rule].__name__}: {option} is {bad}; "):
        build(rule, make_layer(), **{option: bad})


@each_rule
def test_evaluation_truncates_once_and_the_next_step_begins_a_cycle(rule: str) -> None:
    layer = make_layer(9, 7, 3, storage=6)
    optimizer = build(rule, layer, local_steps=10)
    walk(layer, optimizer, range(4))
    assert layer.rank == 6
    optimizer.eval()
    narrow = values(layer)
    assert layer.rank == 3
    optimizer.eval()
    assert same(values(layer), narrow)
    assert optimizer.train() is True
    before = layer.matrix()
    walk(layer, optimizer, range(1))
    assert layer.rank == 6
    torch.testing.assert_close(layer.matrix(), before, rtol=0, atol=1e-12)
    walk(layer, optimizer, range(8))
    assert layer.rank == 6
    walk(layer, optimizer, range(1))
    assert layer.rank == 3


@each_rule
def test_weights_between_steps_are_those_that_count_without_local_steps(rule: str) -> None:
    assert build(rule, make_layer(), local_steps=0).train() is False


@each_rule
def test_report_has_the_mean_rank(rule: str) -> None:
    network = make_network()
    optimizer = build(rule, network, tolerance=0.0, local_steps=0)
    assert optimizer.report()["rank"] == 2.5
    optimizer.step(loss=backward(network))
    assert set(optimizer.report()) == {"skipped", "rank"}
    assert "rank" not in build(rule, nn.Linear(2, 2)).report()


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (LowRankHeavyBall, HeavyBall, {"lr": 0.1, "weight_decay": 0.1, "nesterov": True}),
        (LowRankAdam, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
    ],
)
def test_dense_network_is_trained_by_the_plain_rule(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    networks = []
    for kind, more in ((ours, {}), (theirs, {"fused": True} if theirs is torch.optim.AdamW else {})):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        optimizer = kind(network.parameters(), **options, **more)
        for step in range(20):
            backward(network, step)
            optimizer.step()
        networks.append(values(network))
    assert same(*networks)


@each_rule
def test_groups_have_their_own_options(rule: str) -> None:
    still, moved = make_layer(storage=6), make_layer(storage=6, seed=1)
    before = still.matrix()
    groups = [{"params": list(still.parameters()), "lr": 0.0}, {"params": list(moved.parameters())}]
    optimizer = RULES[rule](groups, lr=0.1, local_steps=1, tolerance=0.0)
    for step in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(bowl(weight_of(still), step) + bowl(weight_of(moved), step))
        optimizer.step()
    torch.testing.assert_close(still.matrix(), before, rtol=0, atol=1e-12)
    assert not torch.equal(moved.matrix(), make_layer(seed=1).matrix())


def saved(*parts: Any) -> Any:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def begin(rule: str, local_steps: int, dtype: torch.dtype) -> tuple[LowRankLinear, LowRankRule]:
    layer = make_layer(12, 10, 3, highest=5, storage=10, dtype=dtype)
    return layer, build(rule, layer, local_steps=local_steps, lr=0.05 if rule == "heavy ball" else 0.3)


def go_on(layer: LowRankLinear, optimizer: LowRankRule, steps: range) -> list[int]:
    """Ranks after each of the steps: first they grow, then they fall."""
    ranks = []
    for step in steps:
        optimizer.param_groups[0]["tolerance"] = 1e-3 if step < 13 else 0.6
        walk(layer, optimizer, range(step, step + 1))
        ranks.append(layer.rank)
    return ranks


@each_rule
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_across_a_change_of_rank(rule: str, local_steps: int, dtype: torch.dtype) -> None:
    straight, optimizer = begin(rule, local_steps, dtype)
    ranks = go_on(straight, optimizer, range(20))
    assert max(ranks[:10]) > 3 and ranks[-1] < max(ranks)
    begun, first = begin(rule, local_steps, dtype)
    # With cycles of four steps the tenth is amid one.
    go_on(begun, first, range(10))
    layer, fresh = begin(rule, local_steps, dtype)
    weights, state = saved(begun, first)
    layer.load_state_dict(weights)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert go_on(layer, fresh, range(10, 20)) == ranks[10:]
    assert same(values(layer), values(straight))
    torch.testing.assert_close(fresh.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@each_rule
@pytest.mark.parametrize("local_steps", [0, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_follows_single(rule: str, local_steps: int, dtype: torch.dtype, tolerance: float) -> None:
    found = []
    for kind in (torch.float32, dtype):
        layer = make_layer(12, 10, 4, storage=8, dtype=dtype).to(kind)
        optimizer = build(rule, layer, local_steps=local_steps, tolerance=0.0, lr=0.01)
        walk(layer, optimizer, range(20))
        optimizer.eval()
        found.append(layer.matrix().float())
        assert {p.dtype for p in layer.parameters()} == {kind, torch.int64}
        assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32}
    start = make_layer(12, 10, 4, dtype=torch.float32).matrix()
    assert (found[1] - found[0]).norm() < tolerance * found[0].norm()
    assert (found[0] - start).norm() > 2 * (found[1] - found[0]).norm()


@pytest.mark.parametrize("local_steps", [0, 1, 50])
def test_steps_too_small_for_half_precision_add_up(local_steps: int) -> None:
    slope = normal(5, 12, 10).bfloat16()
    ways = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer(12, 10, 4, storage=8, dtype=torch.bfloat16).to(dtype)
        start = layer.matrix().float()
        # Every step moves the weight by a hundredth of what bfloat16 can tell apart.
        optimizer = build("heavy ball", layer, lr=3e-4, momentum=0.0, local_steps=local_steps, tolerance=0.0)
        walk(layer, optimizer, range(200), lambda weight, _: (weight * slope.to(weight.dtype)).sum())
        optimizer.eval()
        ways.append(layer.matrix().float() - start)
    assert (ways[0] - ways[1]).norm() < 0.3 * ways[0].norm()


@each_rule
def test_factor_that_was_set_by_hand_counts_in_half_precision(rule: str) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    optimizer = build(rule, layer, local_steps=0, lr=0.0, tolerance=0.0)
    walk(layer, optimizer, range(2))
    with torch.no_grad():
        layer.s.mul_(2)
    before = layer.matrix().float()
    walk(layer, optimizer, range(1))
    assert (layer.matrix() - before).norm() < 0.02 * before.norm()


@each_rule
def test_layers_of_a_network_are_found_by_their_order(rule: str) -> None:
    network = make_network()
    optimizer = build(rule, network)
    found: Any = optimizer.apart()
    expected = {id(p) for layer in network if isinstance(layer, LowRankLayer) for p in list(layer.parameters())[:4]}
    assert found == expected
    optimizer.step(loss=backward(network))
    assert not any("step" in optimizer.state.get(p, {}) for p in (network[0].u, network[0].ranks))
