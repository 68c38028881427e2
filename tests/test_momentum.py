from collections.abc import Sequence

import pytest
import torch
from stages import make_blocks, make_inputs, make_stage
from torch import Tensor, nn

from medmom.models.blocks import ResidualBlock
from medmom.models.gates import Coupling, Gating, residual_weight
from medmom.models.momentum import Memory, MomentumStage

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


# Memory


MEMORIES: tuple[Memory, ...] = ("plain", "checkpoint", "reversible", "exact")


@pytest.mark.parametrize("coupling", ["normalised", "ema"])
@pytest.mark.parametrize("gating", ["fixed", "block", "channel"])
def test_state_is_interchanged_between_memories_and_couplings(gating: Gating, coupling: Coupling) -> None:
    source = make_stage(3, 7 / 8, gating=gating, coupling=coupling)
    x = make_inputs()[0]
    for memory in MEMORIES if gating == "fixed" else MEMORIES[:3]:
        other: Coupling = "ema" if coupling == "normalised" else "normalised"
        for target_coupling in (coupling, other):
            target = MomentumStage(
                make_blocks(3, seed=1), 7 / 8, target_coupling, gating=gating, channels=3, memory=memory
            )
            target.load_state_dict(source.state_dict())
            assert list(target.state_dict()) == list(source.state_dict())
            if target_coupling == coupling:
                torch.testing.assert_close(target(x), source(x), rtol=0, atol=1e-4 if memory == "exact" else 0)


@pytest.mark.parametrize("memory", ["reversible", "exact"])
@pytest.mark.parametrize("num_blocks", [0, 1])
def test_inversion_of_fewer_than_two_blocks_is_refused(num_blocks: int, memory: Memory) -> None:
    message = rf"memory {memory} needs two blocks or more, and this stage has {num_blocks}; take memory plain or check"
    with pytest.raises(ValueError, match=message):
        MomentumStage(make_blocks(num_blocks), 1, memory=memory)


@pytest.mark.parametrize("coupling", ["normalised", "ema"])
def test_gate_zero_cannot_be_inverted(coupling: Coupling) -> None:
    with pytest.raises(ValueError, match=r"gate 0 forgets .* reversible needs .* take gate 0\.315 or more, or memory"):
        MomentumStage(make_blocks(3), 0, coupling, memory="reversible")
    with pytest.raises(ValueError, match=r"gate 0 .*memory exact") as error:
        MomentumStage(make_blocks(3), 0, coupling, memory="exact")
    assert "0.315" not in str(error.value), "no gate that exact refuses is named"


@pytest.mark.parametrize(("num_blocks", "gate", "smallest"), [(5, 0.49, 0.5), (10, 0.7, 0.708), (2, 0.1, 0.177)])
def test_gate_beyond_the_budget_is_refused_with_every_mend(num_blocks: int, gate: float, smallest: float) -> None:
    message = (
        rf"gate {gate} over {num_blocks} blocks loses \S+ bits when it is inverted, and the budget is 5; "
        rf"the smallest legal gate is {smallest}\. Raise it, take gate 1 .*, or memory exact\."
    )
    with pytest.raises(ValueError, match=message):
        MomentumStage(make_blocks(num_blocks), gate, memory="reversible")
    MomentumStage(make_blocks(num_blocks), smallest, memory="reversible")
    MomentumStage(make_blocks(num_blocks), 1, memory="reversible")


def test_gate_one_is_not_the_mend_where_the_coupling_refuses_it() -> None:
    with pytest.raises(ValueError, match="the smallest legal gate is") as error:
        MomentumStage(make_blocks(10), 0.5, "ema", memory="reversible")
    assert "gate 1 " not in str(error.value) or "normalised" in str(error.value)
    with pytest.raises(ValueError, match="memory exact needs a gate of") as error:
        MomentumStage(make_blocks(2), 0.99, "ema", memory="exact")
    assert "the nearest is 0.9375" in str(error.value)


