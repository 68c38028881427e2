from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medmom.classes import Classes
from medmom.data.casefiles import CaseFiles
from medmom.data.class_cases import ClassFolder
from medmom.data.class_layouts import find_class_cases, split_class_cases
from medmom.data.class_split import check_classes, with_blocks
from medmom.data.folds import Split
from medmom.errors import MedmomError

MEDNIST = Path(__file__).parents[1] / "../shared/data/classify-mednist/public"


def case(name: str, *kinds: str, group: str = "", fold: str | None = None) -> CaseFiles:
    return CaseFiles(name, (Path(f"{name}.png"),), None, group or name, classes=kinds, fold=fold)


def folder(*cases: CaseFiles, is_multilabel: bool = False) -> ClassFolder:
    names = sorted({kind for each in cases for kind in each.classes or ()})
    return ClassFolder(Path("data"), cases, Classes(tuple(names), is_multilabel))


def numbered(**counts: int) -> list[CaseFiles]:
    return [case(f"{kind}-{k}", kind) for kind, count in counts.items() for k in range(count)]


def split(found: ClassFolder, fold: int = 0, *, folds: int = 5, seed: int = 0, blocks: int | None = None) -> Split:
    return split_class_cases(found, fold=fold, folds=folds, seed=seed, blocks=blocks)


def test_every_fold_has_its_share_of_every_class() -> None:
    found = folder(*numbered(cat=20, dog=10, owl=5))
    parts = [split(found, fold) for fold in range(5)]
    assert sorted(name for part in parts for name in part.validation) == sorted(each.name for each in found.cases)
    for part in parts:
        assert Counter(name.partition("-")[0] for name in part.validation) == {"cat": 4, "dog": 2, "owl": 1}
        assert not {*part.train} & {*part.validation}


def test_a_patient_stays_on_one_side() -> None:
    found = folder(*[case(f"c{k}", "cat" if k % 3 else "dog", group=f"P{k // 4}") for k in range(40)])
    patients = {each.name: each.group for each in found.cases}
    for fold in range(5):
        part = split(found, fold)
        assert not {patients[name] for name in part.train} & {patients[name] for name in part.validation}


def test_the_split_of_the_data_decides() -> None:
    kinds = ("cat", "dog")
    cases = [case(f"{fold}{kind}", kind, fold=fold) for fold in ("train", "val", "test") for kind in kinds]
    assert split(folder(*cases), fold=3) == Split(("traincat", "traindog"), ("valcat", "valdog"))


def test_numbers_of_the_data_are_folds() -> None:
    cases = [case(f"{kind}{fold}", kind, fold=str(fold)) for fold in (1, 2, 10) for kind in ("cat", "dog")]
    assert split(folder(*cases), fold=10).validation == ("cat10", "dog10")
    with pytest.raises(MedmomError, match=r"--data.fold 0: the data come split into 1, 2, 10. Choose one of these."):
        split(folder(*cases), fold=0)


def test_training_images_without_validation_are_split_into_folds() -> None:
    cases = [case(f"{kind}{k}", kind, fold="train") for kind in ("cat", "dog") for k in range(5)]
    part = split(folder(*cases, case("t", "cat", fold="test")))
    assert len(part.validation) == 2
    assert "t" not in (*part.train, *part.validation)


def test_a_split_without_training_is_refused() -> None:
    with pytest.raises(MedmomError, match=r"the data come split into val. Give images of train and of val"):
        split(folder(case("a", "cat", fold="val"), case("b", "dog", fold="val")))


def test_a_split_that_parts_a_patient_is_refused() -> None:
    cases = [case("a", "cat", group="P", fold="train"), case("b", "dog", group="P", fold="val")]
    with pytest.raises(MedmomError, match=r"a: it is trained on, but others of P validate. Correct the column fold"):
        split(folder(*cases))


def test_a_class_that_only_validates_is_refused() -> None:
    cases = [*(case(f"{kind}1", kind, fold="train") for kind in ("cat", "dog")), case("x", "owl", fold="val")]
    with pytest.raises(MedmomError, match=r"data: 1 validation images are of class owl, and no training image is. Add"):
        split(folder(*cases))
    lone, faults = folder(*numbered(cat=10, dog=10), case("x", "owl")), []
    for fold in range(5):
        try:
            split(lone, fold)
        except MedmomError as error:
            faults.append(str(error))
    assert len(faults) == 1
    assert "1 validation images are of class owl" in faults[0]


def test_a_class_without_any_image_is_refused() -> None:
    found = ClassFolder(Path("data"), (case("a", "x"), case("b")), Classes(("x", "y"), is_multilabel=True))
    with pytest.raises(MedmomError, match="no image is of class y"):
        check_classes(Split(("a", "b"), ()), found)


def test_cases_of_several_classes_are_split_too() -> None:
    kinds = [("a", "b"), ("b",), (), ("a",)]
    found = folder(*[case(f"c{k}", *kinds[k % 4]) for k in range(40)], is_multilabel=True)
    part = split(found)
    chosen = Counter(each.classes for each in found.cases if each.name in part.validation)
    assert chosen == dict.fromkeys(kinds, 2)


def test_blocks_are_neighbours_in_natural_order() -> None:
    found = with_blocks(folder(*numbered(cat=12, dog=7)), 3)
    groups = {each.name: each.group for each in found.cases}
    assert [groups[f"cat-{k}"] for k in range(12)] == [f"cat block {1 + k // 4}" for k in range(12)]
    assert [groups[f"dog-{k}"] for k in range(7)] == [f"dog block {k}" for k in (1, 1, 1, 2, 2, 3, 3)]
    assert found.notes == ("6 groups of neighbours: 3 blocks of each class, in the order of the names",)


def test_a_block_stays_on_one_side() -> None:
    found = folder(*numbered(cat=40, dog=40))
    groups = {each.name: each.group for each in with_blocks(found, 10).cases}
    for fold in range(5):
        part = split(found, fold, blocks=10)
        assert not {groups[name] for name in part.train} & {groups[name] for name in part.validation}
        assert Counter(name.partition("-")[0] for name in part.validation) == {"cat": 8, "dog": 8}
        numbers = sorted(int(name[4:]) for name in part.validation if name.startswith("cat"))
        assert sum(np.diff(numbers) > 1) <= 1


def test_blocks_of_data_that_know_their_patients_are_refused() -> None:
    with pytest.raises(MedmomError, match=r"data says what belongs together \(a to P\). Set --data.blocks null"):
        split(folder(case("a", "cat", group="P"), case("b", "dog")), blocks=5)
    with pytest.raises(MedmomError, match=r"data comes split. Set --data.blocks null"):
        split(folder(case("a", "cat", fold="train"), case("b", "dog", fold="val")), blocks=5)


def test_fewer_blocks_than_folds_are_refused() -> None:
    with pytest.raises(MedmomError, match=r"data.blocks 4: too few for 5 folds. Set --data.blocks 20."):
        split(folder(*numbered(cat=40, dog=40)), blocks=4)


@pytest.mark.skipif(not MEDNIST.is_dir(), reason="needs the shared data")
def test_blocks_of_mednist_leave_no_class_out() -> None:
    found = find_class_cases(MEDNIST)
    for fold in range(5):
        part = split(found, fold, blocks=20)
        assert Counter(name.partition("-")[0] for name in part.validation) == dict.fromkeys(found.classes.names, 120)
        assert len(part.train) == 2880
