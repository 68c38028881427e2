from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stages import difference, gate_difference, gradients, make_blocks, make_inputs, make_stage, saved_bytes
from torch import Tensor, nn

from medmom.models.blocks import ResidualBlock
from medmom.models.momentum import Memory, MomentumStage
from medmom.models.states import UNIT

INVERTIBLE: list[Memory] = ["reversible", "exact"]
KINDS = ["postact", "preact"]
# Up to the limit of 5 bits for fixed gates, and of 3 for learned ones.
SETTINGS = [
    *[
        (num_blocks, gate, coupling, "fixed")
        for num_blocks, gate in [(2, 0.5), (3, 0.8), (5, 0.9), (5, 0.5), (6, 0.562)]
        for coupling in ("normalised", "ema")
    ],
    (6, 1.0, "normalised", "fixed"),
    *[
        (num_blocks, gate, coupling, gating)
        for num_blocks, gate in [(2, 0.5), (3, 0.8), (5, 0.9), (6, 0.75)]
        for coupling in ("normalised", "ema")
        for gating in ("block", "channel")
    ],
]


F64 = torch.float64


def compare(memory: str, stage: MomentumStage, x: Tensor, velocity: Tensor | None = None, **options: Any) -> Any:
    """Gradients in a memory and in plain."""
    stage.memory = "plain"
    expected = gradients(stage, x, velocity, **options)
    stage.memory = memory
    return gradients(stage, x, velocity, **options), expected


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gating", ["fixed", "block", "channel"])
@pytest.mark.parametrize("coupling", ["normalised", "ema"])
@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_gradients_are_those_of_plain_in_double_precision(  # noqa: PLR0917 - one for each choice
    memory: str, coupling: str, gating: str, kind: str, has_velocity: bool, spatial_dims: int
) -> None:
    stage = make_stage(3, 0.8, kind, spatial_dims=spatial_dims, coupling=coupling, gating=gating).double()
    x, velocity = make_inputs(spatial_dims, has_velocity=has_velocity, dtype=F64)
    found, expected = compare(memory, stage, x, velocity)
    assert difference(found, expected) <= 1e-10
    assert gate_difference(found, expected) <= 1e-10
    assert all(expected[name].any() for name in expected if name.startswith("rho"))


@pytest.mark.parametrize("kind", ["smooth", "smooth branch", *KINDS])
@pytest.mark.parametrize(("num_blocks", "gate", "coupling", "gating"), SETTINGS)
def test_gradients_are_those_of_plain_in_single_precision(
    num_blocks: int, gate: float, coupling: str, gating: str, kind: str
) -> None:
    stage = make_stage(num_blocks, gate, kind, coupling=coupling, gating=gating)
    found, expected = compare("reversible", stage, *make_inputs())
    assert difference(found, expected) <= 1e-5
    assert gate_difference(found, expected) <= 1e-5


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
@pytest.mark.parametrize("gating", ["fixed", "channel"])
@pytest.mark.parametrize("on", ["features", "velocity", "both"])
@pytest.mark.parametrize("has_velocity", [False, True])
def test_loss_may_look_at_features_velocity_or_both(on: str, has_velocity: bool, gating: str, memory: str) -> None:
    stage = make_stage(4, 0.8, gating=gating).double()
    x, velocity = make_inputs(has_velocity=has_velocity, dtype=F64)
    found, expected = compare(memory, stage, x, velocity, on=on)
    assert difference(found, expected) <= 1e-10
    assert gate_difference(found, expected) <= 1e-10


def test_gradients_hold_for_flat_kernels_and_odd_sizes() -> None:
    torch.manual_seed(0)
    stage = MomentumStage([ResidualBlock(3, 3, [1, 3, 3]) for _ in range(3)], 0.8, gating="channel", channels=3)
    x = torch.randn(1, 3, 2, 7, 5, dtype=torch.float64)
    assert difference(*compare("reversible", stage.double(), x)) <= 1e-10