@pytest.mark.parametrize("is_autocast", [True, False])
def test_small_budget_of_low_precision_is_checked_in_the_forward(is_autocast: bool) -> None:
    stage = make_stage(5, 0.6, memory="reversible")
    x = make_inputs()[0]
    stage(x)
    if not is_autocast:
        stage, x = stage.bfloat16(), x.bfloat16()
    context = torch.autocast("cpu", torch.bfloat16, enabled=is_autocast)
    message = r"gate 0\.6 over 5 blocks loses 3\.68 bits .* the budget is 3 in low precision; .* gate is 0\.66\. Raise"
    with context, pytest.raises(ValueError, match=message):
        stage(x)
    with context, torch.no_grad():
        stage(x)
    stage.gate = 0.66
    with context:
        stage(x)


def test_small_budget_holds_for_reversible_alone() -> None:
    x = make_inputs()[0]
    with torch.autocast("cpu", torch.bfloat16):
        for memory in ("plain", "checkpoint", "exact"):
            make_stage(5, 0.5, memory=memory)(x)
        make_stage(5, 0.7, gating="block", memory="reversible")(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        make_stage(5, 0.5, memory="reversible")(x)


def test_exact_names_the_nearest_gate() -> None:
    with pytest.raises(ValueError, match=r"1/2, 3/4, 7/8, 15/16 or 1, not 0\.9; the nearest is 0\.875\."):
        MomentumStage(make_blocks(2), 0.9, memory="exact")


@pytest.mark.parametrize("gating", ["block", "channel"])
def test_exact_with_learned_gates_is_refused(gating: Gating) -> None:
    with pytest.raises(ValueError, match=f"needs a fixed gate, and gating {gating} learns it; take reversible"):
        make_stage(2, 7 / 8, gating=gating, memory="exact")


def test_exact_with_batch_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch normalisation .* take group normalisation, or memory reversible"):
        make_stage(2, 7 / 8, norm="batch", memory="exact")


def test_unknown_memory_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="memory is 'hybrid'; it is one of plain, checkpoint, reversible, exact"):
        MomentumStage(make_blocks(2), 0.9, memory="hybrid")  # type: ignore[arg-type]


@pytest.mark.parametrize("gating", ["block", "channel"])
def test_learned_gates_cannot_be_set(gating: Gating) -> None:
    stage = make_stage(2, 0.8, gating=gating)
    with pytest.raises(ValueError, match=f"gating {gating} learns the gate; only a fixed one can be set"):
        stage.gate = 0.9
    assert stage.gate == 0.8


@pytest.mark.parametrize(
    ("memory", "gate", "new", "message"),
    [
        ("plain", 0.9, 1.5, "between 0 and 1"),
        ("plain", 0.9, float("nan"), "between 0 and 1"),
        ("reversible", 0.9, 0.0, "gate 0 forgets"),
        ("reversible", 0.9, 0.2, "the budget is 5"),
        ("exact", 7 / 8, 0.0, "gate 0 forgets"),
        ("exact", 7 / 8, 0.9, "the nearest is 0.875"),
    ],
)
def test_gate_that_is_refused_changes_nothing(memory: str, gate: float, new: float, message: str) -> None:
    stage = make_stage(3, gate, memory=memory)
    with pytest.raises(ValueError, match=message):
        stage.gate = new
    assert (stage.gate, stage.memory) == (gate, memory)
    stage.gate = 1
    assert stage.gate == 1


@pytest.mark.parametrize(
    ("gate", "new", "message"),
    [
        (0.9, "exact", "the nearest is 0.875"),
        (0.2, "reversible", "smallest legal gate is 0.315"),
        (0.0, "reversible", "gate 0 forgets"),
        (0.9, "auto", "it is one of plain"),
    ],
)
def test_memory_that_is_refused_changes_nothing(gate: float, new: str, message: str) -> None:
    stage = make_stage(3, gate, memory="checkpoint")
    with pytest.raises(ValueError, match=message):
        stage.memory = new
    assert (stage.gate, stage.memory) == (gate, "checkpoint")


def test_printed_stage_tells_its_settings() -> None:
    stage = make_stage(2, 7 / 8, coupling="ema", memory="exact")
    assert "gate=0.875, coupling=ema, gating=fixed, memory=exact" in repr(stage)
