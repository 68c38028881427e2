"""Folds that keep the cases of one patient together."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medmom.data.casefiles import CaseFiles
from medmom.errors import MedmomError


@dataclass(frozen=True)
class Split:
    """The cases of one fold by name, both sides sorted."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def split_cases(
    cases: Sequence[CaseFiles], strata: Mapping[str, str], *, fold: int, folds: int = 5, seed: int = 0
) -> Split:
    """Splits cases into training and validation so that a group never lies on both sides.

    Every group is in the validation part of exactly one fold. The groups of a stratum are dealt out one
    by one, large groups first, to the fold that has the fewest cases of that stratum, then the fewest
    cases. So folds differ by one case at most where each group is one case. The order of ``cases`` does not
    matter.

    Args:
        cases: All cases.
        strata: For each case by name, what should be equally frequent in all folds, such as the classes
            it holds. Cases that are not named share one stratum.
        fold: Which part to validate on, from 0.
        folds: Number of parts.
        seed: Changes who comes together with whom.

    Raises:
        MedmomError: ``fold`` or ``folds`` is out of range, or there are fewer groups than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise MedmomError(
            f"fold {fold} of {folds}: folds are at least 2 and counted from 0. Set --data.fold and --data.folds."
        )
    members: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        members[case.group].append(case.name)
    if len(members) < folds:
        mend = f"Set --data.folds {len(members)}." if len(members) > 1 else "Add cases of another patient."
        raise MedmomError(f"{len(cases)} cases of {len(members)} groups (patients) cannot make {folds} folds. {mend}")
    validation = {name for group in _deal(members, strata, folds, seed)[fold] for name in members[group]}
    names = sorted(case.name for case in cases)
    split = Split(tuple(n for n in names if n not in validation), tuple(n for n in names if n in validation))
    check_leakage(split, cases)
    return split


def leave_out(cases: Sequence[CaseFiles], patterns: Sequence[str]) -> list[CaseFiles]:
    """Gives the cases whose names match none of the patterns, such as ``liver_[0-9]`` for a test set.

    Raises:
        MedmomError: A pattern matches no case.
    """
    names = _matching(cases, patterns, "data.leave_out")
    return [case for case in cases if case.name not in names]


def named_split(cases: Sequence[CaseFiles], validation: Sequence[str]) -> Split:
    """Splits cases by the names of the validation cases.

    Args:
        cases: All cases that take part.
        validation: Names or patterns, such as ``liver_3[0-9]``.

    Raises:
        MedmomError: A pattern matches no case, nothing is left to train on, or a group lies on both sides.
    """
    names = _matching(cases, validation, "data.validation")
    train = sorted(case.name for case in cases if case.name not in names)
    if not train:
        raise MedmomError(f"data.validation {list(validation)}: names all {len(cases)} cases. Leave some to train on.")
    groups = {case.group for case in cases if case.name in names}
    other = next((case for case in cases if case.group in groups and case.name not in names), None)
    if other is not None:
        raise MedmomError(
            f"data.validation: the case {other.name} of {other.group} would be trained on, others of it validate. "
            "Name all cases of a patient."
        )
    return Split(tuple(train), tuple(sorted(names)))


def _matching(cases: Sequence[CaseFiles], patterns: Sequence[str], key: str) -> set[str]:
    names = [case.name for case in cases]
    found: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise MedmomError(f"{key}: {pattern!r} is the name of no case, such as {names[0]}. Mend the pattern.")
        found.update(matches)
    return found


def check_leakage(split: Split, cases: Sequence[CaseFiles]) -> None:
    """Demands that a split, such as a stored one, holds known cases only and no group on both sides.

    Raises:
        MedmomError: A case is unknown, or a case or a group lies on both sides.
    """
    group = {case.name: case.group for case in cases}
    unknown = sorted({*split.train, *split.validation} - group.keys())
    if unknown:
        raise MedmomError(f"the split names the case {unknown[0]}, which the data folder lacks. Start a new run.")
    shared = sorted({group[name] for name in split.train} & {group[name] for name in split.validation})
    if shared:
        raise MedmomError(f"group {shared[0]} is in training and in validation. Start a new run with a fresh split.")


def _deal(members: Mapping[str, Sequence[str]], strata: Mapping[str, str], folds: int, seed: int) -> list[list[str]]:
    """Gives each fold its groups."""
    stratum = {group: "|".join(sorted({strata.get(name, "") for name in names})) for group, names in members.items()}
    shuffled = [sorted(members)[i] for i in np.random.default_rng(seed).permutation(len(members))]
    parts: list[list[str]] = [[] for _ in range(folds)]
    size: Counter[int] = Counter()
    share: Counter[tuple[int, str]] = Counter()
    # Rare strata last: they fill up what the frequent ones leave uneven.
    frequency = Counter(stratum.values())
    for group in sorted(shuffled, key=lambda g: (-frequency[stratum[g]], stratum[g], -len(members[g]))):
        kind = stratum[group]
        k = min(range(folds), key=lambda part: (share[part, kind], size[part], part))
        parts[k].append(group)
        size[k] += len(members[group])
        share[k, kind] += len(members[group])
    return parts
