"""The number of steps that fit into a time."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import rows, tiny_recipe

from medmom.budget import MOST_EPOCHS, Pace, epochs_in, measure_pace
from medmom.errors import MedmomError
from medmom.jobs.segmentation import SegmentationJob
from medmom.recipe_file import RecipeFile
from medmom.train import _trainer_options, train

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:isinstance.*LeafSpec")


def test_plan_keeps_to_the_time_and_to_the_recipe() -> None:
    refused = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        pace = Pace(float(10 ** rng.uniform(-2, 1)), float(10 ** rng.uniform(-3, 2)))
        seconds = float(10 ** rng.uniform(1, 5))
        most = {"epochs": int(rng.integers(1, 1500)), "steps_per_epoch": int(rng.integers(1, 400))}
        try:
            epochs, steps = epochs_in(seconds, pace, **most)
        except MedmomError:
            # Only where one step and one validation do not fit in.
            assert pace.step_s + pace.validation_s > 0.9 * seconds
            refused += 1
            continue
        assert min(epochs, steps) >= 1
        assert epochs * (steps * pace.step_s + pace.validation_s) <= seconds
        assert epochs <= min(MOST_EPOCHS, most["epochs"])
        assert epochs * steps <= most["epochs"] * most["steps_per_epoch"]
    assert 0 < refused < 100


def test_time_is_used() -> None:
    epochs, steps = epochs_in(1800, Pace(0.5, 10), epochs=1000, steps_per_epoch=250)
    assert epochs * (steps * 0.5 + 10) > 0.9 * 1800
    assert epochs * 10 <= 0.2 * 1800


def test_ample_time_gives_the_recipe_itself() -> None:
    assert epochs_in(1e6, Pace(0.1, 1), epochs=20, steps_per_epoch=100) == (20, 100)


def test_long_recipe_with_ample_time_keeps_its_steps() -> None:
    epochs, steps = epochs_in(1e9, Pace(0.1, 1), epochs=1000, steps_per_epoch=250)
    assert epochs * steps == 250_000


def test_more_time_never_means_fewer_steps() -> None:
    plans = [epochs_in(s, Pace(0.3, 4), epochs=1000, steps_per_epoch=250) for s in np.geomspace(20, 1e5, 60)]
    totals = [epochs * steps for epochs, steps in plans]
    # Rounding down to whole steps in each epoch costs less than one step an epoch.
    assert all(b >= a - MOST_EPOCHS for a, b in pairwise(totals))


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 1.0])
def test_no_time_for_a_step_is_said_with_the_pace(seconds: float) -> None:
    with pytest.raises(MedmomError, match=r"max_minutes: 0\.0 minutes .* a step takes 2\.0 s .* allow more"):
        epochs_in(seconds, Pace(2.0, 3.0), epochs=10, steps_per_epoch=10)


@pytest.fixture
def started(tmp_path: Path) -> SegmentationJob:
    (tmp_path / "run").mkdir()
    return SegmentationJob.start(
        tiny_recipe(tmp_path, epochs=3, steps_per_epoch=20), tmp_path / "run", torch.device("cpu"), quiet=True
    )


def test_measuring_leaves_the_task_and_the_batches_as_they_are(started: SegmentationJob) -> None:
    device = torch.device("cpu")
    recipe = started.run.recipe.build()
    task, data = started.task(recipe), started.data(recipe, device)
    before = copy.deepcopy(task.state_dict())
    patch = data.patches[0, 11]["image"].clone()
    pace = measure_pace(task, data, [10], **_trainer_options(recipe.training, device))
    assert pace.step_s > 0
    assert pace.validation_s > 0
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert torch.equal(data.patches[0, 11]["image"], patch)
    assert list(started.run.folder.iterdir()) == []


def test_validation_time_is_scaled_to_all_cases(started: SegmentationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    recipe = started.run.recipe.build()
    training, _ = started.prepared
    started.prepared = (training, training)
    data = started.data(recipe, device)
    times = iter(range(10**6))
    monkeypatch.setattr("medmom.budget.time.monotonic", lambda: float(next(times)))
    pace = measure_pace(started.task(recipe), data, [10, 10, 20, 40], **_trainer_options(recipe.training, device))
    # A tick a reading: one a step, one from the start to the end of a validation of the first two cases.
    assert pace.step_s == 1
    assert pace.validation_s == 80 / 20


@pytest.mark.parametrize("accumulate", [1, 3])
def test_epoch_that_is_too_short_for_a_warm_up_is_measured_too(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    recipe_file = tiny_recipe(tmp_path, epochs=3, steps_per_epoch=1, accumulate=accumulate)
    started = SegmentationJob.start(recipe_file, tmp_path / "run", torch.device("cpu"), quiet=True)
    device = torch.device("cpu")
    recipe = started.run.recipe.build()
    data = started.data(recipe, device)
    times = iter(range(10**6))
    monkeypatch.setattr("medmom.budget.time.monotonic", lambda: 7.0 * next(times))
    pace = measure_pace(started.task(recipe), data, [10], **_trainer_options(recipe.training, device))
    assert pace.step_s == 7 * accumulate


def test_timed_run_stores_its_plan_and_equals_a_run_of_that_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmom.train.epochs_in", lambda *_, **__: (1, 3))
    recipe = tiny_recipe(tmp_path, "--training.max_minutes", "5", "--training.validate_every", "4", epochs=40)
    train(recipe, tmp_path / "timed", device="cpu", quiet=True)
    stored = RecipeFile(tmp_path / "timed" / "recipe.yaml")
    plan = [stored.get(f"training.{key}") for key in ("epochs", "steps_per_epoch", "validate_every", "max_minutes")]
    assert plan == [1, 3, 1, None]
    train(stored, tmp_path / "planned", device="cpu", quiet=True)
    timed, planned = (tmp_path / name / "model" / "model.safetensors" for name in ("timed", "planned"))
    assert timed.read_bytes() == planned.read_bytes()


@pytest.mark.parametrize(("wanted", "kept"), [(10, 1), (1, 1), (0, 0)])
def test_short_plan_has_a_short_warm_up(
    wanted: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmom.train.epochs_in", lambda *_, **__: (2, 3))
    recipe = tiny_recipe(tmp_path, "--training.max_minutes", "5", "--training.warmup_steps", str(wanted), epochs=40)
    train(recipe, tmp_path / "run", device="cpu", quiet=True)
    assert RecipeFile(tmp_path / "run" / "recipe.yaml").get("training.warmup_steps") == kept


@pytest.mark.slow
def test_timed_run_ends_in_its_time(tmp_path: Path) -> None:
    import time

    recipe = tiny_recipe(tmp_path, "--training.max_minutes", "0.5", epochs=1000, steps_per_epoch=250)
    began = time.monotonic()
    train(recipe, tmp_path / "run", device="cpu", quiet=True)
    lasted = time.monotonic() - began
    assert 12 < lasted < 36
    assert len(rows(tmp_path / "run" / "metrics.csv")) > 1
