from __future__ import annotations

import difflib
import inspect
import itertools
import pydoc
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from torch.optim import Optimizer

from medmom.data.preparation import Preparation
from medmom.errors import MedmomError

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class DataRecipe:
    """Which scans, and how they become batches.

    Attributes:
        folder: Labelled scans: MSD decathlon, nnU-Net raw, images/ + labels/, or a CSV file.
        group: Column of cases.csv that names the patient; cases of one patient stay in one fold.
        fold: Number of the fold to validate on, from 0.
        folds: Number of folds.
        cache: Folder for prepared cases.
        patch: Voxels of a training patch, in right-anterior-superior axis order.
        batch_size: Patches in a batch of one process.
        workers: Processes that make patches; null: none on the CPU, one a core less one on a GPU.
        augment: Whether patches are changed at random, as nnU-Net does.
        mirror: Axes that may be flipped at random; leave 0 (left-right) out where classes have sides.
        transforms: Further MONAI dictionary transforms of a patch: {"class": RandBiasFieldd, "keys": [image], ...}.
    """

    folder: Path | None = None
    group: str | None = None
    fold: int = 0
    folds: int = 5
    cache: Path = Path("runs/cache")
    patch: tuple[int, int, int] = (128, 128, 128)
    batch_size: int = 2
    workers: int | None = None
    augment: bool = True
    mirror: list[Literal[0, 1, 2]] = field(default_factory=lambda: [0, 1, 2])
    transforms: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuses sizes that make no batch."""
        _refuse_below("data", self, {"batch_size": 1, "workers": 0})
        if min(self.patch) < 1:
            raise MedmomError(f"data.patch {list(self.patch)}: give three edges in voxels, each 1 or more.")


@dataclass(frozen=True)
class ModelRecipe:
    """Which momentum network.

    Attributes:
        preset: Name of a network in medmom.models, such as mom3d_s; mom3d_xs is made for the CPU.
        gate: Momentum g of v' = g v + c f(x), from 0 (a plain residual network) to 1.
        coupling: Factor c: "normalised" keeps the scale of a plain residual network for every gate; "ema" is 1 - g.
        deep_supervision: Whether lower resolutions of the decoder learn too.
    """

    preset: str = "mom3d_s"
    gate: float = 0.9
    coupling: Literal["normalised", "ema"] = "normalised"
    deep_supervision: bool = True

    def __post_init__(self) -> None:
        """Refuses a momentum that grows without end."""
        if not 0 <= self.gate <= 1:
            raise MedmomError(f"model.gate {self.gate}: give a number from 0 to 1.")


@dataclass(frozen=True)
class TrainingRecipe:
    """How long, how exactly and with which seed.

    Attributes:
        epochs: Number of epochs.
        steps_per_epoch: Optimizer steps in an epoch.
        max_minutes: Wall-clock time for everything; some steps are measured, and epochs and steps_per_epoch are
            set so that the schedule ends in time. null: train for all epochs.
        validate_every: Epochs between validations.
        picture_every: Validations between pictures of a validation case.
        keep: Weights of the model package: "last" owes nothing to the validation fold; "best" scored highest on it.
        schedule: Course of the learning rate.
        warmup_steps: Steps over which the learning rate rises from 0.
        accumulate: Batches that make one optimizer step.
        gradient_clip: Largest norm of the gradient; null: any.
        precision: Lightning's name; null: bf16-mixed on a GPU that has it, else 32-true.
        seed: Seed of weights, patches and augmentation.
    """

    epochs: int = 1000
    steps_per_epoch: int = 250
    max_minutes: float | None = None
    validate_every: int = 1
    picture_every: int = 5
    keep: Literal["last", "best"] = "last"
    schedule: Literal["polynomial", "cosine", "constant"] = "polynomial"
    warmup_steps: int = 0
    accumulate: int = 1
    gradient_clip: float | None = 12.0
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers of which no training is made."""
        counts = dict.fromkeys(("epochs", "steps_per_epoch", "validate_every", "picture_every", "accumulate"), 1)
        _refuse_below("training", self, {**counts, "warmup_steps": 0, "seed": 0})
        if self.seed >= 2**32:
            raise MedmomError(f"training.seed {self.seed}: give a number below 2^32.")
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

