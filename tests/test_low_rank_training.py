"""Networks of low rank from recipe to package: what is validated, saved and resumed is truncated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file
from test_resume import StopError, cut_off
from tiny import save_tiny
from tiny_run import rows, tiny_recipe
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.models import MomentumUNet, to_dense, to_low_rank
from medmom.models.cost import measure_cost
from medmom.models.factorise import list_ranks
from medmom.models.low_rank import LowRankLayer
from medmom.network import build_network, plan_memory
from medmom.optimizer import make_optimizer
from medmom.package import load_package
from medmom.recipe_file import RecipeFile
from medmom.tasks.segmentation import SegmentationTask
from medmom.train import resume, train
from medmom.transfer import initialise_from

# A cycle of five steps, epochs of two: each of these ends in the middle of one.
RULES = {
    "LowRankHeavyBall": ["--optimizer.init_args.lr=0.02", "--optimizer.init_args.tolerance=0.2"],
    "LowRankAdam": ["--optimizer.init_args.local_steps=5", "--optimizer.init_args.tolerance=0.3"],
}


def low_rank(folder: Path, rule: str, *overrides: str, **training: object) -> RecipeFile:
    chosen = ["--model.low_rank=0.5", f"--optimizer=medmom.optim.{rule}", *RULES.get(rule, [])]
    return tiny_recipe(folder, *chosen, *overrides, **{"picture_every": 3, **training})


def run(folder: Path, name: str, rule: str, *overrides: str, **training: object) -> Path:
    train(low_rank(folder, rule, *overrides, **training), folder / name, device="cpu", quiet=True)
    return folder / name


def layers_in(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Factors and ranks by layer."""
    names = [key.removesuffix(".ranks").removeprefix("network.") for key in state if key.endswith(".ranks")]
    plain = {key.removeprefix("network."): value for key, value in state.items()}
    return {name: {part: plain[f"{name}.{part}"] for part in ("u", "s", "v", "ranks")} for name in names}


