from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_novelty import tiny_classifier
from tiny import save_image, save_tiny

from medmom.classes import Classes
from medmom.data.class_layouts import find_class_cases
from medmom.data.class_module import ClassDataModule
from medmom.data.class_survey import summarise
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference import class_predict as room
from medmom.inference import class_predictor
from medmom.inference.appearance import appearance
from medmom.inference.class_predict import ClassPredictor, predict_classes
from medmom.inference.explain import SOFTWARE
from medmom.inference.novelty import fit_novelty
from medmom.models import MomentumResNet, SliceClassifier
from medmom.package import load_package, save_package

CLASSES = Classes(("heart", "liver", "spleen"))
UNIT = Preparation(None, "unit", colour="grey")
MRI = Preparation((1.0, 1.0, 1.0), "zscore")


def save_classifier(folder: Path, network: Any = None, **changes: Any) -> Path:
    options: dict[str, Any] = {"classes": CLASSES, "preparation": UNIT, "patch": (16, 16), "channels": ("grey",)}
    save_package(folder, network or tiny_classifier(), recipe={}, **{**options, "temperature": 0.5, **changes})
    return folder


def save_picture(path: Path, *, seed: int = 0, size: Sequence[int] = (20, 18), mode: str = "L") -> Path:
    shape = (*size, 3) if mode == "RGB" else tuple(size)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def slice_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_classifier(kind=SliceClassifier, pooling="mean")
    return save_classifier(tmp_path_factory.mktemp("run") / "model", network, preparation=MRI, slices=4)


@pytest.fixture(scope="module")
def volume_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MomentumResNet(
            1, 3, channels=(4, 6), blocks=(1, 2), kernels=[[3] * 3] * 2, strides=[[1] * 3, [2] * 3]
        ).eval()
    return save_classifier(tmp_path_factory.mktemp("run") / "model", network, preparation=MRI, patch=(16, 16, 8))


# What is predicted


def test_probabilities_are_those_of_the_network_at_the_temperature(model: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "a.png", size=(16, 16))
    (outcome,) = predict_classes(model, [picture], tmp_path / "classes.csv", quiet=True)
    image = torch.from_numpy(np.asarray(Image.open(picture), np.float32).T[None, None] / 255)
    with torch.inference_mode():
        logits = tiny_classifier()(image)[0]
    torch.testing.assert_close(torch.tensor(outcome.logits), logits)
    wanted = (logits / 0.5).softmax(0)
    torch.testing.assert_close(torch.tensor(outcome.probabilities), wanted)
    (row,) = rows(tmp_path / "classes.csv")
    assert list(row) == ["case", "image", "class", "probability", "flag", "p_heart", "p_liver", "p_spleen"]
    assert (row["case"], row["image"], row["flag"]) == ("a", str(picture), "")
    assert row["class"] == CLASSES.names[int(wanted.argmax())] == outcome.classes[0]
    assert row["probability"] == f"{wanted.max():.6f}"
    assert [row[f"p_{name}"] for name in CLASSES.names] == [f"{value:.6f}" for value in wanted]


def fed(
    folder: Path, preparation: Preparation, patch: Sequence[int], slices: int | None, cache: Path
) -> dict[str, Any]:
    """What validation feeds the network, by case."""
    found = find_class_cases(folder)
    data = ClassDataModule(
        found.cases,
        found.cases,
        classes=found.classes,
        preparation=preparation,
        cache=cache,
        patch=patch,
        batch_size=1,
        steps_per_epoch=1,
        transforms=[],
        seed=0,
        workers=0,
        slices=slices,
    )
    return {batch["case"][0]: batch["image"][0].numpy() for batch in data.val_dataloader()}


