from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from medmom import optim
from medmom.data.augment import monai_transforms
from medmom.errors import MedmomError
from medmom.network import build_network, job_of
from medmom.recipe import SECTIONS, describe_keys, known_keys
from medmom.recipe_file import RecipeFile, recipe_path, shipped_recipes
from medmom.tasks.class_losses import ClassificationLoss
from medmom.tasks.losses import DiceCrossEntropy

SHIPPED = sorted(shipped_recipes())
CLASSIFYING = ("abdomen_pelvis", "modality", "organ_slices")
TORCH_OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
# One rule takes sparse gradients alone.
DENSE_OPTIMIZERS = [name for name in TORCH_OPTIMIZERS if name != "SparseAdam"]


def changed(tmp_path: Path, *, section: str, key: str | None = None, value: object = None) -> Path:
    """Writes the demo recipe with one change."""
    content = yaml.safe_load(recipe_path("demo").read_text())
    if key is None:
        content[section] = value
    else:
        content[section][key] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fault(path: Path, *overrides: str) -> str:
    """Gives the one line that a recipe is refused with."""
    with pytest.raises(MedmomError) as caught:
        RecipeFile(path, overrides).build()
    text = str(caught.value)
    assert "\n" not in text
    assert "<class" not in text
    assert len(text) < 500
    return text


def demo_fault(*overrides: str) -> str:
    return fault(recipe_path("demo"), *overrides)


def test_the_six_recipes_are_shipped() -> None:
    volumes = ["colon", "ct_organs", "demo", "hippocampus", "liver", "lung"]
    slices = ["liver_slices", "lung_slices", "polyps", "polyps_paper"]
    assert sorted(SHIPPED) == sorted([*volumes, *slices, *CLASSIFYING])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_read_and_its_objects_are_built(name: str) -> None:
    recipe = RecipeFile(recipe_path(name)).build()
    assert isinstance(recipe.loss, ClassificationLoss if name in CLASSIFYING else DiceCrossEntropy)
    assert {section: type(getattr(recipe, section)) for section in SECTIONS} == SECTIONS
    assert isinstance(recipe.optimizer([nn.Parameter(torch.zeros(1))]), torch.optim.Optimizer)
    shape = (3, *recipe.data.patch)
    listed = monai_transforms(recipe.data.transforms, intensity=recipe.preparation.intensity, shape=shape)
    assert len(listed) == (name == "polyps_paper")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_network_of_a_shipped_recipe_takes_its_patch(name: str) -> None:
    recipe = RecipeFile(recipe_path(name)).build()
    assert job_of(recipe) == ("classification" if name in CLASSIFYING else "segmentation")
    with torch.device("meta"):
        network = build_network(recipe, 2, 3)
        divisor = network.divisor
        assert [n % d for n, d in zip(recipe.data.patch, divisor, strict=True)] == [0] * len(divisor)
        outputs = network.train()(torch.empty(2, 2, *recipe.data.patch))
        full = outputs[0] if isinstance(outputs, list | tuple) else outputs
        assert full.shape == (2, 3, *(() if name in CLASSIFYING else recipe.data.patch))
        assert recipe.model.gate == 0.9


def test_the_small_network_fits_the_hippocampus_recipe_too() -> None:
    recipe = RecipeFile(recipe_path("hippocampus"), ["--model.preset", "mom3d_xs"]).build()
    with torch.device("meta"):
        assert sum(p.numel() for p in build_network(recipe, 1, 3).parameters()) == 640_817


