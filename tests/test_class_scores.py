from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmom.errors import MedmomError
from medmom.evaluation.calibration import fit_temperature, probabilities
from medmom.evaluation.class_scores import evaluate_classes, format_class_scores, is_class_table

NAMES = ("abdomen", "chest", "head")
LOGITS = np.array([[2.0, 0, 0], [1, 2, 0], [0, 3, 1], [0, 2, 0], [0, 1, 1.5], [2, 0, 1], [0, 0, 4], [3, 0, 0]])
TRUE = (0, 0, 1, 1, 2, 2, 2, 0)
TEMPERATURE = 1.5


def write_table(
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    logits: np.ndarray = LOGITS,
    references: Sequence[Sequence[str] | None] | None = None,
    is_multilabel: bool = False,
    failed: Sequence[int] = (),
    head: dict[str, Any] | None = None,
) -> Path:
    """A table as predict writes it: two cases a patient, six digits, failed cases without probabilities."""
    folder.mkdir(parents=True, exist_ok=True)
    given = probabilities(logits, TEMPERATURE, is_multilabel=is_multilabel)
    references = [[names[k]] for k in TRUE] if references is None else references
    cases = [
        {"name": f"scan{k}", "image": [f"/gone/scan{k}.png"], "patient": f"p{k // 2}",
         "reference": None if reference is None else list(reference),
         "logits": None if k in failed else logits[k].tolist(),
         "error": f"/gone/scan{k}.png: cut off. Fetch it again." if k in failed else None}
        for k, reference in enumerate(references)
    ]  # fmt: skip
    with (folder / "classes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case", "image", "class", "probability", "flag", *(f"p_{name}" for name in names)])
        for k, row in enumerate(given):
            if k not in failed:
                flag = "unlike the training images" if k == 1 else ""
                top = [names[row.argmax()], f"{row.max():.6f}"]
                writer.writerow([f"scan{k}", f"/gone/scan{k}.png", *top, flag, *(f"{p:.6f}" for p in row)])
    content = {"classes": {"names": list(names), "is_multilabel": is_multilabel}, "temperature": TEMPERATURE,
               "model": {"path": str(folder / "run"), "network": "MomentumResNet"}, "cases": cases}  # fmt: skip
    (folder / "classes.json").write_text(json.dumps(content | (head or {})))
    return folder / "classes.csv"