PLAIN_WORDS = (
    (r"Type collections.*?callable class: ", ""),
    (r"Parser key", "key"),
    (r"Does not validate against any of the Union subtypes.*?Errors: - ", ""),
    (r" - Expected a <class 'NoneType'>", " or null"),
    (r" Given value type: .*? Given value: ", ". Got value: "),
    (r"a <class 'int'>", "a whole number"),
    (r"a <class 'float'>", "a number"),
    (r"a <class 'tuple'>", "a list"),
    (r"<class '([\w.]+)'>", r"\1"),
    (r"a typing\.Literal(\[.*?\])", r"one of \1"),
    (r"Expected a dot import path string: (\w+)", r"no such class: \1; write its whole path, as torch.optim.AdamW"),
    (r"\.\. Got", ". Got"),
)
"""What jsonargparse says, in plain words: patterns and what stands for them."""


def recipe_parser() -> ArgumentParser:
    """Gives the parser of recipes: every attribute of ``Recipe`` is an option of its own."""
    parser = ArgumentParser(prog="medmom train", exit_on_error=False, add_help=False)
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    parser.add_argument("--loss", type=nn.Module, required=True, help="Class of the loss and its arguments.")
    parser.add_argument(
        "--optimizer",
        type=Callable[[Iterable[nn.Parameter]], Optimizer],
        required=True,
        help="Class of the optimizer and its arguments: medmom.optim's or torch.optim's.",
    )
    return parser


