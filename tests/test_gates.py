from __future__ import annotations

import pytest
import torch
from stages import CHANNELS, Halving, make_inputs, make_stage
from torch import Tensor

from medmom.models.gates import (
    BITS,
    EXACT_GATES,
    LOW_PRECISION_BITS,
    Coupling,
    Gating,
    check_exact,
    check_reversible,
    gate_range,
    lost_bits,
    residual_weight,
    smallest_gate,
)
from medmom.models.momentum import MomentumStage

COUPLINGS: list[Coupling] = ["normalised", "ema"]
LEARNED: list[Gating] = ["block", "channel"]


def sums(gate: float, num_blocks: int) -> float:
    """``sum_j S_j`` as the formula has it."""
    return sum(gate**i for j in range(1, num_blocks + 1) for i in range(j))


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 20])
@pytest.mark.parametrize("gate", [0.0, 0.3, 0.9, 1.0])
def test_weight_is_that_of_the_formula(gate: float, num_blocks: int) -> None:
    assert residual_weight("ema", gate, num_blocks) == 1 - gate
    assert residual_weight("normalised", gate, num_blocks) == pytest.approx(num_blocks / sums(gate, num_blocks))


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 20])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_weight_of_learned_gates_is_that_of_numbers_and_its_gradient_the_derivative(
    coupling: Coupling, num_blocks: int
) -> None:
    values = (0.0, 0.3, 0.9, 1.0)
    gates = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    weights = residual_weight(coupling, gates, num_blocks)
    expected = torch.tensor([residual_weight(coupling, gate, num_blocks) for gate in values], dtype=torch.float64)
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-14, atol=0)
    (slopes,) = torch.autograd.grad(weights.sum(), gates)
    for gate, slope in zip(values, slopes.tolist(), strict=True):
        by_gate = sum(i * gate ** (i - 1) for j in range(1, num_blocks + 1) for i in range(1, j))
        wanted = -1 if coupling == "ema" else -num_blocks * by_gate / sums(gate, num_blocks) ** 2
        assert slope == pytest.approx(wanted, abs=1e-12)


def test_bits_are_those_of_the_products() -> None:
    assert lost_bits(0.5, 5) == 5
    assert lost_bits(0.25, 3) == 6
    assert lost_bits(1, 40) == 0
    assert lost_bits(0, 2) == float("inf")


@pytest.mark.parametrize("bits", [BITS, LOW_PRECISION_BITS])
@pytest.mark.parametrize("num_blocks", range(2, 41))
def test_smallest_gate_is_legal_and_a_thousandth_less_is_not(num_blocks: int, bits: float) -> None:
    gate = smallest_gate(num_blocks, bits)
    check_reversible(gate, num_blocks, bits)
    with pytest.raises(ValueError, match=f"the smallest legal gate is {gate:g}"):
        check_reversible(gate - 0.001, num_blocks, bits)


@pytest.mark.parametrize(("num_blocks", "low"), [(2, 0.35), (3, 0.50), (5, 0.66), (7, 0.74), (9, 0.79)])
def test_range_of_learned_gates_keeps_the_small_budget(num_blocks: int, low: float) -> None:
    for coupling, high in zip(COUPLINGS, (1, 0.95), strict=True):
        bounds = gate_range(coupling, num_blocks)
        assert bounds == pytest.approx((low, high), abs=0.005)
        assert bounds[1] == high
        assert lost_bits(bounds[0], num_blocks) == pytest.approx(LOW_PRECISION_BITS)


def test_fractions_of_the_exact_mode_are_their_gates() -> None:
    assert {p / q for p, q in EXACT_GATES.values()} == set(EXACT_GATES) == {0.5, 0.75, 0.875, 0.9375, 1}
    assert all(gate == p / q and q.bit_count() == 1 for gate, (p, q) in EXACT_GATES.items())


@pytest.mark.parametrize(
    ("gate", "nearest"), [(0.9, "0.875"), (0.1, "0.5"), (0.7, "0.75"), (0.95, "0.9375"), (0.99, "1")]
)
def test_gate_that_is_no_fraction_is_refused_with_the_nearest(gate: float, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"1/2, 3/4, 7/8, 15/16 or 1, not {gate:g}; the nearest is {nearest}\."):
        check_exact(gate, "normalised")


# Learned gates


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("gating", LEARNED)
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("gate", [0.67, 0.9, 0.949])
def test_learned_gates_start_at_the_given_one(gate: float, num_blocks: int, gating: Gating, coupling: Coupling) -> None:
    stage = MomentumStage([Halving()] * num_blocks, gate, coupling, gating=gating, channels=CHANNELS)
    gates = stage.learned_gates()
    assert gates.shape == (num_blocks, CHANNELS if gating == "channel" else 1)
    torch.testing.assert_close(gates, torch.full_like(gates, gate), rtol=0, atol=2e-7)
    assert stage.gate == gate


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("rho", [-1e30, -200.0, -20.0, 20.0, 200.0, 1e30])
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 19])
def test_learned_gates_stay_within_their_range(num_blocks: int, rho: float, coupling: Coupling) -> None:
    stage = MomentumStage([Halving()] * num_blocks, 0.92, coupling, gating="block")
    for parameter in stage.rho:
        fill(parameter, rho)
    low, high = gate_range(coupling, num_blocks)
    gates = stage.learned_gates()
    rounding = 1.2e-7
    assert gates.min() >= low - rounding and gates.max() <= high + rounding
    x = make_inputs()[0]
    features, velocity = stage.flow(x, x)
    assert velocity is not None
    assert features.isfinite().all() and velocity.isfinite().all()