@pytest.mark.parametrize("size", [(16, 16), (31, 12), (7, 40), (2, 3)])
@pytest.mark.parametrize("preparation", [UNIT, replace(UNIT, size=(16, 16), intensity="zscore", colour="rgb")])
def test_pictures_are_fed_as_in_validation(size: Sequence[int], preparation: Preparation, tmp_path: Path) -> None:
    channels = ("R", "G", "B") if preparation.colour == "rgb" else ("grey",)
    network = tiny_classifier(in_channels=len(channels))
    model = save_classifier(tmp_path / "model", network, preparation=preparation, channels=channels)
    for k, mode in enumerate(("L", "RGB")):
        save_picture(tmp_path / "in" / mode / f"{mode}.png", seed=k, size=size, mode=mode)
    wanted = fed(tmp_path / "in", preparation, (16, 16), None, tmp_path / "cache")
    predictor = ClassPredictor(model, device="cpu")
    for case in room.find_class_inputs([tmp_path / "in"], len(channels)):
        np.testing.assert_array_equal(predictor.read(case).image, wanted[case.name])


@pytest.mark.parametrize("depth", [1, 3, 4, 23])
def test_volumes_are_fed_as_in_validation(depth: int, slice_model: Path, volume_model: Path, tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / "in" / name / f"{name}.nii.gz", (13, 21, depth), affine=np.diag([-1.0, 2, 1, 1]))
    for model, slices, patch in ((slice_model, 4, (16, 16)), (volume_model, None, (16, 16, 8))):
        wanted = fed(tmp_path / "in", MRI, patch, slices, tmp_path / "cache")
        predictor = ClassPredictor(model, device="cpu")
        for case in room.find_class_inputs([tmp_path / "in"], 1):
            found = predictor.read(case)
            np.testing.assert_array_equal(found.image, wanted[case.name])
            assert found.image.shape == ((1, 16, 16, min(4, depth)) if slices else (1, 16, 16, 8))


def test_slices_have_a_table_of_their_own(slice_model: Path, tmp_path: Path) -> None:
    for k, depth in enumerate((3, 12)):
        save_image(tmp_path / "in" / f"{k}.nii.gz", (16, 16, depth), affine=np.eye(4), seed=k)
    outcomes = predict_classes(slice_model, [tmp_path / "in"], tmp_path / "out" / "classes.csv", quiet=True)
    found = rows(tmp_path / "out" / "slices.csv")
    assert list(found[0]) == ["case", "slice", "p_heart", "p_liver", "p_spleen"]
    assert [(row["case"], int(row["slice"])) for row in found] == [
        *(("0", k) for k in range(3)),
        *(("1", k) for k in (1, 4, 7, 10)),
    ]
    assert sum(float(found[0][f"p_{name}"]) for name in CLASSES.names) == pytest.approx(1, abs=1e-5)
    assert len(outcomes[1].slices) == 4
    # A later run on pictures of one slice each must not leave them for its own.
    predict_classes(slice_model, [tmp_path / "in" / "0.nii.gz"], tmp_path / "out" / "classes.csv", quiet=True)
    assert {row["case"] for row in rows(tmp_path / "out" / "slices.csv")} == {"0"}