def saved(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


Seen = list[list[list[int]]]
"""Ranks of the layers, at each validation."""


@pytest.fixture(scope="module", params=RULES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A run of three epochs, not to be changed, and what its validations saw."""
    seen: Seen = []
    validate = SegmentationTask.validation_step

    def watch(task: SegmentationTask, batch: Any, index: int) -> None:
        seen.append([m.ranks.tolist() for m in task.network.modules() if isinstance(m, LowRankLayer)])
        validate(task, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "validation_step", watch)
        return run(tmp_path_factory.mktemp("low_rank"), "run", request.param, epochs=3), seen


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_checkpoints_hold_truncated_factors(name: str, finished: tuple[Path, Seen]) -> None:
    layers = layers_in(saved(finished[0] / name))
    assert len(layers) > 20
    for layer in layers.values():
        rank, lowest, highest = layer["ranks"].tolist()
        assert lowest <= rank <= highest
        u, s, v = (layer[part] for part in ("u", "s", "v"))
        assert not (u[:, rank:].any() or v[:, rank:].any() or s[rank:].any() or s[:, rank:].any())
        assert s[:rank, :rank].diagonal().all()
        torch.testing.assert_close(u[:, :rank].T @ u[:, :rank], torch.eye(rank), rtol=0, atol=1e-5)


def test_validation_sees_truncated_networks(finished: tuple[Path, Seen]) -> None:
    folder, validations = finished
    table = rows(folder / "ranks.csv")
    assert len(validations) == len(table) == 3
    for seen, row in zip(validations, table, strict=True):
        # The table stands from input to output, the modules in the order of their names.
        assert sorted(rank for rank, *_ in seen) == sorted(int(row[name]) for name in row if name != "epoch")
        assert all(lowest <= rank <= highest for rank, lowest, highest in seen)


def test_package_holds_the_ranks_of_the_last_epoch_and_nothing_beyond(finished: tuple[Path, Seen]) -> None:
    folder, _ = finished
    first, *_, last = rows(folder / "ranks.csv")
    assert last != {**first, "epoch": "2"}
    tensors = load_file(folder / "model" / "model.safetensors")
    for name, layer in layers_in(tensors).items():
        rank = int(last[name])
        assert {layer["u"].shape[1], layer["v"].shape[1], *layer["s"].shape, int(layer["ranks"][0])} == {rank}
    network, from_last = load_package(folder).network, layers_in(saved(folder / "last.ckpt"))
    for name, sizes in list_ranks(network).items():
        u, s, v, _ = from_last[name].values()
        kept: Any = network.get_submodule(name)
        torch.testing.assert_close(kept.matrix(), u @ s @ v.T, rtol=0, atol=1e-6)
        assert sizes.rank == int(last[name])


def test_metrics_tell_mean_rank_and_compression(finished: tuple[Path, Seen]) -> None:
    folder, _ = finished
    row, ranks = rows(folder / "metrics.csv")[-1], rows(folder / "ranks.csv")[-1]
    counts = [int(value) for name, value in ranks.items() if name != "epoch"]
    assert float(row["rank/mean"]) == pytest.approx(sum(counts) / len(counts), rel=1e-5)
    network = load_package(folder).network
    kept = sum(p.numel() for p in network.parameters() if p.is_floating_point())
    dense = sum(p.numel() for p in to_dense(network).parameters())
    assert kept < dense
    assert float(row["compression"]) == pytest.approx(kept / dense, rel=1e-5)
    assert not any(name.startswith("rank/encoder") for name in row)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_resumed_run_ends_as_the_straight_one_over_a_change_of_ranks(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(tmp_path, "straight", rule, epochs=3)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        cut_off(patch, 1, StopError())
        run(tmp_path, "stopped", rule, epochs=3)
    resume(tmp_path / "stopped", device="cpu", quiet=True)
    table = rows(straight / "ranks.csv")
    assert table[0] != {**table[1], "epoch": "0"}
    for name in ("ranks.csv", "metrics.csv", "model/model.safetensors", "pictures/ranks.png"):
        assert (tmp_path / "stopped" / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.slow
def test_frozen_layers_stay_and_the_others_learn(tmp_path: Path) -> None:
    rule = "LowRankAdam"
    options = ["--training.frozen", "[encoder.stages.1]", "--training.layer_decay", "0.8"]
    out = run(tmp_path, "run", rule, *options, "--training.decay_norms", "false", epochs=1, steps_per_epoch=3)
    recipe = low_rank(tmp_path, rule).build()
    lightning.seed_everything(recipe.training.seed, verbose=False)
    begin, end = layers_in(build_network(recipe, 1, 3).state_dict()), layers_in(saved(out / "last.ckpt"))
    for name, layer in begin.items():
        if name.startswith("encoder.stages.1."):
            assert all(torch.equal(end[name][part], value) for part, value in layer.items()), name
        else:
            assert not torch.equal(end[name]["u"], layer["u"]), name


def test_other_rules_train_the_factors_as_they_are(tmp_path: Path) -> None:
    out = run(tmp_path, "run", "HeavyBall", epochs=1, steps_per_epoch=1)
    network = load_package(out).network
    assert {name: str(sizes.rank) for name, sizes in list_ranks(network).items()}.items() <= (
        rows(out / "ranks.csv")[0].items()
    )


@pytest.mark.parametrize(
    ("precision", "rule"),
    [("32-true", "LowRankHeavyBall"), ("bf16-mixed", "LowRankAdam"), ("bf16-true", "LowRankAdam")],
)
def test_memory_is_planned_in_any_precision(precision: str, rule: str, tmp_path: Path) -> None:
    recipe = low_rank(tmp_path, rule, "--model.memory", "plain", precision=precision)
    assert plan_memory(recipe.build(), 1, 3, torch.device("cpu")) == "plain"


def test_low_rank_layers_are_planned_to_cast_as_convolutions_do() -> None:
    network: Any = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(4)))
    network.memory = "plain"
    to_low_rank(network, 0.25)
    costs = [
        measure_cost(network, (1, 32, 64, 64), mixed=mixed, memories=["plain"]) for mixed in (None, torch.bfloat16)
    ]
    kept, mixed = (cost.activations["plain"].kept for cost in costs)
    # Images, sums and copies of the weights stay as wide as they were, or come on top.
    assert 0.45 * kept < mixed < 0.65 * kept


def unet(**options: Any) -> MomentumUNet:
    plan: dict[str, Any] = {"kernels": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]], **options}
    return MomentumUNet(2, 3, channels=(8, 8, 16), blocks=(1, 2, 2), **plan)


def save(folder: Path, network: MomentumUNet) -> Path:
    return save_tiny(folder, network=network, patch=(16, 16), channels=("T1", "T2"))


def test_low_rank_network_starts_from_the_nearest_of_a_trained_dense_one(tmp_path: Path) -> None:
    theirs, ours = unet(), to_low_rank(unet(), 0.5, gradients="tangent", room=2)
    before = list_ranks(ours)
    transfer = initialise_from(ours, save(tmp_path / "model", theirs))
    assert (transfer.left, transfer.unused, transfer.share) == ((), (), 1)
    assert transfer.taken == tuple(theirs.state_dict())
    assert list_ranks(ours) == before
    expected = to_low_rank(copy.deepcopy(theirs), 0.5, gradients="tangent", room=2)
    for name, sizes in before.items():
        found, wanted = (network.get_submodule(name) for network in (ours, expected))
        assert isinstance(found, LowRankLayer) and isinstance(wanted, LowRankLayer)
        torch.testing.assert_close(found.matrix(), wanted.matrix(), rtol=0, atol=1e-6)
        assert not found.u[:, sizes.rank :].any()
    image = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(image), expected.eval()(image), rtol=0, atol=1e-4)


def test_what_does_not_fit_is_told_by_its_dense_name_and_stays(tmp_path: Path) -> None:
    ours = to_low_rank(unet(kernels=[[3, 3], [3, 1], [3, 3]]), 0.5)
    name = "encoder.stages.1.entry.conv1"
    layer = ours.get_submodule(name)
    assert isinstance(layer, LowRankLayer)
    before = layer.matrix()
    transfer = initialise_from(ours, save(tmp_path / "model", unet()))
    assert dict(transfer.left)[f"{name}.weight"] == "8 x 8 x 3 x 3 there, 8 x 8 x 3 x 1 here"
    torch.testing.assert_close(layer.matrix(), before, rtol=0, atol=1e-6)


def test_dense_and_low_rank_networks_start_from_a_low_rank_package(tmp_path: Path) -> None:
    theirs = unet()
    to_low_rank(theirs, 0.4, room=2)
    model = save(tmp_path / "model", theirs)
    for ours in (unet(), to_low_rank(unet(), 0.4, gradients="tangent")):
        assert initialise_from(ours, model).share == 1
        image = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(ours.eval()(image), theirs.eval()(image), rtol=0, atol=1e-5)


def test_without_memory_a_start_is_only_checked(tmp_path: Path) -> None:
    model = save(tmp_path / "model", unet())
    with torch.device("meta"):
        ours = to_low_rank(unet(), 0.5)
    assert initialise_from(ours, model).share == 1
    assert all(p.is_meta for p in ours.parameters())


def test_factors_without_their_network_are_refused(tmp_path: Path) -> None:
    torch.save(to_low_rank(unet(), 0.5).state_dict(), tmp_path / "a.pt")
    with pytest.raises(MedmomError, match=r"a.pt: 13 layers are factors of a low rank \(encoder\.stages\.0\.entry"):
        initialise_from(unet(), tmp_path / "a.pt")


@pytest.mark.parametrize("training", [{}, {"decay_norms": False}])
def test_fused_kernels_of_other_rules_train_the_factors(training: dict[str, Any], tmp_path: Path) -> None:
    words = ["--optimizer=torch.optim.AdamW", "--optimizer.init_args.fused=true"]
    recipe = tiny_recipe(tmp_path, "--model.low_rank=0.5", *words, **training).build()
    network = build_network(recipe, 1, 3)
    optimizer = make_optimizer(recipe, network)(network.parameters())
    before = {name: p.clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.ones_like(p) if p.is_floating_point() else None
    optimizer.step()
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name]) is name.endswith(".ranks"), name
