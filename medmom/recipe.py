from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.models.encoder import Block, Velocity
from medmom.models.gates import Coupling, Gating


@dataclass(frozen=True)
class DataRecipe:
    """Which scans, and how they become batches.

    Attributes:
        folder: Labelled scans: MSD decathlon, nnU-Net raw, images/ + labels/, or a CSV file; to classify: a folder a
            class, a CSV file with image and label, MedMNIST's .npz, or RadImageNet.
        group: Column of cases.csv that names the patient; cases of one patient stay in one fold.
        blocks: To classify: each class's images, in the order of their names, are cut into that many blocks, which
            stay in one fold; for neighbours that are slices of one scan. null: no blocks.
        validation: Names of the validation cases, such as "liver_3[0-9]", instead of a fold.
        leave_out: Names of cases that take no part, such as those of a test set.
        fold: Number of the fold to validate on, from 0.
        folds: Number of folds.
        cache: Folder for prepared cases.
        patch: Voxels of a training patch, in the order of the working axes; two edges make a network for pictures and
            slices.
        batch_size: Patches in a batch of one process.
        workers: Processes that make patches; null: none on the CPU, one a core less one on a GPU.
        augment: Whether patches are changed at random, as nnU-Net does.
        mirror: Axes that may be flipped at random; leave 0 (left-right) out where classes have sides.
        transforms: Further MONAI dictionary transforms of a patch: {"class": RandBiasFieldd, "keys": [image], ...}, or
            of albumentations: {"class": albumentations.Rotate, "limit": 35}.
        slices: To classify volumes with a 2-D network: how many slices of each are looked at.
        balance: To classify: "weights": rare classes weigh more in the loss; "sampling": they are drawn more often.
    """

    folder: Path | None = None
    group: str | None = None
    blocks: int | None = None
    validation: list[str] = field(default_factory=list)
    leave_out: list[str] = field(default_factory=list)
    fold: int = 0
    folds: int = 5
    cache: Path = Path("runs/cache")
    patch: tuple[int, ...] = (128, 128, 128)
    batch_size: int = 2
    workers: int | None = None
    augment: bool = True
    mirror: list[Literal[0, 1, 2]] = field(default_factory=lambda: [0, 1, 2])
    transforms: list[dict[str, Any]] = field(default_factory=list)
    slices: int | None = None
    balance: Literal["none", "weights", "sampling"] = "none"

    def __post_init__(self) -> None:
        """Refuses sizes that make no batch."""
        _refuse_below("data", self, {"batch_size": 1, "workers": 0, "slices": 1, "blocks": 2})
        if len(self.patch) not in (2, 3) or min(self.patch) < 1:
            raise MedmomError(f"data.patch {list(self.patch)}: give two or three edges in voxels, each 1 or more.")


@dataclass(frozen=True)
class ModelRecipe:
    """Which momentum network.

    Attributes:
        preset: Name of a network in medmom.models, such as mom3d_s; mom3d_xs is made for the CPU.
        gate: Momentum g of v' = g v + c f(x), from 0 (a plain residual network) to 1.
        coupling: Factor c: "normalised" keeps the scale of a plain residual network for every gate; "ema" is 1 - g.
        gating: "fixed": the gate stays; "block": every block learns its own; "channel": every channel does.
        velocity: v at the start of a stage: "zero"; "learned" from its features; "carry": from the stage above.
        block: "postact": the block of a plain residual network; "preact": for stages of 8 blocks or more.
        memory: What training keeps for the backward pass. "plain": everything, the fastest; "checkpoint", "reversible"
            and "hybrid": less, in about a third more time; "exact": as reversible, to the bit; "auto": the fastest
            that fits, of all but exact; null: the preset's own, which is hybrid for mom3d_deep and plain for others.
        memory_limit: GiB that a training step may take under memory auto, weights and optimizer included; null: nine
            tenths of what is free on the GPU.
        deep_supervision: Whether lower resolutions of the decoder learn too.
        pooling: To classify volumes with a 2-D network: "mean" of the slices' logits, or by learned "attention".
        dropout: To classify: share of the pooled features that training sets to 0; null: the preset's own.
        num_blocks: Residual blocks a decoder stage of transnetr and paper2d; null: one.
        low_rank: Share of the full rank, below 1, that every weight matrix has at most, kept as factors U S V^T;
            optimizers medmom.optim.LowRankHeavyBall and LowRankAdam lower it layer by layer. 0.85 with a tolerance of
            0.2 is a good start; 0.45 halves weights and optimizer in training too. null: dense weights.
        init_from: Model package or checkpoint whose weights are taken where they fit.
    """

    preset: str = "mom3d_s"
    gate: float = 0.9
    coupling: Coupling = "normalised"
    gating: Gating = "fixed"
    velocity: Velocity = "zero"
    block: Block = "postact"
    memory: Literal["plain", "checkpoint", "reversible", "hybrid", "exact", "auto"] | None = None
    memory_limit: float | None = None
    deep_supervision: bool = True
    pooling: Literal["mean", "attention"] = "mean"
    dropout: float | None = None
    num_blocks: int | None = None
    low_rank: float | None = None
    init_from: Path | None = None

    def __post_init__(self) -> None:
        """Refuses a momentum that grows without end, and no memory."""
        if not 0 <= self.gate <= 1:
            raise MedmomError(f"model.gate {self.gate}: give a number from 0 to 1.")
        if self.memory_limit is not None and self.memory_limit <= 0:
            raise MedmomError(f"model.memory_limit {self.memory_limit}: give a number above 0, or null.")
        if self.low_rank is not None and not 0 < self.low_rank < 1:
            raise MedmomError(f"model.low_rank {self.low_rank}: give a share above 0 and below 1, or null.")


