"""The reconstruction: TransNetR at gate 0, the paper's formula above."""

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from medmom.models.momentum import MomentumStage
from medmom.models.paper2d import Paper2D
from medmom.models.transnetr import TransNetR


def image() -> Tensor:
    return torch.randn(2, 1, 16, 256, generator=torch.Generator().manual_seed(1))


def paper2d(num_blocks: int = 1, gate: float = 0.9) -> Paper2D:
    torch.manual_seed(0)
    return Paper2D(1, 2, num_blocks=num_blocks, gate=gate)


def momentum_stages(network: Paper2D) -> list[MomentumStage]:
    return [part for part in network.modules() if isinstance(part, MomentumStage)]


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_gate_zero_is_the_baseline_to_the_bit(num_blocks: int, training: bool) -> None:
    ours = paper2d(num_blocks, gate=0).train(training)
    baseline = TransNetR(1, 2, num_blocks=num_blocks).train(training)
    baseline.load_state_dict(ours.state_dict())
    losses = []
    for network in (ours, baseline):
        torch.manual_seed(3)  # of the dropout
        logits = network(image())
        logits.square().sum().backward()
        losses.append(logits)
    assert torch.equal(*losses)
    for (key, mine), theirs in zip(ours.named_parameters(), baseline.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad), key


def test_keys_and_start_are_those_of_the_baseline_for_every_gate() -> None:
    torch.manual_seed(0)
    expected = TransNetR(1, 2, num_blocks=2).state_dict()
    for gate in (0, 0.9):
        state = paper2d(2, gate).state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.parametrize("gate", [0.5, 0.9])
def test_decoder_follows_the_formula_from_zero_velocity(gate: float) -> None:
    network = paper2d(num_blocks=3, gate=gate).double().eval()
    stages = momentum_stages(network)
    assert [len(stage.blocks) for stage in stages] == [3, 3, 2]
    for stage in stages:
        start = torch.randn(1, 64, 4, 6, dtype=torch.float64)
        x, v = start, torch.zeros_like(start)
        for block in stage.blocks:
            v = gate * v + (1 - gate) * (block(x) - x)
            x = x + v
        torch.testing.assert_close(stage(start), x, rtol=1e-12, atol=1e-12)


def test_default_is_a_weaker_branch_and_nothing_at_half_resolution() -> None:
    network = paper2d().double().eval()
    eighth, quarter, half = momentum_stages(network)
    x = torch.randn(1, 64, 4, 6, dtype=torch.float64)
    for stage in (eighth, quarter):
        (block,) = stage.blocks
        torch.testing.assert_close(stage(x), x + (1 - 0.9) * (block(x) - x), rtol=1e-12, atol=1e-12)
    assert torch.equal(half(x), x)


def test_momentum_stages_lie_behind_the_first_unit_and_nowhere_else() -> None:
    network = paper2d(2)
    names = [name for name, part in network.named_modules() if isinstance(part, MomentumStage)]
    assert names == ["stages.0.residual", "stages.1.residual", "stages.2.residual"]


def test_every_gate_gives_other_logits() -> None:
    logits = []
    for gate in (0, 0.5, 0.9):
        logits.append(paper2d(gate=gate).eval()(image()))
    assert all((a - b).abs().max() > 1e-4 for a, b in pairwise(logits))


def test_every_parameter_has_a_gradient() -> None:
    network = paper2d(num_blocks=2)
    network(image()).square().sum().backward()
    for key, parameter in network.named_parameters():
        # A bias before a normalisation is taken out again by it.
        if not key.endswith("conv.bias"):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 1e-6, key


def test_arguments_rebuild_the_network_through_json() -> None:
    network = paper2d(2, 0.7).eval()
    again = type(network)(**json.loads(json.dumps(network.arguments))).eval()
    assert isinstance(again, Paper2D)
    assert again.arguments == {"in_channels": 1, "out_channels": 2, "num_blocks": 2, "gate": 0.7}
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(image()), network(image()))


def test_torchvision_weights_reach_its_encoder() -> None:
    network = Paper2D(3, 1)
    state = {key: torch.full_like(value, 2) for key, value in network.encoder.state_dict().items()}
    network.load_torchvision(state)
    assert all((parameter == 2).all() for parameter in network.encoder.parameters())


def test_size_is_refused_as_the_baseline_refuses_it() -> None:
    network = paper2d()
    assert network.divisor == (16, 256)
    with pytest.raises(ValueError, match=r"^250 x 250 is not divisible by 16 x 256; the next size is 256 x 256\.$"):
        network(torch.zeros(1, 1, 250, 250))


@pytest.mark.parametrize(("gate", "message"), [(1, "lower it"), (-0.1, "between 0 and 1"), (2, "between 0 and 1")])
def test_gate_outside_its_range_is_refused(gate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paper2d(gate=gate)


def test_blocks_stay_registered_once() -> None:
    network = paper2d(2)
    parameters = [id(parameter) for parameter in network.parameters()]
    assert len(parameters) == len(set(parameters))
    assert isinstance(network.stages, nn.ModuleList)
