"""The summary in nnU-Net's form: its keys, its rules for nan, and its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmom.errors import MedmomError
from medmom.evaluation import voxel_counts
from medmom.evaluation.nnunet_summary import METRICS, write_summary
from medmom.evaluation.scores import evaluate
from medmom.evaluation.voxel_counts import count_voxels

SHAPE = (9, 8, 7)
VALUES = (1, 4, 7)
IGNORE = 9
LABELS: dict[str, Any] = {"names": ["background", "head", "body", "tail"], "values": [0, *VALUES], "ignore": IGNORE}


def save(path: Path, label: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label.astype(np.uint8), np.diag([0.9, 1.1, 2.0, 1.0])), path)
    return path


def label_map(seed: int, *values: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, *values], size=SHAPE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cases: the last class is in no case, the second one in one alone, and some voxels are ignored."""
    for k, (found, wanted) in enumerate([((1, 4), (1, 4, IGNORE)), ((1,), (1,)), ((), (1,))]):
        save(tmp_path / "found" / f"case{k}.nii.gz", label_map(k, *found))
        save(tmp_path / "wanted" / f"case{k}.nii.gz", label_map(k + 10, *wanted))
    return tmp_path


def listed(folder: Path, **more: Any) -> None:
    """Lets a list tell the classes of the predictions, as predict does."""
    cases = [{"name": f"case{k}", **more.get(f"case{k}", {})} for k in range(3)]
    (folder / "found" / "cases.json").write_text(json.dumps({"labels": LABELS, "cases": cases}))


def summary(folder: Path) -> dict[str, Any]:
    # As scores.json would give them back.
    scores = json.loads(json.dumps(evaluate(folder / "found", folder / "wanted"), allow_nan=False))
    write_summary(folder / "summary.json", scores)
    return dict(json.loads((folder / "summary.json").read_text()))


