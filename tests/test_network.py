"""The network of a recipe, and the memory that is planned for its training."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmom import network as room
from medmom.errors import MedmomError
from medmom.models import MomentumUNet
from medmom.models.presets import SIZES
from medmom.network import build_network, plan_memory, presets
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


def test_presets_segment_volumes() -> None:
    assert {"mom3d_xs", "mom3d_s", "mom3d_sr", "mom3d_m", "mom3d_deep"} <= set(presets())
    assert not [name for name in presets() if SIZES[name].spatial_dims != 3 or name.startswith("cls")]


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
        (
            {"preset": "mom2d_s"},
            "model.preset mom2d_s: no network that segments volumes of 3 axes; choose one of mom3d",
        ),
    ],
)
def test_settings_that_do_not_suit_each_other_say_what_does(settings: dict[str, str], fact: str) -> None:
    given = [word for key, value in settings.items() for word in (f"--model.{key}", value)]
    assert fact in fault(*given)


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
        return room._optimizer_share(small("--optimizer", optimizer, "--optimizer.lr", "0.1"))

    # One or two averages of the gradients.
    assert share("medmom.optim.HeavyBall") == pytest.approx(1, rel=0.01)
    assert share("torch.optim.AdamW") == pytest.approx(2, rel=0.01)
    with pytest.raises(MedmomError, match=r"optimizer SparseAdam: .*; choose another"):
        share("torch.optim.SparseAdam")


def test_table_tells_what_every_memory_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "medmom.network")
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
    caplog.set_level(logging.INFO, "medmom.network")
    assert plan_memory(small("--loss", "medmom.network.Curious"), 1, 3, CPU) == "plain"
    first, second = (record.message for record in caplog.records)
    assert first.startswith("Curious is left out of the plan")
    assert second.startswith("mom3d_xs")
