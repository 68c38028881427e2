from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from stages import SmoothBlock, make_blocks, make_inputs, make_stage
from torch import Tensor, nn

from medmom.models.gates import residual_weight
from medmom.models.inversion import invertible_flow
from medmom.models.momentum import MomentumStage
from medmom.models.states import LOW_PRECISION_UNIT, UNIT, FloatState, IntegerState

Residual = Callable[[int, Tensor], Tensor]

# What a byte of lost digits an element can hold.
FITTING = [
    *[(5, gate) for gate in (1 / 2, 3 / 4, 7 / 8, 15 / 16)],
    *[(10, gate) for gate in (3 / 4, 7 / 8, 15 / 16)],
    *[(20, gate) for gate in (7 / 8, 15 / 16)],
    *[(num_blocks, 1.0) for num_blocks in (2, 5, 10, 40)],
]
TOO_LONG = [(10, 1 / 2), (20, 1 / 2), (20, 3 / 4)]


def noise(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Values of both signs and several sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * 3 ** torch.randn(*shape, generator=generator)
    return values.clamp(-15, 15)


def fixed_residuals(num_blocks: int, shape: Sequence[int], seed: int) -> Residual:
    residuals = noise((num_blocks, *shape), seed)
    return lambda index, features: residuals[index]


def forth(state: IntegerState | FloatState, num_blocks: int, residual: Residual, gate: float) -> list[Tensor]:
    """Advances through all blocks; gives the features that each was given."""
    seen = []
    for index in range(num_blocks):
        seen.append(state.features)
        state.advance(residual(index, state.features), gate, residual_weight("normalised", gate, num_blocks))
    state.end_forth()
    return seen


def back(state: IntegerState | FloatState, num_blocks: int, residual: Residual, gate: float) -> list[Tensor]:
    """Undoes all steps; gives the features that each block was given, the first block's first."""
    seen = []
    for index in reversed(range(num_blocks)):
        state.step_back()
        seen.append(state.features)
        state.slow_down(residual(index, state.features), gate, residual_weight("normalised", gate, num_blocks))
    return seen[::-1]


def stores(state: IntegerState) -> list[Tensor]:
    """The bytes of lost digits, where there are any."""
    return [kept for kept in state.saved if kept.dtype == torch.uint8]


def assert_exact(num_blocks: int, gate: float, residual: Residual, x: Tensor, velocity: Tensor | None) -> None:
    """Forth and back through two states that share only what is saved."""
    state = IntegerState.start(x, velocity, UNIT, has_store=gate != 1)
    start = state.saved
    seen = forth(state, num_blocks, residual, gate)
    assert len(stores(state)) == (gate != 1)
    assert all(store.any() for store in stores(state)), "digits were lost on the way"
    returned = IntegerState(state.saved, UNIT, torch.float32)
    seen_again = back(returned, num_blocks, residual, gate)
    returned.end_back()
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start, returned.saved, strict=True))
    assert not any(store.any() for store in stores(returned))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize(("num_blocks", "gate"), FITTING)
def test_integers_return_to_the_bit(num_blocks: int, gate: float, has_velocity: bool, seed: int) -> None:
    shape = (2, 3, 8, 8)
    velocity = noise(shape, seed + 20) if has_velocity else None
    assert velocity is None or (velocity < 0).any()
    assert_exact(num_blocks, gate, fixed_residuals(num_blocks, shape, seed), noise(shape, seed + 10), velocity)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_blocks", "gate"), FITTING)
