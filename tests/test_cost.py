"""What a network is said to cost, against what it costs on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from medmom import models
from medmom.models import MomentumUNet
from medmom.models.cost import MEMORIES, Activations, Cost, choose_memory, measure_cost
from medmom.models.momentum import MomentumStage

SHAPE = (2, 1, 16, 16, 16)
# Every memory takes this gate.
GATE = 0.875
OPTIONS: dict[str, dict[str, Any]] = {
    "postact": {"gate": GATE},
    "preact": {"gate": GATE, "block": "preact"},
    "carry": {"gate": GATE, "velocity": "carry"},
    "learned": {"gate": GATE, "velocity": "learned"},
    "gates": {"gate": 0.95, "gating": "channel"},
    "group": {"gate": 1.0, "norm": "group"},
}


def network(blocks: tuple[int, ...] = (2, 3), *, spatial_dims: int = 3, **options: Any) -> MomentumUNet:
    return MomentumUNet(
        1,
        3,
        channels=[8, 16][: len(blocks)],
        blocks=blocks,
        kernels=[[3] * spatial_dims] * len(blocks),
        strides=[[1] * spatial_dims] + [[2] * spatial_dims] * (len(blocks) - 1),
        **options,
    ).train()


class Kept:
    """A tensor as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], list[Tensor]], own: nn.Module) -> int:
    """Bytes of every storage that waits for the backward pass, with the outputs and without the weights."""
    waiting: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        waiting.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        outputs = forward()
    storages = [tensor.untyped_storage() for tensor in (*outputs, *(kept.tensor for kept in waiting))]
    weights = {parameter.untyped_storage().data_ptr() for parameter in own.parameters()}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for place, size in sizes.items() if place not in weights)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bytes_kept_are_those_that_autograd_saves(memory: str, options: dict[str, Any]) -> None:
    real = network(**options)
    cost = measure_cost(real, SHAPE, memories=[memory])
    if memory in cost.refused:
        assert (memory, options.get("gating")) == ("exact", "channel")
        return
    real.memory = memory
    assert cost.activations[memory].kept == saved_bytes(lambda: real(torch.randn(SHAPE)), real)


@pytest.mark.parametrize("memory", MEMORIES)
def test_bytes_kept_in_mixed_precision_are_those_under_autocast(memory: str) -> None:
    # In two dimensions: on a CPU, but not on a GPU, pooling of volumes is cast to fp32.
    real = network(spatial_dims=2, gate=GATE)
    cost = measure_cost(real, SHAPE[:4], mixed=torch.bfloat16, memories=[memory])
    real.memory = memory
    with torch.autocast("cpu", torch.bfloat16):
        assert cost.activations[memory].kept == saved_bytes(lambda: real(torch.randn(SHAPE[:4])), real)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that the CPU's allocator had given out at any time of a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Wave(nn.Module):
    """A block whose kernels want no space of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.frequency * x)


class Waves(nn.Module):
    """Stages of waves, with what all networks have: a memory that can be set."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(MomentumStage([Wave(), Wave(), Wave()], GATE) for _ in range(2)))

    @property
    def memory(self) -> str:
        return str(self.stages[0].memory)

    @memory.setter
    def memory(self, memory: str) -> None:
        for stage in self.stages:
            stage.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


@pytest.mark.parametrize("memory", ["plain", "checkpoint", "reversible", "exact"])
def test_peak_is_that_of_a_real_step(memory: str) -> None:
    shape, real = (1, 1, 512, 512), Waves()
    planned = measure_cost(real, shape, memories=[memory]).activations[memory]
    real.memory = memory
    peak = peak_bytes(lambda: real(torch.zeros(shape)).sum().backward())
    assert peak == pytest.approx(planned.peak, rel=0.005)
    assert planned.kept < planned.peak


def test_gradients_of_weights_are_not_activations() -> None:
    wide = nn.Linear(512, 512)
    wide.memory = "plain"  # type: ignore[assignment]
    cost = measure_cost(wide, (1, 512), memories=["plain"])
    assert cost.activations["plain"].peak < cost.parameter_bytes / 50
    assert cost.flops == 2 * 512 * 512


def test_group_normalisation_stays_in_fp32() -> None:
    grouped, low = (
        measure_cost(network(norm="group").to(dtype), SHAPE, mixed=mixed, memories=["plain"]).activations["plain"]
        for dtype, mixed in ((torch.float32, torch.bfloat16), (torch.bfloat16, None))
    )
    assert grouped.kept > 1.5 * low.kept


def test_reversible_keeps_the_same_for_any_depth_and_plain_does_not() -> None:
    memories = ("plain", "reversible")
    by_depth = [measure_cost(network((1, 2 + m)), SHAPE, memories=memories).activations for m in (2, 4, 6)]
    reversible = [each["reversible"].kept for each in by_depth]
    plain = [each["plain"].kept for each in by_depth]
    assert reversible[0] == reversible[1] == reversible[2]
    assert plain[2] - plain[1] == plain[1] - plain[0] > 0


def test_plain_takes_what_the_formula_says() -> None:
    # 8 bytes an element of every block, 4 of the stem, 8 of a decoder stage, in bf16: 2.03 GiB a patch of 128^3,
    # without logits, image, shortcuts and weights.
    with torch.device("meta"):
        large = models.mom3d_m(1, 3).to(torch.bfloat16)
    cost = measure_cost(large, (1, 1, 128, 128, 128), memories=["plain"])
    assert cost.activations["plain"].kept / 2**30 == pytest.approx(2.03, rel=0.07)
    assert cost.num_parameters == 102_350_575
    assert cost.parameter_bytes == 2 * cost.num_parameters