def test_volume_as_a_whole_is_classified(volume_model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.nii.gz", (20, 9, 30))
    (outcome,) = predict_classes(volume_model, [image], tmp_path / "classes.csv", quiet=True)
    assert outcome.slices == ()
    assert files_below(tmp_path) == ["a.nii.gz", "classes.csv", "classes.json"]


def test_image_of_several_classes_names_those_above_one_half(tmp_path: Path) -> None:
    classes = replace(CLASSES, is_multilabel=True)
    network = tiny_classifier()
    with torch.no_grad():
        network.head.linear.weight.zero_()
        network.head.linear.bias.copy_(torch.tensor([1.0, -1.0, 2.0]))
    model = save_classifier(tmp_path / "model", network, classes=classes, temperature=2.0)
    predict_classes(model, [save_picture(tmp_path / "a.png")], tmp_path / "classes.csv", quiet=True)
    (row,) = rows(tmp_path / "classes.csv")
    assert row["class"] == "heart;spleen"
    assert row["probability"] == row["p_spleen"] == f"{1 / (1 + np.exp(-1)):.6f}"
    with torch.no_grad():
        network.head.linear.bias.fill_(-1)
    predict_classes(
        save_classifier(tmp_path / "model", network, classes=classes),
        [tmp_path / "a.png"],
        tmp_path / "classes.csv",
        quiet=True,
    )
    (row,) = rows(tmp_path / "classes.csv")
    assert (row["class"], row["probability"]) == ("", row["p_heart"])


def test_batches_change_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(7):
        save_picture(tmp_path / "in" / f"{k}.png", seed=k, size=(16, 16 + k % 2))
    many = predict_classes(model, [tmp_path / "in"], tmp_path / "many.csv", quiet=True)
    monkeypatch.setattr(room, "BATCH", 1)
    single = predict_classes(model, [tmp_path / "in"], tmp_path / "single.csv", quiet=True)
    assert [outcome.case.name for outcome in many] == [str(k) for k in range(7)]
    np.testing.assert_allclose([outcome.logits for outcome in many], [outcome.logits for outcome in single], atol=1e-6)


def test_batches_have_bounded_size(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(5):
        save_picture(tmp_path / "in" / f"{k}.png", seed=k)
    sizes = []
    look = class_predictor.look
    monkeypatch.setattr(room, "BATCH_VOXELS", 2 * 16 * 16)
    monkeypatch.setattr(
        class_predictor, "look", lambda network, batch: sizes.append(len(batch)) or look(network, batch)
    )
    predict_classes(model, [tmp_path / "in"], tmp_path / "classes.csv", quiet=True)
    assert sizes == [2, 2, 1]


def test_batch_that_is_too_large_for_memory_is_split(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(3):
        save_picture(tmp_path / "in" / f"{k}.png", seed=k)
    look = class_predictor.look

    def small(network: Any, batch: torch.Tensor) -> Any:
        if len(batch) > 1 or bool((batch > 0.999).sum() > 3):
            raise torch.OutOfMemoryError
        return look(network, batch)

    Image.fromarray(np.full((20, 18), 255, np.uint8) - np.eye(20, 18, dtype=np.uint8)).save(tmp_path / "in" / "1.png")
    monkeypatch.setattr(class_predictor, "look", small)
    outcomes = predict_classes(model, [tmp_path / "in"], tmp_path / "classes.csv", quiet=True)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "1.png: memory is too small for the 16 x 16 voxels" in (outcomes[1].error or "")


def with_novelty(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 16, 16)).astype(np.float32)
    looks = np.stack([appearance(image / 255, (0.0, 1.0)) for image in images])
    summaries = np.stack([summarise(image) for image in images])
    targets = np.eye(3)[np.arange(60) % 3]
    validation = (looks[40:], targets[40:])
    novelty = fit_novelty(looks[:40], targets[:40], summaries[:40], validation=validation, span=(0.0, 1.0))
    return save_classifier(folder, novelty=novelty)


def test_image_unlike_those_of_training_is_flagged(tmp_path: Path) -> None:
    model = with_novelty(tmp_path / "model")
    save_picture(tmp_path / "in" / "usual.png", seed=77, size=(16, 16))
    Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))).save(tmp_path / "in" / "stripes.png")
    blank = np.full((16, 16), 90, np.uint8)
    blank[3, 4] = 91
    Image.fromarray(blank).save(tmp_path / "in" / "blank.png")
    outcomes = predict_classes(model, [tmp_path / "in"], tmp_path / "classes.csv", quiet=True, explain=True)
    flags = {row["case"]: row["flag"] for row in rows(tmp_path / "classes.csv")}
    assert flags["blank"] == "blank image"
    assert flags["stripes"].startswith("unlike the training images (")
    assert flags["usual"] == ""
    assert [outcome.flag for outcome in outcomes] == [flags[outcome.case.name] for outcome in outcomes]


# What is read