def fill(parameter: Tensor, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("rho", [-1e30, 1e30])
def test_gates_at_the_ends_of_their_range_can_be_inverted(rho: float, coupling: Coupling) -> None:
    stage = make_stage(5, 0.9, "smooth", gating="block", coupling=coupling)
    for parameter in stage.rho:
        fill(parameter, rho)
    x, velocity = make_inputs()
    results = {}
    for memory in ("plain", "reversible"):
        stage.memory = memory
        features, moved = stage.flow(x, velocity)
        assert moved is not None
        loss = features.square().sum() + moved.sum()
        results[memory] = torch.autograd.grad(loss, [p for name, p in stage.named_parameters() if "conv" in name])
    torch.testing.assert_close(results["reversible"], results["plain"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gating", LEARNED)
@pytest.mark.parametrize("has_velocity", [False, True])
def test_gate_of_a_single_block_can_be_learned(has_velocity: bool, gating: Gating) -> None:
    stage = MomentumStage([Halving()], 0.9, "ema", gating=gating, channels=CHANNELS)
    x, velocity = make_inputs(has_velocity=has_velocity)
    features, _ = stage.flow(x, velocity)
    torch.testing.assert_close(features, x - 0.05 * x + (0 if velocity is None else 0.9 * velocity))
    features.sum().backward()  # type: ignore[no-untyped-call]
    (rho,) = stage.rho
    assert rho.grad is not None and rho.grad.abs().min() > 0


@pytest.mark.parametrize("memory", ["plain", "checkpoint", "reversible"])
def test_every_gate_has_a_gradient_even_from_zero_velocity(memory: str) -> None:
    stage = make_stage(3, 0.8, gating="channel", memory=memory)
    stage(make_inputs()[0]).square().sum().backward()
    assert all(rho.grad is not None and rho.grad.abs().min() > 0 for rho in stage.rho)


@pytest.mark.parametrize("memory", ["plain", "reversible"])
def test_learned_gates_at_one_value_equal_the_fixed_one(memory: str) -> None:
    fixed = make_stage(3, 0.8, memory=memory)
    learned = MomentumStage(fixed.blocks, 0.8, gating="channel", channels=CHANNELS, memory=memory)  # type: ignore[arg-type]
    x, velocity = make_inputs()
    for a, b in zip(learned.flow(x, velocity), fixed.flow(x, velocity), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_channel_gates_act_on_their_channel_alone() -> None:
    stage = MomentumStage([Halving()] * 2, 0.8, gating="channel", channels=CHANNELS)
    x, velocity = make_inputs()
    before, _ = stage.flow(x, velocity)
    with torch.no_grad():
        stage.rho[0][1] += 1
    after, _ = stage.flow(x, velocity)
    changed = (after != before).transpose(0, 1).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_gates_are_the_only_parameters_they_add() -> None:
    fixed, by_block, by_channel = (make_stage(3, 0.8, gating=gating) for gating in ("fixed", "block", "channel"))
    keys = [f"rho.{index}" for index in range(3)]
    for stage, shape in ((by_block, (1,)), (by_channel, (CHANNELS,))):
        state = stage.state_dict()
        assert sorted(set(state) - set(fixed.state_dict())) == keys
        assert set(fixed.state_dict()) <= set(state)
        assert {state[key].shape for key in keys} == {shape}


def test_stage_without_blocks_has_no_gates() -> None:
    stage = MomentumStage([], 0.9, gating="channel", channels=CHANNELS)
    assert not list(stage.parameters())
    assert stage.learned_gates().shape == (0, 1)


@pytest.mark.parametrize(
    ("gate", "num_blocks", "coupling", "message"),
    [
        (0.5, 5, "normalised", r"gate 0\.5 cannot be learned in a stage of 5 blocks .* range is 0\.660 to 1, ends"),
        (1.0, 5, "normalised", r"0\.660 to 1, ends excluded\. Start within it, or take a fixed gate"),
        (0.95, 2, "ema", r"coupling ema: the range is 0\.354 to 0\.95"),
        (0.0, 2, "normalised", r"range is 0\.354 to 1"),
        (0.9, 20, "normalised", r"range is 0\.901 to 1"),
    ],
)
@pytest.mark.parametrize("gating", LEARNED)
def test_gate_from_which_nothing_can_be_learned_is_refused(
    gating: Gating, gate: float, num_blocks: int, coupling: Coupling, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MomentumStage([Halving()] * num_blocks, gate, coupling, gating=gating, channels=CHANNELS)


def test_channel_gates_without_the_number_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the number of channels; give channels"):
        MomentumStage([Halving()] * 2, 0.9, gating="channel")


def test_unknown_gating_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="gating is 'voxel'; it is one of fixed, block, channel"):
        MomentumStage([Halving()] * 2, 0.9, gating="voxel")  # type: ignore[arg-type]