def shipped_recipes() -> dict[str, Path]:
    """Gives the recipes that come with medmom, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def recipe_path(name: str | Path) -> Path:
    """Finds a recipe by its path or, for a shipped one, by its name.

    Raises:
        MedmomError: There is neither such a file nor such a name.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    close = difflib.get_close_matches(str(name), shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise MedmomError(f"{name}: no recipe of that name and no such file; {hint}Shipped recipes: {', '.join(shipped)}.")


class RecipeFile:
    """A recipe as it was written, with what the command line changed: reads, changes, writes, and builds it.

    Args:
        path: A YAML file.
        overrides: ``--section.key value`` pairs, as on the command line.

    Raises:
        MedmomError: The file is no YAML, a key is not known (the nearest right one is named), or a value does not
            fit its type.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.path = path
        self._parser = recipe_parser()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise MedmomError(f"{path}: not a readable YAML file ({reason}); mend it or name another recipe.") from None
        if not isinstance(content, dict):
            raise MedmomError(
                f"{path}: a recipe is a table of sections; this file holds none. See configs/ for examples."
            )
        self._refuse_unknown(content, overrides)
        # Another class starts from its own defaults: the learning rate of one rule is not that of another.
        content |= {key: {"class_path": name} for key, name in _new_classes(overrides).items()}
        self._refuse_other_classes(content)
        # A section all of whose keys are commented out says nothing.
        content = {key: {} if value is None and key in SECTIONS else value for key, value in content.items()}
        try:
            self._values = self._parser.parse_args(list(overrides), namespace=self._parser.parse_object(content))
        except Exception as error:  # jsonargparse raises several kinds, each about what the user wrote
            raise MedmomError(f"{path}: {_one_line(error)}") from None

    def set(self, key: str, value: Any) -> None:
        """Changes one value, such as ``set("training.epochs", 20)``."""
        self._values[key] = value

    def get(self, key: str) -> Any:
        """Gives one value as it is written, such as ``get("data.folder")``."""
        return self._values[key]

    def text(self) -> str:
        """Gives the whole recipe as YAML, every default written out."""
        return str(self._parser.dump(self._values, skip_unset=False))

    def as_dict(self) -> dict[str, Any]:
        """Gives the whole recipe as plain types."""
        return dict(yaml.safe_load(self.text()))

    def build(self) -> Recipe:
        """Makes the objects that the recipe names.

        Raises:
            MedmomError: A value is refused by what it is given to.
        """
        try:
            objects = self._parser.instantiate(self._values)
            sections = {name: _section(objects, name, kind) for name, kind in SECTIONS.items()}
            # An optimizer refuses its arguments when it is made: once here, before any case is prepared.
            objects.optimizer([nn.Parameter(torch.zeros(1, 1))])
            return Recipe(loss=objects.loss, optimizer=objects.optimizer, **sections)
        except (ValueError, TypeError) as error:
            raise MedmomError(f"{self.path}: {_one_line(error)}") from None

    def _refuse_other_classes(self, content: dict[str, Any]) -> None:
        """Only a loss is called as one, and only an optimizer: no other function of any module."""
        for key, base in (("loss", nn.Module), ("optimizer", Optimizer)):
            name = content[key].get("class_path") if isinstance(content.get(key), dict) else None
            kind = pydoc.locate(name) if isinstance(name, str) else None
            if kind is not None and not (isinstance(kind, type) and issubclass(kind, base)):
                raise MedmomError(f"{self.path}: {key}: {name} is no {base.__name__}; name a subclass of it.")

    def _refuse_unknown(self, content: dict[str, Any], overrides: Sequence[str]) -> None:
        known = known_keys()
        # The command line may leave out init_args, a file may not.
        given = [part[2:].split("=")[0] for part in overrides if part.startswith("--")]
        written = [*_keys(content), *(key for key in given if not key.startswith(("loss.", "optimizer.")))]
        for key in written:
            if key not in known:
                raise MedmomError(f"{self.path}: unknown key {key}; {_nearest_key(key, known)}")
        for key in content.keys() & SECTIONS.keys():
            if not isinstance(content[key], dict | None):
                raise MedmomError(f"{self.path}: {key}: {content[key]!r}; write a table of keys, as in configs/*.yaml.")


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


def _nearest_key(key: str, known: Sequence[str]) -> str:
    same_word = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
    close = same_word or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"sections are {', '.join(sorted(each for each in known if '.' not in each))}."


def _refuse_below(section: str, values: Any, lowest: Mapping[str, float]) -> None:
    for name, least in lowest.items():
        value = getattr(values, name)
        if value is not None and value < least:
            raise MedmomError(f"{section}.{name} {value}: give {least} or more.")


def _section(objects: Namespace, name: str, kind: type) -> Any:
    value = objects[name]
    return value if isinstance(value, kind) else kind(**vars(value))


def _new_classes(overrides: Sequence[str]) -> dict[str, str]:
    """Classes that the command line names for the loss or the optimizer."""
    classes = {}
    for part, following in itertools.zip_longest(overrides, overrides[1:], fillvalue=""):
        option, _, value = part.partition("=")
        value = value or following
        if option in ("--loss", "--optimizer") and re.fullmatch(r"[\w.]+", value):
            classes[option[2:]] = value
    return classes


def _keys(content: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in content.items():
        if isinstance(value, dict) and not prefix:
            keys += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
        else:
            keys.append(f"{prefix}{key}")
    return keys


def _one_line(error: Exception) -> str:
    """Says what jsonargparse found, without its types, and names the nearest argument of the class meant."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    for pattern, plain in PLAIN_WORDS:
        text = re.sub(pattern, plain, text)
    wrong = re.search(r"Option '(\w+)' is not accepted", text)
    owner = re.search(r"class_path[=\s]+'([\w.]+)'", text)
    if wrong and owner:
        kind: Any = pydoc.locate(owner[1])
        arguments = inspect.signature(kind).parameters
        close = difflib.get_close_matches(wrong[1], arguments, n=1, cutoff=0.4)
        text = re.sub(r" Got value: Namespace.*", "", text).rstrip(".")
        text += f". Did you mean {close[0]}?" if close else f". It takes {', '.join(arguments)}."
    missing = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text)
    if missing:
        room: Any = pydoc.locate(missing[1])
        close = difflib.get_close_matches(missing[2], dir(room), n=1)
        text += f". Did you mean {missing[1]}.{close[0]}?" if close else ""
    return text if len(text) <= 400 else f"{text[:400]} ..."
