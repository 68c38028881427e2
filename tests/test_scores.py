from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmom.errors import MedmomError
from medmom.evaluation.metrics import METRICS, missed_scores
from medmom.evaluation.scores import evaluate, format_scores
from medmom.evaluation.summary import summarise

SHAPE = (12, 10, 8)
AFFINE = np.diag([0.9, 1.1, 2.0, 1.0])
DIAGONAL = float(np.linalg.norm((np.array(SHAPE) - 1) * (0.9, 1.1, 2.0)))
LABELS = {"names": ["background", "liver", "colon"], "values": [0, 1, 2], "ignore": None}


def label_map(seed: int) -> np.ndarray:
    """Two boxes whose edges the seed moves."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    a, b, c, d = rng.integers(0, 2, 4)
    label[1 + a : 5 + b, 2:8, 1:7] = 1
    label[7 + c : 10 + d, 2:8, 2:6] = 2
    return label


def save(path: Path, label: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, affine), path)
    return path


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions of four cases, and their references."""
    for k in range(4):
        save(tmp_path / "predictions" / f"case{k}.nii.gz", label_map(k))
        save(tmp_path / "references" / f"case{k}.nii.gz", label_map(k + 10))
    return tmp_path / "predictions", tmp_path / "references"


def names(scores: dict[str, Any]) -> list[str]:
    return [case["name"] for case in scores["cases"]]