@pytest.mark.parametrize(
    ("name", "patch", "spacing"),
    [
        ("liver", (128, 128, 128), (0.77, 0.77, 1.0)),
        ("lung", (160, 192, 80), (0.79, 0.79, 1.24)),
        ("colon", (160, 192, 56), (0.78, 0.78, 3.0)),
    ],
)
def test_a_plan_is_that_of_preset_m(
    name: str, patch: tuple[int, ...], spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RecipeFile(recipe_path(name)).build()
    assert (recipe.data.patch, recipe.preparation.spacing) == (patch, spacing)
    assert (recipe.data.batch_size, recipe.model.preset) == (2, "mom3d_m")
    assert (recipe.training.epochs, recipe.training.steps_per_epoch) == (1000, 250)
    (group,) = recipe.optimizer([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.01, 0.99, True, 3e-5)
    with torch.device("meta"):
        arguments = build_network(recipe, 1, 2).arguments
    twos, full = [2, 2, 2], [3, 3, 3]
    kernels = {"colon": [[3, 3, 1], full, full, full, full, full]}.get(name, [full] * 6)
    strides = {
        "liver": [[1, 1, 1], twos, twos, twos, twos, twos],
        "lung": [[1, 1, 1], twos, twos, twos, twos, [2, 2, 1]],
        "colon": [[1, 1, 1], [2, 2, 1], twos, twos, twos, [2, 2, 1]],
    }[name]
    assert [list(each) for each in arguments["kernels"]] == kernels
    assert [list(each) for each in arguments["strides"]] == strides


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_at_most_forty_lines(name: str) -> None:
    assert len(recipe_path(name).read_text().splitlines()) <= 40


def test_sides_are_not_mirrored_where_classes_have_them() -> None:
    assert RecipeFile(recipe_path("ct_organs")).build().data.mirror == []
    assert RecipeFile(recipe_path("demo")).build().data.mirror == []
    assert RecipeFile(recipe_path("hippocampus")).build().data.group == "subject_pair"
    assert RecipeFile(recipe_path("hippocampus")).build().evaluation.nsd_tolerance == 1.0


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_recipe_writes_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = RecipeFile(recipe_path(name))
    transforms = [{"class": "RandBiasFieldd", "keys": ["image"], "prob": 0.1}]
    for key, value in {
        "data.folder": "a folder/ü",
        "data.transforms": transforms,
        "preparation.clip": (-160.123456789, 1 / 3),
        "preparation.mean": 1e-7,
        "preparation.std": 3.0,
        "training.max_minutes": 12.5,
    }.items():
        recipe.set(key, value)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.text(), encoding="utf-8")
    again = RecipeFile(path)
    assert again.text() == recipe.text()
    assert again.as_dict() == recipe.as_dict() == yaml.safe_load(path.read_text(encoding="utf-8"))
    first, second = recipe.build(), again.build()
    assert [getattr(first, each) for each in SECTIONS] == [getattr(second, each) for each in SECTIONS]
    assert second.preparation.clip == (-160.123456789, 1 / 3)
    assert second.data.transforms == transforms


def test_what_a_recipe_writes_names_every_key() -> None:
    written = RecipeFile(recipe_path("demo")).as_dict()
    keys = [*written, *(f"{section}.{key}" for section, table in written.items() for key in table)]
    assert sorted(keys) == sorted(known_keys())


def test_the_network_is_plain_and_fixed_unless_said() -> None:
    model = RecipeFile(recipe_path("liver")).build().model
    assert (model.gating, model.velocity, model.block) == ("fixed", "zero", "postact")
    # Left to the preset, and written as such.
    assert (model.memory, model.memory_limit) == (None, None)
    assert RecipeFile(recipe_path("liver")).as_dict()["model"]["memory"] is None


def test_the_command_line_wins_over_the_file() -> None:
    overrides = ["--training.epochs", "3", "--data.patch=[16, 16, 32]", "--preparation.clip", "[-100, 200]"]
    overrides += ["--optimizer.lr", "0.5", "--loss.dice_weight", "2", "--data.folder", "scans", "--data.augment=false"]
    recipe = RecipeFile(recipe_path("demo"), overrides).build()
    assert recipe.training.epochs == 3
    assert recipe.data.patch == (16, 16, 32)
    assert recipe.preparation.clip == (-100, 200)
    assert recipe.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    assert recipe.loss.dice_weight == 2
    assert recipe.data.folder == Path("scans")
    assert recipe.data.augment is False
    assert recipe.training.steps_per_epoch == 100


@pytest.mark.parametrize("key", sorted(set(known_keys()) - set(SECTIONS) - {"loss", "optimizer"}))
def test_every_key_is_explained(key: str) -> None:
    if not key.startswith(("loss", "optimizer")):
        assert re.search(rf"--{key}  \S+", describe_keys())


def test_an_unknown_key_of_the_file_names_the_nearest(tmp_path: Path) -> None:
    path = changed(tmp_path, section="training", key="epoks", value=3)
    assert fault(path) == f"{path}: unknown key training.epoks; did you mean training.epochs?"


def test_an_unknown_section_names_the_nearest(tmp_path: Path) -> None:
    path = changed(tmp_path, section="prepartion", value={"spacing": [1, 1, 1]})
    assert fault(path) == f"{path}: unknown key prepartion; did you mean preparation?"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--training.epoch", "training.epochs"),  # argparse alone would take the abbreviation
        ("--training.epochs.x", "training.epochs"),
        ("--data.spacing", "preparation.spacing"),  # the same word in another section
        ("--epochs", "training.epochs"),
        ("--data.bach_size", "data.batch_size"),
        ("--modle.preset", "model.preset"),
    ],
)
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
def test_an_unknown_key_of_the_command_line_names_the_nearest(given: str, meant: str, form: str) -> None:
    assert demo_fault(*form.format(given).split()).endswith(
        f"demo.yaml: unknown key {given[2:]}; did you mean {meant}?"
    )


