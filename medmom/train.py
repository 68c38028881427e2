from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from medmom.budget import WARM_UP_SHARE, epochs_in, measure_pace
from medmom.callbacks import AtomicCheckpoints, CurveFile
from medmom.device import torch_device
from medmom.errors import MedmomError
from medmom.jobs.base import Job
from medmom.jobs.classification import ClassificationJob
from medmom.jobs.segmentation import SegmentationJob
from medmom.models.factorise import list_ranks
from medmom.monitor import OptimizerMonitor
from medmom.network import job_of, training_precision
from medmom.package import package_folder
from medmom.ramp import GateRamp
from medmom.rank_monitor import RankMonitor
from medmom.recipe import Recipe, TrainingRecipe
from medmom.recipe_file import RecipeFile
from medmom.run import claim_folder, read_run, write_run
from medmom.transfer import describe, initialise_from

logger = logging.getLogger(__name__)

JOBS: dict[str, type[Job]] = {"segmentation": SegmentationJob, "classification": ClassificationJob}
"""By what the recipe's preset is for."""

RAMP_HOLD = 0.2
"""Share of a gate ramp in which the gate is still 0."""

# Lightning's greetings and hints are not news to who trains here.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)
    logging.getLogger(f"{_name}.utilities.rank_zero").setLevel(logging.WARNING)


def train(recipe: RecipeFile, out: Path, *, device: str = "auto", quiet: bool = False) -> Path:
    """Trains a network on a folder of labelled scans.

    Args:
        recipe: What to train.
        out: A new folder for the run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        quiet: Whether to leave out progress bars.

    Returns:
        The folder of the model package, ``out/model``.

    Raises:
        MedmomError: The recipe, the data or ``out`` is not usable.
    """
    started = time.monotonic()
    chosen = torch_device(device)
    if recipe.get("data.folder") is None:
        raise MedmomError("data.folder: not given; say --data.folder FOLDER with the labelled scans.")
    kind = JOBS[job_of(recipe.build())]
    claim_folder(out)
    try:
        job = kind.start(recipe, out, chosen, quiet=quiet)
        if recipe.get("training.max_minutes") is not None:
            _fit_to_time(job, chosen, started)
        write_run(job.run)
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # still empty: a run that never started leaves nothing behind
        raise
    return _fit(job, chosen)


def resume(folder: Path, *, device: str = "auto", quiet: bool = False) -> Path:
    """Goes on with a run that was stopped; the result is that of a run that was not.

    Args:
        folder: The run folder.
        device: As in ``train``.
        quiet: As in ``train``.

    Returns:
        The folder of the model package.

    Raises:
        MedmomError: The folder holds no run that can be resumed.
    """
    if (folder / "recipe.yaml").is_file() and package_folder(folder) is not None:
        logger.info("%s: the run is complete.", folder)
        return folder / "model"
    run, chosen = read_run(folder), torch_device(device)
    job = JOBS[job_of(run.recipe.build())](run, quiet=quiet)
    # Another device may have another precision, which has to suit the memory as well.
    job.plan(run.recipe.build(), chosen)
    return _fit(job, chosen)


def _fit_to_time(job: Job, device: torch.device, started: float) -> None:
    """Measures this machine and writes the epochs that fit into the recipe's time."""
    written = job.run.recipe
    recipe = written.build()
    options = _trainer_options(recipe.training, device)
    with _without_hints(), _exact_in_words():
        pace = measure_pace(job.task(recipe), job.data(recipe, device), job.validation_voxels(), **options)
    seconds = 60 * (recipe.training.max_minutes or 0) - (time.monotonic() - started)
    epochs, steps = epochs_in(
        seconds, pace, epochs=recipe.training.epochs, steps_per_epoch=recipe.training.steps_per_epoch
    )
    logger.info("%.2f s a step: %d epochs of %d steps fit into the time.", pace.step_s, epochs, steps)
    written.set("training.epochs", epochs)
    written.set("training.steps_per_epoch", steps)
    written.set("training.warmup_steps", min(recipe.training.warmup_steps, int(WARM_UP_SHARE * epochs * steps)))
    written.set("training.validate_every", 1)
    written.set("training.max_minutes", None)


def _fit(job: Job, device: torch.device) -> Path:
    """Trains from the last checkpoint, or from the start, to the end, and writes the package."""
    folder, recipe = job.run.folder, job.run.recipe.build()
    lightning.seed_everything(recipe.training.seed, workers=True, verbose=False)
    task, last = job.task(recipe), folder / "last.ckpt"
    if recipe.model.init_from is not None and not last.is_file():
        logger.info("%s", describe(initialise_from(task.network, recipe.model.init_from)))
    trainer = lightning.Trainer(
        max_epochs=recipe.training.epochs,
        check_val_every_n_epoch=min(recipe.training.validate_every, recipe.training.epochs),
        gradient_clip_val=recipe.training.gradient_clip,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=_callbacks(job, recipe, task.network),
        plugins=[AtomicCheckpoints()],
        enable_progress_bar=not job.quiet,
        enable_model_summary=False,
        default_root_dir=folder,
        **_trainer_options(recipe.training, device),
    )
    with _without_hints(), _interruptible(trainer), _exact_in_words():
        trainer.fit(task, job.data(recipe, device), ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    if recipe.training.keep == "best":
        _take_best(folder / "best.ckpt", task.network)
    job.save(recipe, task.network, device)
    return folder / "model"


@contextmanager
def _without_hints() -> Iterator[None]:
    """Keeps back Lightning's hints on what is meant as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|does not have many workers|log_every_n_steps).*")
        # Of a first step that the scaler of 16-mixed leaves out.
        warnings.filterwarnings("ignore", message=r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning.*")
        yield


@contextmanager
def _interruptible(trainer: lightning.Trainer) -> Iterator[None]:
    """Hands an interrupt on: Lightning turns it into an exit with code 1."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


@contextmanager
def _exact_in_words() -> Iterator[None]:
    """Says in one line what memory exact found in the middle of a step."""
    try:
        yield
    except (OverflowError, RuntimeError) as error:
        if "emory exact" not in str(error):
            raise
        raise MedmomError(f"model.memory exact: {error}") from None


def _trainer_options(settings: TrainingRecipe, device: torch.device) -> dict[str, Any]:
    return {
        "accelerator": device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "precision": training_precision(settings, device),
        "accumulate_grad_batches": settings.accumulate,
        "use_distributed_sampler": False,
        "benchmark": device.type == "cuda",
    }


def _callbacks(job: Job, recipe: Recipe, network: nn.Module) -> list[Callback]:
    folder = job.run.folder
    best = ModelCheckpoint(
        folder,
        "best",
        monitor=job.monitor(),
        mode="max",
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    # The last checkpoint stands behind the best one, so that it knows of it when a run is resumed.
    last = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    callbacks: list[Callback] = [CurveFile(folder / "metrics.csv"), *job.pictures(recipe), best, last]
    if recipe.training.monitor:
        callbacks.insert(0, OptimizerMonitor())
    if list_ranks(network):
        callbacks.insert(0, RankMonitor(folder, every=recipe.training.picture_every))
    end = recipe.training.gate_ramp
    if end is not None:
        callbacks.insert(0, GateRamp(recipe.model.gate, hold=RAMP_HOLD * end, end=end))
    return callbacks if job.quiet else [TQDMProgressBar(), *callbacks]


def _take_best(checkpoint: Path, network: nn.Module) -> None:
    """Gives the network the weights that scored highest, where any did."""
    if not checkpoint.is_file():
        return
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "network."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
