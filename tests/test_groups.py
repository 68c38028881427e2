from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from medmom.models import JointMomentumUNet, cls2d_xs, mom2d_xs, to_low_rank
from medmom.optim import HeavyBall, LowRankHeavyBall
from medmom.optim.groups import freeze, list_layers, parameter_groups
from medmom.optim.low_rank import layers_in


def small_unet() -> nn.Module:
    return mom2d_xs(1, 3, gating="channel", velocity="carry")


def classifier() -> nn.Module:
    return cls2d_xs(1, 3, gating="block")


def joint() -> nn.Module:
    shape: dict[str, Any] = {"channels": (4, 8), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
    return JointMomentumUNet(1, 2, 3, **shape)


def plain() -> nn.Sequential:
    head = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Linear(3, 2))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), head)


class Tied(nn.Module):
    """A token in front, an embedding whose weight the head reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


NETWORKS: list[Callable[[], nn.Module]] = [small_unet, classifier, joint, plain, Tied]
every_network = pytest.mark.parametrize("make", NETWORKS)


def names_in(network: nn.Module, group: dict[str, Any]) -> set[str]:
    held = {id(p) for p in group["params"]}
    return {name for name, p in network.named_parameters() if id(p) in held}


def undecayed(network: nn.Module, **options: Any) -> set[str]:
    groups = parameter_groups(network, weight_decay=0.1, **options)
    return {name for g in groups if g["weight_decay"] == 0 for name in names_in(network, g)}


@every_network
@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
def test_every_parameter_is_in_exactly_one_group(make: Callable[[], nn.Module], layer_decay: float) -> None:
    network = make()
    groups = parameter_groups(network, weight_decay=0.1, lr=1.0, layer_decay=layer_decay)
    held = [id(p) for g in groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in network.parameters()}
    assert all(g["params"] for g in groups)
    assert len({g["name"] for g in groups}) == len(groups)
    assert all(set(g) == {"params", "weight_decay", "name", "lr"} for g in groups)


def test_weights_decay_and_biases_and_normalisations_do_not() -> None:
    network = plain()
    assert undecayed(network) == {"0.bias", "1.weight", "1.bias", "3.1.bias", "3.2.bias"}
    decayed, rest = parameter_groups(network, weight_decay=0.1)
    assert (decayed["name"], decayed["weight_decay"]) == ("decay", 0.1)
    assert (rest["name"], rest["weight_decay"]) == ("no_decay", 0.0)
    assert "lr" not in decayed


@pytest.mark.parametrize("make", [small_unet, classifier])
def test_learned_gates_do_not_decay(make: Callable[[], nn.Module]) -> None:
    network = make()
    gates = {name for name, _ in network.named_parameters() if ".rho." in name}
    assert gates
    assert gates <= undecayed(network)
    weights = {name for name, p in network.named_parameters() if p.ndim > 1}
    assert not weights & undecayed(network)


def test_normalisation_over_several_axes_does_not_decay() -> None:
    assert undecayed(Tied()) == {"norm.weight", "norm.bias", "head.bias"}


def test_bias_in_the_shape_of_an_image_does_not_decay() -> None:
    network = nn.Linear(3, 2)
    network.bias = nn.Parameter(torch.zeros(1, 2, 1, 1))
    assert undecayed(network) == {"bias"}


def test_scales_of_normalisations_decay_where_asked_for() -> None:
    assert undecayed(plain(), decay_norms=True) == {"0.bias", "1.bias", "3.1.bias", "3.2.bias"}
    assert undecayed(Tied(), decay_norms=True) == {"norm.bias", "head.bias"}


def test_layers_of_a_unet_run_down_the_encoder_and_up_the_decoder() -> None:
    down = ["encoder.stem", *(f"encoder.stages.{s}" for s in range(5))]
    up = [f"decoder.stages.{s}" for s in (3, 2, 1, 0)]
    assert list_layers(small_unet()) == [(name,) for name in (*down, *up, "heads")]


def test_layers_of_a_classifier_are_its_stages() -> None:
    stages = [f"encoder.stages.{s}" for s in range(4)]
    assert list_layers(classifier()) == [(name,) for name in ("encoder.stem", *stages, "head")]


def test_all_heads_are_the_last_layer() -> None:
    assert list_layers(joint())[-1] == ("unet.heads", "head")
    assert list_layers(joint())[:2] == [("unet.encoder.stem",), ("unet.encoder.stages.0",)]


def test_wrapped_network_has_the_layers_of_the_network() -> None:
    for network in (classifier(), plain()):
        inside = [tuple(f"module.{name}" for name in layer) for layer in list_layers(network)]
        assert list_layers(nn.ModuleDict({"module": network})) == inside


def test_layers_of_any_network_are_its_children() -> None:
    assert list_layers(plain()) == [("0",), ("1",), ("3.1",), ("3.2",)]
    assert list_layers(Tied()) == [("token", "embedding"), ("norm",), ("head",)]
    assert list_layers(nn.Linear(2, 2)) == [("weight", "bias")]
    blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    stages = nn.ModuleDict({"encoder": plain(), "act": nn.ReLU(), "reduce": blocks, "head": nn.Bilinear(1, 1, 1)})
    encoder = [("encoder.0",), ("encoder.1",), ("encoder.3",)]
    assert list_layers(stages) == [*encoder, ("reduce.0",), ("reduce.1",), ("head",)]


def test_rate_falls_from_layer_to_layer() -> None:
    network = classifier()
    groups = parameter_groups(network, weight_decay=0.1, lr=0.2, layer_decay=0.5)
    rates = {g["name"]: g["lr"] for g in groups}
    assert rates["head.decay"] == rates["head.no_decay"] == 0.2
    assert rates["encoder.stages.3.decay"] == 0.1
    assert rates["encoder.stem.no_decay"] == 0.2 / 2**5
    assert list(rates) == sorted(rates, key=lambda name: rates[name])
    assert all(name.startswith("encoder.stages.3.") for name in names_in(network, groups[-4]))


def test_layers_may_be_given_the_longest_name_decides() -> None:
    network = classifier()
    layers = ["encoder", ["encoder.stages.*.momentum.rho", "encoder.stages.3"], "head"]
    groups = parameter_groups(network, weight_decay=0.1, lr=1.0, layer_decay=0.5, layers=layers)
    rates = {name: g["lr"] for g in groups for name in names_in(network, g)}
    assert rates["head.linear.bias"] == 1
    assert rates["encoder.stages.3.entry.conv1.weight"] == rates["encoder.stages.0.momentum.rho.1"] == 0.5
    assert rates["encoder.stages.2.entry.conv1.weight"] == 0.25
    assert groups[-1]["name"] == "head.no_decay"
    assert groups[-3]["name"] == "encoder.stages.*.momentum.rho+encoder.stages.3.no_decay"


def test_parameter_of_two_names_counts_under_its_first() -> None:
    network = Tied()
    groups = parameter_groups(network, weight_decay=0.1, lr=1.0, layer_decay=0.5)
    assert names_in(network, groups[0]) == {"token", "embedding.weight"}
    assert groups[0]["lr"] == 0.25


def test_parameter_in_no_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"encoder\.stem\.conv\.weight lies in none of the 2 layers; name the layer"):
        parameter_groups(classifier(), weight_decay=0.1, lr=1.0, layer_decay=0.5, layers=["encoder.stages", "head"])


def test_frozen_parts_are_left_out_of_the_groups() -> None:
    network = classifier()
    groups = parameter_groups(network, weight_decay=0.1, frozen=["encoder.stem", "encoder.stages.*.momentum"])
    held = set.union(*(names_in(network, g) for g in groups))
    assert held == {n for n, _ in network.named_parameters() if "stem" not in n and ".momentum." not in n}
    assert all(p.requires_grad for p in network.parameters())


def test_frozen_parts_get_no_gradient_and_no_group() -> None:
    network = classifier()
    freeze(network, ["encoder"])
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad} == {"head"}
    groups = parameter_groups(network, weight_decay=0.1)
    assert set.union(*(names_in(network, g) for g in groups)) == {
        n for n, p in network.named_parameters() if p.requires_grad
    }


def test_parameter_is_frozen_by_either_of_its_names() -> None:
    network = Tied()
    freeze(network, ["head.weight"])
    assert not network.embedding.weight.requires_grad


def test_star_is_one_part_and_a_dot_no_wildcard() -> None:
    network = nn.ModuleDict({"ab": nn.Linear(1, 1), "a": nn.ModuleDict({"b": nn.Linear(1, 1)})})
    freeze(network, ["*.bias"])
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["ab.bias"]
    with pytest.raises(ValueError, match=r"'a\*' names no parameter; take one of ab, a\."):
        freeze(network, ["a*"])
    with pytest.raises(ValueError, match=r"'a\.\.b' names no parameter; under a take one of b\."):
        freeze(network, ["a..b"])


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("stem", r"'stem' names no parameter; take one of encoder, head\."),
        ("encoder.stage.0", r"'encoder\.stage\.0' names no parameter; under encoder take one of stem, stages\."),
        ("encoder.stages.4", r"under encoder\.stages take one of 0, 1, 2, 3\."),
        ("head.linear.bias.x", r"under head\.linear take one of weight, bias\."),
        ("", r"'' names no parameter; take one of encoder, head\."),
    ],
)
def test_name_of_nothing_is_refused_with_the_nearest_names(pattern: str, message: str) -> None:
    network = classifier()
    for call in (
        lambda: freeze(network, [pattern]),
        lambda: parameter_groups(network, weight_decay=0.1, frozen=["head", pattern]),
        lambda: parameter_groups(network, weight_decay=0.1, lr=1.0, layer_decay=0.5, layers=["encoder", pattern]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer_decay": 0.0, "lr": 1.0}, r"layer_decay is 0\.0; it must lie in \(0, 1\]"),
        ({"layer_decay": 1.1, "lr": 1.0}, r"layer_decay is 1\.1"),
        ({"layer_decay": 0.9}, r"layer_decay 0\.9 needs a learning rate .*give lr"),
        ({"frozen": ["encoder", "head"]}, "nothing is left to train"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(classifier(), weight_decay=0.1, **options)


@pytest.mark.parametrize("rule", [torch.optim.AdamW, HeavyBall])
def test_optimizers_take_the_groups_and_keep_their_names(rule: Any) -> None:
    network = plain()
    groups = parameter_groups(network, weight_decay=0.5, lr=0.01, layer_decay=0.5)
    optimizer = rule(groups, lr=7.0)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = rule(parameter_groups(network, weight_decay=0.5, lr=0.01, layer_decay=0.5))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in again.param_groups] == [
        (g["name"], g["lr"], g["weight_decay"]) for g in groups
    ]


def test_zero_gradients_move_only_what_decays() -> None:
    network = plain()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = HeavyBall(parameter_groups(network, weight_decay=0.5), lr=0.1)
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "3.1.weight", "3.2.weight"}


def low_rank() -> nn.Module:
    dense = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 12))
    return to_low_rank(dense, 0.3, gradients="tangent", room=2)


def factors(network: nn.Module, name: str) -> list[nn.Parameter]:
    return [network.get_parameter(f"{name}.{part}") for part in ("u", "s", "v", "ranks")]


@pytest.mark.parametrize("options", [{}, {"lr": 1.0, "layer_decay": 0.5}, {"decay_norms": True}])
def test_factors_and_their_ranks_stay_together_and_in_order(options: dict[str, Any]) -> None:
    network = low_rank()
    groups = parameter_groups(network, weight_decay=0.5, **options)
    params = [p for g in groups for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in network.parameters()} and len(params) == len(set(map(id, params)))
    found = [(g, layer) for g in groups for layer in layers_in(g["params"])]
    for (group, layer), name in zip(found, ("1", "4"), strict=True):
        assert [id(p) for p in layer] == [id(p) for p in factors(network, name)]
        assert group["weight_decay"] == 0.5
    assert names_in(network, next(g for g in groups if g["name"].endswith("no_decay"))) & {"1.bias", "0.bias"}


@pytest.mark.parametrize("way", ["named", "stopped"])
def test_frozen_factors_leave_with_their_ranks(way: str) -> None:
    network = low_rank()
    if way == "stopped":
        freeze(network, ["1"])
    (group, _) = parameter_groups(network, weight_decay=0.5, frozen=["1"] if way == "named" else [])
    assert [id(p) for layer in layers_in(group["params"]) for p in layer] == [id(p) for p in factors(network, "4")]
    assert not names_in(network, group) & {"1.u", "1.s", "1.v", "1.ranks"}


def test_half_of_the_factors_is_refused_by_a_low_rank_rule_alone() -> None:
    groups = parameter_groups(low_rank(), weight_decay=0.0, frozen=["1.u"])
    torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match=r"whole numbers of shape \[3\] stands behind parameters of the shapes"):
        LowRankHeavyBall(groups)


def test_whole_numbers_that_are_no_ranks_are_left_out_alone() -> None:
    network = plain()
    network[3].counts = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
    assert undecayed(network) == {"0.bias", "1.weight", "1.bias", "3.1.bias", "3.2.bias"}


@pytest.mark.parametrize("local_steps", [0, 3])
def test_low_rank_rule_leaves_frozen_layers_alone(local_steps: int) -> None:
    network = low_rank()
    freeze(network, ["1"])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = LowRankHeavyBall(network.parameters(), lr=0.1, weight_decay=0.5, tolerance=0.5, local_steps=local_steps)
    for _ in range(4):
        optimizer.zero_grad()
        network(torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        optimizer.step()
    optimizer.eval()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert not moved & {f"1.{part}" for part in ("u", "s", "v", "ranks", "bias")}
    assert moved >= {"4.u", "4.s", "4.v", "4.ranks"}