def test_a_key_like_no_other_names_the_sections() -> None:
    sections = "data, evaluation, loss, model, optimizer, preparation, training"
    assert demo_fault("--zzz", "3").endswith(f"unknown key zzz; sections are {sections}.")


def test_a_word_too_many_is_refused() -> None:
    assert "unrecognized arguments: word" in demo_fault("word")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.epochs", "many", "Expected a whole number. Got value: many"),
        ("training.epochs", "2.5", "Expected a whole number. Got value: 2.5"),
        ("training.max_minutes", "long", "Expected a number or null. Got value: long"),
        ("data.patch", "[1, two]", "Expected a whole number"),
        ("data.patch", "48", "Expected a list. Got value: 48"),
        ("data.mirror", "[3]", r"Expected one of [0, 1, 2]. Got value: 3"),
        ("data.augment", "perhaps", "data.augment"),
        ("model.coupling", "emma", "Expected one of ['normalised', 'ema']. Got value: emma"),
        ("model.gating", "layer", "Expected one of ['fixed', 'block', 'channel']. Got value: layer"),
        ("model.memory", "little", "'hybrid', 'exact', 'auto'] or null. Got value: little"),
        ("model.memory_limit", "much", "Expected a number or null. Got value: much"),
        ("training.schedule", "linear", "Expected one of ['polynomial', 'cosine', 'warmup_stable_decay', 'constant']"),
        ("training.precision", "fp8", "training.precision"),
        ("preparation.intensity", "us", "Expected one of ['ct', 'zscore', 'unit']"),
        ("loss.dice_weight", "two", 'key "dice_weight": Expected a number. Got value: two'),
    ],
)
def test_a_value_of_another_type_is_refused_with_key_and_value(key: str, value: str, message: str) -> None:
    text = demo_fault(f"--{key}", value)
    assert message in text
    assert "demo.yaml: key" in text
    assert key.rpartition(".")[2] in text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.patch", "[0, 8, 8]", "data.patch [0, 8, 8]"),
        ("data.batch_size", "0", "data.batch_size 0: give 1 or more"),
        ("data.workers", "-1", "data.workers -1: give 0 or more"),
        ("model.gate", "1.5", "model.gate 1.5: give a number from 0 to 1"),
        ("model.memory_limit", "0", "model.memory_limit 0.0: give a number above 0, or null"),
        ("training.epochs", "0", "training.epochs 0: give 1 or more"),
        ("training.accumulate", "0", "training.accumulate 0: give 1 or more"),
        ("training.seed", "-1", "training.seed -1: give 0 or more"),
        ("training.max_minutes", "0", "training.max_minutes 0.0: give a number above 0"),
        ("training.gradient_clip", "-1", "training.gradient_clip -1.0: give a number above 0"),
        ("training.layer_decay", "0", "training.layer_decay 0.0: give a number above 0 and at most 1"),
        ("training.layer_decay", "1.1", "training.layer_decay 1.1: give a number above 0 and at most 1"),
        ("evaluation.nsd_tolerance", "-2", "evaluation.nsd_tolerance -2.0: give 0 or more"),
        ("preparation.spacing", "[0, 1, 1]", "each above 0"),
        ("preparation.clip", "[200, -100]", "lower bound first"),
        ("optimizer.lr", "-0.1", "lr is -0.1"),
    ],
)
def test_a_number_out_of_range_is_refused(key: str, value: str, message: str) -> None:
    assert message in demo_fault(f"--{key}", value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("loss.dice_wieght", "dice_weight"),
        ("loss.init_args.batch_dce", "batch_dice"),
        ("optimizer.momentun", "momentum"),
        ("optimizer.init_args.nestrov", "nesterov"),
    ],
)
def test_a_wrong_argument_of_a_class_names_the_nearest(wrong: str, right: str, tmp_path: Path) -> None:
    assert demo_fault(f"--{wrong}", "1").endswith(f"is not accepted. Did you mean {right}?")
    section, word = wrong.split(".", maxsplit=1)[0], wrong.rpartition(".")[2]
    kind = {"loss": "medmom.tasks.losses.DiceCrossEntropy", "optimizer": "medmom.optim.HeavyBall"}[section]
    path = changed(tmp_path, section=section, value={"class_path": kind, "init_args": {word: 1}})
    text = fault(path)
    assert text.startswith(f'{path}: key "{section}"')
    assert text.endswith(f"is not accepted. Did you mean {right}?")


