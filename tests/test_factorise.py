"""Whole networks of low rank: which layers are factored, and what stays the same on the way there and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from class_networks import tiny_2d, tiny_3d, tiny_slices
from stages import difference
from test_cost import saved_bytes
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from unets import MEMORIES, gradients, make_image, make_unet

from medmom import models
from medmom.models import LowRankConv, LowRankLinear, presets, to_dense, to_low_rank
from medmom.models.cost import measure_cost
from medmom.models.factorise import compact, count_dense, list_ranks, rank_limit, set_dense, with_ranks
from medmom.models.low_rank import LowRankLayer
from medmom.models.transnetr import StripTransformer

PLAN: dict[str, Any] = {"kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]], "channels": [8, 16]}
PRESETS = [name for name in presets.__all__ if name != "plan_kernels_and_strides"]
SHARE = 0.4


def unet(**changes: Any) -> Any:
    return make_unet(**{"channels": [8, 12, 16], "blocks": [1, 2, 3], **changes})


def plain_unet() -> nn.Module:
    return models.PlainUNet(1, 3, convolutions=[2, 2], decoder_convolutions=[1], **PLAN)


def joint() -> nn.Module:
    return models.JointMomentumUNet(1, 3, 2, blocks=[1, 3], dropout=0.0, **PLAN)


TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2-D": (unet, (1, 2, 16, 16)),
    "3-D": (lambda: unet(axes="3-D"), (1, 2, 8, 8, 8)),
    "preact": (lambda: unet(block="preact", norm="group"), (1, 2, 16, 16)),
    "plain": (plain_unet, (1, 1, 16, 16)),
    "joint": (joint, (1, 1, 16, 16)),
    "classifier": (tiny_2d, (2, 1, 16, 16)),
    "classifier 3-D": (tiny_3d, (1, 1, 16, 16, 16)),
    "slices": (tiny_slices, (1, 1, 16, 16, 3)),
}


def tiny(name: str) -> tuple[nn.Module, Tensor]:
    """A network in double precision and evaluation mode, and an image for it."""
    make, shape = TINY[name]
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(shape, dtype=torch.float64)


def stack(width: int = 16, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 24, **options), nn.Tanh(), nn.Conv1d(12, 20, 3, 2, 4, 5))


def count(network: nn.Module) -> int:
    """Numbers that are stored."""
    return sum(p.numel() for p in network.parameters() if p.is_floating_point())


def outputs(network: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = network(image)
    return [found] if isinstance(found, Tensor) else list(found)


def layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in network.named_modules():
        if isinstance(part, LowRankLayer | nn.Linear | _ConvNd):
            yield name, part


def reasons(layer: Any) -> list[str]:
    """Why a layer is dense, from the layer alone."""
    weight, inputs = layer.weight, layer.weight.shape[1]
    rows, columns = len(weight), weight[0].numel()
    rank = max(2, round(SHARE * min(rows, columns)))
    said = {
        "transposed": isinstance(layer, _ConvTransposeNd),
        "narrow": min(rows, inputs) < 8,
        "no smaller": rank * (rows + rank + columns) >= rows * columns,
        "attention's own": type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    }
    return [reason for reason, holds in said.items() if holds]


# Which layers


@pytest.mark.parametrize("name", [*PRESETS, "TransNetR", "Paper2D"])
def test_presets_have_fewer_weights_and_say_why_layers_stay_dense(name: str) -> None:
    with torch.device("meta"):
        network = getattr(models, name)(1, 3)
        before, dense = count(network), dict(layers(network))
        assert to_low_rank(network, SHARE) is network
    assert count(network) < 0.75 * before
    ranks = list_ranks(network)
    saved = sum(r.rows * r.columns - r.num_parameters for r in ranks.values())
    assert count(network) == before - saved
    for layer_name, layer in layers(network):
        if isinstance(layer, LowRankLayer):
            weight = dense[layer_name].weight
            assert ranks[layer_name][1:] == (len(weight), weight[0].numel())
            assert layer.rank == rank_limit(dense[layer_name], SHARE) == round(SHARE * min(ranks[layer_name][1:]))
        else:
            assert reasons(layer), layer_name
    assert set(ranks) == {layer_name for layer_name, layer in dense.items() if not reasons(layer)}


def test_layers_that_are_no_plain_matrix_stay_dense() -> None:
    network = nn.Sequential(
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Conv2d(16, 16, 3, padding_mode="reflect", padding=1),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.ConvTranspose2d(16, 16, 2, 2),
        nn.Conv2d(7, 16, 3),
        nn.Conv2d(16, 7, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        nn.Linear(16, 16),
    )
    assert list(list_ranks(to_low_rank(network, 0.25))) == ["7"]


def test_rank_is_a_share_of_the_full_one_and_never_below_two() -> None:
    for share, rank, storage in ((0.01, 2, 4), (0.25, 4, 8), (0.3, 5, 10), (0.7, 11, 16)):
        network: Any = to_low_rank(nn.Sequential(nn.Linear(16, 200)), share, room=2)
        assert network[0].ranks.tolist() == [rank, 2, rank]
        assert network[0].s.shape == (storage, storage)


# The same function


@pytest.mark.parametrize("name", TINY)
def test_back_to_dense_is_the_same_function(name: str) -> None:
    network, image = tiny(name)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    before = outputs(network, image)
    low = to_low_rank(network, SHARE, room=2, keep_norm=True)
    expected = outputs(low, image)
    assert count_dense(low) == sum(p.numel() for p in tiny(name)[0].parameters())
    assert max(float((a - b).abs().max()) for a, b in zip(expected, before, strict=True)) > 1e-4
    state = torch.get_rng_state()
    back = to_dense(low)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(outputs(back, image), expected, rtol=0, atol=1e-10)
    assert {key: value.shape for key, value in back.state_dict().items()} == shapes
    assert list_ranks(back) == {}
    # Weights that have this rank are taken as they are.
    torch.testing.assert_close(outputs(to_low_rank(back, SHARE), image), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("is_training", [True, False])
def test_transformers_run_with_factors_inside(is_training: bool) -> None:
    torch.manual_seed(0)
    low = to_low_rank(StripTransformer(16, 12, (4, 8)), 0.2)
    assert sum("transformer" in name for name in list_ranks(low)) == 4
    image, found = torch.randn(2, 16, 8, 16), []
    for network in (copy.deepcopy(low), to_dense(low)):
        torch.manual_seed(1)  # some values are dropped in training
        found += outputs(network.train(is_training), image)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["2-D", "3-D", "joint", "slices"])
def test_compact_network_is_the_same_to_the_bit(name: str) -> None:
    network, image = tiny(name)
    low = to_low_rank(network.float(), SHARE, room=2)
    with torch.no_grad():
        for layer in low.modules():
            if isinstance(layer, LowRankLayer):
                layer.ranks[0] = layer.rank - 1
    stored, ranks, expected = count(low), list_ranks(low), outputs(low, image.float())
    assert compact(low) is low
    torch.testing.assert_close(outputs(low, image.float()), expected, rtol=0, atol=0)
    assert list_ranks(low) == ranks
    assert count(low) < stored
    for layer in low.modules():
        if isinstance(layer, LowRankLayer):
            r = layer.rank
            assert layer.ranks.tolist() == [r, min(2, r), r]
            assert (layer.u.shape[1], layer.s.shape, layer.v.shape[1]) == (r, (r, r), r)


def test_ranks_and_weights_alone_give_the_network_back() -> None:
    network, image = tiny("joint")
    low = compact(to_low_rank(network, SHARE, room=2, gradients="tangent"))
    ranks = {layer: sizes.rank for layer, sizes in list_ranks(low).items()}
    other = joint().double().eval()
    with torch.device("meta"):
        empty = with_ranks(joint().double().eval(), ranks)
    for made, assign in ((with_ranks(other, ranks), False), (empty, True)):
        made.load_state_dict(low.state_dict(), assign=assign)
        assert list_ranks(made) == list_ranks(low)
        torch.testing.assert_close(outputs(made, image), outputs(low, image), rtol=0, atol=0)


def test_dense_weights_are_taken_over_as_nearest() -> None:
    (low, image), (dense, _) = tiny("2-D"), tiny("2-D")
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    to_low_rank(low, SHARE, room=2)
    with torch.no_grad():
        for layer in low.modules():
            if isinstance(layer, LowRankLayer):
                layer.ranks[0] = 2
    kept = copy.deepcopy(dense.state_dict())
    set_dense(low, dense)
    torch.testing.assert_close(dense.state_dict(), kept, rtol=0, atol=0)
    expected = to_low_rank(dense, SHARE, room=2)
    assert list_ranks(low) == list_ranks(expected)
    torch.testing.assert_close(outputs(low, image), outputs(expected, image), rtol=0, atol=1e-12)


# What a layer brings along


def test_layers_keep_their_options_bias_mode_precision_and_whether_they_learn() -> None:
    network = stack().bfloat16()
    network[0].weight.requires_grad_(False)
    network[2].eval()
    biases = [network[0].bias, network[2].bias]
    for convert in (lambda n: to_low_rank(n, 0.3, gradients="tangent"), to_dense):
        convert(network)
        assert [network[0].bias, network[2].bias] == biases
        assert biases[0].requires_grad
        assert (network[0].training, network[2].training) == (True, False)
        conv: Any = network[2]
        assert (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3,), (2,), (4,), (5,))
        frozen = [p.requires_grad for p in network[0].parameters() if p is not biases[0]]
        learning = [p.requires_grad for p in network[2].parameters() if p.is_floating_point()]
        assert not any(frozen)
        assert all(learning)
        assert {p.dtype for p in network.parameters()} <= {torch.bfloat16, torch.int64}
    assert [type(part) for part in network] == [nn.Linear, nn.Tanh, nn.Conv1d]


def test_options_of_the_layers_are_those_of_the_network() -> None:
    network: Any = to_low_rank(stack(bias=False), 0.3, gradients="tangent", room=2)
    assert (type(network[0]), type(network[2])) == (LowRankLinear, LowRankConv)
    assert {network[0].gradients, network[2].gradients} == {"tangent"}
    assert network[0].bias is None
    empty: Any = with_ranks(stack(bias=False), {"0": 4})
    assert empty[0].gradients == "factors"
    assert list(empty.state_dict()) == [
        *(f"0.{part}" for part in ("u", "s", "v", "ranks")),
        "2.weight",
        "2.bias",
    ]


def test_norms_are_kept_on_demand() -> None:
    dense, near, scaled = (stack() for _ in range(3))
    to_low_rank(near, 0.3)
    to_low_rank(scaled, 0.3, keep_norm=True)
    for index in (0, 2):
        norms = [float(n[index].matrix().norm()) for n in (near, scaled)]  # type: ignore[operator]
        full = float(dense[index].weight.detach().norm())  # type: ignore[operator]
        assert norms[0] < 0.95 * full
        assert norms[1] == pytest.approx(full, rel=1e-5)


def test_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(16, 16)
    network: Any = nn.Sequential(shared, shared, nn.Sequential(shared, nn.Linear(16, 3)))
    for convert, kind in ((lambda n: to_low_rank(n, 0.25), LowRankLinear), (to_dense, nn.Linear)):
        convert(network)
        assert type(network[0]) is kind
        assert network[0] is network[1] is network[2][0]


# Inside momentum stages


@pytest.mark.parametrize("kind", ["factors", "tangent"])
@pytest.mark.parametrize("memory", [name for name in MEMORIES if name != "plain"])
def test_gradients_do_not_depend_on_what_is_kept(memory: str, kind: Any) -> None:
    network = to_low_rank(unet(), SHARE, room=2, gradients=kind)
    if memory != "exact":  # which counts in units of single precision
        network.double()
    image = make_image(unet()).to(next(network.parameters()).dtype)
    expected = gradients(network, image)
    network.memory = memory  # type: ignore[assignment]
    found = gradients(network, image)
    assert any(name.endswith(".v") for name in found)
    assert not any(name.endswith(".ranks") for name in found)
    assert difference(found, expected) <= (1e-3 if memory == "exact" else 1e-10)


@pytest.mark.parametrize("memory", ["plain", "reversible"])
@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
def test_cost_of_a_step_is_what_autograd_keeps(memory: str, mixed: torch.dtype | None) -> None:
    network = to_low_rank(unet(), SHARE, room=2)
    network.memory = memory  # type: ignore[assignment]
    image = make_image(unet())
    cost = measure_cost(network, image.shape, mixed=mixed, memories=[memory])
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed is not None):
        kept = saved_bytes(lambda: network(image), network)
    assert cost.activations[memory].kept == kept
    assert cost.parameter_bytes == sum(p.nbytes for p in network.parameters())


def test_cost_counts_the_operations_of_the_rank() -> None:
    shape = (1, 2, 16, 16)
    flops = [measure_cost(network, shape, memories=[]).flops for network in (unet(), to_low_rank(unet(), 0.1))]
    assert flops[1] < 0.6 * flops[0]
    wide = to_low_rank(unet(), 0.1, room=2)
    assert measure_cost(wide, shape, memories=[]).flops == flops[1]


# Faults


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"low_rank is .*; give a share of the full rank above 0 and below 1"):
        to_low_rank(stack(), share)


def test_networks_without_a_layer_to_factor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low_rank 0\.9: no layer of this Sequential .* give a smaller share"):
        to_low_rank(stack(), 0.9)
    with pytest.raises(ValueError, match="no layer of this MomentumUNet"):
        to_low_rank(make_unet(channels=[4, 6, 7]), SHARE)


def test_a_layer_alone_is_refused() -> None:
    for run in (lambda: to_low_rank(nn.Linear(16, 16), 0.25), lambda: to_dense(LowRankLinear(16, 16, 4))):
        with pytest.raises(
            ValueError, match=r"Linear alone cannot be replaced in place; put it into an nn\.Sequential"
        ):
            run()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"5": 4}, "5 is no linear layer or convolution of Sequential"),
        ({"1": 4}, "1 is no linear layer or convolution of Sequential"),
        ({"": 4}, " is no linear layer or convolution of Sequential"),
        ({"0": 17}, "rank 17, .* for a matrix of 24 x 16"),
        ({"0": 0}, "rank 0, .* for a matrix of 24 x 16"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_ranks(stack(), ranks)


def test_dense_weights_of_another_shape_are_refused() -> None:
    low = to_low_rank(stack(), 0.3)
    with pytest.raises(ValueError, match=r"weight of shape \[24, 14\] for factors of 24 x 16"):
        set_dense(low, stack(14))