def twin(folder: Path) -> dict[str, Any]:
    """The same numbers, spelt out voxel by voxel as nnU-Net's rules say."""
    per_case = []
    for k in range(3):
        found, wanted = (
            np.asarray(nib.load(folder / name / f"case{k}.nii.gz").dataobj) for name in ("found", "wanted")
        )
        seen, metrics = wanted != IGNORE, {}
        for value in VALUES:
            p, r = found == value, wanted == value
            tp, fp, fn, tn = (int((m & seen).sum()) for m in (p & r, p & ~r, ~p & r, ~p & ~r))
            empty = tp + fp + fn == 0
            metrics[str(value)] = {
                "Dice": math.nan if empty else 2 * tp / (2 * tp + fp + fn),
                "IoU": math.nan if empty else tp / (tp + fp + fn),
                **{"FP": fp, "TP": tp, "FN": fn, "TN": tn, "n_pred": fp + tp, "n_ref": fn + tp},
            }
        per_case.append(metrics)
    mean: dict[str, Any] = {}
    for key in map(str, VALUES):
        columns = {metric: np.array([row[key][metric] for row in per_case]) for metric in METRICS}
        mean[key] = {m: c[~np.isnan(c)].mean() if not np.isnan(c).all() else math.nan for m, c in columns.items()}
    overall = {metric: np.mean([row[metric] for row in mean.values()]) for metric in METRICS}
    return {"foreground_mean": overall, "mean": mean, "per_case": per_case}


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Mapping):
            check_same(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


def test_numbers_are_those_of_the_rules(folder: Path) -> None:
    listed(folder)
    found, expected = summary(folder), twin(folder)
    assert sorted(found) == ["foreground_mean", "mean", "metric_per_case"]
    check_same(found["mean"], expected["mean"])
    check_same(found["foreground_mean"], expected["foreground_mean"])
    for case, metrics in zip(found["metric_per_case"], expected["per_case"], strict=True):
        assert sorted(case) == ["metrics", "prediction_file", "reference_file"]
        check_same(case["metrics"], metrics)
        assert all(isinstance(row["TN"], int) for row in case["metrics"].values())


def test_class_that_is_nowhere_leaves_the_mean_over_classes_without_a_number(folder: Path) -> None:
    listed(folder)
    found = summary(folder)
    assert math.isnan(found["mean"]["7"]["Dice"]) and math.isnan(found["foreground_mean"]["Dice"])
    assert "NaN" in (folder / "summary.json").read_text()
    assert found["mean"]["4"]["Dice"] == found["metric_per_case"][0]["metrics"]["4"]["Dice"]
    assert found["mean"]["7"]["n_ref"] == 0


def test_files_are_named_as_they_lie(folder: Path) -> None:
    listed(folder)
    case = summary(folder)["metric_per_case"][1]
    assert case["prediction_file"] == str((folder / "found" / "case1.nii.gz").resolve())
    assert case["reference_file"] == str((folder / "wanted" / "case1.nii.gz").resolve())


def test_missing_prediction_counts_as_an_empty_one(folder: Path) -> None:
    listed(folder)
    empty = summary(folder)["metric_per_case"][2]
    (folder / "found" / "case2.nii.gz").unlink()
    missing = summary(folder)["metric_per_case"][2]
    assert missing == {**empty, "prediction_file": None}
    assert missing["metrics"]["1"]["Dice"] == 0
    assert missing["metrics"]["1"]["FN"] == missing["metrics"]["1"]["n_ref"] > 0


def test_class_that_is_not_annotated_is_left_out_of_the_case(folder: Path) -> None:
    listed(folder, case1={"annotated": ["body"]})
    found = summary(folder)
    assert [sorted(case["metrics"]) for case in found["metric_per_case"]] == [["1", "4", "7"], ["4"], ["1", "4", "7"]]
    rows = [case["metrics"]["1"]["n_ref"] for case in found["metric_per_case"] if "1" in case["metrics"]]
    assert found["mean"]["1"]["n_ref"] == np.mean(rows)


def test_dice_and_iou_are_those_of_the_scores(folder: Path) -> None:
    listed(folder)
    scores = evaluate(folder / "found", folder / "wanted")
    for case, told in zip(scores["cases"], summary(folder)["metric_per_case"], strict=True):
        for name, value in zip(LABELS["names"][1:], map(str, VALUES), strict=True):
            for ours, theirs in (("dice", "Dice"), ("iou", "IoU")):
                expected = math.nan if case["scores"][name][ours] is None else case["scores"][name][ours]
                assert told["metrics"][value][theirs] == pytest.approx(expected, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("scores", [{}, {"kind": "classification", "cases": [{"name": "a"}]}])
def test_scores_without_counts_are_refused(scores: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"summary\.json: a summary needs counts of voxels"):
        write_summary(tmp_path / "summary.json", scores)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(5, 4, 6), (7, 3), (4, 4, 0)])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_counts_do_not_depend_on_the_pieces(
    shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(voxel_counts, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    found, wanted = (rng.choice([0, 1, 2, 255], size=shape).astype(np.uint8) for _ in range(2))
    seen = wanted != 255
    # One array by rows, the other by columns, as files may give them.
    counts = count_voxels(np.asfortranarray(found), wanted, (1, 2))
    for channel in (1, 2):
        p, r = found == channel, wanted == channel
        masks = {"tp": p & r, "fp": p & ~r, "fn": ~p & r, "tn": ~p & ~r}
        assert counts[channel] == {name: int((mask & seen).sum()) for name, mask in masks.items()}


def test_counts_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="label maps of shape"):
        count_voxels(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), (1,))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_file_is_the_one_of_nnunet(folder: Path) -> None:
    peer = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    reader = pytest.importorskip("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO()
    listed(folder)
    ours, theirs = summary(folder), folder / "theirs.json"
    places = str((folder / "wanted").resolve()), str((folder / "found").resolve()), str(theirs)
    peer.compute_metrics_on_folder(*places, reader, ".nii.gz", list(VALUES), IGNORE, num_processes=1)
    expected = json.loads(theirs.read_text())
    check_same(ours["mean"], expected["mean"])
    check_same(ours["foreground_mean"], expected["foreground_mean"])
    assert len(ours["metric_per_case"]) == len(expected["metric_per_case"])
    for case, other in zip(ours["metric_per_case"], expected["metric_per_case"], strict=True):
        check_same(case, other)