def test_folder_of_folders_stands_for_all_their_images(model: Path, tmp_path: Path) -> None:
    for folder, name in (("liver", "1"), ("liver", "2"), ("heart", "3"), (".hidden", "4")):
        save_picture(tmp_path / "in" / folder / f"{name}.png", seed=int(name))
    (tmp_path / "in" / "empty").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("")
    cases = predict_classes(model, [tmp_path / "in"], tmp_path / "a.csv", quiet=True)
    assert [outcome.case.name for outcome in cases] == ["3", "1", "2"]
    save_picture(tmp_path / "in" / "heart" / "1.png")
    outcomes = predict_classes(model, [tmp_path / "in"], tmp_path / "b.csv", quiet=True)
    assert [outcome.case.name for outcome in outcomes] == ["heart-1", "heart-3", "liver-1", "liver-2"]
    assert json.loads((tmp_path / "b.json").read_text())["cases"][0]["patient"] == "heart-1"


def test_every_image_of_an_npz_file_is_classified(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, num in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(num)[:, None] % 3
    np.savez(tmp_path / "set.npz", **arrays)
    single = save_picture(tmp_path / "b.png")
    outcomes = predict_classes(model, [tmp_path / "set.npz", single], tmp_path / "classes.csv", quiet=True)
    assert [outcome.case.item for outcome in outcomes] == [None, *range(9)]
    listed = json.loads((tmp_path / "classes.json").read_text())["cases"]
    assert [case["item"] for case in listed] == [None, *range(9)]
    assert listed[0]["reference"] is None
    assert listed[2]["reference"] == ["1"]
    predictor = ClassPredictor(model, device="cpu")
    image = predictor.read(outcomes[1].case).image
    # Rows are y, columns are x; 28 pixels are cut to 16 about the centre.
    np.testing.assert_allclose(image[0], arrays["train_images"][0].T[6:22, 6:22] / 255, atol=1e-6)


def split_file(run: Path, entries: Sequence[dict[str, Any]]) -> None:
    base = {"label": None, "annotated": None, "group": None}
    (run / "split.json").write_text(json.dumps({"train": [], "validation": [{**base, **entry} for entry in entries]}))


def test_validation_cases_bring_their_references(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_classifier(run / "model")
    images = [save_picture(tmp_path / f"{name}.png") for name in "ab"]
    np.savez(
        tmp_path / "set.npz",
        train_images=np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8),
        train_labels=np.arange(3)[:, None],
    )
    split_file(
        run,
        [
            {"name": "a", "images": [str(images[0])], "group": "p1", "classes": ["liver"]},
            {"name": "b", "images": [str(images[1])], "classes": []},
            {"name": "set-2", "images": [str(tmp_path / "set.npz")], "classes": ["spleen"], "item": 2},
        ],
    )
    outcomes = predict_classes(run, [], tmp_path / "out" / "classes.csv", fold="validation", quiet=True)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    told = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert told["fold"] == "validation"
    cases = [(case["name"], case["patient"], case["reference"], case["item"]) for case in told["cases"]]
    assert cases == [("a", "p1", ["liver"], None), ("b", "b", [], None), ("set-2", "set-2", ["spleen"], 2)]
    with pytest.raises(MedmomError, match="an input besides --fold"):
        predict_classes(run, [images[0]], tmp_path / "out" / "classes.csv", fold="validation", quiet=True)
    with pytest.raises(MedmomError, match="fold test: unknown"):
        predict_classes(run, [], tmp_path / "out" / "classes.csv", fold="test", quiet=True)


# What is written


def test_json_file_says_all_that_scoring_needs(model: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "in" / "a.png")
    (outcome,) = predict_classes(model.parent, [picture], tmp_path / "out.csv", quiet=True)
    told = json.loads((tmp_path / "out.json").read_text())
    assert Classes.from_dict(told["classes"]) == CLASSES
    package = load_package(model)
    wanted = {"path": str(model.parent), "network": "MomentumResNet", "checksum": package.checksum}
    assert (told["model"], told["temperature"], told["fold"]) == (wanted, 0.5, None)
    assert {"medmom", "torch"} <= told["versions"].keys()
    assert told["cases"] == [
        {
            "name": "a",
            "image": [str(picture)],
            "item": None,
            "patient": "a",
            "reference": None,
            "logits": list(outcome.logits or ()),
            "error": None,
        }
    ]


def test_failing_image_does_not_stop_the_others(model: Path, tmp_path: Path) -> None:
    for name in "ad":
        save_picture(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes()[:90])
    save_image(tmp_path / "in" / "c.nii.gz", (16, 16, 3))
    outcomes = predict_classes(model, [tmp_path / "in", tmp_path / "absent.png"], tmp_path / "out.csv", quiet=True)
    errors = [outcome.error for outcome in outcomes]
    assert [error is None for error in errors] == [True, False, False, True, False]
    assert "b.png: " in str(errors[1])
    assert "c.nii.gz: a volume of 3 slices, the model classifies pictures. Give one slice." in str(errors[2])
    assert "absent.png" in str(errors[4])
    assert [row["case"] for row in rows(tmp_path / "out.csv")] == ["a", "d"]
    listed = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["error"] for case in listed] == errors
    assert [case["logits"] is None for case in listed] == [False, True, True, False, True]


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_single_image_that_fails_leaves_nothing_behind(content: bytes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MedmomError, match=r"a\.png: "):
        predict_classes(model, [tmp_path / "a.png"], tmp_path / "out" / "classes.csv", quiet=True, explain=True)
    assert files_below(tmp_path) == ["a.png"]