def test_a_mean_is_over_cases_then_over_classes(folders: tuple[Path, Path]) -> None:
    scores = evaluate(*folders)
    assert scores["num_cases"] == 4
    assert scores["labels"]["names"] == ["background", "1", "2"]
    for metric in METRICS:
        by_class = [np.mean([case["scores"][c][metric] for case in scores["cases"]]) for c in ("1", "2")]
        assert [scores["classes"][c][metric]["mean"] for c in ("1", "2")] == pytest.approx(by_class)
        assert scores["mean"][metric]["mean"] == pytest.approx(np.mean(by_class))
    assert scores["mean"]["miou"] == scores["mean"]["iou"]
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("missing", [(), (2,)])
def test_means_equal_the_independent_tool(folders: tuple[Path, Path], missing: tuple[int, ...]) -> None:
    tool = Path(__file__).resolve().parents[2] / "shared" / "tools" / "score_folder.py"
    if not tool.is_file():
        pytest.skip("no independent tool beside the checkout")
    predictions, references = folders
    for k in missing:
        (predictions / f"case{k}.nii.gz").unlink()
    save(predictions / "case3.nii.gz", np.minimum(label_map(3), 1))
    only_one_class = save(references / "case3.nii.gz", np.minimum(label_map(13), 1))
    assert only_one_class.exists()
    told = subprocess.run(
        [sys.executable, str(tool), str(predictions), str(references), "1", "2"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    scores = evaluate(predictions, references)
    for name in ("1", "2"):
        dice, iou = re.findall(rf"label {name}: Dice (\S+)  IoU (\S+)", told)[0]
        assert scores["classes"][name]["dice"]["mean"] == pytest.approx(float(dice), abs=5.1e-5)
        assert scores["classes"][name]["iou"]["mean"] == pytest.approx(float(iou), abs=5.1e-5)
    assert scores["num_both_empty"] == {"1": 0, "2": 1}


def test_a_reference_without_a_prediction_is_a_miss_and_counted(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "case1.nii.gz").unlink()
    scores = evaluate(predictions, references)
    missed = scores["cases"][1]
    assert (scores["num_missing"], missed["missing"], missed["prediction"]) == (1, True, None)
    assert all(missed["scores"][name] == pytest.approx(missed_scores(DIAGONAL)) for name in ("1", "2"))
    assert "1 without a prediction (counted as missed)" in format_scores(scores)


def test_both_empty_is_left_out_and_counted(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    for folder in folders:
        save(folder / "case0.nii.gz", np.minimum(label_map(0), 1))
    scores = evaluate(predictions, references)
    assert scores["cases"][0]["scores"]["2"] == dict.fromkeys(METRICS)
    assert scores["classes"]["2"]["dice"]["num"] == 3
    assert scores["num_both_empty"] == {"1": 0, "2": 1}
    assert "left out: 2 in 1 case." in format_scores(scores)


def test_the_list_of_predict_decides_what_is_scored(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    listed = [
        {"name": "case3", "prediction": "case3.nii.gz", "patient": "p", "image": ["case3_img.nii.gz"]},
        {"name": "case0", "prediction": None, "error": "truncated", "reference": None},
    ]
    write(predictions / "cases.json", {"labels": LABELS, "model": {"name": "m"}, "cases": listed})
    scores = evaluate(predictions, references)
    assert names(scores) == ["case3", "case0"]
    assert scores["labels"] == LABELS
    assert scores["model"] == {"name": "m"}
    # A prediction of an earlier run lies there, but the list says that this run failed.
    assert (scores["cases"][1]["missing"], scores["cases"][1]["error"]) == (True, "truncated")
    assert scores["cases"][0]["patient"] == "p"
    assert "not scored: 3 (case0.nii.gz, case1.nii.gz, case2.nii.gz)" in format_scores(scores)


def test_references_may_come_from_the_list(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    expected = evaluate(predictions, references)
    listed = [{"name": f"case{k}", "reference": str(references / f"case{k}.nii.gz")} for k in range(4)]
    write(predictions / "cases.json", {"cases": listed})
    assert evaluate(predictions)["mean"] == expected["mean"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("list.json", ["case2.nii.gz", "case0"]),
        ("list.json", {"cases": [{"name": "case2"}, {"name": "case0"}]}),
        ("list.json", {"cases": {"case2": {"annotated": ["1", "2"]}, "case0": {}}}),
        ("split.json", {"train": [{"name": "case1"}], "validation": [{"name": "case2"}, {"name": "case0"}]}),
        ("list.csv", "file,age\ncase2.nii.gz,3\ncase0.nii.gz,4\n"),
        ("list.txt", "# held out\ncase2\n\ncase0.nii.gz\n"),
    ],
)
def test_a_list_of_cases_may_be_json_csv_or_text(folders: tuple[Path, Path], file: str, content: Any) -> None:
    listed = write(folders[0].parent / file, content)
    assert names(evaluate(*folders, cases=listed)) == ["case2", "case0"]


def test_a_listed_case_without_prediction_is_a_miss(folders: tuple[Path, Path]) -> None:
    (folders[0] / "case2.nii.gz").unlink()
    listed = write(folders[0].parent / "list.json", ["case2", "case0"])
    assert evaluate(*folders, cases=listed)["num_missing"] == 1


def test_classes_not_annotated_are_left_out_of_their_case(folders: tuple[Path, Path]) -> None:
    listed = [{"name": f"case{k}", "annotated": ["liver"] if k else None} for k in range(4)]
    write(folders[0] / "cases.json", {"labels": LABELS, "cases": listed})
    scores = evaluate(*folders)
    assert list(scores["cases"][0]["scores"]) == ["liver", "colon"]
    assert list(scores["cases"][1]["scores"]) == ["liver"]
    assert scores["classes"]["colon"]["dice"]["num"] == 1
    assert scores["num_both_empty"] == {"liver": 0, "colon": 0}


def test_a_data_folder_around_the_references_tells_labels_patients_and_annotations(tmp_path: Path) -> None:
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "colon": 2}}
    write(tmp_path / "data" / "dataset.json", dataset)
    write(tmp_path / "data" / "cases.csv", "file,patient,annotated\na.nii.gz,p1,liver\nb.nii.gz,p1,liver;colon\n")
    for name in "ab":
        save(tmp_path / "data" / "images" / f"{name}.nii.gz", label_map(0))
        save(tmp_path / "data" / "labels" / f"{name}.nii.gz", label_map(1))
        save(tmp_path / "out" / f"{name}.nii.gz", label_map(2))
    for references in (tmp_path / "data" / "labels", tmp_path / "data"):
        scores = evaluate(tmp_path / "out", references)
        assert scores["labels"]["names"] == ["background", "liver", "colon"]
        assert [case["patient"] for case in scores["cases"]] == ["p1", "p1"]
        assert [list(case["scores"]) for case in scores["cases"]] == [["liver"], ["liver", "colon"]]
        assert Path(scores["cases"][0]["image"]).name == "a.nii.gz"
        assert scores["mean"]["dice"]["low"] is None
    write(tmp_path / "out" / "cases.json", {"labels": LABELS, "cases": [{"name": "b", "patient": "b"}]})
    assert evaluate(tmp_path / "out", tmp_path / "data")["cases"][0]["patient"] == "p1"


def test_classes_are_matched_by_name_where_the_stored_values_differ(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    expected = evaluate(predictions, references)
    for k in range(4):
        label = label_map(k + 10)
        save(references / f"case{k}.nii.gz", np.array([0, 7, 4], np.uint8)[label])
    write(references / "dataset.json", {"labels": {"background": 0, "colon": 4, "spleen": 5, "liver": 7}})
    write(predictions / "cases.json", {"labels": LABELS, "cases": [{"name": f"case{k}"} for k in range(4)]})
    scores = evaluate(predictions, references)
    assert scores["classes"]["liver"] == expected["classes"]["1"]
    assert scores["classes"]["colon"] == expected["classes"]["2"]


def test_voxels_marked_ignore_count_in_no_score(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(references / "dataset.json", {"labels": {"background": 0, "liver": 1, "colon": 2, "ignore": 3}})
    for k in range(4):
        label = label_map(k)
        label[:, 5:] = 3
        save(references / f"case{k}.nii.gz", label)
    assert evaluate(predictions, references)["mean"]["dice"]["mean"] == 1.0


def test_two_single_files_are_scored_whatever_their_names(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(predictions / "case0.json", {"labels": LABELS, "image": ["/scans/scan.nii.gz"]})
    scores = evaluate(predictions / "case0.nii.gz", references / "case1.nii.gz")
    assert names(scores) == ["case0"]
    assert list(scores["classes"]) == ["liver", "colon"]
    assert scores["cases"][0]["image"] == str(Path("/scans/scan.nii.gz").resolve())


def test_the_bootstrap_draws_patients_not_cases() -> None:
    rng = np.random.default_rng(3)
    skill = rng.random(30)
    cases = [
        {"patient": f"p{p}", "scores": {"a": dict.fromkeys(METRICS, float(skill[p])), "b": dict.fromkeys(METRICS)}}
        for p in range(30)
        for _ in range(5)
    ]
    by_patient = summarise(cases, ["a", "b"])
    draws = np.random.default_rng(1).choice(skill, (20000, 30)).mean(1)
    found = by_patient["classes"]["a"]["dice"]
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)
    assert by_patient["classes"]["b"]["dice"] == {"mean": None, "low": None, "high": None, "num": 0}
    assert by_patient["mean"]["dice"]["mean"] == found["mean"]
    assert summarise(cases, ["a", "b"]) == by_patient
    by_case = summarise([case | {"patient": str(k)} for k, case in enumerate(cases)], ["a", "b"])
    assert by_case["mean"]["dice"]["high"] - by_case["mean"]["dice"]["low"] < 0.6 * (found["high"] - found["low"])


def test_a_draw_weighs_all_cases_of_its_patients_and_keeps_every_class() -> None:
    rng = np.random.default_rng(5)
    cases = []
    for patient, num_cases in enumerate((1, 4, 2, 3)):
        for k in range(num_cases):
            found = {"a": dict.fromkeys(METRICS, float(rng.random()))}
            if (patient, k) in ((1, 0), (2, 1)):
                found["b"] = dict.fromkeys(METRICS, float(rng.random()))
            cases.append({"patient": f"p{patient}", "scores": found})
    draws = []
    all_of_b = float(np.mean([case["scores"]["b"]["iou"] for case in cases if "b" in case["scores"]]))
    for weights in np.random.default_rng(0).multinomial(4, [0.25] * 4, 2000):
        drawn = [case for case in cases for _ in range(weights[int(case["patient"][1:])])]
        a, b = ([case["scores"][c]["iou"] for case in drawn if c in case["scores"]] for c in "ab")
        draws.append((np.mean(a) + (np.mean(b) if b else all_of_b)) / 2)
    mean = summarise(cases, ["a", "b"])["mean"]["miou"]
    assert [mean["low"], mean["high"]] == pytest.approx(np.percentile(draws, [2.5, 97.5]))


def test_the_table_shows_a_line_a_class_and_their_mean(folders: tuple[Path, Path]) -> None:
    scores = evaluate(*folders)
    lines = format_scores(scores).splitlines()
    assert lines[0].split()[:2] == ["class", "dice"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert f"{scores['mean']['dice']['mean']:.3f}" in lines[4]
    assert max(map(len, lines)) <= 120


def other_grid(predictions: Path, references: Path) -> Any:
    moved = AFFINE.copy()
    moved[0, 3] = 3
    save(predictions / "case1.nii.gz", label_map(1), moved)
    return predictions, references


def other_shape(predictions: Path, references: Path) -> Any:
    save(predictions / "case1.nii.gz", label_map(1)[:-1])
    return predictions, references


def unknown_value(predictions: Path, references: Path) -> Any:
    write(references / "dataset.json", {"labels": {"background": 0, "liver": 1, "colon": 2}})
    save(predictions / "case1.nii.gz", label_map(1) + np.uint8(6))
    return predictions, references


def foreign_names(predictions: Path, references: Path) -> Any:
    for path in list(predictions.iterdir()):
        path.rename(path.with_name(f"seg_{path.name}"))
    return predictions, references


def no_predictions(predictions: Path, references: Path) -> Any:
    shutil.rmtree(predictions)
    predictions.mkdir()
    return predictions, references


def no_reference(predictions: Path, references: Path) -> Any:
    write(predictions / "cases.json", {"cases": [{"name": "case0"}, {"name": "case9"}]})
    return predictions, references


def reference_gone(predictions: Path, references: Path) -> Any:
    write(predictions / "cases.json", {"cases": [{"name": "case0", "reference": "gone/case0.nii.gz"}]})
    return predictions, None


def no_classes_in_common(predictions: Path, references: Path) -> Any:
    write(predictions / "cases.json", {"labels": LABELS, "cases": [{"name": "case0"}]})
    write(references / "dataset.json", {"labels": {"background": 0, "heart": 1, "lung": 2}})
    return predictions, references


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (other_grid, r"predictions.case1.nii.gz: another grid than .*references.case1.nii.gz"),
        (other_shape, r"predictions.case1.nii.gz: another grid than .*references.case1.nii.gz .*11 x 10 x 8"),
        (unknown_value, r"predictions.case1.nii.gz: label value 6, 7, 8 is not among"),
        (foreign_names, r"no prediction has the name of a case \(seg_case0 against case0\)"),
        (no_predictions, r"predictions: there is no label map in this folder"),
        (no_reference, r"references: there is no reference of the case case9"),
        (reference_gone, r"case0.nii.gz: there is no such reference of the case case0"),
        (no_classes_in_common, r"heart, lung, the predictions liver, colon"),
        (lambda p, r: (p, None), r"predictions: has no cases.json"),
        (lambda p, r: (p / "nowhere", r), r"nowhere: there is no such"),
        (lambda p, r: (p, r / "nowhere"), r"nowhere: there is no such"),
        (lambda p, r: (p, r / "case0.nii.gz"), r"case0.nii.gz: one reference for a folder of predictions"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(folders: tuple[Path, Path], fault: Any, message: str) -> None:
    with pytest.raises(MedmomError, match=message) as caught:
        evaluate(*fault(*folders))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("list.json", ["case0", "case0.nii.gz"], "lists the case case0 2 times"),
        ("list.json", [], "lists no case"),
        ("list.json", {"runs": []}, "has no list of cases"),
        ("list.json", "{", "not valid JSON"),
        ("list.csv", "case0\ncase1\n", "is called name, case or file"),
    ],
)
def test_a_list_that_names_no_cases_is_refused(
    folders: tuple[Path, Path], file: str, content: Any, message: str
) -> None:
    with pytest.raises(MedmomError, match=message):
        evaluate(*folders, cases=write(folders[0].parent / file, content))


def test_real_references_score_perfectly_against_themselves(shared_data: Path) -> None:
    labels = shared_data / "ct-organs-open" / "public" / "labels"
    scores = evaluate(labels / "cip-ct64-chest.nii.gz", labels / "cip-ct64-chest.nii.gz")
    assert list(scores["cases"][0]["scores"]) == ["lung_right", "lung_left"]
    assert scores["mean"]["dice"]["mean"] == 1.0
    assert scores["mean"]["hd95_mm"]["mean"] == 0.0
