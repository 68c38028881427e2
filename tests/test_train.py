"""Training from a folder of scans to a model package."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file
from test_resume import StopError, cut_off
from tiny_run import PATCH, rows, tiny_recipe, write_recipe, write_scans
from torch import nn

from medmom import models, optim
from medmom.errors import MedmomError
from medmom.jobs.segmentation import SegmentationJob
from medmom.monitor import OptimizerMonitor
from medmom.network import build_network
from medmom.optimizer import make_optimizer
from medmom.package import load_package
from medmom.recipe_file import RecipeFile, recipe_path
from medmom.run import next_run
from medmom.train import resume, train


def run(folder: Path, name: str, *overrides: str, **training: object) -> Path:
    out = folder / name
    train(tiny_recipe(folder, *overrides, **training), out, device="cpu", quiet=True)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, not to be changed."""
    return run(tmp_path_factory.mktemp("finished"), "run")


def test_run_folder_holds_all_that_was_promised(finished: Path) -> None:
    held = {path.name for path in finished.iterdir()}
    files = {"recipe.yaml", "split.json", "metrics.csv", "last.ckpt", "best.ckpt"}
    assert held == {*files, "tensorboard", "pictures", "model"}
    assert {path.name for path in (finished / "model").iterdir()} == {"model.safetensors", "model.json"}
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert [path.name for path in sorted((finished / "pictures").iterdir())] == ["epoch_0001.png", "epoch_0002.png"]


def test_data_folder_stays_as_it_was(finished: Path) -> None:
    held = sorted(str(path.relative_to(finished.parent / "scans")) for path in (finished.parent / "scans").rglob("*"))
    files = [f"{kind}/case_{k}.nii.gz" for kind in ("images", "labels") for k in range(5)]
    assert held == sorted(["images", "labels", "dataset.json", *files])


def test_metrics_hold_a_row_an_epoch(finished: Path) -> None:
    table = rows(finished / "metrics.csv")
    assert [(row["epoch"], row["step"]) for row in table] == [("0", "2"), ("1", "4")]
    for row in table:
        assert float(row["train_loss"]) > 0
        assert 0 <= float(row["val_dice"]) <= 1
        both = float(row["val_dice_head"]) + float(row["val_dice_body"])
        assert float(row["val_dice"]) == pytest.approx(both / 2, abs=1e-5)


def test_package_is_the_last_network_and_predicts(finished: Path) -> None:
    package = load_package(finished)
    saved = torch.load(finished / "last.ckpt", weights_only=True)["state_dict"]
    state = package.network.state_dict()
    assert all(torch.equal(state[key], saved[f"network.{key}"]) for key in state)
    assert package.labels.names == ("background", "head", "body")
    assert package.labels.values == (0, 1, 4)
    assert package.patch == tuple(PATCH)
    assert package.channels == ("MRI",)
    assert package.preparation.spacing == (1.0, 1.0, 2.0)
    with torch.inference_mode():
        assert package.network(torch.zeros(1, 1, *PATCH)).shape == (1, 3, *PATCH)


