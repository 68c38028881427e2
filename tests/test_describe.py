from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABELS, save_tiny, tiny_network

from medmom.classes import Classes
from medmom.data.preparation import Preparation
from medmom.describe import describe_model
from medmom.errors import MedmomError
from medmom.labels import Labels
from medmom.models import MomentumUNet, SliceClassifier, to_low_rank
from medmom.models.low_rank import LowRankLayer
from medmom.package import load_package, save_package

RECIPE = {
    "data": {"folder": "/scans/of/Ward 7", "fold": 2, "folds": 5},
    "model": {"preset": "mom3d_xs"},
    "loss": {"class_path": "medmom.tasks.losses.DiceCrossEntropy", "init_args": {"smooth": 1e-5}},
    "optimizer": {"class_path": "medmom.optim.HeavyBall", "init_args": {"lr": 0.01}},
    "training": {"epochs": 13, "steps_per_epoch": 127},
}
CT = Preparation((1.5, 1.5, 2.0), "ct", (-200.0, 300.0), 99.4, 39.25)


def rows(text: str) -> dict[str, str]:
    """Lines by their title; what stands below one belongs to it."""
    found: dict[str, str] = {}
    title = ""
    for line in text.splitlines():
        title = line[:11].strip() or title
        found[title] = "\n".join(filter(None, [found.get(title, ""), line[11:]]))
    return found


def save(folder: Path, labels: Labels = LABELS, **changes: Any) -> Path:
    told = {"preparation": CT, "patch": (16, 16, 16), "channels": ("CT",), "recipe": RECIPE, **changes}
    save_package(folder, tiny_network(1, labels.num_channels), labels=labels, **told)
    return folder


def test_what_a_segmentation_model_is_stands_in_the_text(tmp_path: Path) -> None:
    model = save(tmp_path / "run" / "model").parent
    found = rows(describe_model(model))
    assert found["model"] == str(model)
    assert found["segments"].splitlines() == [
        "2 classes in volumes: stored value, colour, name",
        "    1  #e24b36  head",
        "    4  #36e27d  body",
    ]
    count = sum(weights.numel() for weights in tiny_network().parameters())
    assert found["network"] == f"MomentumUNet (mom3d_xs): {count:,} parameters, gate 0.9, memory plain"
    assert found["channels"] == "1: CT"
    assert found["grid"] == "voxels of 1.5 x 1.5 x 2 mm, axes RAS"
    assert found["intensity"] == "CT, -200 to 300 HU, mean 99.4, standard deviation 39.25"
    assert found["window"] == "16 x 16 x 16 voxels"
    trained = "13 epochs of 127 steps, HeavyBall with lr 0.01, DiceCrossEntropy, data Ward 7, fold 2 of 5"
    assert found["trained"] == trained
    assert f"torch {torch.__version__}" in found["made with"]
    assert load_package(model).checksum in found["package"] and "KiB" in found["package"]
    assert found["use"].splitlines()[0] == f"medmom predict {model} IMAGES --out LABELS"


def test_low_rank_is_told_with_what_it_saves(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"channels": (8, 16), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
    network = MomentumUNet(1, 3, **plan)
    dense = sum(p.numel() for p in network.parameters())
    to_low_rank(network, 0.25, room=2)
    layers = [m for m in network.modules() if isinstance(m, LowRankLayer)]
    saved = sum(len(m.u) * len(m.v) - m.sizes.num_parameters for m in layers)
    told: dict[str, Any] = {"labels": LABELS, "preparation": CT, "channels": ("CT",), "recipe": {}}
    save_package(tmp_path / "model", network, patch=(16, 16), **told)
    parts = rows(describe_model(tmp_path / "model"))["network"].split(", ")
    assert parts[0] == f"MomentumUNet: {dense - saved:,} parameters" and saved > 0
    assert parts[1:3] == [f"{dense:,} if dense", f"{len(layers)} low-rank layers at 25% of full rank"]


def test_folder_of_the_data_is_told_by_its_name_alone(tmp_path: Path) -> None:
    assert "/scans" not in describe_model(save(tmp_path / "model"))


def test_many_classes_fit_on_a_page(tmp_path: Path) -> None:
    names = ("background", *(f"vertebrae_of_the_spine_{k}" for k in range(1, 105)))
    text = describe_model(save(tmp_path / "model", Labels(names, tuple(range(105)), ignore=255)))
    assert len(text.splitlines()) <= 30
    assert "104 classes" in text and "and 80 more" in text and "value 255 was ignored" in text
    assert all(f"  {name}" in text for name in names[1:25])


def test_one_class_and_no_recipe_will_do(tmp_path: Path) -> None:
    preparation = Preparation(None, "unit", size=(64, 48), colour="grey")
    plan: dict[str, Any] = {"channels": (4, 6), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
    labels = Labels(("background", "polyp"), (0, 1))
    told: dict[str, Any] = {"labels": labels, "preparation": preparation, "patch": (32, 32), "recipe": {}}
    save_package(tmp_path / "model", MomentumUNet(1, 2, **plan), channels=("grey",), **told)
    found = rows(describe_model(tmp_path / "model"))
    assert found["segments"].startswith("1 class in pictures, and volumes slice by slice")
    assert found["grid"] == "64 x 48 voxels, whatever the image's proportions, axes RAS"
    assert found["channels"] == "1: grey; pictures in colour become grey"
    assert "trained" not in found


def test_what_a_classifier_is_stands_in_the_text(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"channels": (4, 6), "blocks": (1, 2), "kernels": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]]}
    told: dict[str, Any] = {"preparation": CT, "patch": (16, 16), "channels": ("CT",), "recipe": {}, "slices": 9}
    classes = Classes(("liver", "lung"), is_multilabel=True)
    save_package(tmp_path / "model", SliceClassifier(1, 2, **plan), classes=classes, temperature=1.25, **told)
    text = describe_model(tmp_path / "model")
    found = rows(text)
    assert found["classifies"].split() == "volumes: any number of 2 classes liver lung".split()
    assert found["confidence"] == "temperature 1.25"
    assert found["sees"] == "16 x 16 voxels about the centre, at most 9 slices of a volume"
    assert "--out classes.csv" in found["use"] and "monai-bundle" not in text


def test_lines_are_short_and_plain(tmp_path: Path) -> None:
    text = describe_model(save(tmp_path / "model"))
    assert text.isascii() and not any(line != line.rstrip() for line in text.splitlines())
    assert all(len(line) <= 120 + len(str(tmp_path)) for line in text.splitlines())


def test_damaged_model_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(MedmomError, match="checksum"):
        describe_model(model)
    with pytest.raises(MedmomError, match="no such folder"):
        describe_model(tmp_path / "absent")