def test_an_argument_like_no_other_lists_those_there_are() -> None:
    assert re.search(r"It takes .*dice_weight, .*batch_dice.*smooth", demo_fault("--loss.xyzzy", "1"))


def test_a_wrong_word_beside_class_path_names_it(tmp_path: Path) -> None:
    path = changed(tmp_path, section="optimizer", value={"clas_path": "torch.optim.AdamW"})
    assert fault(path).endswith("unknown key optimizer.clas_path; did you mean optimizer.class_path?")


@pytest.mark.parametrize(
    ("given", "meant"), [("torch.optim.AdamV", "torch.optim.Adam"), ("medmom.optim.HevyBall", "medmom.optim.HeavyBall")]
)
def test_a_class_that_is_not_there_names_the_nearest(given: str, meant: str) -> None:
    assert demo_fault("--optimizer", given).endswith(f"Did you mean {meant}?")


def test_a_class_of_no_known_name_asks_for_its_whole_path() -> None:
    assert "no such class: Adamski; write its whole path" in demo_fault("--optimizer", "Adamski")


@pytest.mark.parametrize("given", ["os.system", "torch.nn.Linear", "builtins.eval"])
def test_what_is_no_optimizer_is_refused_as_one(given: str) -> None:
    assert "Optimizer" in demo_fault("--optimizer", given)


def test_a_section_left_out_that_has_no_default_is_asked_for(tmp_path: Path) -> None:
    assert "required: optimizer" in fault(changed(tmp_path, section="optimizer", value=None))


def test_a_section_whose_keys_are_commented_out_has_its_defaults(tmp_path: Path) -> None:
    assert RecipeFile(changed(tmp_path, section="model", value=None)).build().model.preset == "mom3d_s"


def test_a_section_that_is_no_table_is_refused(tmp_path: Path) -> None:
    assert "model: 'mom3d_xs'; write a table of keys" in fault(changed(tmp_path, section="model", value="mom3d_xs"))


@pytest.mark.parametrize("text", ["", "hello\n", "- a\n- b\n", "3\n"])
def test_a_file_without_sections_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert fault(path).startswith(f"{path}: a recipe is a table of sections")


@pytest.mark.parametrize("content", [b"data: [1,\nmodel: }\n", b"\xff\xfe\x00\x81", b"a: !!python/name:os.system\n"])
def test_a_file_that_is_no_plain_yaml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert fault(path).startswith(f"{path}: not a readable YAML file (")


def test_a_missing_recipe_names_the_nearest_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"hipocampus: no recipe .* did you mean hippocampus\? Shipped.*colon"):
        recipe_path("hipocampus")
    with pytest.raises(MedmomError, match=r"mine\.yaml: no recipe of that name and no such file; Shipped recipes"):
        recipe_path(tmp_path / "mine.yaml")
    with pytest.raises(MedmomError, match="no recipe of that name"):
        recipe_path(tmp_path)


def test_a_file_goes_before_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "liver").write_text("")
    assert recipe_path("liver") == Path("liver")


@pytest.mark.parametrize("name", DENSE_OPTIMIZERS)
def test_any_optimizer_of_torch_works(name: str, tmp_path: Path) -> None:
    value = {"class_path": f"torch.optim.{name}", "init_args": {"lr": 0.125}}
    recipe = RecipeFile(changed(tmp_path, section="optimizer", value=value)).build()
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = recipe.optimizer([weight])
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.125

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(weight, torch.ones(2, 2))


RULES = sorted(
    name
    for name in optim.__all__
    if inspect.isclass(kind := getattr(optim, name)) and issubclass(kind, torch.optim.Optimizer)
)