def test_scores_come_from_the_two_files(tmp_path: Path) -> None:
    scores = evaluate_classes(write_table(tmp_path), progress=False)
    json.dumps(scores, allow_nan=False)
    assert scores["kind"] == "classification"
    assert scores["classes"] == list(NAMES)
    assert scores["confusion"] == [[2, 1, 0], [0, 2, 0], [1, 0, 2]]
    assert scores["summary"]["accuracy"]["value"] == 6 / 8
    assert scores["summary"]["accuracy"]["low"] < 6 / 8 < scores["summary"]["accuracy"]["high"]
    assert scores["summary"]["balanced_accuracy"]["value"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert scores["classes_scores"]["chest"]["precision"]["value"] == 2 / 3
    # All images of chests are of one patient.
    assert scores["classes_scores"]["chest"]["recall"] == {"value": 1.0, "low": None, "high": None}
    assert (scores["num_cases"], scores["num_failed"], scores["num_flagged"]) == (8, 0, 1)
    assert scores["bootstrap"]["num_patients"] == 4
    assert scores["temperature"] == TEMPERATURE
    assert [case["right"] for case in scores["cases"]].count(False) == 2
    wrong = scores["cases"][1]
    expected = probabilities(LOGITS[1], TEMPERATURE, is_multilabel=False)[1]
    assert (wrong["reference"], wrong["predicted"]) == (["abdomen"], ["chest"])
    assert wrong["mistake"] == {"class": "chest", "probability": pytest.approx(expected)}


def test_a_folder_does_for_its_table_and_other_paths_are_none(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    assert evaluate_classes(tmp_path, progress=False) == evaluate_classes(table, progress=False)
    assert is_class_table(tmp_path)
    assert is_class_table(table)
    assert not is_class_table(tmp_path / "classes.json")
    assert not is_class_table(tmp_path / "scan.nii.gz")
    (tmp_path / "cases.json").write_text("{}")
    assert not is_class_table(tmp_path)


def test_a_table_of_another_name_has_its_json_under_that_name(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    moved = table.rename(tmp_path / "mine.csv")
    with pytest.raises(MedmomError, match=r"mine\.csv: mine\.json is not beside it"):
        evaluate_classes(moved, progress=False)
    (tmp_path / "classes.json").rename(tmp_path / "mine.json")
    assert evaluate_classes(moved, progress=False)["num_cases"] == 8


@pytest.mark.parametrize("has_row", [False, True])
def test_failed_cases_count_as_wrong_with_or_without_a_row(tmp_path: Path, has_row: bool) -> None:
    table = write_table(tmp_path, failed=[0])
    if has_row:
        table.write_text(table.read_text() + "scan0,/gone/scan0.png,,,,,,\n")
    scores = evaluate_classes(table, progress=False)
    assert scores["num_failed"] == 1
    assert scores["summary"]["accuracy"]["value"] == 5 / 8
    assert scores["classes_scores"]["abdomen"]["num_failed"] == 1
    case = next(case for case in scores["cases"] if case["name"] == "scan0")
    assert (case["right"], case["predicted"], case["mistake"]) == (False, None, None)
    assert "1 not predicted (counted as wrong)" in format_class_scores(scores)


def test_cases_without_a_reference_are_named_and_left_out(tmp_path: Path) -> None:
    references = [[NAMES[k]] for k in TRUE[:6]] + [None, None]
    scores = evaluate_classes(write_table(tmp_path, references=references), progress=False)
    assert scores["num_cases"] == 6
    assert scores["without_reference"] == ["scan6", "scan7"]
    assert "2 cases without a reference, left out: scan6, scan7." in format_class_scores(scores)


def test_an_absent_class_has_no_score_and_the_table_says_so(tmp_path: Path) -> None:
    references = [[NAMES[min(k, 1)]] for k in TRUE]
    scores = evaluate_classes(write_table(tmp_path, references=references), progress=False)
    assert all(scores["classes_scores"]["head"][name]["value"] is None for name in ("recall", "auroc", "precision"))
    assert scores["roc"]["head"] is None
    text = format_class_scores(scores)
    assert re.search(r"^head +- +- +- +- +- +- +0$", text, re.MULTILINE)
    assert "Without a reference, so without scores: head." in text


def test_small_probabilities_are_told_apart_by_their_logits(tmp_path: Path) -> None:
    """With six digits alone, all of these are 0.000000 of the second class."""
    logits = np.array([[60.0, 0], [55, 0], [50, 0], [45, 0]])
    two = [["a"], ["a"], ["b"], ["b"]]
    table = write_table(tmp_path, names=("a", "b"), logits=logits, references=two)
    assert evaluate_classes(table, progress=False)["summary"]["auroc"]["value"] == 1.0


def test_on_its_own_fold_calibration_is_cross_fitted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (200, 3))
    picked = [rng.choice(3, p=row) for row in probabilities(logits, 3.0, is_multilabel=False)]
    options: dict[str, Any] = {"logits": logits, "references": [[NAMES[k]] for k in picked]}
    plain = evaluate_classes(write_table(tmp_path / "a", **options), progress=False)
    own = evaluate_classes(write_table(tmp_path / "b", **options, head={"fold": "validation"}), progress=False)
    assert plain["reliability"]["temperatures"] == [TEMPERATURE]
    assert not plain["reliability"]["is_cross_fitted"]
    first, second = own["reliability"]["temperatures"]
    both = fit_temperature(logits, np.eye(3)[picked], is_multilabel=False)
    assert min(first, second) < both < max(first, second)
    assert own["reliability"]["before"] == plain["reliability"]["before"]
    assert own["reliability"]["after"]["ece"] == own["summary"]["ece"]["value"] != plain["summary"]["ece"]["value"]
    assert own["reliability"]["after"]["brier"] == pytest.approx(own["summary"]["brier"]["value"])
    for name in ("accuracy", "auroc", "auprc"):
        assert own["summary"][name] == plain["summary"][name]
    assert "cross-fitted" in format_class_scores(own)
    assert "cross-fitted" not in format_class_scores(plain)


def test_the_own_fold_is_known_from_the_runs_split_too(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    (tmp_path / "run").mkdir()
    split = {"validation": [{"name": "scan3", "images": ["/gone/scan3.png"]}]}
    (tmp_path / "run" / "split.json").write_text(json.dumps(split))
    assert evaluate_classes(table, progress=False)["reliability"]["is_cross_fitted"]
    split["validation"][0]["images"] = ["/other/scan3.png"]
    (tmp_path / "run" / "split.json").write_text(json.dumps(split))
    assert not evaluate_classes(table, progress=False)["reliability"]["is_own_fold"]


def test_a_single_patient_gives_no_interval_and_says_that_calibration_is_flattered(tmp_path: Path) -> None:
    table = write_table(tmp_path, head={"fold": "validation"})
    content = json.loads((tmp_path / "classes.json").read_text())
    for case in content["cases"]:
        case["patient"] = "p"
    (tmp_path / "classes.json").write_text(json.dumps(content))
    scores = evaluate_classes(table, progress=False)
    assert {found["low"] for found in scores["summary"].values()} == {None}
    assert "flattered" in format_class_scores(scores)


def test_multilabel_scores(tmp_path: Path) -> None:
    references = [["abdomen"], [], ["chest", "head"], ["chest"], ["head"], ["abdomen", "head"], ["head"], ["abdomen"]]
    table = write_table(tmp_path, logits=LOGITS - 1, references=references, is_multilabel=True)
    scores = evaluate_classes(table, progress=False)
    json.dumps(scores, allow_nan=False)
    assert "kappa" not in scores["summary"]
    # A probability of exactly 0.5 (a logit of 0) is a yes: right are scans 0, 2, 3, 5, 6 and 7.
    assert scores["summary"]["accuracy"]["value"] == 6 / 8
    assert scores["confusion"][0] == [[4, 1], [0, 3]]
    # Of nothing it is given two; the surer is the worse.
    assert scores["cases"][1]["mistake"]["class"] == "chest"
    assert scores["cases"][4]["predicted"] == ["chest", "head"]
    assert "macro mean" in format_class_scores(scores)


def put_csv(folder: Path, text: str) -> Path:
    (folder / "references.csv").write_text(text)
    return folder / "references.csv"


@pytest.mark.parametrize("column", ["case", "image"])
def test_references_of_a_csv_file_go_before_those_of_the_table(tmp_path: Path, column: str) -> None:
    table = write_table(tmp_path)
    suffix = ".png" if column == "image" else ""
    rows = "".join(f"scan{k}{suffix},{NAMES[LOGITS[k].argmax()]},q{k}\n" for k in range(7))
    scores = evaluate_classes(table, put_csv(tmp_path, f"{column},label,patient\n{rows}zoo,head,\n"), progress=False)
    assert scores["summary"]["accuracy"]["value"] == 1
    assert scores["without_reference"] == ["scan7"]
    assert scores["bootstrap"]["num_patients"] == 7
    assert scores["notes"] == ["1 of the references fit no case, such as zoo."]


def test_references_of_a_folder_for_each_class(tmp_path: Path) -> None:
    for k, true in enumerate(TRUE):
        (tmp_path / "tree" / NAMES[true]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / NAMES[true] / f"scan{k}.png").touch()
    scores = evaluate_classes(write_table(tmp_path, references=[None] * 8), tmp_path / "tree", progress=False)
    assert scores["num_cases"] == 8
    assert scores["summary"]["accuracy"]["value"] == 6 / 8


def test_images_of_one_name_in_two_classes_are_told_apart_by_path_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "scan.png").touch()
    logits = np.array([[1.0, 0], [0, 1]])
    table = write_table(tmp_path, names=("a", "b"), logits=logits, references=[None, None])
    content = json.loads((tmp_path / "classes.json").read_text())
    for case, name in zip(content["cases"], "ab", strict=True):
        case["image"] = [str(tmp_path / "tree" / name / "scan.png")]
    (tmp_path / "classes.json").write_text(json.dumps(content))
    assert evaluate_classes(table, tmp_path / "tree", progress=False)["summary"]["accuracy"]["value"] == 1
    moved = (tmp_path / "tree").rename(tmp_path / "moved")
    with pytest.raises(MedmomError, match=r"a/scan\.png and b/scan\.png may both be the case scan0"):
        evaluate_classes(table, moved, progress=False)


def test_multilabel_references_of_a_csv_file(tmp_path: Path) -> None:
    table = write_table(tmp_path, logits=LOGITS - 1, is_multilabel=True)
    joined = put_csv(tmp_path, "case,label\nscan0,abdomen; head\nscan1,\n")
    found = {case["name"]: case["reference"] for case in evaluate_classes(table, joined, progress=False)["cases"]}
    assert found == {"scan0": ["abdomen", "head"], "scan1": []}
    yes_no = put_csv(tmp_path, "case,label_abdomen,label_chest,label_head\nscan0,1,0,1\nscan1,0,0,0\n")
    again = {case["name"]: case["reference"] for case in evaluate_classes(table, yes_no, progress=False)["cases"]}
    assert again == found


def edit_table(change: Callable[[list[str]], list[str]]) -> Callable[[Path], Path | None]:
    def fault(folder: Path) -> None:
        path = folder / "classes.csv"
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return fault


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path | None]:
    def fault(folder: Path) -> None:
        path = folder / "classes.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return fault


def references(text: str) -> Callable[[Path], Path | None]:
    return lambda folder: put_csv(folder, text)


def no_logits(content: dict[str, Any]) -> None:
    for case in content["cases"]:
        case["logits"] = None


def probability(text: str) -> Callable[[Path], Path | None]:
    def fault(folder: Path) -> None:
        edit_json(no_logits)(folder)
        edit_table(lambda lines: [lines[0], re.sub(r"[\d.]+$", text, lines[1]), *lines[2:]])(folder)

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (edit_table(lambda lines: [lines[0].replace("p_head", "head"), *lines[1:]]), "has no column p_head"),
        (edit_table(lambda lines: [lines[0].replace("case", "id"), *lines[1:]]), "has no column case"),
        (edit_table(lambda lines: [*lines, lines[3]]), "two rows are of the case scan2. Keep one"),
        (edit_table(lambda lines: lines[:-1]), r"has no row of the case scan7, which classes\.json lists"),
        (edit_table(lambda lines: [*lines, lines[1].replace("scan0", "new")]), r"the case new is not in classes\.json"),
        (probability("many"), "p_head of the case scan0 is 'many', no number from 0 to 1"),
        (probability("nan"), "p_head of the case scan0 is 'nan', no number from 0 to 1"),
        (probability("1.2"), "p_head of the case scan0 is '1.2', no number from 0 to 1"),
        (probability(""), "p_head of the case scan0 is '', no number from 0 to 1"),
        (probability("0.2"), r"probabilities of the case scan0 add up to 1\.0\d+, not to 1"),
        (edit_json(lambda c: c.update(temperature=3.0)), "case scan0 are not those of its logits"),
        (edit_json(lambda c: c["cases"][0].update(logits=[1, 2])), "case scan0 are not those of its logits"),
        (edit_json(lambda c: c.update(temperature=0)), r"classes\.json: not as medmom predict wrote it"),
        (edit_json(lambda c: c.pop("classes")), r"classes\.json: not as medmom predict wrote it"),
        (edit_json(lambda c: c["cases"][0].pop("name")), r"classes\.json: not as medmom predict wrote it"),
        (edit_json(lambda c: c["cases"].append(c["cases"][0])), "lists the case scan0 twice"),
        (edit_json(lambda c: c["cases"][0].update(reference=["pelvis"])), "scan0 is of the class pelvis"),
        (edit_json(lambda c: c["cases"][0].update(reference=["head", "chest"])), "scan0 is of 2 classes"),
        (edit_json(lambda c: [case.update(reference=None) for case in c["cases"]]), "no case has a reference"),
        (references("case,label\nscan0,pelvis\n"), r"references\.csv: scan0 is of the class pelvis, which the model"),
        (references("case,label\nscan0,head;chest\n"), r"references\.csv: scan0 is of 2 classes"),
        (references("case,label\nscan0,head\nscan0,chest\n"), "two rows are of scan0. Keep one"),
        (references("case,diagnosis\nscan0,head\n"), "none of the columns case, diagnosis is called label or class"),
        (references("scan,label\nscan0,head\n"), "none of the columns scan, label is called case, name, image or file"),
        (references("case,label\nzoo,head\n"), r"none of the cases of .*classes\.csv; it names zoo, the table scan0"),
        (references("case,label\n"), r"references\.csv: lists no image"),
        (lambda folder: folder / "nowhere", "nowhere: there are no such references"),
        (references("case,label_abdomen,label_chest,label_head\nscan0,1,no,0\n"), "label_chest is 'no' in a row"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_right_is_refused_in_one_line(
    tmp_path: Path, fault: Callable[[Path], Path | None], message: str
) -> None:
    table = write_table(tmp_path)
    given = fault(tmp_path)
    with pytest.raises(MedmomError, match=message) as caught:
        evaluate_classes(table, given, progress=False)
    assert "\n" not in str(caught.value)


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, logits=np.zeros((0, 3)), references=[])
    with pytest.raises(MedmomError, match="lists no case"):
        evaluate_classes(table, progress=False)
    table.write_text("")
    with pytest.raises(MedmomError, match="is no header"):
        evaluate_classes(table, progress=False)


def test_the_printed_table_is_aligned_and_complete(tmp_path: Path) -> None:
    lines = format_class_scores(evaluate_classes(write_table(tmp_path), progress=False)).splitlines()
    assert lines[0].split() == ["class", "f1", "95", "%", "interval", "auroc", "auprc", "recall", "precision", "cases"]
    assert {len(line) for line in lines[:6]} == {len(lines[0])}
    assert lines[5].startswith("macro mean")
    text = "\n".join(lines)
    for title in ("accuracy", "balanced accuracy", "cohen's kappa", "brier score", "calibration error"):
        assert re.search(rf"^{title} +0\.\d\d\d", text, re.MULTILINE), title
    assert "8 cases of 4 patients, 0 not predicted (counted as wrong), 1 flagged." in lines
