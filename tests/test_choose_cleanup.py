from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medmom.cleanup import Cleanup
from medmom.errors import MedmomError
from medmom.evaluation.choose_cleanup import Choice, _Study, choose_cleanup, format_choice
from medmom.evaluation.matching import match
from medmom.evaluation.paired import Pairs, paired_gain
from medmom.evaluation.scores import evaluate
from medmom.labels import Labels

LABELS = Labels(("background", "liver", "lungs"), (0, 1, 4))
SHAPE = (24, 20, 16)

Spoil = Callable[[np.ndarray, np.random.Generator], None]


def organs(shift: int = 0) -> np.ndarray:
    """A liver in one piece, and two lungs that are one class."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:20, 4:16, 1 + shift : 6 + shift] = 1
    label[3:9, 5:15, 8 + shift : 14] = label[13:20, 5:15, 8 + shift : 14] = 4
    return label


def islands(label: np.ndarray, rng: np.random.Generator) -> None:
    """Pieces of liver far from it: at the feet, beside nothing else."""
    for _ in range(3):
        x, y = rng.integers(0, 20), rng.integers(17, 19)
        label[x : x + 3, y : y + 2, 10:13] = 1


def specks(label: np.ndarray, rng: np.random.Generator) -> None:
    """Single voxels of every class that are wrong."""
    flat = label.reshape(-1)
    flat[rng.choice(flat.size, 160, replace=False)] = rng.choice([0, 1, 4], 160)


def nothing(label: np.ndarray, rng: np.random.Generator) -> None:
    """A perfect prediction."""


def write(path: Path, label: np.ndarray, spacing: Sequence[float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(label[..., 0].T.astype(np.uint8)).save(path)
    else:
        nib.save(nib.Nifti1Image(label, np.diag([*spacing, 1.0])), path)
    return path


def study(folder: Path, spoil: Spoil, *, patients: int = 8, spacing: Sequence[float] = (1, 1, 1), **entry: Any) -> Path:
    """Writes references, predictions that ``spoil`` makes of them, and their list; gives the folder."""
    rng, entries = np.random.default_rng(0), []
    for k in range(patients):
        label = organs(k % 2)
        reference = write(folder / "references" / f"c{k}.nii", label, spacing)
        spoil(label, rng)
        write(folder / "validation" / f"c{k}.nii", label, spacing)
        row = {"name": f"c{k}", "prediction": f"c{k}.nii", "reference": str(reference), "patient": f"p{k}"}
        entries.append({**row, **entry})
    return listed(folder / "validation", entries)


def listed(folder: Path, entries: list[dict[str, Any]], labels: Labels = LABELS) -> Path:
    (folder / "cases.json").write_text(json.dumps({"labels": labels.as_dict(), "model": None, "cases": entries}))
    return folder


def chosen(folder: Path) -> Choice:
    return choose_cleanup(match(folder, None, None))


def trial(choice: Choice, name: str, candidate: str) -> Any:
    return [t for t in choice.trials if (t.name, t.candidate) == (name, candidate)]


def test_largest_part_is_chosen_where_islands_are_and_not_for_two_lungs(tmp_path: Path) -> None:
    choice = chosen(study(tmp_path, islands))
    assert choice.cleanup.largest == ("liver",)
    (liver,), (lungs,) = trial(choice, "liver", "largest part"), trial(choice, "lungs", "largest part")
    assert liver.is_taken
    assert liver.gain.gain > 0.01
    assert liver.gain.after == 1
    assert (lungs.is_taken, lungs.reason) == (False, "no gain")
    assert lungs.gain.after < 0.75


def test_perfect_predictions_choose_nothing(tmp_path: Path) -> None:
    choice = chosen(study(tmp_path, nothing))
    assert choice.cleanup == Cleanup()
    assert {t.reason for t in choice.trials} == {"changes nothing", "no gain"}
    assert format_choice(choice).endswith("of 8 patients: nothing.")


def test_each_cleanup_starts_from_the_files(tmp_path: Path) -> None:
    pairs = Pairs.find(match(study(tmp_path, specks, patients=1), None, None))
    cleanups = [Cleanup((), tuple((name, mm) for name in LABELS.foreground)) for mm in (2.5, 1.0)]
    cleanups.append(Cleanup())
    apart = [pairs.dice([cleanup])[0] for cleanup in cleanups]
    np.testing.assert_array_equal(pairs.dice(cleanups), apart)
    assert len(np.unique(apart)) == 6


def test_smoothing_is_chosen_against_specks_in_mm_of_the_grid(tmp_path: Path) -> None:
    choice = chosen(study(tmp_path, specks, spacing=(2, 2, 2)))
    assert set(dict(choice.cleanup.smoothing)) == {"liver", "lungs"}
    assert set(dict(choice.cleanup.smoothing).values()) <= {1.4, 2.0, 3.0}
    assert {t.mm for t in trial(choice, "liver", "smoothing")} == {1.4, 2.0, 3.0}
    taken = [t for t in choice.trials if t.is_taken]
    assert all(t.gain.low > 0 for t in taken)
    assert sum(t.candidate == "smoothing" for t in taken) == 2


def test_gain_of_few_patients_among_many_is_not_sure(tmp_path: Path) -> None:
    turn = iter(range(8))

    def seldom(label: np.ndarray, rng: np.random.Generator) -> None:
        if next(turn) == 3:
            islands(label, rng)

    choice = chosen(study(tmp_path, seldom))
    (liver,) = trial(choice, "liver", "largest part")
    assert liver.gain.gain > 0
    assert (liver.gain.num_changed, liver.gain.low, liver.reason) == (1, 0, "gain not sure")
    assert choice.cleanup == Cleanup()


def test_fewer_than_five_patients_choose_nothing(tmp_path: Path) -> None:
    few = chosen(study(tmp_path / "few", islands, patients=4))
    same = chosen(study(tmp_path / "same", islands, patient="one"))
    assert few.cleanup == same.cleanup == Cleanup()
    assert few.notes == ("4 patients, fewer than 5: nothing is chosen.",)
    assert same.notes == ("1 patient, fewer than 5: nothing is chosen.",)
    assert (same.num_cases, same.num_patients) == (8, 1)


def test_only_annotated_classes_count(tmp_path: Path) -> None:
    choice = chosen(study(tmp_path, islands, annotated=["lungs"]))
    (liver,) = trial(choice, "liver", "largest part")
    assert choice.cleanup == Cleanup()
    assert (liver.gain.num_patients, liver.gain.before, liver.reason) == (0, None, "fewer than 5 patients")


def test_dice_before_is_that_of_evaluate_with_a_missing_prediction(tmp_path: Path) -> None:
    folder = study(tmp_path, islands)
    (folder / "c2.nii").unlink()
    scores = evaluate(folder)
    choice = chosen(folder)
    for name in LABELS.foreground:
        (row,) = trial(choice, name, "largest part")
        assert row.gain.before == pytest.approx(scores["classes"][name]["dice"]["mean"], abs=1e-12)
        assert row.gain.num_patients == 8


def test_ignored_voxels_count_in_no_dice(tmp_path: Path) -> None:
    folder = study(tmp_path, islands)
    for path in (tmp_path / "references").iterdir():
        label = np.asarray(nib.load(path).dataobj).astype(np.uint8)
        label[:, 17:] = 9
        write(path, label, (1, 1, 1))
    labels = Labels(LABELS.names, LABELS.values, ignore=9)
    entries = json.loads((folder / "cases.json").read_text())["cases"]
    choice = chosen(listed(folder, entries, labels))
    assert choice.cleanup == Cleanup()
    assert {t.gain.before for t in choice.trials} == {1.0}


class MadeUpPairs:
    """Dice that a rule gives, without files."""

    names, edge = ("a", "b", "c"), 2.0

    def __init__(self, rule: Callable[[dict[str, float]], Sequence[float]]) -> None:
        self.rule = rule
        self.asked: list[Cleanup] = []

    def dice(self, cleanups: Sequence[Cleanup]) -> np.ndarray:
        self.asked += cleanups
        wobble = np.linspace(0.999, 1.001, 8)[:, None]
        return np.array([0.5 + wobble * self.rule(dict(cleanup.smoothing)) for cleanup in cleanups])


def smoothed(rule: Callable[[dict[str, float]], Sequence[float]]) -> tuple[_Study, MadeUpPairs]:
    pairs = MadeUpPairs(rule)
    study = _Study(pairs, [str(k) for k in range(8)])  # type: ignore[arg-type]
    study.try_largest()
    study.try_smoothing()
    return study, pairs


def test_each_class_takes_its_best_width() -> None:
    study, pairs = smoothed(
        lambda mm: [mm.get("a", 0) / 100, 0.05 - abs(mm.get("b", 0) - 2) / 100 if "b" in mm else 0, 0]
    )
    assert study.cleanup == Cleanup((), (("a", 3.0), ("b", 2.0)))
    assert pairs.asked[-1] == study.cleanup
    assert {t.reason for t in study.trials if t.name == "c"} == {"changes nothing"}
    assert [t.reason for t in study.trials if t.name == "a"][1:] == ["another width gains more"] * 2 + ["taken"]


def test_smoothing_that_costs_another_class_is_dropped() -> None:
    study, pairs = smoothed(lambda mm: [0.1 * ("a" in mm), 0.05 * ("b" in mm), -0.02 * ("b" in mm)])
    assert dict(study.cleanup.smoothing) == {"a": 1.4}
    assert "costs c" in {t.reason for t in study.trials if t.name == "b"}
    assert pairs.asked[-1] == study.cleanup


def test_smoothing_that_does_not_hold_with_the_others_is_dropped() -> None:
    def rule(mm: dict[str, float]) -> list[float]:
        at = (mm.get("a"), mm.get("b"))
        return [0.1 * (at[0] == 1.4), {None: 0.0, 3: -0.1 if at[0] == 1.4 else 0.1}.get(at[1], 0.0), 0]

    study, _ = smoothed(rule)
    assert dict(study.cleanup.smoothing) == {"a": 1.4}
    assert "not with the others" in {t.reason for t in study.trials if t.name == "b"}


def test_pictures_choose_in_pixels(tmp_path: Path) -> None:
    labels, entries, rng = Labels(("background", "polyp"), (0, 3)), [], np.random.default_rng(0)
    for k in range(6):
        label = np.zeros((30, 24, 1), np.uint8)
        label[5:15, 5:14] = 3
        reference = write(tmp_path / "masks" / f"c{k}.png", label, ())
        label[20:23, 18 : 20 + rng.integers(0, 3)] = 3
        write(tmp_path / "validation" / f"c{k}.png", label, ())
        entries.append({"name": f"c{k}", "prediction": f"c{k}.png", "reference": str(reference)})
    choice = chosen(listed(tmp_path / "validation", entries, labels))
    assert choice.cleanup.largest == ("polyp",)
    assert {t.mm for t in trial(choice, "polyp", "smoothing")} == {0.7, 1.0, 1.5}


def test_table_and_json_tell_the_same(tmp_path: Path) -> None:
    choice = chosen(study(tmp_path, islands))
    told = json.loads(json.dumps(choice.as_dict(), allow_nan=False))
    assert Cleanup.from_dict(told["cleanup"], LABELS) == choice.cleanup
    assert {"class", "candidate", "before", "after", "gain", "low", "high", "is_taken", "reason"} <= set(
        told["trials"][0]
    )
    lines = format_choice(choice).splitlines()
    assert lines[0].split()[:4] == ["class", "candidate", "dice", "before"]
    assert [line.split()[0] for line in lines[1:5]] == ["liver", "lungs"] * 2
    assert lines[5] == "Cleanup chosen on 8 cases of 8 patients: largest part of liver."
    assert "optimistic" in lines[6]


def test_faults_of_files_are_named(tmp_path: Path) -> None:
    folder = study(tmp_path / "value", nothing)
    write(folder / "c1.nii", organs() + 5, (1, 1, 1))
    with pytest.raises(MedmomError, match=r"c1\.nii: label value 5, 6, 9 is not among"):
        chosen(folder)
    folder = study(tmp_path / "grid", nothing)
    write(folder / "c1.nii", organs(), (1, 1, 2))
    with pytest.raises(MedmomError, match=r"c1\.nii: another grid than"):
        chosen(folder)


def test_interval_is_over_patients_and_not_over_cases() -> None:
    before, after = np.zeros(10), np.array([1.0] * 5 + [0.0] * 5)
    cases = paired_gain(before, after, [str(k) for k in range(10)])
    patients = paired_gain(before, after, ["a"] * 5 + ["b"] * 5)
    assert (cases.gain, patients.gain) == (0.5, 0.5)
    assert (cases.low or 0) > 0
    assert (patients.low, patients.high, patients.num_patients) == (0, 1, 2)


def test_cases_without_a_score_are_left_out_of_the_gain() -> None:
    gain = paired_gain(np.array([np.nan, 0.5, 0.0]), np.array([0.9, 0.75, np.nan]), ["a", "b", "c"])
    assert (gain.before, gain.after, gain.gain, gain.low, gain.num_patients) == (0.5, 0.75, 0.25, None, 1)
