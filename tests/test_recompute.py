from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stages import CHANNELS, SmoothBlock, difference, gradients, make_blocks, make_inputs, make_stage
from torch import Tensor, nn

from medmom.models.momentum import MomentumStage
from medmom.models.recompute import Draws, FrozenBuffers, Precision, check_replay, checkpointed

RECOMPUTING = ["checkpoint", "reversible", "exact"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


# Random numbers


def dropping_stage(memory: str) -> MomentumStage:
    """Dropout in the first and the last of three blocks; the one between them draws nothing."""
    a, b, c = make_blocks(3, "smooth")
    blocks = [nn.Sequential(a, nn.Dropout(0.3)), b, nn.Sequential(c, nn.Dropout2d(0.5))]
    return MomentumStage(blocks, 7 / 8, memory=memory).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize("memory", RECOMPUTING)
def test_dropout_is_replayed(memory: str, has_velocity: bool) -> None:
    x, velocity = make_inputs(has_velocity=has_velocity)
    x, velocity = x.double(), None if velocity is None else velocity.double()
    found = []
    for mode in ("plain", memory):
        torch.manual_seed(3)
        found.append(gradients(dropping_stage(mode), x, velocity))
    assert difference(found[1], found[0]) <= (1e-4 if memory == "exact" else 1e-10)
    other = gradients(dropping_stage(memory), x, velocity)
    assert difference(other, found[0]) > 0.1, "other draws, other gradients"


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_backward_leaves_the_random_numbers_where_they_were(memory: str) -> None:
    states = {}
    for mode in ("plain", memory):
        torch.manual_seed(3)
        loss = dropping_stage(mode)(make_inputs()[0].double()).sum()
        torch.rand(5)
        before = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        states[mode] = before
    assert torch.equal(states["plain"], states[memory]), "the forward draws as plain does"


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_random_numbers_are_replayed_in_a_second_backward_too(memory: str) -> None:
    stage = dropping_stage(memory)
    loss = stage(make_inputs()[0].double()).square().sum()
    parameters = list(stage.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.rand(5)
    again = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_draws_are_kept_only_where_something_was_drawn() -> None:
    idle, busy = Draws(CPU), Draws(CPU)
    idle.end()
    drawn = torch.rand(3)
    busy.end()
    with busy.again():
        assert torch.equal(torch.rand(3), drawn)
    before = torch.get_rng_state()
    with idle.again():
        assert torch.equal(torch.get_rng_state(), before)


def test_draws_put_the_generator_back_after_an_error() -> None:
    draws = Draws(CPU)
    torch.rand(3)
    draws.end()
    before = torch.get_rng_state()
    with pytest.raises(KeyError), draws.again():
        torch.rand(2)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("memory", ["reversible", "exact"])
def test_dropout_is_refused_where_its_numbers_cannot_be_had_again(memory: str) -> None:
    stage = dropping_stage(memory).to("meta")
    x = torch.empty(1, CHANNELS, 4, 4, device="meta", dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"device meta cannot be drawn again .* take memory plain, or leave"):
        stage(x)
    stage.eval()(x).sum().backward()
    for part in stage.modules():
        if isinstance(part, (nn.Dropout, nn.Dropout2d)):
            part.p = 0.0
    stage.train()(x).sum().backward()


def test_replay_is_asked_for_only_where_values_are_dropped() -> None:
    meta = torch.device("meta")
    check_replay([nn.Dropout(0.1)], CPU)
    check_replay([nn.Dropout(0.0), nn.Dropout3d(0.5).eval(), nn.Conv2d(1, 1, 1)], meta)
    for part in (nn.Dropout(0.1), nn.Dropout3d(0.1), nn.AlphaDropout(0.1)):
        with pytest.raises(RuntimeError, match="drops values"):
            check_replay([nn.Conv2d(1, 1, 1), nn.Sequential(part)], meta)


# Buffers


@pytest.mark.parametrize("kind", ["postact", "preact"])
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_running_statistics_are_updated_once(memory: str, kind: str) -> None:
    plain, other = (make_stage(3, 0.8, kind, norm="batch").double() for _ in range(2))
    other.memory = memory
    for seed in range(2):
        x = torch.randn(4, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed)).double()
        for stage in (plain, other):
            stage(x).square().sum().backward()
    buffers = dict(plain.named_buffers())
    assert {int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")} == {2}
    assert any(name.endswith("running_var") for name in buffers)
    for name, value in other.named_buffers():
        assert torch.equal(value, buffers[name]), name


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("kind", ["postact", "preact"])
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_gradients_through_batch_normalisation_are_those_of_plain(memory: str, kind: str, is_training: bool) -> None:
    stage = make_stage(3, 0.8, kind, norm="batch").double()
    x, velocity = make_inputs()
    assert velocity is not None
    stage(x.double())
    stage.train(is_training)
    before = {name: value.clone() for name, value in stage.named_buffers()}
    expected = gradients(stage, x.double(), velocity.double())
    stage.memory = memory
    assert difference(gradients(stage, x.double(), velocity.double()), expected) <= 1e-10
    if not is_training:
        assert all(torch.equal(value, before[name]) for name, value in stage.named_buffers())


def test_buffers_are_the_same_objects_after_a_backward() -> None:
    stage = make_stage(2, 0.8, norm="batch", memory="reversible")
    before = {name: value.data_ptr() for name, value in stage.named_buffers()}
    stage(make_inputs()[0]).sum().backward()
    assert {name: value.data_ptr() for name, value in stage.named_buffers()} == before


def test_buffers_are_thawed_after_an_error() -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    mean = norm.running_mean
    with pytest.raises(KeyError), FrozenBuffers(norm):
        norm(make_inputs()[0])
        raise KeyError
    assert norm.running_mean is mean
    assert mean is not None and not mean.any()
    assert norm.num_batches_tracked == 0


def test_buffers_may_be_absent() -> None:
    norm = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    with FrozenBuffers(norm):
        norm(make_inputs()[0])
    assert norm.running_mean is None


def test_checkpointed_module_with_buffers_can_run_backward_twice() -> None:
    norm = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.Tanh())
    loss = checkpointed(norm, make_inputs()[0]).square().sum()
    first = torch.autograd.grad(loss, list(norm.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(norm.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert norm[1].num_batches_tracked == 1


def test_checkpointed_method_freezes_the_buffers_of_its_module() -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    checkpointed(norm.forward, make_inputs()[0].requires_grad_()).square().sum().backward()
    assert norm.num_batches_tracked == 1


# Precision


@pytest.mark.parametrize("has_velocity", [False, True])
@pytest.mark.parametrize(("num_blocks", "gate"), [(2, 0.5), (5, 0.66), (5, 0.9), (5, 1.0)])
@pytest.mark.parametrize("kind", ["smooth", "postact"])
def test_autocast_adds_less_to_the_gradients_than_it_costs_itself(
    kind: str, num_blocks: int, gate: float, has_velocity: bool
) -> None:
    stage = make_stage(num_blocks, gate, kind)
    x, velocity = make_inputs(has_velocity=has_velocity, edge=8)
    full = gradients(stage, x, velocity)
    with autocast():
        plain = gradients(stage, x, velocity)
        stage.memory = "reversible"
        reversible = gradients(stage, x, velocity)
    assert 0 < difference(reversible, plain) <= difference(plain, full)


@pytest.mark.parametrize(("num_blocks", "gate"), [(2, 0.5), (5, 1.0)])
def test_autocast_of_an_exact_stage_adds_less_than_it_costs_itself(num_blocks: int, gate: float) -> None:
    stage = make_stage(num_blocks, gate, "smooth")
    x, velocity = make_inputs(edge=8)
    full = gradients(stage, x, velocity)
    with autocast():
        plain = gradients(stage, x, velocity)
        stage.memory = "exact"
        exact = gradients(stage, x, velocity)
    assert difference(exact, plain) <= difference(plain, full)


@pytest.mark.parametrize("gating", ["fixed", "channel"])
def test_state_under_autocast_is_no_worse_than_the_stream_of_plain(gating: str) -> None:
    # In plain the velocity of such blocks is bf16 as their convolutions are; the reversible state is fp32.
    stage = make_stage(4, 0.8, "preact", gating=gating)
    x, velocity = make_inputs(edge=8)
    full = gradients(stage, x, velocity)
    with autocast():
        plain = gradients(stage, x, velocity)
        stage.memory = "reversible"
        reversible = gradients(stage, x, velocity)
    assert difference(reversible, full) <= 1.2 * difference(plain, full)


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("kind", ["postact", "preact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_have_the_type_of_plain_under_autocast(dtype: torch.dtype, kind: str, memory: str) -> None:
    stage, x = make_stage(2, 7 / 8, kind), make_inputs()[0].to(dtype)
    with autocast():
        plain = stage(x)
        stage.memory = memory
        assert stage(x).dtype == plain.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", ["reversible", "exact"])
def test_blocks_under_autocast_are_given_the_whole_state(memory: str, dtype: torch.dtype) -> None:
    stage = make_stage(2, 7 / 8, memory=memory)
    given: list[torch.dtype] = []
    for block in stage.blocks:
        block.register_forward_pre_hook(lambda block, args: given.append(args[0].dtype))
    with autocast():
        stage(make_inputs(dtype=dtype)[0]).float().sum().backward()
    assert given == [torch.float32] * 4


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_backward_may_run_inside_or_outside_of_autocast(memory: str) -> None:
    stage = make_stage(3, 7 / 8, memory=memory)
    x = make_inputs()[0]
    with autocast():
        inside = torch.autograd.grad(stage(x).square().sum(), list(stage.parameters()))
        loss = stage(x).square().sum()
    outside = torch.autograd.grad(loss, list(stage.parameters()))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    loss = stage(x).square().sum()
    expected = torch.autograd.grad(stage(x).square().sum(), list(stage.parameters()))
    with autocast():
        found = torch.autograd.grad(loss, list(stage.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_casts_of_weights_made_without_gradients_are_not_taken_up(memory: str) -> None:
    stage = make_stage(3, 7 / 8)
    x = make_inputs()[0]
    with autocast():
        expected = torch.autograd.grad(stage(x).square().sum(), list(stage.parameters()))
    stage.memory = memory
    for _ in range(2):
        stage.zero_grad()
        with autocast():
            with torch.no_grad():
                stage(x)
            stage(x).square().sum().backward()
            with torch.no_grad():
                stage(x)
        assert all(parameter.grad is not None for parameter in stage.parameters())
    found = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    assert difference(found, dict(zip(found, expected, strict=True))) < 0.1


@pytest.mark.parametrize("memory", RECOMPUTING)
@pytest.mark.parametrize("kind", ["smooth", "preact"])
def test_network_in_bf16_has_gradients_as_good_as_those_of_plain(kind: str, memory: str) -> None:
    stage = make_stage(4, 7 / 8, kind)
    x, velocity = make_inputs(edge=8)
    assert velocity is not None
    full = gradients(stage, x, velocity)
    stage, x, velocity = stage.bfloat16(), x.bfloat16(), velocity.bfloat16()
    plain = gradients(stage, x, velocity)
    stage.memory = memory
    assert all(output is not None and output.dtype == torch.bfloat16 for output in stage.flow(x, velocity))
    found = gradients(stage, x, velocity)
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}
    assert difference(found, full) <= 1.2 * difference(plain, full)


@pytest.mark.parametrize("gating", ["block", "channel"])
def test_learned_gates_of_a_bf16_network_have_gradients(gating: str) -> None:
    stage = make_stage(3, 0.8, "smooth", gating=gating, memory="reversible")
    x, velocity = make_inputs()
    assert velocity is not None
    full = gradients(stage, x, velocity)
    found = gradients(stage.bfloat16(), x.bfloat16(), velocity.bfloat16())
    assert difference(found, full) < 0.05


def test_precision_is_what_holds_and_comes_again() -> None:
    outside = Precision.now("cpu")
    with autocast():
        inside = Precision.now("cpu")
        with outside.again():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert (outside.is_low, inside.is_low, inside.dtype) == (False, True, torch.bfloat16)
    with inside.again():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_device_without_autocast_has_full_precision() -> None:
    precision = Precision.now("meta")
    assert not precision.is_low
    with precision.again():
        pass


@pytest.mark.parametrize("memory", RECOMPUTING)
def test_stage_runs_without_values(memory: str) -> None:
    stage = make_stage(2, 7 / 8, memory=memory).to("meta")
    x = torch.empty(1, CHANNELS, 4, 4, device="meta", requires_grad=True)
    stage(x).sum().backward()
    assert x.grad is not None and x.grad.is_meta


# Being asked for gradients


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("memory", RECOMPUTING)
def test_stage_that_is_traced_or_exported_is_the_plain_loop(memory: str) -> None:
    stage, x = make_stage(2, 7 / 8, "smooth"), make_inputs()[0]
    expected = stage(x)
    stage.memory = memory
    traced = torch.jit.trace(stage, x, check_trace=False)  # type: ignore[no-untyped-call]
    assert "PythonOp" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), expected)
    program = torch.export.export(stage.eval(), (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=1e-6)


def test_block_of_a_checkpointed_stage_is_called_directly_without_gradients() -> None:
    calls = []
    block = SmoothBlock()
    block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        result: Tensor = checkpointed(block, make_inputs()[0])
    assert calls == [False] and not result.requires_grad