@dataclass(frozen=True)
class TrainingRecipe:
    """How long, how exactly and with which seed.

    Attributes:
        epochs: Number of epochs.
        steps_per_epoch: Optimizer steps in an epoch.
        max_minutes: Wall-clock time for everything; some steps are measured, and epochs and steps_per_epoch are
            set so that the schedule ends in time, with a warm-up of a fifth of the steps at most. null: train for
            all epochs.
        validate_every: Epochs between validations.
        picture_every: Validations between pictures of a validation case.
        keep: Weights of the model package: "last" owes nothing to the validation fold; "best" scored highest on it.
        schedule: Course of the learning rate.
        warmup_steps: Steps over which the learning rate rises from 0.
        decay_norms: Whether weight decay pulls at biases and at the scales of norms too.
        layer_decay: Factor of the learning rate from a layer to the one before it; 1: the same for all.
        frozen: Names of parts of the network that stay as they are, such as encoder or "encoder.stages.*.momentum".
        accumulate: Batches that make one optimizer step.
        gradient_clip: Largest norm of the gradient; null: any.
        precision: Lightning's name; null: bf16-mixed on a GPU that has it, else 32-true.
        seed: Seed of weights, patches and augmentation.
        monitor: Whether to log what the optimizer does (such as the step size it chose) and the gradient's spectrum.
        gate_ramp: Share of the run in which the gate rises from 0 to model.gate, for weights of a plain residual
            network; null: the gate stays.
        mixup: To classify: how evenly two images are mixed, the parameter of a Beta distribution; 0: not at all.
    """

    epochs: int = 1000
    steps_per_epoch: int = 250
    max_minutes: float | None = None
    validate_every: int = 1
    picture_every: int = 5
    keep: Literal["last", "best"] = "last"
    schedule: Literal["polynomial", "cosine", "warmup_stable_decay", "constant"] = "polynomial"
    warmup_steps: int = 0
    decay_norms: bool = True
    layer_decay: float = 1.0
    frozen: list[str] = field(default_factory=list)
    accumulate: int = 1
    gradient_clip: float | None = 12.0
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"] | None = None
    seed: int = 0
    monitor: bool = False
    mixup: float = 0.0
    gate_ramp: float | None = None

    def __post_init__(self) -> None:
        """Refuses numbers of which no training is made."""
        if self.gate_ramp is not None and not 0 < self.gate_ramp <= 1:
            raise MedmomError(f"training.gate_ramp {self.gate_ramp}: give a share above 0 and at most 1, or null.")
        if self.gate_ramp is not None and self.keep == "best":
            raise MedmomError(
                "training.keep best: with gate_ramp the best weights may belong to another gate; keep last."
            )
        counts = dict.fromkeys(("epochs", "steps_per_epoch", "validate_every", "picture_every", "accumulate"), 1)
        _refuse_below("training", self, {**counts, "warmup_steps": 0, "seed": 0, "mixup": 0})
        if self.seed >= 2**32:
            raise MedmomError(f"training.seed {self.seed}: give a number below 2^32.")
        if not 0 < self.layer_decay <= 1:
            raise MedmomError(f"training.layer_decay {self.layer_decay}: give a number above 0 and at most 1.")
        for name in ("max_minutes", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise MedmomError(f"training.{name} {value}: give a number above 0, or null.")


@dataclass(frozen=True)
class EvaluationRecipe:
    """What scoring needs to know of the anatomy.

    Attributes:
        nsd_tolerance: Distance in mm within which two surfaces count as touching.
    """

    nsd_tolerance: float = 2.0

    def __post_init__(self) -> None:
        """Refuses a distance below 0."""
        _refuse_below("evaluation", self, {"nsd_tolerance": 0})


@dataclass(frozen=True)
class Recipe:
    """One experiment, all of it.

    Attributes:
        data: Which scans, and how they become batches.
        preparation: Working grid and intensities.
        model: Which network.
        loss: Class of the loss and its arguments.
        optimizer: Class of the optimizer and its arguments: medmom.optim's or torch.optim's.
        training: How long and how exactly.
        evaluation: What scoring needs to know.
    """

    data: DataRecipe
    preparation: Preparation
    model: ModelRecipe
    loss: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    training: TrainingRecipe
    evaluation: EvaluationRecipe


SECTIONS: dict[str, Any] = {
    "data": DataRecipe,
    "preparation": Preparation,
    "model": ModelRecipe,
    "training": TrainingRecipe,
    "evaluation": EvaluationRecipe,
}
"""The sections of a recipe that are tables of values; loss and optimizer are classes instead."""


def known_keys() -> list[str]:
    """Lists every key that a recipe may hold, sections included."""
    keys = [f"{name}{key}" for name in ("loss", "optimizer") for key in ("", ".class_path", ".init_args")]
    for name, kind in SECTIONS.items():
        keys += [name, *(f"{name}.{key.name}" for key in fields(kind))]
    return keys


def describe_keys() -> str:
    """Gives every key with what it means, for people."""
    lines = ["keys of a recipe:"]
    for name, kind in SECTIONS.items():
        meanings = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", kind.__doc__ or "", flags=re.MULTILINE)
        for key, meaning in meanings:
            plain = " ".join(meaning.split()).replace("``", "").replace("None", "null")
            lines += textwrap.wrap(f"--{name}.{key}  {plain}", 110, initial_indent="  ", subsequent_indent="      ")
    return "\n".join([*lines, "  --loss, --optimizer  a class_path and its init_args, as in configs/*.yaml"])


def _refuse_below(section: str, values: Any, lowest: Mapping[str, float]) -> None:
    for name, least in lowest.items():
        value = getattr(values, name)
        if value is not None and value < least:
            raise MedmomError(f"{section}.{name} {value}: give {least} or more.")