def test_integers_return_to_the_bit_through_convolutions(num_blocks: int, gate: float, precision: torch.dtype) -> None:
    blocks = make_blocks(num_blocks)

    def residual(index: int, features: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            output: Tensor = blocks[index](features)
        return output - features

    x, velocity = make_inputs()
    assert_exact(num_blocks, gate, residual, x, velocity)


def test_integers_follow_the_recurrence_to_a_few_units() -> None:
    x, velocity = make_inputs()
    assert velocity is not None
    residual = fixed_residuals(5, x.shape, 0)
    state = IntegerState.start(x, velocity, UNIT, has_store=True)
    forth(state, 5, residual, 7 / 8)
    weight = residual_weight("normalised", 7 / 8, 5)
    for index in range(5):
        velocity = 7 / 8 * velocity + weight * residual(index, x)
        x = x + velocity
    # The digits that come back from the store move the velocity by up to 8 units a block.
    torch.testing.assert_close(state.velocity, velocity, rtol=0, atol=5 * 9 * UNIT)
    torch.testing.assert_close(state.features, x, rtol=1e-6, atol=15 * 9 * UNIT)


def test_integers_start_at_the_nearest_whole_unit() -> None:
    x = torch.tensor([[[0.0, 1.0, -1.5, 0.4 * UNIT, 0.6 * UNIT, -0.6 * UNIT, 1000.0]]])
    state = IntegerState.start(x, x / 2, UNIT, has_store=True)
    assert state.features.tolist() == [[[0.0, 1.0, -1.5, 0.0, UNIT, -UNIT, 1000.0]]]
    assert state.velocity.flatten()[:3].tolist() == [0.0, 0.5, -0.75]
    assert [kept.dtype for kept in state.saved if kept.shape == x.shape] == [torch.int32, torch.int32, torch.uint8]
    assert not stores(state)[0].any()


def test_integers_of_a_double_stage_are_given_as_doubles() -> None:
    x = noise((1, 2, 3, 3)).double()
    state = IntegerState.start(x, None, UNIT, has_store=False)
    assert state.features.dtype == torch.float64
    torch.testing.assert_close(state.features, x, rtol=0, atol=UNIT / 2)
    assert not state.velocity.any()


@pytest.mark.parametrize(("num_blocks", "gate"), TOO_LONG)
def test_more_digits_than_a_byte_are_refused_with_the_mend(num_blocks: int, gate: float) -> None:
    x, velocity = make_inputs()
    state = IntegerState.start(x, velocity, UNIT, has_store=True)
    with pytest.raises(OverflowError, match=r"must fit into a byte; here they made \d+\. Take a gate nearer to 1"):
        forth(state, num_blocks, fixed_residuals(num_blocks, x.shape, 0), gate)


@pytest.mark.parametrize(("num_blocks", "gate"), TOO_LONG)
def test_stage_with_too_many_digits_is_refused_in_its_forward(num_blocks: int, gate: float) -> None:
    x, velocity = make_inputs()
    stage = make_stage(num_blocks, gate, "smooth", memory="exact")
    with pytest.raises(OverflowError, match="or memory reversible"):
        stage.flow(x, velocity)


@pytest.mark.parametrize("bad", [1025.0, -1025.0, 5000.0, 1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["features", "velocity", "residual"])
def test_values_out_of_range_are_refused(where: str, bad: float) -> None:
    values = {name: torch.zeros(1, 2, 3, 3) for name in ("features", "velocity", "residual")}
    values[where][0, 1, 2, 0] = bad
    state = IntegerState.start(values["features"], values["velocity"], UNIT, has_store=True)
    state.advance(values["residual"], 0.5, 1.0)
    with pytest.raises(OverflowError, match=r"must stay below 1024 and finite; here one reached \S+\. Take memory"):
        state.end_forth()


def test_sum_that_leaves_the_range_is_refused_though_its_parts_do_not() -> None:
    state = IntegerState.start(torch.full((1, 1, 2), 600.0), torch.full((1, 1, 2), 500.0), UNIT, has_store=False)
    state.advance(torch.zeros(1, 1, 2), 1.0, 1.0)
    with pytest.raises(OverflowError, match="reached 1100"):
        state.end_forth()


def test_velocity_that_leaves_the_range_is_refused_though_features_do_not() -> None:
    state = IntegerState.start(torch.full((1, 1, 2), -600.0), torch.full((1, 1, 2), 500.0), UNIT, has_store=False)
    state.advance(torch.full((1, 1, 2), 600.0), 1.0, 1.0)
    assert state.features.tolist() == [[[500.0, 500.0]]]
    with pytest.raises(OverflowError, match="reached 1100"):
        state.end_forth()


def test_value_that_was_too_large_for_one_block_alone_is_refused() -> None:
    residuals = torch.tensor([1500.0, -3000.0, 1500.0, 0.0])
    state = IntegerState.start(torch.zeros(1, 1, 2), None, UNIT, has_store=False)
    with pytest.raises(OverflowError, match="must stay below 1024"):
        forth(state, 4, lambda index, features: residuals[index].expand(1, 1, 2), 1.0)


def test_values_within_the_range_are_kept() -> None:
    state = IntegerState.start(torch.full((1, 1, 2), 1023.0), None, UNIT, has_store=False)
    state.advance(torch.zeros(1, 1, 2), 1.0, 1.0)
    state.end_forth()
    assert state.features.tolist() == [[[1023.0, 1023.0]]]


def test_low_precision_reaches_further() -> None:
    x = torch.full((1, 3, 4, 4), 5000.0)
    stage = make_stage(2, 1.0, memory="exact")
    with pytest.raises(OverflowError, match="below 1024"):
        stage(x)
    with torch.autocast("cpu", torch.bfloat16):
        stage(x)
        with pytest.raises(OverflowError, match="below 16384"):
            stage(4 * x)
    assert LOW_PRECISION_UNIT / UNIT == 16


class Restless(nn.Module):
    """Computes something else the second time: everywhere, or at a single voxel."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.block, self.where, self.num_calls = SmoothBlock(), where, 0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.block(x)
        change = torch.zeros_like(output)
        change[(0, 0, 0, 0) if self.where == "one voxel" else ...] = 16 * UNIT * self.num_calls
        self.num_calls += 1
        return output + change


@pytest.mark.parametrize("where", ["everywhere", "one voxel"])
@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize("gate", [1 / 2, 3 / 4, 7 / 8, 15 / 16, 1.0])
def test_block_that_computes_other_bits_the_second_time_is_found(gate: float, has_velocity: bool, where: str) -> None:
    stage = MomentumStage([*make_blocks(2, "smooth"), Restless(where), *make_blocks(1, "smooth")], gate, memory="exact")
    x, velocity = make_inputs(has_velocity=has_velocity)
    features, _ = stage.flow(x, velocity)
    with pytest.raises(RuntimeError, match="compute the same bits twice"):
        features.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_blocks", "gate"), FITTING)
def test_blocks_of_an_exact_stage_see_equal_bits_on_both_ways(
    num_blocks: int, gate: float, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(num_blocks, gate, memory="exact")
    seen: list[list[Tensor]] = [[] for _ in stage.blocks]
    for block, inputs in zip(stage.blocks, seen, strict=True):
        block.register_forward_hook(lambda block, args, output, inputs=inputs: inputs.append(args[0].detach().clone()))
    ends: list[IntegerState] = []
    check = IntegerState.end_back

    def end_back(state: IntegerState) -> None:
        ends.append(state)
        check(state)

    monkeypatch.setattr(IntegerState, "end_back", end_back)
    x, velocity = make_inputs()
    assert velocity is not None

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        features, moved = stage.flow(x, velocity)
    assert moved is not None
    (features.square().sum() + moved.square().sum()).backward()  # type: ignore[no-untyped-call]

    assert all(torch.equal(forward, backward) for forward, backward in seen)
    unit = UNIT if precision == torch.float32 else LOW_PRECISION_UNIT
    (end,) = ends
    assert torch.equal(end.saved[0], (x / unit).round().int())
    assert torch.equal(end.saved[1], (velocity / unit).round().int())
    assert not any(store.any() for store in stores(end))


@pytest.mark.parametrize(("num_blocks", "gate"), [(2, 0.177), (5, 0.5), (6, 0.562), (10, 0.708), (20, 0.841), (40, 1)])
def test_floats_return_at_the_limit_of_the_budget(num_blocks: int, gate: float) -> None:
    x, velocity = make_inputs()
    assert velocity is not None
    blocks = make_blocks(num_blocks, "smooth branch")

    def residual(index: int, features: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = blocks[index](features)
        return output

    state = FloatState(x, velocity)
    forth(state, num_blocks, residual, gate)
    returned = FloatState(*state.saved)
    back(returned, num_blocks, residual, gate)
    torch.testing.assert_close(returned.features, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(returned.velocity, velocity, rtol=0, atol=1e-5)


def test_floats_beyond_the_budget_do_not_return() -> None:
    x, velocity = make_inputs()
    residual = fixed_residuals(20, x.shape, 0)
    state = FloatState(x, velocity)
    forth(state, 20, residual, 0.5)
    back(state, 20, residual, 0.5)
    assert velocity is not None and state.velocity is not None
    assert (state.velocity - velocity).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_never_narrower_than_fp32(dtype: torch.dtype) -> None:
    x = torch.ones(1, 2, 3, 3, dtype=dtype)
    state = FloatState(x, x)
    state.advance(x, 0.9, 0.5)
    assert {kept.dtype for kept in state.saved} == {torch.promote_types(dtype, torch.float32)}


def test_states_leave_the_tensors_they_were_given_alone() -> None:
    x, velocity = make_inputs()
    assert velocity is not None
    residual = noise(x.shape)
    before = [tensor.clone() for tensor in (x, velocity, residual)]
    for state in (FloatState(x, velocity), IntegerState.start(x, velocity, UNIT, has_store=True)):
        state.advance(residual, 0.75, 1.0)
        saved = state.saved
        copies = [kept.clone() for kept in saved]
        state.step_back()
        state.slow_down(residual, 0.75, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(saved, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, velocity, residual), strict=True))


def test_large_negative_velocity_returns_to_the_bit() -> None:
    # Division toward zero, as of C, would return for positive numbers alone.
    x = torch.zeros(1, 1, 64)
    velocity = -torch.linspace(0, 900, 64).view(1, 1, 64)
    for gate in (1 / 2, 3 / 4, 7 / 8, 15 / 16):
        assert_exact(2, gate, lambda index, features: torch.zeros_like(features), x, velocity / 16 - UNIT)


def test_gate_one_keeps_no_store() -> None:
    x, velocity = make_inputs()
    stage_input = x.requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        invertible_flow(make_blocks(2), stage_input, velocity, pair=(1.0, 0.5), is_exact=True)
    assert [tensor.dtype for tensor in kept if tensor.shape == x.shape] == [torch.int32, torch.int32]