@pytest.mark.parametrize("name", RULES)
def test_any_optimizer_of_ours_works_by_its_name(name: str, tmp_path: Path) -> None:
    path = changed(
        tmp_path, section="optimizer", value={"class_path": f"medmom.optim.{name}", "init_args": {"lr": 0.5}}
    )
    recipe = RecipeFile(path)
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = recipe.build().optimizer([weight])
    assert type(optimizer) is getattr(optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.5

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert not torch.equal(weight, torch.ones(2, 2))
    # Every argument it has is written, and read again.
    (tmp_path / "again.yaml").write_text(recipe.text())
    again = RecipeFile(tmp_path / "again.yaml")
    assert again.text() == recipe.text()
    assert type(again.build().optimizer([weight])) is type(optimizer)


@pytest.mark.parametrize("name", RULES)
def test_any_optimizer_of_ours_is_taken_from_the_command_line(name: str) -> None:
    recipe = RecipeFile(recipe_path("demo"), ["--optimizer", f"medmom.optim.{name}"]).build()
    assert type(recipe.optimizer([nn.Parameter(torch.zeros(1))])) is getattr(optim, name)


class LongPlan(torch.optim.SGD):
    """A rule that must know how long it trains."""

    def __init__(self, params: object, total_steps: int, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)  # type: ignore[arg-type]
        self.total_steps = total_steps


def long_plan(path: Path, *overrides: str, **arguments: object) -> RecipeFile:
    """Reads a recipe of 20 epochs of 100 steps with such a rule."""
    kind = f"{LongPlan.__module__}.LongPlan"
    return RecipeFile(changed(path, section="optimizer", value={"class_path": kind, "init_args": arguments}), overrides)


def total_steps(recipe: RecipeFile) -> int:
    optimizer = recipe.build().optimizer([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, LongPlan)
    return optimizer.total_steps


def test_a_rule_that_asks_for_the_steps_of_the_training_is_told_them(tmp_path: Path) -> None:
    recipe = long_plan(tmp_path, lr=0.5)
    assert total_steps(recipe) == 2000
    assert recipe.build().optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    recipe.set("training.epochs", 3)
    assert total_steps(recipe) == 300
    assert total_steps(long_plan(tmp_path, "--training.steps_per_epoch=7")) == 140
    kind = f"--optimizer={LongPlan.__module__}.LongPlan"
    assert total_steps(RecipeFile(recipe_path("demo"), [kind, "--optimizer.init_args.lr=0.3"])) == 2000


def test_the_steps_it_was_told_are_not_written_into_the_recipe(tmp_path: Path) -> None:
    recipe = long_plan(tmp_path)
    for _ in range(2):
        assert "total_steps" not in recipe.as_dict()["optimizer"]["init_args"]
        total_steps(recipe)
    copied = tmp_path / "copied.yaml"
    copied.write_text(recipe.text())
    assert RecipeFile(copied).text() == recipe.text()
    assert total_steps(RecipeFile(copied, ["--training.epochs", "1"])) == 100


@pytest.mark.parametrize("form", ["--optimizer.total_steps", "--optimizer.init_args.total_steps"])
def test_steps_that_the_recipe_gives_stand(form: str, tmp_path: Path) -> None:
    for recipe in (
        long_plan(tmp_path, total_steps=7),
        long_plan(tmp_path, form, "7"),
        long_plan(tmp_path, f"{form}=7"),
    ):
        assert total_steps(recipe) == 7
        assert recipe.as_dict()["optimizer"]["init_args"]["total_steps"] == 7


def test_steps_that_are_no_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"total_steps.*Expected a whole number. Got value: many"):
        long_plan(tmp_path, total_steps="many")


def test_an_optimizer_serves_several_networks() -> None:
    recipe = RecipeFile(recipe_path("demo")).build()
    first, second = (recipe.optimizer([nn.Parameter(torch.zeros(1))]) for _ in range(2))
    assert first is not second
    assert first.state_dict()["state"] == {}


def test_another_optimizer_starts_from_its_own_defaults() -> None:
    given = RecipeFile(recipe_path("hippocampus"), ["--optimizer", "torch.optim.AdamW"])
    optimizer = given.build().optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 1e-3
    kept = RecipeFile(recipe_path("hippocampus"), ["--optimizer.init_args.lr", "0.5"]).build()
    assert kept.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