def test_gradients_pass_the_check_by_finite_differences() -> None:
    stage = make_stage(3, 0.7, "smooth", gating="channel", memory="reversible").double()
    x, velocity = make_inputs(edge=2, dtype=F64)
    assert velocity is not None

    def flow(x: Tensor, velocity: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        features, moved = stage.flow(x, velocity)
        assert moved is not None
        return features, moved

    inputs = (x[:1].requires_grad_(), velocity[:1].requires_grad_(), *stage.rho)
    assert torch.autograd.gradcheck(flow, inputs, check_undefined_grad=False)


class Dead(torch.autograd.Function):
    """Hands no gradient on, as an operation may whose output is not looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("memory", ["plain", "checkpoint", *INVERTIBLE])
def test_stage_that_no_gradient_reaches_has_none(memory: str) -> None:
    stage = make_stage(2, 7 / 8, memory=memory)
    Dead.apply(stage(make_inputs()[0])).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in stage.parameters())


class Rounded(torch.autograd.Function):
    """A value of integers with the gradient of what it stands for."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, integers: Tensor) -> Tensor:
        return integers.to(smooth.dtype) * UNIT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def rounded(smooth: Tensor, integers: Tensor) -> Tensor:
    result: Tensor = Rounded.apply(smooth, integers)  # type: ignore[no-untyped-call]
    return result


def whole(values: Tensor) -> Tensor:
    return (values.detach() / UNIT).round().long()


def integer_twin(stage: MomentumStage, x: Tensor, velocity: Tensor, p: int, q: int) -> tuple[Tensor, Tensor]:
    """The steps of the exact mode in 64 bits, with all activations stored, rounding straight through."""
    units, speed, store = whole(x), whole(velocity), torch.zeros_like(x, dtype=torch.long)
    x, velocity = rounded(x, units), rounded(velocity, speed)
    for block in stage.blocks:
        change = (block(x) - x) * stage.weight
        a, r = speed // q, speed % q
        store = store * q + r
        b, e = store // p, store % p
        store, speed = b, a * p + e + whole(change)
        units = units + speed
        velocity = rounded(stage.gate * velocity + change, speed)
        x = rounded(x + velocity, units)
    return x, velocity


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("gate", [(1, 2), (3, 4), (7, 8), (15, 16), (1, 1)])
def test_exact_stage_equals_its_stored_twin(gate: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    p, q = gate
    stage = make_stage(4, p / q, memory="exact").to(dtype)
    x, velocity = make_inputs(dtype=dtype)
    assert velocity is not None
    found = gradients(stage, x, velocity)
    with torch.no_grad():
        outputs = integer_twin(stage, x, velocity, p, q)
    assert all(a is not None and torch.equal(a, b) for a, b in zip(stage.flow(x, velocity), outputs, strict=True))

    def flow(x: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert velocity is not None
        return integer_twin(stage, x, velocity, p, q)

    stage.flow = flow  # type: ignore[method-assign]
    assert difference(found, gradients(stage, x, velocity)) <= tolerance


@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize("kind", ["smooth", "smooth branch"])
@pytest.mark.parametrize(("num_blocks", "gate"), [(2, 1 / 2), (5, 1 / 2), (6, 3 / 4), (6, 7 / 8), (6, 15 / 16), (6, 1)])
def test_exact_gradients_are_near_those_of_plain(num_blocks: int, gate: float, kind: str, has_velocity: bool) -> None:
    stage = make_stage(num_blocks, gate, kind)
    found, expected = compare("exact", stage, *make_inputs(has_velocity=has_velocity))
    # Each velocity is off by less than 16 units of 1e-6, the digits that come back from the store.
    assert difference(found, expected) <= 2e-5


@pytest.mark.parametrize("gating", ["fixed", "block", "channel"])
def test_reversible_forward_is_that_of_plain_to_the_bit(gating: str) -> None:
    stage = make_stage(4, 0.8, gating=gating)
    x, velocity = make_inputs()
    plain = stage.flow(x, velocity)
    stage.memory = "reversible"
    for found, expected in zip(stage.flow(x, velocity), plain, strict=True):
        assert found is not None and expected is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize("memory", INVERTIBLE)
def test_kept_bytes_do_not_grow_with_depth(memory: str) -> None:
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    kept = {m: saved_bytes(make_stage(m, 1 if m > 10 else 15 / 16, memory=memory), x) for m in (2, 5, 10)}
    assert len(set(kept.values())) == 1
    assert kept[2] <= 2.25 * x.nbytes + 64, "features, velocity, a byte an element and some sums"
    plain = {m: saved_bytes(make_stage(m, 15 / 16), x) for m in (2, 5, 10)}
    assert plain[10] - plain[5] > 0.9 * 5 / 3 * (plain[5] - plain[2]) > 0


@pytest.mark.parametrize(("memory", "gating"), [("reversible", "fixed"), ("reversible", "channel"), ("exact", "fixed")])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_blocks_keep_at_most_15_percent(kind: str, memory: str, gating: str) -> None:
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    stage = make_stage(16, 15 / 16, kind, gating=gating)
    plain = saved_bytes(stage, x)
    stage.memory = memory
    assert saved_bytes(stage, x) <= 0.15 * plain


def test_checkpoint_keeps_one_input_a_block() -> None:
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert saved_bytes(make_stage(8, 0.9, memory="checkpoint"), x) <= 8.1 * x.nbytes


@pytest.mark.parametrize("memory", ["reversible", "exact"])
def test_activation_in_place_behind_the_stage_is_never_silently_wrong(memory: str) -> None:
    stage = make_stage(3, 7 / 8, "smooth").double()
    x, _ = make_inputs(dtype=F64)
    activation = nn.LeakyReLU(0.1, inplace=True)
    parameters = list(stage.parameters())
    expected = torch.autograd.grad(activation(stage(x)).square().sum(), parameters)
    stage.memory = memory
    loss = activation(stage(x)).square().sum()
    try:
        found = torch.autograd.grad(loss, parameters)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", ["plain", *INVERTIBLE])
def test_weights_that_change_before_the_backward_are_never_silently_wrong(memory: str) -> None:
    stage = make_stage(3, 7 / 8, "smooth").double()
    x, _ = make_inputs(dtype=F64)
    parameters = list(stage.parameters())
    stage.memory = memory
    expected = torch.autograd.grad(stage(x).square().sum(), parameters)
    loss = stage(x).square().sum()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)
    try:
        found = torch.autograd.grad(loss, parameters)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memory", ["plain", *INVERTIBLE])
def test_weights_lent_for_the_forward_alone_are_never_silently_wrong(memory: str) -> None:
    stage = make_stage(2, 7 / 8, "smooth", memory=memory).double()
    x = make_inputs(dtype=F64)[0]
    lent = {name: (1.3 * parameter.detach()).requires_grad_() for name, parameter in stage.named_parameters()}
    loss = torch.func.functional_call(stage, lent, (x,)).square().sum()
    try:
        found = torch.autograd.grad(loss, list(lent.values()), allow_unused=True)
    except RuntimeError as error:
        assert "parameters" in str(error)
    else:
        stage.load_state_dict(lent)
        expected = torch.autograd.grad(stage(x).square().sum(), list(stage.parameters()))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memory", INVERTIBLE)
def test_block_that_writes_to_its_input_is_refused(memory: Memory) -> None:
    blocks = [nn.Sequential(nn.LeakyReLU(inplace=True), nn.Conv2d(3, 3, 1)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="in-place operation"):
        MomentumStage(blocks, 1.0, memory=memory)(make_inputs()[0]).sum().backward()


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_second_backward_gives_the_same_again(memory: str) -> None:
    stage = make_stage(3, 7 / 8, gating="fixed", memory=memory)
    x = make_inputs()[0].requires_grad_()
    sources = [x, *stage.parameters()]
    loss = stage(x).square().sum()
    first = torch.autograd.grad(loss, sources, retain_graph=True)
    again = torch.autograd.grad(loss, sources)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("memory", INVERTIBLE)
def test_second_backward_of_a_graph_that_was_not_kept_is_refused(memory: str) -> None:
    loss = make_stage(3, 7 / 8, memory=memory)(make_inputs()[0]).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("memory", INVERTIBLE)
def test_second_derivative_is_refused(memory: str) -> None:
    stage = make_stage(2, 7 / 8, memory=memory)
    x = make_inputs()[0].requires_grad_()
    (grad,) = torch.autograd.grad(stage(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_frozen_parameters_get_no_gradient_and_the_rest_the_right_one(memory: str) -> None:
    found: dict[str, dict[str, Tensor | None]] = {}
    for mode in ("plain", memory):
        stage = make_stage(3, 7 / 8, "smooth", memory=mode).double()
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_("blocks.1" not in name and "conv1.weight" not in name)
        stage(make_inputs()[0].double()).square().sum().backward()
        found[mode] = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for name, expected in found["plain"].items():
        grad = found[memory][name]
        assert (grad is None) == (expected is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4 if memory == "exact" else 1e-10)


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_unused_parameters_get_no_gradient(memory: str) -> None:
    stage = make_stage(2, 7 / 8, memory=memory)
    stage.blocks[1].spare = nn.Linear(2, 2)
    stage(make_inputs()[0]).sum().backward()
    without = [name for name, parameter in stage.named_parameters() if parameter.grad is None]
    assert without == ["blocks.1.spare.weight", "blocks.1.spare.bias"]


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_frozen_stage_hands_the_gradient_of_its_input_on(memory: str) -> None:
    stage = make_stage(3, 7 / 8, "smooth").double().requires_grad_(False)
    x = make_inputs()[0].double().requires_grad_()
    (expected,) = torch.autograd.grad(stage(x).square().sum(), x)
    stage.memory = memory
    (found,) = torch.autograd.grad(stage(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if memory == "exact" else 1e-10)


class Constant(nn.Module):
    """A branch that does not look at its input."""

    is_branch = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_block_without_a_gradient_lets_that_of_the_others_through(memory: str) -> None:
    stage = MomentumStage([*make_blocks(2, "smooth"), Constant()], 7 / 8, memory="plain").double()
    x = make_inputs()[0].double()
    found, expected = compare(memory, stage, x)
    assert difference(found, expected) <= (1e-4 if memory == "exact" else 1e-10)


def _one_block_twice() -> list[nn.Module]:
    a, b = make_blocks(2, "smooth")
    return [a, b, a]


def _one_convolution_in_two_blocks() -> list[nn.Module]:
    a, b = make_blocks(2, "smooth")
    b.conv1 = a.conv1
    return [a, b]


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
@pytest.mark.parametrize("sharing", [_one_block_twice, _one_convolution_in_two_blocks])
def test_shared_parameters_get_the_sum(sharing: Callable[[], list[nn.Module]], memory: str) -> None:
    stage = MomentumStage(sharing(), 7 / 8).double()
    found, expected = compare(memory, stage, *make_inputs(dtype=F64))
    assert difference(found, expected) <= (1e-4 if memory == "exact" else 1e-10)


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_two_runs_before_one_backward_do_not_disturb_each_other(memory: str) -> None:
    stage = make_stage(3, 7 / 8, "smooth").double()
    x, velocity = make_inputs(dtype=F64)
    assert velocity is not None

    def both() -> tuple[Tensor, ...]:
        first, second = stage(x), stage(velocity)
        return torch.autograd.grad((first * second).sum(), list(stage.parameters()))

    expected = both()
    stage.memory = memory
    torch.testing.assert_close(both(), expected, rtol=1e-4, atol=1e-3 if memory == "exact" else 1e-10)


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
@pytest.mark.parametrize("is_training", [False, True])
def test_without_gradients_every_memory_is_the_plain_loop(memory: str, is_training: bool) -> None:
    stage = make_stage(4, 15 / 16).train(is_training)
    x, velocity = make_inputs()
    with torch.no_grad():
        plain = stage.flow(x, velocity)
        stage.memory = memory
        for found, expected in zip(stage.flow(x, velocity), plain, strict=True):
            assert found is not None and expected is not None
            assert torch.equal(found, expected)


@pytest.mark.parametrize("memory", ["checkpoint", *INVERTIBLE])
def test_memory_may_change_between_forward_and_backward(memory: str) -> None:
    stage = make_stage(3, 7 / 8, memory=memory)
    x = make_inputs()[0]
    expected = torch.autograd.grad(stage(x).square().sum(), list(stage.parameters()))
    loss = stage(x).square().sum()
    stage.memory, stage.gate = "plain", 0.3
    found = torch.autograd.grad(loss, list(stage.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_stage_leaves_inputs_and_incoming_gradients_alone() -> None:
    stage = make_stage(3, 7 / 8, memory="reversible")
    x, velocity = make_inputs()
    grads = [torch.randn_like(x), torch.randn_like(x)]
    before = [tensor.clone() for tensor in (x, velocity, *grads) if tensor is not None]
    outputs = [output for output in stage.flow(x, velocity) if output is not None]
    torch.autograd.backward(outputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, velocity, *grads), strict=True) if b is not None)
