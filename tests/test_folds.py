from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from medmom.data.case import CaseFiles, Split, check_leakage, find_cases, split_cases
from medmom.data.folds import leave_out, named_split
from medmom.errors import MedmomError


def cases(groups: list[str]) -> list[CaseFiles]:
    return [CaseFiles(f"case{k:03d}", (Path(f"{k}.nii"),), None, group) for k, group in enumerate(groups)]


def random_cases(seed: int, num_cases: int, num_groups: int) -> tuple[list[CaseFiles], dict[str, str]]:
    rng = np.random.default_rng(seed)
    groups = [f"p{k}" for k in range(num_groups)] + [
        f"p{k}" for k in rng.integers(num_groups, size=num_cases - num_groups)
    ]
    listed = cases(groups)
    return listed, {case.name: str(rng.choice(list("abc"), p=[0.6, 0.3, 0.1])) for case in listed}


@pytest.mark.parametrize("folds", [2, 4, 5])
@pytest.mark.parametrize("seed", range(10))
def test_every_group_is_validated_in_exactly_one_fold(seed: int, folds: int) -> None:
    listed, strata = random_cases(seed, 60, 25)
    splits = [split_cases(listed, strata, fold=fold, folds=folds, seed=seed) for fold in range(folds)]
    group = {case.name: case.group for case in listed}
    assert sorted(name for split in splits for name in split.validation) == sorted(group)
    for split in splits:
        assert sorted((*split.train, *split.validation)) == sorted(group)
        assert not {group[name] for name in split.train} & {group[name] for name in split.validation}


@pytest.mark.parametrize("num_cases", [5, 7, 23, 104])
@pytest.mark.parametrize("seed", range(5))
def test_folds_of_single_cases_differ_by_one_in_size_and_in_each_stratum(seed: int, num_cases: int) -> None:
    listed, strata = random_cases(seed, num_cases, num_cases)
    splits = [split_cases(listed, strata, fold=fold, seed=seed) for fold in range(5)]
    sizes = [len(split.validation) for split in splits]
    assert max(sizes) - min(sizes) <= 1
    for kind in "abc":
        share = [Counter(strata[name] for name in split.validation)[kind] for split in splits]
        assert max(share) - min(share) <= 1


def test_large_group_of_one_stratum_leaves_the_other_stratum_even() -> None:
    listed = cases(["p"] * 6 + [f"q{k}" for k in range(24)])
    strata = {case.name: "a" if k < 20 else "b" for k, case in enumerate(listed)}
    for fold in range(5):
        validation = split_cases(listed, strata, fold=fold).validation
        assert Counter(strata[name] for name in validation)["b"] == 2


def test_order_of_the_cases_does_not_matter_but_the_seed_does() -> None:
    listed, strata = random_cases(0, 40, 20)
    split = split_cases(listed, strata, fold=1)
    assert split_cases(listed[::-1], strata, fold=1) == split
    assert split_cases(listed, strata, fold=1, seed=1) != split


def test_split_is_the_same_in_another_process() -> None:
    code = (
        "from pathlib import Path\n"
        "from medmom.data.case import CaseFiles, split_cases\n"
        "listed = [CaseFiles(f'case{k:03d}', (Path('x'),), None, f'p{k // 2}') for k in range(20)]\n"
        "print(*split_cases(listed, {}, fold=2).validation)"
    )
    root = Path(__file__).resolve().parent.parent
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert tuple(output.split()) == split_cases(cases([f"p{k // 2}" for k in range(20)]), {}, fold=2).validation


def test_four_cases_can_make_four_folds() -> None:
    splits = [split_cases(cases(list("abcd")), {}, fold=fold, folds=4) for fold in range(4)]
    assert [len(split.validation) for split in splits] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("groups", "fold", "folds", "text"),
    [
        (list("aabbcd"), 0, 5, "6 cases of 4 groups .* cannot make 5 folds. Set --data.folds 4"),
        (list("aaa"), 0, 2, "3 cases of 1 groups .* Add cases of another patient"),
        (list("abcdef"), 5, 5, "fold 5 of 5: folds are at least 2 and counted from 0"),
        (list("abcdef"), -1, 5, "counted from 0"),
        (list("abcdef"), 0, 1, "at least 2"),
    ],
)
def test_folds_that_cannot_be_made_are_refused(groups: list[str], fold: int, folds: int, text: str) -> None:
    with pytest.raises(MedmomError, match=text):
        split_cases(cases(groups), {}, fold=fold, folds=folds)


def test_leak_and_unknown_case_are_refused() -> None:
    listed = cases(list("aabc"))
    with pytest.raises(MedmomError, match="group a is in training and in validation"):
        check_leakage(Split(("case000", "case002"), ("case001",)), listed)
    with pytest.raises(MedmomError, match="names the case case009, which the data folder lacks"):
        check_leakage(Split(("case009",), ()), listed)
    check_leakage(Split(("case000", "case001"), ("case002", "case003")), listed)


def test_pairs_of_real_subjects_stay_together(shared_data: Path) -> None:
    found = find_cases(shared_data / "mri-hippocampus-msd04" / "public", group="subject_pair")
    sizes = []
    for fold in range(5):
        split = split_cases(found.cases, {}, fold=fold)
        check_leakage(split, found.cases)
        sizes.append(len(split.validation))
    assert sum(sizes) == 194
    assert max(sizes) - min(sizes) <= 2


def named(*names: str) -> list[CaseFiles]:
    return [CaseFiles(name, (), None, name.split("_")[0]) for name in names]


def test_named_cases_validate_and_the_others_train() -> None:
    split = named_split(named("a_1", "b_1", "b_2", "c_1"), ["b_*"])
    assert (split.train, split.validation) == (("a_1", "c_1"), ("b_1", "b_2"))


@pytest.mark.parametrize(
    "patterns, text",
    [
        (["d_*"], "'d_*' is the name of no case, such as a_1"),
        (["*"], "names all 4 cases"),
        (["b_1"], "the case b_2 of b would be trained on"),
    ],
)
def test_names_that_make_no_split_are_refused(patterns: list[str], text: str) -> None:
    with pytest.raises(MedmomError, match=re.escape(text)):
        named_split(named("a_1", "b_1", "b_2", "c_1"), patterns)


def test_cases_are_left_out_by_name() -> None:
    assert [case.name for case in leave_out(named("a_1", "a_12", "b_1"), ["a_[0-9]"])] == ["a_12", "b_1"]
    assert len(leave_out(named("a_1"), [])) == 1
    with pytest.raises(MedmomError, match="is the name of no case"):
        leave_out(named("a_1"), ["x"])