def test_package_does_not_say_where_the_data_lay(finished: Path) -> None:
    assert str(finished.parent) not in (finished / "model" / "model.json").read_text()


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_checkpoint_holds_no_code(finished: Path, name: str) -> None:
    state = torch.load(finished / name, weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= state.keys()


def test_stored_recipe_is_complete_and_trains_the_same(finished: Path, tmp_path: Path) -> None:
    stored = RecipeFile(finished / "recipe.yaml")
    assert stored.get("training.epochs") == 2
    train(stored, tmp_path / "again", device="cpu", quiet=True)
    assert same(weights(tmp_path / "again"), weights(finished))
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()


def test_another_seed_gives_other_weights_on_the_same_split(finished: Path) -> None:
    other = run(finished.parent, "seed", training_seed := "--training.seed", "7")
    assert training_seed
    assert not same(weights(other), weights(finished))
    first, second = (json.loads((out / "split.json").read_text()) for out in (finished, other))
    assert first == second


def test_split_lists_every_case_once_with_its_files(finished: Path) -> None:
    split = json.loads((finished / "split.json").read_text())
    assert (split["fold"], split["folds"], split["seed"]) == (0, 5, 0)
    assert Path(split["folder"]) == finished.parent / "scans"
    assert len(split["validation"]) == 1
    cases = [*split["train"], *split["validation"]]
    assert sorted(case["name"] for case in cases) == [f"case_{k}" for k in range(5)]
    for case in cases:
        assert all(Path(path).is_file() for path in (*case["images"], case["label"]))


def test_patients_never_lie_on_both_sides(tmp_path: Path) -> None:
    data = write_scans(tmp_path / "scans", num_cases=8)
    lines = [f"case_{k}.nii.gz,person_{k // 2}" for k in range(8)]
    (data / "cases.csv").write_text("\n".join(["file,patient", *lines]) + "\n")
    for fold in range(2):
        out = run(tmp_path, f"fold{fold}", "--data.folds", "2", "--data.fold", str(fold), epochs=1, steps_per_epoch=1)
        split = json.loads((out / "split.json").read_text())
        groups = [{case["group"] for case in split[side]} for side in ("train", "validation")]
        assert len(split["validation"]) == 4
        assert not groups[0] & groups[1]
        assert groups[0] | groups[1] == {f"person_{k}" for k in range(4)}


def test_the_same_image_on_both_sides_is_refused(tmp_path: Path) -> None:
    data = write_scans(tmp_path / "scans", num_cases=2)
    shutil.copy(data / "images" / "case_0.nii.gz", data / "images" / "case_1.nii.gz")
    with pytest.raises(MedmomError, match=r"case_[01] \(validation\) holds the same image as case_[01] \(training\)"):
        run(tmp_path, "run", "--data.folds", "2")
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_best_weights_are_packaged_where_the_recipe_says_so(tmp_path: Path) -> None:
    # So high a rate that the network is worse after more of it.
    rate = ("--optimizer.init_args.lr", "0.3")
    out = run(tmp_path, "best", *rate, "--training.keep", "best", epochs=4, steps_per_epoch=1, schedule="constant")
    saved = torch.load(out / "best.ckpt", weights_only=True)
    dice = [float(row["val_dice"]) for row in rows(out / "metrics.csv")]
    assert saved["epoch"] == dice.index(max(dice))
    state = weights(out)
    assert all(torch.equal(state[key], saved["state_dict"][f"network.{key}"]) for key in state)


def test_validation_and_pictures_come_as_often_as_asked(tmp_path: Path) -> None:
    out = run(tmp_path, "rare", epochs=5, steps_per_epoch=1, validate_every=2, picture_every=5)
    assert [bool(row["val_dice"]) for row in rows(out / "metrics.csv")] == [False, True, False, True, False]
    # The last validation is drawn, though it is not the fifth.
    assert [path.name for path in (out / "pictures").iterdir()] == ["epoch_0004.png"]


def test_steps_are_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    out = run(tmp_path, "parts", accumulate=3)
    assert [row["step"] for row in rows(out / "metrics.csv")] == ["2", "4"]


@pytest.mark.parametrize("optimizer", ["medmom.optim.MoMo", "torch.optim.AdamW"])
def test_other_optimizers_train(optimizer: str, tmp_path: Path) -> None:
    recipe = RecipeFile(
        write_recipe(tmp_path / "tiny.yaml", write_scans(tmp_path / "scans"), epochs=1),
        [f"--optimizer={optimizer}", "--optimizer.init_args.lr=0.01"],
    )
    assert train(recipe, tmp_path / "run", device="cpu", quiet=True) == tmp_path / "run" / "model"


def groups_of(folder: Path, *overrides: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The network and the parameter groups that a recipe makes."""
    decay = ("--optimizer.init_args.weight_decay", "0.25")
    recipe = tiny_recipe(folder, *decay, *overrides).build()
    network = build_network(recipe, 1, 3)
    return network, make_optimizer(recipe, network)(network.parameters()).param_groups


def test_all_weights_are_one_group_unless_the_recipe_tells_them_apart(tmp_path: Path) -> None:
    network, (group,) = groups_of(tmp_path)
    assert len(group["params"]) == len(list(network.parameters()))
    assert "name" not in group


def test_biases_and_norms_do_not_decay_where_the_recipe_says_so(tmp_path: Path) -> None:
    network, groups = groups_of(tmp_path, "--training.decay_norms", "false")
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.keys() == {id(p) for p in network.parameters()}
    for parameter in network.parameters():
        assert decays[id(parameter)] == (0.25 if parameter.ndim > 1 else 0.0)


def test_layers_learn_the_slower_the_earlier_they_are(tmp_path: Path) -> None:
    network, groups = groups_of(tmp_path, "--training.layer_decay", "0.5")
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in network.named_parameters()}
    assert max(by_name.values()) == 0.01
    first, last = (
        {rate for name, rate in by_name.items() if name.startswith(part)} for part in ("encoder.stem", "decoder")
    )
    assert max(first) < min(last)
    # What one key asks for leaves the other as it was: biases decay too.
    assert {group["weight_decay"] for group in groups} == {0.25}


def test_groups_of_a_copy_hold_the_parameters_of_the_copy(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "--training.decay_norms", "false").build()
    network = build_network(recipe, 1, 3)
    twin = copy.deepcopy(network)
    optimizer = make_optimizer(recipe, network)(twin.parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in twin.parameters()}


@pytest.mark.parametrize("memory", ["plain", "reversible"])
def test_frozen_parts_stay_as_they_were(memory: str, tmp_path: Path) -> None:
    names = ("--training.frozen", "[encoder.stem, encoder.stages.1]")
    out = run(tmp_path, "run", *names, "--model.memory", memory, "--training.layer_decay", "0.8", epochs=1)
    recipe = tiny_recipe(tmp_path, *names).build()
    lightning.seed_everything(recipe.training.seed, verbose=False)
    begin, end = build_network(recipe, 1, 3).state_dict(), weights(out)
    for name, value in begin.items():
        if name.startswith(("encoder.stem.", "encoder.stages.1.")):
            assert torch.equal(end[name], value), name
        elif value.ndim > 1:
            assert not torch.equal(end[name], value), name


def test_frozen_parts_ask_for_no_gradients(tmp_path: Path) -> None:
    job = SegmentationJob.start(
        tiny_recipe(tmp_path, "--training.frozen", "[decoder]"), tmp_path / "run", torch.device("cpu"), quiet=True
    )
    task = job.task(job.run.recipe.build())
    for name, parameter in task.network.named_parameters():
        assert parameter.requires_grad != name.startswith("decoder."), name


def test_groups_are_made_before_the_time_is_planned(tmp_path: Path) -> None:
    overrides = ["--training.decay_norms", "false", "--training.max_minutes", "0.1"]
    out = run(tmp_path, "timed", *overrides, epochs=1, steps_per_epoch=2)
    assert RecipeFile(out / "recipe.yaml").get("training.decay_norms") is False


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor reads at every second step, so that short runs have readings."""
    monkeypatch.setattr("medmom.train.OptimizerMonitor", partial(OptimizerMonitor, every=2))


@pytest.mark.usefixtures("often")
def test_the_monitor_writes_into_the_metrics_where_the_recipe_asks(finished: Path, tmp_path: Path) -> None:
    out = run(tmp_path, "watched", "--training.monitor", "true")
    assert [row["optimizer/skipped"] for row in rows(out / "metrics.csv")] == ["0", "0"]
    assert not any(name.startswith("optimizer/") for name in rows(finished / "metrics.csv")[0])
    # It watches, and changes nothing.
    assert same(weights(out), weights(finished))


TOLD_APART = {
    "ScheduleFreeSGD": ["--optimizer.init_args.lr=0.1"],
    "FSGDM": ["--optimizer.init_args.lr=0.02"],
    "MoMoAdam": [],
    "AdaMomentum": ["--training.warmup_steps=2"],
}


@pytest.mark.slow
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("name", [name for name in TOLD_APART if name in optim.__all__])
def test_rule_trains_and_resumes_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [f"--optimizer=medmom.optim.{name}", *TOLD_APART[name], "--training.monitor=true"]
    settings = {"epochs": 2, "steps_per_epoch": 3, "picture_every": 3}
    straight = run(tmp_path, "straight", *chosen, **settings)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        cut_off(patch, 1, StopError())
        run(tmp_path, "stopped", *chosen, **settings)
    resume(tmp_path / "stopped", device="cpu", quiet=True)
    assert same(weights(tmp_path / "stopped"), weights(straight))
    assert (tmp_path / "stopped" / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()
    losses = [float(row["train_loss"]) for row in rows(straight / "metrics.csv")]
    assert losses[1] < losses[0]
    check_point(straight)


def check_point(out: Path) -> None:
    """The package holds the weights that count: x of a two-point rule, not the y at which it trains."""
    network = load_package(out).network.train()
    recipe = RecipeFile(out / "recipe.yaml").build()
    optimizer: Any = recipe.optimizer(network.parameters())
    optimizer.load_state_dict(torch.load(out / "last.ckpt", weights_only=True)["optimizer_states"][0])
    packaged = [p.detach().clone() for p in network.parameters()]
    if not hasattr(optimizer, "eval"):
        return
    optimizer.eval()
    assert all(torch.equal(p, x) for p, x in zip(network.parameters(), packaged, strict=True))
    optimizer.train()
    for y, x in zip(network.parameters(), packaged, strict=True):
        z = y.detach() - optimizer.state[y]["unit"] * optimizer.state[y]["apart"]
        torch.testing.assert_close(y.detach(), 0.1 * z + 0.9 * x)
    for y, x in zip(network.parameters(), packaged, strict=True):
        # A norm's scale of 1 may stand where it was, in single precision.
        assert y.ndim < 2 or not torch.equal(y, x)


@pytest.mark.slow
def test_loss_falls_and_dice_rises(tmp_path: Path) -> None:
    rate = ("--optimizer.init_args.lr", "0.1")
    out = run(tmp_path, "longer", "--data.augment", "false", *rate, epochs=5, steps_per_epoch=12)
    table = rows(out / "metrics.csv")
    losses = [float(row["train_loss"]) for row in table]
    assert losses[-1] < 0.5 * losses[0]
    assert float(table[-1]["val_dice"]) > 0.7


def test_folder_with_something_in_it_is_not_written_to(finished: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(MedmomError, match=r"already there; .*--resume"):
        train(tiny_recipe(tmp_path), finished, device="cpu", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run(tmp_path, "run", epochs=1, steps_per_epoch=1)


def refused(folder: Path, *overrides: str, **training: object) -> str:
    with pytest.raises(MedmomError) as caught:
        run(folder, "refused", *overrides, **training)
    # What never started leaves no folder, so that the same command works once it is mended.
    assert not (folder / "refused").exists()
    return str(caught.value)


def test_patch_that_cannot_be_halved_is_refused_with_the_next_size(tmp_path: Path) -> None:
    assert "next size is [40, 32, 8]" in refused(tmp_path, "--data.patch", "[33, 32, 8]")


def test_patch_that_is_too_small_is_refused(tmp_path: Path) -> None:
    assert "larger patch" in refused(tmp_path, "--data.patch", "[8, 8, 8]")


@pytest.mark.parametrize("preset", ["mom3d_xxs", "mom2d_xs", "plan_kernels_and_strides", "MomentumUNet"])
def test_unknown_preset_is_refused_with_the_known_ones(preset: str, tmp_path: Path) -> None:
    message = refused(tmp_path, "--model.preset", preset)
    assert preset in message
    assert "mom3d_xs" in message


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        (["--training.epochs", "0"], "training.epochs 0"),
        (["--training.steps_per_epoch", "0"], "training.steps_per_epoch 0"),
        (["--training.accumulate", "0"], "training.accumulate 0"),
        (["--training.validate_every", "0"], "training.validate_every 0"),
        (["--training.picture_every", "0"], "training.picture_every 0"),
        (["--training.seed", "-1"], "training.seed -1"),
        (["--training.seed", "4294967296"], "training.seed 4294967296"),
        (["--training.warmup_steps", "4"], "warm-up must end before the training"),
        (["--training.precision", "fp8"], "precision"),
        (["--training.max_minutes", "0.0001"], "training.max_minutes"),
        (["--data.batch_size", "0"], "data.batch_size 0"),
        (["--data.workers", "-1"], "data.workers -1"),
        (["--data.patch", "[0, 32, 8]"], "data.patch"),
        (["--data.fold", "5"], "fold 5 of 5"),
        (["--data.folds", "9"], "cannot make 9 folds"),
        (["--model.gate", "1.5"], "gate"),
        (["--model.gate", "1", "--model.coupling", "ema"], "lower it or take normalised"),
        (["--model.gate", "0", "--model.memory", "reversible"], "take gate 0.177 or more"),
        (["--model.memory", "exact"], "the nearest is 0.875"),
        (["--model.memory", "exact", "--model.gate", "0.875", "--model.gating", "block"], "take reversible"),
        (["--model.memory", "auto"], "say --model.memory_limit GIB"),
        (["--model.memory", "auto", "--model.memory_limit", "0.001"], "Allow more"),
        (
            ["--model.memory", "reversible", "--model.gate", "0.3", "--training.precision", "bf16-mixed"],
            "smallest legal gate is 0.354",
        ),
        (["--optimizer.init_args.lr", "-1"], "lr is -1"),
        (["--training.frozen", "[encodr]"], "training.frozen ['encodr']: "),
        (["--training.frozen", "[encoder, decoder, heads]"], "nothing is left to train"),
        (["--training.layer_decay", "2"], "training.layer_decay 2.0"),
        (
            ["--training.decay_norms", "false", "--optimizer", "torch.optim.Rprop"],
            "training.decay_norms: Rprop knows no weight decay",
        ),
        (
            ["--training.layer_decay", "0.9", "--optimizer", "torch.optim.LBFGS"],
            "training.layer_decay 0.9: LBFGS doesn't support per-parameter options",
        ),
        (["--data.folder", "nowhere"], "nowhere"),
        (["--data.folder", "null"], "say --data.folder FOLDER"),
    ],
)
def test_setting_that_cannot_work_is_refused_before_training(changes: list[str], fact: str, tmp_path: Path) -> None:
    message = refused(tmp_path, *changes)
    assert fact in message
    assert "\n" not in message


def test_auto_writes_its_choice_into_the_run(tmp_path: Path) -> None:
    auto = ("--model.memory", "auto", "--model.memory_limit", "0.016")
    out = run(tmp_path, "auto", *auto, epochs=1, steps_per_epoch=1)
    written = RecipeFile(out / "recipe.yaml")
    assert written.get("model.memory") in {"checkpoint", "hybrid"}
    assert written.get("model.memory_limit") == 0.016
    assert load_package(out).network.memory == written.get("model.memory")


@pytest.mark.parametrize("memory", ["hybrid", "exact"])
def test_other_memory_trains_the_same_network(memory: str, tmp_path: Path) -> None:
    first, second = (
        run(tmp_path, name, "--model.memory", name, "--model.gate", "0.875", epochs=1) for name in ("plain", memory)
    )
    losses = [float(rows(out / "metrics.csv")[0]["train_loss"]) for out in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert weights(first).keys() == weights(second).keys()


def test_overflow_of_memory_exact_is_one_line(tmp_path: Path) -> None:
    exact = ("--model.memory", "exact", "--model.gate", "0.875", "--optimizer.init_args.lr", "1e9")
    with pytest.raises(MedmomError, match=r"^model\.memory exact: .* must stay below 1024 .* Take memory") as caught:
        run(tmp_path, "run", *exact, gradient_clip=None, schedule="constant")
    assert "\n" not in str(caught.value)
    # What was begun can be looked at, and is not finished.
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert not (tmp_path / "run" / "model").exists()


def test_resumed_run_is_refused_where_its_precision_does_not_suit(tmp_path: Path) -> None:
    out = run(tmp_path, "run", "--model.memory", "reversible", "--model.gate", "0.3", epochs=1, steps_per_epoch=1)
    shutil.rmtree(out / "model")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("precision: null", "precision: bf16-mixed"))
    with pytest.raises(MedmomError, match=r"smallest legal gate is 0\.354"):
        resume(out, device="cpu", quiet=True)


def test_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match="choose auto, cpu, cuda"):
        train(tiny_recipe(tmp_path), tmp_path / "run", device="tpu", quiet=True)


def test_runs_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_run("liver") == Path("runs/liver-001")
    for name in ("liver-001", "liver-007", "lung-009", "liver-abc"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert next_run("liver") == Path("runs/liver-008")


def test_finished_run_is_not_trained_again(finished: Path) -> None:
    before = (finished / "model" / "model.safetensors").stat().st_mtime_ns
    assert resume(finished, device="cpu", quiet=True) == finished / "model"
    assert (finished / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_every_shipped_recipe_makes_a_network_for_its_patch() -> None:
    for name in ("demo", "hippocampus", "ct_organs", "liver", "lung", "colon"):
        recipe = RecipeFile(recipe_path(name)).build()
        with torch.device("meta"):
            network = build_network(recipe, 1, 3)
        assert isinstance(network, models.MomentumUNet)
        assert not any(n % d for n, d in zip(recipe.data.patch, network.divisor, strict=True))
