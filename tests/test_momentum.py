from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from medmom.models.blocks import ResidualBlock
from medmom.models.momentum import Coupling, MomentumStage, residual_weight

GATES = (0.0, 0.3, 0.5, 0.9, 1.0)


class AddTo(nn.Module):
    """Adds 1 to one entry, so that the stage's output shows the weight of this block."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.one_hot(torch.tensor(self.index), x.numel()).to(x).view_as(x)


def block_weights(gate: float, coupling: Coupling, num_blocks: int) -> Tensor:
    """Weight with which each block's residual enters the output of a stage."""
    stage = MomentumStage([AddTo(index) for index in range(num_blocks)], gate, coupling)
    output: Tensor = stage(torch.zeros(1, num_blocks, 1, 1, dtype=torch.float64))
    return output.flatten()


def random_blocks(num_blocks: int, spatial_dims: int = 2, seed: int = 0) -> list[ResidualBlock]:
    torch.manual_seed(seed)
    return [ResidualBlock(3, 3, [3] * spatial_dims).double() for _ in range(num_blocks)]


def naive(blocks: Sequence[nn.Module], x: Tensor, g: float, c: float) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper writes it."""
    v = torch.zeros_like(x)
    for block in blocks:
        f = block(x) - x
        v = g * v + c * f
        x = x + v
    return x, v


@pytest.mark.parametrize("coupling", ["normalised", "ema"])
@pytest.mark.parametrize("gate", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_stage_equals_the_naive_recurrence_with_its_gradients(gate: float, coupling: Coupling, num_blocks: int) -> None:
    blocks = random_blocks(num_blocks)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(parameter for block in blocks for parameter in block.parameters())]
    c = 1 - gate if coupling == "ema" else num_blocks / sum(gate**i for j in range(num_blocks) for i in range(j + 1))

    features, velocity = MomentumStage(blocks, gate, coupling).flow(x)
    expected_features, expected_velocity = naive(blocks, x, gate, c)

    assert velocity is not None
    torch.testing.assert_close(features, expected_features, rtol=0, atol=1e-12)
    torch.testing.assert_close(velocity, expected_velocity, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((features.square() + velocity.pow(3)).sum(), parameters)
    expected = torch.autograd.grad((expected_features.square() + expected_velocity.pow(3)).sum(), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


def test_given_velocity_continues_the_flow() -> None:
    blocks = random_blocks(4)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    whole = MomentumStage(blocks, 0.7, "ema").flow(x)
    first, second = MomentumStage(blocks[:1], 0.7, "ema"), MomentumStage(blocks[1:], 0.7, "ema")
    torch.testing.assert_close(second.flow(*first.flow(x)), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5, 7, 40])
def test_normalised_weights_have_mean_one(gate: float, num_blocks: int) -> None:
    assert block_weights(gate, "normalised", num_blocks).mean().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("num_blocks", "mean"), [(2, 0.145), (3, 0.187), (5, 0.263)])
def test_ema_throttles_short_stages_as_published(num_blocks: int, mean: float) -> None:
    assert block_weights(0.9, "ema", num_blocks).mean().item() == pytest.approx(mean, abs=5e-4)


def test_residual_weight_at_the_ends_of_the_gate() -> None:
    for num_blocks in (1, 2, 5):
        assert residual_weight("normalised", 0, num_blocks) == 1
        assert residual_weight("normalised", 1, num_blocks) == pytest.approx(2 / (num_blocks + 1), rel=1e-12)
        assert residual_weight("ema", 0, num_blocks) == 1


@pytest.mark.parametrize("coupling", ["normalised", "ema"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gate_zero_gives_the_blocks_bit_for_bit(coupling: Coupling, spatial_dims: int) -> None:
    blocks = random_blocks(3, spatial_dims)
    x = torch.randn(1, 3, *[4] * spatial_dims, dtype=torch.float64)
    assert torch.equal(MomentumStage(blocks, 0, coupling)(x), nn.Sequential(*blocks)(x))


def test_single_block_is_a_plain_one_for_every_gate() -> None:
    (block,) = random_blocks(1)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    for gate in GATES:
        assert torch.equal(MomentumStage([block], gate)(x), block(x))


def test_stage_without_blocks_gives_its_input() -> None:
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(MomentumStage([], 0.9)(x), x)


@pytest.mark.parametrize("gate", GATES)
def test_stage_leaves_its_input_alone(gate: float) -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    before = x.clone()
    stage = MomentumStage(random_blocks(3), gate)
    _, velocity = stage.flow(x, start := torch.ones_like(x))
    assert velocity is not start
    assert torch.equal(x, before)
    assert torch.equal(start, torch.ones_like(x))


def test_keys_do_not_depend_on_gate_or_coupling() -> None:
    settings: list[tuple[float, Coupling]] = [(0.0, "normalised"), (1.0, "normalised"), (0.9, "ema")]
    keys = {tuple(MomentumStage(random_blocks(2), gate, coupling).state_dict()) for gate, coupling in settings}
    assert len(keys) == 1
    assert next(iter(keys))[0] == "blocks.0.conv1.weight"


@pytest.mark.parametrize("gate", [-0.1, 1.1, float("nan")])
def test_gate_outside_its_range_is_refused(gate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        MomentumStage([], gate)


def test_ema_with_gate_one_is_refused() -> None:
    with pytest.raises(ValueError, match="lower it or take normalised"):
        MomentumStage([], 1, "ema")


def test_unknown_coupling_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="it is one of normalised, ema"):
        MomentumStage([], 0.5, "heavy")  # type: ignore[arg-type]
