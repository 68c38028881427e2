"""The network of a recipe, and the memory that is planned for its training."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmom import models
from medmom import step_cost as room
from medmom.errors import MedmomError
from medmom.models import MomentumResNet, MomentumUNet, Paper2D, SliceClassifier, TransNetR
from medmom.models.presets import CLASSIFIER_SIZES, SIZES
from medmom.network import build_network, job_of, plan_memory, presets
from medmom.recipe import Recipe
from medmom.recipe_file import RecipeFile, recipe_path

CPU = torch.device("cpu")
SMALL = ("--model.preset", "mom3d_xs", "--data.patch", "[32, 32, 32]", "--data.batch_size", "2")


def small(*overrides: str) -> Recipe:
    return RecipeFile(recipe_path("demo"), [*SMALL, *overrides]).build()


def fault(*overrides: str, device: torch.device = CPU) -> str:
    """Gives the one line with which a plan is refused."""
    with pytest.raises(MedmomError) as caught:
        plan_memory(small(*overrides), 1, 3, device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LOSS = ("--loss", "medmom.tasks.class_losses.ClassificationLoss")
KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "volumes": (MomentumUNet, ()),
    "pictures": (MomentumUNet, ("--model.preset", "mom2d_xs", "--data.patch", "[64, 96]")),
    "paper": (Paper2D, ("--model.preset", "paper2d", "--data.patch", "[32, 256]")),
    "its baseline": (TransNetR, ("--model.preset", "transnetr", "--data.patch", "[32, 256]")),
    "whole pictures": (MomentumResNet, ("--model.preset", "cls2d_xs", "--data.patch", "[32, 64]", *LOSS)),
    "slices": (
        SliceClassifier,
        ("--model.preset", "cls2d_xs", "--data.patch", "[32, 64]", "--data.slices", "5", *LOSS),
    ),
    "whole volumes": (MomentumResNet, ("--model.preset", "cls3d_s", *LOSS)),
}
CLASSIFIERS = ("whole pictures", "slices", "whole volumes")


def test_every_preset_has_a_job_and_axes() -> None:
    known = {*SIZES, *CLASSIFIER_SIZES, "paper2d", "transnetr"}
    named = {name for name in models.__all__ if name.startswith(("mom2d", "mom3d", "cls"))}
    assert known == {*named, "paper2d", "transnetr"} == set(presets())
    assert presets("segmentation", 3) == ["mom3d_xs", "mom3d_xw", "mom3d_s", "mom3d_sr", "mom3d_m", "mom3d_deep"]
    assert presets("segmentation", 2) == ["mom2d_xs", "mom2d_s", "mom2d_m", "paper2d", "transnetr"]
    assert presets("classification", 2) == ["cls2d_xs", "cls2d_s"]
    assert presets("classification") == ["cls2d_xs", "cls2d_s", "cls3d_s"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_takes_the_batches_of_its_recipe(kind: str) -> None:
    cls, options = KINDS[kind]
    recipe = small(*options)
    with torch.device("meta"):
        network = build_network(recipe, 3, 4).eval()
        assert type(network) is cls
        assert job_of(recipe) == ("classification" if kind in CLASSIFIERS else "segmentation")
        image = torch.empty(2, 3, *recipe.data.patch, *([5] if kind == "slices" else []))
        assert network(image).shape == ((2, 4) if kind in CLASSIFIERS else (2, 4, *recipe.data.patch))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_every_kind_of_network_is_planned_with_its_loss(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medmom.step_cost")
    assert plan_memory(small(*KINDS[kind][1]), 3, 4, CPU) == "plain"
    assert not caplog.records  # a loss that is left out of the plan is told


def test_more_slices_take_more_memory() -> None:
    def peak(slices: int) -> int:
        recipe = small(*KINDS["slices"][1], "--data.slices", str(slices))
        with torch.device("meta"):
            network = build_network(recipe, 1, 2)
        cost = room.measure_step(recipe, network, (1, 2), precision="32-true", memories=("plain",))
        return cost.activations["plain"].peak

    assert peak(20) == pytest.approx(10 * peak(2), rel=0.05)


def test_networks_without_a_choice_of_memory_take_what_keeps_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medmom")
    auto = ("--model.memory", "auto", "--model.memory_limit", "8", "--training.precision", "bf16-mixed")
    assert plan_memory(small(*KINDS["paper"][1], *auto), 3, 2, CPU) == "plain"
    (line,) = (record.message for record in caplog.records)
    (row,) = line.split("\n")[3:]
    assert re.fullmatch(r"  activations, memory plain +\d\.\d+ +100%  chosen", row)


def test_slices_are_pooled_and_dropped_as_the_recipe_says() -> None:
    options = ("--model.pooling", "attention", "--model.dropout", "0.5", "--model.memory", "hybrid")
    network: Any = build_network(small(*KINDS["slices"][1], *options, "--model.gate", "1"), 1, 2)
    assert network.arguments["pooling"] == "attention"
    assert (network.arguments["dropout"], network.memory, network.gate) == (0.5, "hybrid", 1)
    assert not any(parameter.is_meta for parameter in network.parameters())
    with torch.device("meta"):
        plain: Any = build_network(small(*KINDS["whole pictures"][1]), 1, 2)
    assert plain.arguments["dropout"] == 0.2
    assert plain.arguments["stem_stride"] == [2, 2]


def test_slices_draw_the_weights_of_the_plain_classifier() -> None:
    torch.manual_seed(0)
    by_slice = build_network(small(*KINDS["slices"][1]), 1, 2).state_dict()
    torch.manual_seed(0)
    plain = build_network(small(*KINDS["whole pictures"][1]), 1, 2).state_dict()
    assert all(torch.equal(by_slice[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("preparation", "strides"),
    [
        (("--preparation.spacing", "[1, 3, 3]"), [[1, 1], [2, 1], [2, 2], [2, 2], [2, 2]]),
        (("--preparation.spacing", "null"), [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]]),
        (("--preparation.spacing", "null", "--preparation.size", "[64, 64]"), [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]]),
    ],
)
def test_strides_of_slices_follow_the_spacing_within_them(
    preparation: tuple[str, ...], strides: list[list[int]]
) -> None:
    with torch.device("meta"):
        network: Any = build_network(small(*KINDS["pictures"][1], "--data.patch", "[64, 64]", *preparation), 1, 2)
    assert network.arguments["strides"] == strides


def test_options_of_the_recipe_reach_the_network() -> None:
    options = {"gating": "block", "velocity": "carry", "block": "preact", "memory": "hybrid", "coupling": "ema"}
    given = [word for key, value in options.items() for word in (f"--model.{key}", value)]
    with torch.device("meta"):
        network = build_network(small(*given, "--model.gate", "0.8"), 2, 4)
    assert isinstance(network, MomentumUNet)
    assert {key: network.arguments[key] for key in options} == options
    assert (network.gate, network.arguments["in_channels"], network.arguments["out_channels"]) == (0.8, 2, 4)


@pytest.mark.parametrize(("preset", "memory"), [("mom3d_xs", "plain"), ("mom3d_m", "plain"), ("mom3d_deep", "hybrid")])
def test_memory_is_the_preset_s_own_unless_said(preset: str, memory: str) -> None:
    large = ("--data.patch", "[128, 128, 128]", "--model.preset", preset)
    with torch.device("meta"):
        assert build_network(small(*large), 1, 3).memory == memory
        assert build_network(small(*large, "--model.memory", "checkpoint"), 1, 3).memory == "checkpoint"
        assert build_network(small(*large, "--model.memory", "auto"), 1, 3).memory == "plain"


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"memory": "exact"}, "needs a gate of 1/2, 3/4, 7/8, 15/16 or 1, not 0.9; the nearest is 0.875"),
        ({"memory": "exact", "gate": "0.875", "gating": "block"}, "exact needs a fixed gate"),
        ({"memory": "reversible", "gate": "0"}, "take gate 0.177 or more, or memory plain or checkpoint"),
        ({"memory": "hybrid", "gate": "0.1"}, "the smallest legal gate is 0.177. Raise it, take gate 1"),
        ({"coupling": "ema", "gate": "1"}, "gate 1 with coupling ema gives every block the weight 0"),
        ({"gating": "channel", "gate": "1"}, "the range is 0.354 to 1, ends excluded"),
        ({"gating": "block", "gate": "0.2"}, "the range is 0.354 to 1, ends excluded"),
        ({"dropout": "0.5"}, "model.dropout 0.5: mom3d_xs knows no dropout; leave the key out"),
        ({"pooling": "attention"}, "model.pooling attention: there are no slices to pool; say with data.slices how"),
        (
            {"preset": "mom2d_s"},
            "model.preset mom2d_s: a network of 2 axes, but data.patch [32, 32, 32] has 3 edges; choose one of "
            "mom3d_xs, mom3d_xw, mom3d_s, mom3d_sr, mom3d_m, mom3d_deep, or a patch of 2 edges",
        ),
        ({"preset": "cls2d_s"}, "has 3 edges; choose one of cls3d_s, or a patch of 2 edges"),
        (
            {"preset": "unet"},
            "model.preset unet: no such network; data.patch [32, 32, 32] has 3 edges, for which there",
        ),
        ({"preset": "cls3d_s"}, "loss DiceCrossEntropy: is not called with logits and target, as cls3d_s needs; take"),
    ],
)
def test_settings_that_do_not_suit_each_other_say_what_does(settings: dict[str, str], fact: str) -> None:
    given = [word for key, value in settings.items() for word in (f"--model.{key}", value)]
    assert fact in fault(*given)


@pytest.mark.parametrize(
    ("kind", "settings", "fact"),
    [
        (
            "pictures",
            ("--data.slices", "3"),
            "data.slices 3: mom2d_xs does not classify volumes by their slices; set it",
        ),
        ("pictures", ("--data.patch", "[8, 8]"), "mom2d_xs: A patch of 8 x 8 carries 2 stages, the network has 5"),
        ("pictures", LOSS, "ClassificationLoss: is not called with outputs and label and annotated, as mom2d_xs needs"),
        ("paper", ("--model.gate", "1"), "model with preset paper2d: gate 1 with coupling ema"),
        ("paper", ("--model.memory", "hybrid"), "model.memory hybrid: paper2d knows no memory; leave the key out"),
        ("its baseline", ("--model.gate", "0.5"), "model.gate 0.5: transnetr knows no gate; leave the key out"),
        (
            "whole volumes",
            ("--data.slices", "3"),
            "does not classify volumes by their slices; set it to null, or choose",
        ),
        ("slices", ("--model.deep_supervision", "false"), "model.deep_supervision False: cls2d_xs knows no deep_supe"),
        ("slices", ("--model.dropout", "1"), "model with preset cls2d_xs: dropout is 1.0; it is 0 or more and below 1"),
    ],
)
def test_settings_that_a_network_does_not_know_are_named(kind: str, settings: tuple[str, ...], fact: str) -> None:
    assert fact in fault(*KINDS[kind][1], *settings)


def test_gate_of_mixed_precision_is_refused_before_training() -> None:
    gate = ("--model.memory", "reversible", "--model.gate", "0.3")
    assert plan_memory(small(*gate), 1, 3, CPU) == "reversible"
    message = fault(*gate, "--training.precision", "bf16-mixed")
    assert "training.precision bf16-mixed" in message
    assert "3 in low precision; the smallest legal gate is 0.354" in message


def test_precision_is_the_device_s_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    gate = ("--model.memory", "reversible", "--model.gate", "0.3")
    assert "bf16-mixed" in fault(*gate, device=torch.device("cuda"))


def test_auto_takes_the_fastest_that_fits() -> None:
    def chosen(limit: float, *overrides: str) -> str:
        auto = ("--model.memory", "auto", "--model.memory_limit", str(limit))
        return plan_memory(small(*auto, *overrides), 1, 3, CPU)

    # With 0.01 for weights, gradients and optimizer, plain takes 0.05 and the least 0.03.
    assert chosen(0.04) in {"checkpoint", "hybrid"}
    assert chosen(0.04, "--training.precision", "bf16-true") == "plain"
    assert chosen(0.04, "--model.gate", "0") == "checkpoint"


def test_auto_names_the_smallest_need_where_nothing_fits() -> None:
    message = fault("--model.memory", "auto", "--model.memory_limit", "0.01")
    assert re.search(
        r"model\.memory auto: No memory fits into 0\.01 GiB: the least, \w+, needs 0\.\d+ GiB .* Allow", message
    )


def test_auto_wants_a_limit_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = ("--model.memory", "auto", "--training.precision", "32-true")
    assert "say --model.memory_limit GIB, or name a memory" in fault(*auto)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**33))
    assert plan_memory(small(*auto), 1, 3, torch.device("cuda")) == "plain"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**23, 2**33))
    assert "fits into 0.00703 GiB" in fault(*auto, device=torch.device("cuda"))


def test_optimizer_counts_by_what_it_keeps() -> None:
    def share(optimizer: str) -> float:
        return room.optimizer_share(small("--optimizer", optimizer, "--optimizer.lr", "0.1"))

    # One or two averages of the gradients.
    assert share("medmom.optim.HeavyBall") == pytest.approx(1, rel=0.01)
    assert share("torch.optim.AdamW") == pytest.approx(2, rel=0.01)
    with pytest.raises(MedmomError, match=r"optimizer SparseAdam: .*; choose another"):
        share("torch.optim.SparseAdam")


def test_table_tells_what_every_memory_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medmom")
    plan_memory(small("--model.memory", "hybrid"), 1, 3, CPU)
    (line,) = (record.message for record in caplog.records)
    head, step, beside, *rows = line.split("\n")
    assert re.fullmatch(r"mom3d_xs: 640 8\d\d parameters, \d\.\d GFLOP a patch\.", head)
    assert step == "Planned for a step of 2 patches in 32-true, GiB:"
    assert re.fullmatch(r" +weights, gradients, optimizer +0\.0\d+", beside)
    assert [row.split()[2] for row in rows] == ["plain", "checkpoint", "reversible", "hybrid", "exact"]
    assert rows[0].split()[4] == "100%"
    assert [row for row in rows if row.endswith("chosen")] == [rows[3]]
    assert rows[4].endswith("the nearest is 0.875.")
    assert len({row.index(re.findall(r"\d\.\d\d|-", row)[0]) for row in [beside, *rows[:4]]}) == 1


class Curious(nn.Module):
    """A loss that wants to see values."""

    def forward(self, outputs: Any, label: Tensor, annotated: Tensor) -> Tensor:
        return torch.tensor(outputs[0].detach().numpy().mean()) + outputs[0].sum()


def test_loss_that_cannot_be_planned_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "Curious", Curious, raising=False)
    caplog.set_level(logging.INFO, "medmom")
    assert plan_memory(small("--loss", "medmom.step_cost.Curious"), 1, 3, CPU) == "plain"
    first, second = (record.message for record in caplog.records)
    assert first.startswith("Curious is left out of the plan")
    assert second.startswith("mom3d_xs")