def test_channels_that_the_model_does_not_take_are_named(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model", preparation=replace(UNIT, colour="own"))
    picture = save_picture(tmp_path / "a.png", mode="RGB")
    with pytest.raises(MedmomError, match=r"a\.png: the number of image channels is 3, the model takes 1 \(grey\)"):
        predict_classes(model, [picture], tmp_path / "classes.csv", quiet=True)


def test_absurd_working_grid_is_refused_before_memory_is_asked_for(volume_model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.nii.gz", (9, 9, 9), affine=np.diag([900.0, 900.0, 900.0, 1.0]))
    with pytest.raises(MedmomError, match=r"8100 x 8100 x 8100 voxels at the model's spacing"):
        predict_classes(volume_model, [image], tmp_path / "classes.csv", quiet=True)


@pytest.mark.parametrize("is_only", [True, False])
def test_network_that_gives_no_numbers_is_named(is_only: bool, tmp_path: Path) -> None:
    network = tiny_classifier()
    with torch.no_grad():
        next(network.parameters()).fill_(np.nan)
    model = save_classifier(tmp_path / "model", network)
    images = [save_picture(tmp_path / f"{name}.png") for name in ("a" if is_only else "ab")]
    fact = r"a\.png: the network's output is not finite\. Train the model again\."
    if is_only:
        with pytest.raises(MedmomError, match=fact):
            predict_classes(model, images, tmp_path / "classes.csv", quiet=True)
    else:
        outcomes = predict_classes(model, images, tmp_path / "classes.csv", quiet=True)
        assert all("not finite" in str(outcome.error) for outcome in outcomes)
        assert rows(tmp_path / "classes.csv") == []


def test_run_that_is_cut_short_lists_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k, name in enumerate("abc"):
        save_picture(tmp_path / "in" / f"{name}.png", seed=k)
    read = ClassPredictor.read

    def interrupted(self: ClassPredictor, files: room.CaseFiles) -> room.ClassInput:
        if files.name == "c":
            raise KeyboardInterrupt
        return read(self, files)

    monkeypatch.setattr(ClassPredictor, "read", interrupted)
    monkeypatch.setattr(room, "BATCH", 1)
    with pytest.raises(KeyboardInterrupt):
        predict_classes(model, [tmp_path / "in"], tmp_path / "classes.csv", quiet=True)
    listed = json.loads((tmp_path / "classes.json").read_text())["cases"]
    assert [row["case"] for row in rows(tmp_path / "classes.csv")] == ["a"]
    assert ["not reached" in str(case["error"]) for case in listed] == [False, True, True]


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_run_says_nothing(
    quiet: bool, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        save_picture(tmp_path / "in" / f"{name}.png")
    predict_classes(model, [tmp_path / "in"], tmp_path / "classes.csv", quiet=quiet, explain=True)
    out, err = capfd.readouterr()
    assert (out, err == "", caplog.text) == ("", quiet, "")


def test_explanations_lie_beside_the_table_and_change_no_number(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(3):
        save_picture(tmp_path / "in" / f"{k}.png", seed=k)
    monkeypatch.setattr(room, "BATCH", 1)
    plain = predict_classes(model, [tmp_path / "in"], tmp_path / "plain" / "classes.csv", quiet=True)
    shown = predict_classes(model, [tmp_path / "in"], tmp_path / "shown" / "classes.csv", quiet=True, explain=True)
    assert plain == shown
    wanted = ["classes.csv", "classes.json", *(f"classes_explain/{k}.png" for k in range(3))]
    assert files_below(tmp_path / "shown") == wanted
    with Image.open(tmp_path / "shown" / "classes_explain" / "0.png") as picture:
        assert picture.info["Software"] == SOFTWARE
        assert picture.width > picture.height > 300
    # Ours may be replaced.
    predict_classes(model, [tmp_path / "in"], tmp_path / "shown" / "classes.csv", quiet=True, explain=True)


def test_explanations_of_volumes_are_drawn(slice_model: Path, volume_model: Path, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.nii.gz", (20, 18, 9))
    for name, model in (("slices", slice_model), ("whole", volume_model)):
        predict_classes(model, [image], tmp_path / f"{name}.csv", quiet=True, explain=True)
        assert (tmp_path / f"{name}_explain" / "a.png").is_file()


# What is never written over


@pytest.mark.parametrize("out", ["classes", "classes.txt", "classes.json", "folder.csv"])
def test_table_must_be_a_csv_file(out: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(MedmomError, match=r"Name a file that ends in \.csv"):
        predict_classes(model, [save_picture(tmp_path / "a.png")], tmp_path / out, quiet=True)


@pytest.mark.parametrize("name", ["labels.csv", "labels.json", "labels_slices.csv", "labels_explain/a.png"])
def test_file_of_somebody_else_is_not_replaced(name: str, model: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "in" / "a.png")
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(picture.read_bytes() if path.suffix == ".png" else b'{"cases": []}\n')
    before = path.read_bytes()
    with pytest.raises(MedmomError, match=rf"{path.name}: exists and was not written by medmom predict"):
        predict_classes(model, [picture], tmp_path / "out" / "labels.csv", quiet=True, explain=True)
    assert files_below(tmp_path / "out") == [name]
    assert path.read_bytes() == before


def test_later_run_replaces_an_earlier_ones_table(model: Path, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "a.png")
    predict_classes(model, [picture], tmp_path / "classes.csv", quiet=True)
    first = (tmp_path / "classes.csv").read_bytes()
    predict_classes(
        save_classifier(tmp_path / "other", temperature=3.0), [picture], tmp_path / "classes.csv", quiet=True
    )
    assert (tmp_path / "classes.csv").read_bytes() != first


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write")
def test_place_where_nobody_may_write_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = save_picture(tmp_path / "a.png")
    monkeypatch.setattr(ClassPredictor, "read", None)
    for out in (Path("/proc/medmom/classes.csv"), picture / "classes.csv"):
        with pytest.raises(MedmomError, match="cannot be written"):
            predict_classes(model, [picture], out, quiet=True)


@pytest.mark.parametrize("inputs", [[], ["absent/*.png"], ["."]])
def test_inputs_without_an_image_are_named(inputs: list[str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "empty" / each for each in inputs]
    with pytest.raises(MedmomError, match=r"no input is given|no file matches|there is no .*NIfTI image"):
        predict_classes(model, given, tmp_path / "classes.csv", quiet=True)


def test_two_images_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "x" / "1" / "a.png")
    with pytest.raises(MedmomError, match=r"has the same name a"):
        predict_classes(
            model, [tmp_path / "x", save_picture(tmp_path / "y" / "a.png")], tmp_path / "classes.csv", quiet=True
        )


def test_model_for_label_maps_is_refused_with_the_right_command(model: Path, tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"draws label maps \(head, body\).*--out FOLDER"):
        predict_classes(save_tiny(tmp_path / "model"), [tmp_path / "a.png"], tmp_path / "classes.csv", quiet=True)