def test_operations_are_two_for_each_multiply_add() -> None:
    real = network(gate=GATE)
    counted = 0

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        voxels = inputs[0] if isinstance(layer, nn.ConvTranspose3d) else output
        counted += 2 * voxels.numel() * layer.weight[0].numel()

    for part in real.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d):
            part.register_forward_hook(count)
    real(torch.zeros(1, *SHAPE[1:]))
    assert measure_cost(network(gate=GATE), SHAPE, memories=[]).flops == counted


def test_the_network_stays_as_it_is() -> None:
    real = network((1, 3), gate=GATE, memory="checkpoint", norm="batch").eval()
    before = {key: value.clone() for key, value in real.state_dict().items()}
    random_numbers = torch.get_rng_state()
    measure_cost(real, SHAPE, mixed=torch.bfloat16)
    assert (real.memory, real.training) == ("checkpoint", False)
    assert all(parameter.grad is None and not parameter.is_meta for parameter in real.parameters())
    assert before.keys() == real.state_dict().keys()
    assert all(torch.equal(value, real.state_dict()[key]) for key, value in before.items())
    assert torch.equal(random_numbers, torch.get_rng_state())


def test_frozen_weights_have_no_gradients_to_wait_for() -> None:
    real = network(gate=GATE)
    free = measure_cost(real, SHAPE, memories=["plain"]).activations["plain"]
    real.encoder.requires_grad_(False)
    assert measure_cost(real, SHAPE, memories=["plain"]).activations["plain"].kept < free.kept


def test_the_loss_is_planned_as_well() -> None:
    def large(outputs: list[Tensor]) -> Tensor:
        # Kept until the backward pass: 16 of them are more than anything else.
        return torch.stack([output.sum() for output in outputs]).sum() + outputs[0].repeat(16, 1, 1, 1, 1).exp().sum()

    plain = [measure_cost(network(), SHAPE, loss=loss, memories=["plain"]) for loss in (None, large)]
    logits = 4 * 2 * 3 * 16**3
    first, second = (each.activations["plain"] for each in plain)
    assert first.kept == second.kept
    assert second.peak > first.peak + 16 * logits


def test_a_loss_that_asks_for_values_is_answered_with_one() -> None:
    asked = []

    def curious(outputs: list[Tensor]) -> Tensor:
        asked.extend([bool((outputs[0] > 0).all()), outputs[0].sum().item(), int(outputs[0].argmax())])
        return outputs[0].sum()

    measure_cost(network(), SHAPE, loss=curious, memories=["plain"])
    assert asked == [True, 1.0, 1]


def test_what_does_not_suit_the_network_says_why() -> None:
    assert set(measure_cost(network((1, 3), gate=GATE), SHAPE).activations) == set(MEMORIES)
    refused = measure_cost(network((1, 3), gate=0.9), SHAPE).refused
    assert refused.keys() == {"exact"}
    assert "nearest is 0.875" in refused["exact"]
    assert measure_cost(network((1, 3), gate=0.0), SHAPE).refused.keys() == {"reversible", "hybrid", "exact"}
    assert measure_cost(network((1, 2)), SHAPE).refused.keys() == {"reversible", "hybrid", "exact"}


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_gates_that_suit_fp32_alone_are_refused_in_mixed_precision(norm: Any) -> None:
    # Two blocks at most: log2(1 / 0.4) is 1.3, twice that 2.6 bits; with three blocks 4.
    deep = network((1, 4), gate=0.4, norm=norm)
    assert measure_cost(deep, SHAPE).refused.keys() == {"exact"}
    refused = measure_cost(deep, SHAPE, mixed=torch.bfloat16).refused
    assert refused.keys() == {"reversible", "hybrid", "exact"}
    assert "3 in low precision; the smallest legal gate is 0.5" in refused["hybrid"]
    assert measure_cost(deep.to(torch.bfloat16), SHAPE).refused == refused
    assert measure_cost(network((1, 3), gate=0.4), SHAPE, mixed=torch.bfloat16).refused.keys() == {"exact"}


def table(**peaks: int) -> Cost:
    return Cost(10, 40, 100, {memory: Activations(0, peak) for memory, peak in peaks.items()}, {})


@pytest.mark.parametrize(
    ("limit", "beside", "chosen"),
    [
        (100, 0, "plain"),
        (99, 0, "hybrid"),
        (100, 1, "hybrid"),
        (40, 0, "hybrid"),
        (45, 5, "hybrid"),
    ],
)
def test_the_fastest_that_fits_is_chosen(limit: float, beside: float, chosen: str) -> None:
    cost = table(plain=100, checkpoint=60, reversible=80, hybrid=40, exact=30)
    assert choose_memory(cost, limit, beside=beside) == chosen


def test_exact_is_never_chosen_and_the_least_need_is_named() -> None:
    cost = table(plain=100 * 2**30, checkpoint=60 * 2**30, exact=30 * 2**30)
    with pytest.raises(ValueError, match=r"into 50 GiB: the least, checkpoint, needs 62 GiB \(2 of them for weights"):
        choose_memory(cost, 50 * 2**30, beside=2 * 2**30)
