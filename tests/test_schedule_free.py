"""Schedule-free rules against the three sequences of the paper, one parameter after the other."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bowls import make, problem
from torch import Tensor, nn

from medmom.optim import batches
from medmom.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from medmom.optim.schedules import cosine, polynomial, warmup_stable_decay

STEPS = 60
SCHEDULES: dict[str, Callable[[int], float] | None] = {
    "constant": None,
    "cosine": cosine(STEPS),
    "wsd": warmup_stable_decay(STEPS, warmup_steps=10, decay=0.3),
    "polynomial": polynomial(STEPS, warmup_steps=4),
    "late": lambda step: float(step > 2),
    "jumping": lambda step: (1.0, 0.0, 1e-8, 0.5)[step % 4],
}
WEIGHTS = ["schedulet", "schedulet_next", "lr_max_squared", "uniform"]
PLANS = [(schedule, weights) for schedule in SCHEDULES for weights in WEIGHTS]
PLANS.remove(("constant", "schedulet_next"))
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"lr": 0.5}, {"lr": 0.3, "momentum": 0.6, "weight_decay": 0.1}],
    "adamw": [
        {"lr": 0.02},
        {"lr": 0.05, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.3},
        {"lr": 0.02, "inner_momentum": 0.8, "weight_decay": 0.1},
    ],
}
RULES = {"sgd": ScheduleFreeSGD, "adamw": ScheduleFreeAdamW}
# Every plan with one set of options, every other set with one plan.
CASES = [(rule, given[1], *plan) for rule, given in OPTIONS.items() for plan in PLANS]
CASES += [(rule, options, "cosine", "schedulet") for rule, given in OPTIONS.items() for options in given[::2]]
both_rules = pytest.mark.parametrize("rule", RULES)


def walk(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p in params:
            p.grad = None
        problem(params, step).backward()
        optimizer.step()


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Twin:
    """Keeps x, z and y of each parameter, and lists of its learning rates, as the docstrings say."""

    def __init__(
        self, groups: list[dict[str, Any]], adaptive: bool, schedule: Any, weights: str, **options: Any
    ) -> None:
        defaults = {"momentum": 0.9, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "inner_momentum": 0.0}
        self.groups = [{**defaults, **options, **group} for group in groups]
        self.adaptive, self.factor, self.weights, self.k = adaptive, schedule or (lambda _: 1.0), weights, 0
        self.of: dict[nn.Parameter, dict[str, Any]] = {}

    def step(self) -> None:
        for group in self.groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.move(group, p, self.of.setdefault(p, {"x": p.detach().clone(), "z": p.detach().clone(), "w": []}))
        self.k += 1

    def move(self, group: dict[str, Any], p: nn.Parameter, of: dict[str, Any]) -> None:
        b = group["betas"][0] if self.adaptive else group["momentum"]
        lr = group["lr"] * self.factor(self.k)
        of.setdefault("lrs", []).append(lr)
        weight = {
            "schedulet": lr,
            "schedulet_next": group["lr"] * self.factor(self.k + 1),
            "lr_max_squared": max(of["lrs"]) ** 2,
            "uniform": 1.0,
        }
        of["w"].append(weight[self.weights])
        c = of["w"][-1] / sum(of["w"]) if sum(of["w"]) else 0.0
        d = self.normalised(group, p.grad, of) if self.adaptive else p.grad
        of["z"] = of["z"] - lr * (d + group["weight_decay"] * p.detach())
        of["x"] = (1 - c) * of["x"] + c * of["z"]
        p.data = (1 - b) * of["z"] + b * of["x"]

    def normalised(self, group: dict[str, Any], g: Tensor, of: dict[str, Any]) -> Tensor:
        i, b2, t = group["inner_momentum"], group["betas"][1], len(of["w"])
        of["m"] = i * of.get("m", 0.0) + (1 - i) * g
        of["v"] = b2 * of.get("v", 0.0) + (1 - b2) * g**2
        return (of["m"] / (1 - i**t)) / ((of["v"] / (1 - b2**t)).sqrt() + group["eps"])


@pytest.mark.parametrize("rule, options, schedule, weights", CASES)
def test_sixty_steps_equal_those_of_a_naive_twin(
    rule: str, options: dict[str, Any], schedule: str, weights: str
) -> None:
    ours, theirs = make(), make()
    special = {"lr": 0.1, "weight_decay": 0.2}
    plan: dict[str, Any] = {"schedule": SCHEDULES[schedule], "weights": weights}
    optimizer = RULES[rule]([{"params": ours[:2]}, {"params": ours[2:], **special}], **options, **plan)
    twin = Twin([{"params": theirs[:2]}, {"params": theirs[2:], **special}], rule == "adamw", **plan, **options)
    for step in range(STEPS):
        # The third parameter starts late, the first pauses for a while.
        used = slice(0, 2) if step < 10 else slice(1, 4) if 20 <= step < 30 else slice(0, 4)
        for params in (ours, theirs):
            for p in params:
                p.grad = None
            problem(params[used], step).backward()
        optimizer.step()
        twin.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    optimizer.eval()
    torch.testing.assert_close([p.detach() for p in ours], [twin.of[p]["x"] for p in theirs], rtol=0, atol=1e-12)


@both_rules
def test_rounding_stays_small_over_many_steps(rule: str) -> None:
    single, double = make(torch.float32), make()
    for params in (single, double):
        optimizer = RULES[rule](params, lr=0.05, schedule=warmup_stable_decay(2000, warmup_steps=50, decay=0.5))
        walk(optimizer, params, range(2000))
        optimizer.eval()
    torch.testing.assert_close([p.double() for p in single], list(double), rtol=0, atol=2e-6)


@both_rules
def test_pieces_of_long_tensors_keep_the_weights_of_their_parameters(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make(), make()
    for params in (whole, cut):
        optimizer = RULES[rule](params, lr=0.1, schedule=cosine(10))
        walk(optimizer, params[1:3], range(3))
        walk(optimizer, params, range(3, 9))
        monkeypatch.setattr(batches, "CPU_BATCH", 7)
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-14)


@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_training_point_comes_back_after_evaluation(rule: str, dtype: torch.dtype) -> None:
    params = make(dtype)
    optimizer = RULES[rule](params, lr=0.1)
    walk(optimizer, params, range(7))
    before = copy.deepcopy(params)
    optimizer.eval()
    assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.train()
    torch.testing.assert_close(params, before, rtol=0, atol=2 * torch.finfo(dtype).eps)


@both_rules
def test_evaluation_at_half_precision_rounds_but_once(rule: str) -> None:
    y = nn.Parameter(torch.linspace(-2, 2, 999).bfloat16())
    optimizer = RULES[rule]([y], lr=0.3)
    walk(optimizer, [y], range(4))
    state, before = optimizer.state[y], y.detach().float()
    optimizer.eval()
    assert_equal(y.detach(), (before + state["apart"] * (state["unit"] * (1 / 0.9 - 1))).bfloat16())


@both_rules
def test_switching_twice_is_switching_once(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params, lr=0.1)
    optimizer.train()
    walk(optimizer, params, range(3))
    optimizer.eval()
    averaged = copy.deepcopy(params)
    optimizer.eval()
    assert_equal(params, averaged)
    optimizer.train()
    trained = copy.deepcopy(params)
    optimizer.train()
    assert_equal(params, trained)


@both_rules
def test_switching_before_the_first_step_changes_nothing(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params)
    optimizer.eval()
    assert_equal(params, make())
    assert not optimizer.state
    optimizer.train()
    walk(optimizer, params, range(1))
    assert not torch.equal(params[0], make()[0])


@both_rules
def test_step_at_the_average_is_refused_before_the_closure_runs(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params)
    walk(optimizer, params, range(2))
    optimizer.eval()
    called: list[int] = []
    with pytest.raises(RuntimeError, match=r"averaged weights.*call train\(\)"):
        optimizer.step(lambda: called.append(1))
    with pytest.raises(RuntimeError, match="averaged weights"):
        optimizer.step(loss=1.0)
    assert not called


@both_rules
def test_run_saved_at_the_average_continues_bit_for_bit(rule: str) -> None:
    straight = make(torch.float32)
    optimizer = RULES[rule](straight, lr=0.1, schedule=cosine(20))
    walk(optimizer, straight, range(10))
    optimizer.eval()
    file = io.BytesIO()
    torch.save({"weights": straight, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach()) for p in loaded["weights"]]
    fresh = RULES[rule](resumed, lr=0.1, schedule=cosine(20))
    fresh.load_state_dict(loaded["optimizer"])
    with pytest.raises(RuntimeError, match="averaged weights"):
        fresh.step()
    for each, params in ((optimizer, straight), (fresh, resumed)):
        each.train()
        walk(each, params, range(10, 20))
        each.eval()
    assert_equal(straight, resumed)


@both_rules
def test_group_added_at_the_average_switches_with_the_others(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params[:2])
    walk(optimizer, params[:2], range(3))
    optimizer.eval()
    optimizer.add_param_group({"params": params[2:]})
    optimizer.train()
    walk(optimizer, params, range(2))
    assert [group["evaluating"] for group in optimizer.param_groups] == [False, False]
    assert [group["steps_done"] for group in optimizer.param_groups] == [5, 5]


@both_rules
def test_schedule_inside_equals_the_same_from_outside(rule: str) -> None:
    inside, outside = make(), make()
    optimizer = RULES[rule](inside, lr=0.1, schedule=cosine(20, warmup_steps=5))
    walk(optimizer, inside, range(20))
    driven = RULES[rule](outside, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(driven, cosine(20, warmup_steps=5))
    for step in range(20):
        walk(driven, outside, range(step, step + 1))
        scheduler.step()
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-14)


@both_rules
def test_schedule_takes_over_where_a_run_without_one_was_saved(rule: str) -> None:
    straight, resumed = make(), make()
    decay = warmup_stable_decay(20, decay=0.5)
    walk(RULES[rule](straight, schedule=decay), straight, range(20))
    begun = RULES[rule](resumed)
    walk(begun, resumed, range(10))
    finishing = RULES[rule](resumed, schedule=decay)
    finishing.load_state_dict(begun.state_dict())
    walk(finishing, resumed, range(10, 20))
    assert_equal(straight, resumed)


@both_rules
def test_copied_optimizer_keeps_its_schedule(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params, schedule=cosine(6), weights="schedulet_next")
    walk(optimizer, params, range(3))
    twins, twin = copy.deepcopy((params, optimizer))
    walk(optimizer, params, range(3, 6))
    walk(twin, twins, range(3, 6))
    assert_equal(params, twins)


@both_rules
def test_last_point_counts_for_nothing_where_no_step_leaves_it(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params, lr=0.1, schedule=polynomial(4), weights="schedulet_next")
    walk(optimizer, params, range(3))
    optimizer.eval()
    before = copy.deepcopy(params)
    optimizer.train()
    walk(optimizer, params, range(3, 4))
    optimizer.eval()
    torch.testing.assert_close(params, before, rtol=0, atol=1e-14)


@both_rules
def test_first_average_is_the_first_base_point(rule: str) -> None:
    params = make()
    optimizer = RULES[rule](params, lr=0.1)
    walk(optimizer, params, range(1))
    before = copy.deepcopy(params)
    assert all(optimizer.state[p]["unit"] == 0 for p in params)
    optimizer.eval()
    assert_equal(params, before)


@both_rules
@pytest.mark.parametrize("weights", WEIGHTS)
def test_schedule_inside_asks_for_no_new_compilation(rule: str, weights: str) -> None:
    eager, compiled = make(torch.float32), make(torch.float32)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "schedule": cosine(8), "weights": weights}
    walk(RULES[rule](eager, **options), eager, range(8))
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    torch.compiler.reset()
    optimizer = RULES[rule](compiled, **options)
    step_compiled, counts = torch.compile(optimizer.step, backend=backend), []
    for step in range(8):
        optimizer.zero_grad()
        problem(compiled, step).backward()
        step_compiled()
        counts.append(len(graphs))
    assert counts[0] == counts[-1] > 0
    torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)


def test_no_first_moment_is_kept_unless_asked_for() -> None:
    params = make()
    optimizer, other = ScheduleFreeAdamW(params), ScheduleFreeAdamW(make(), inner_momentum=0.5)
    walk(optimizer, params, range(1))
    others = other.param_groups[0]["params"]
    walk(other, others, range(1))
    kept = {name for name, value in optimizer.state[params[1]].items() if value.shape == params[1].shape}
    assert kept == {"apart", "square"}
    assert "grad_average" in other.state[others[1]]


@pytest.mark.parametrize(
    "rule, options, message",
    [
        ("sgd", {"momentum": 0.0}, r"ScheduleFreeSGD: momentum is 0\.0; it must lie in \(0, 1\)"),
        ("adamw", {"betas": (0.0, 0.9)}, r"ScheduleFreeAdamW: momentum is 0\.0; it must lie in \(0, 1\)"),
        ("adamw", {"betas": (0.9, 1.0)}, r"betas is .*must lie in \[0, 1\)"),
        ("adamw", {"inner_momentum": 1.0}, r"inner_momentum is 1\.0; it must lie in \[0, 1\)"),
        ("sgd", {"weights": "lr"}, "weights is 'lr'; it must be one of schedulet, "),
        ("sgd", {"weights": "schedulet_next"}, "no schedule says what the next learning rate is; give schedule="),
    ],
)
def test_option_that_makes_no_sense_is_refused(rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RULES[rule](make(), **options)


def test_groups_with_different_inner_momentum_are_refused() -> None:
    first, second, *_ = make()
    with pytest.raises(ValueError, match=r"inner_momentum is 0\.5 in one group and 0\.0 in another"):
        ScheduleFreeAdamW([{"params": [first]}, {"params": [second], "inner_momentum": 0.5}])


@pytest.mark.slow
def test_average_that_follows_the_schedule_is_better_on_noisy_absolute_deviations() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    repro = import_module("repro_schedule_free")
    sys.path.pop(0)
    found = repro.weights_of_the_average(repro.problems(range(10), 2000, repro.NOISE))
    mean = {key: repro.best(excess).mean().item() for key, excess in found.items()}
    for key, value in mean.items():
        print(f"{key}: {value:.1e}")
    assert mean["constant", "schedulet"] == pytest.approx(1.8e-3, rel=0.3)
    for weights in ("schedulet", "schedulet_next"):
        assert mean["cosine", weights] < 2 / 3 * mean["cosine", "lr_max_squared"]
        assert mean["warmup_stable_decay", weights] == pytest.approx(
            mean["warmup_stable_decay", "lr_max_squared"], rel=0.2
        )
    assert mean["cosine", "lr_max_squared"] == pytest.approx(2.7e-3, rel=0.3)
