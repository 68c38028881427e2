"""Training and validation images of a classification, so that no patient is on both sides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medmom.data.casefiles import CaseFiles
from medmom.data.class_cases import TEST, TRAIN, VALIDATION, ClassFolder, natural_key
from medmom.data.folds import Split, split_cases
from medmom.errors import MedmomError


def split_class_cases(folder: ClassFolder, *, fold: int, folds: int, seed: int, blocks: int | None = None) -> Split:
    """Splits classified cases; every class is trained on, and classes are equally frequent in all folds.

    A split that comes with the data decides: ``train`` against ``val``, or the number ``fold`` against the other
    numbers. Where there is a ``train`` but no ``val``, its cases are split into folds. Cases of ``test`` take no part.

    Args:
        folder: The cases.
        fold: Which part to validate on, from 0.
        folds: Number of parts; not asked for where the data come split.
        seed: Changes who comes together with whom.
        blocks: As for ``with_blocks``; None: groups are as listed.

    Raises:
        MedmomError: A group lies on both sides, a class has no training case, or there are too few groups.
    """
    folder = folder if blocks is None else with_blocks(folder, blocks)
    if blocks is not None and blocks < folds:
        raise MedmomError(f"data.blocks {blocks}: too few for {folds} folds. Set --data.blocks {4 * folds}.")
    cases = [case for case in folder.cases if case.fold != TEST]
    named = {case.fold for case in cases} - {None}
    if named <= {TRAIN}:
        strata = {case.name: ";".join(case.classes or ()) for case in cases}
        split = split_cases(cases, strata, fold=fold, folds=folds, seed=seed)
    else:
        split = _own_split(cases, fold)
    check_classes(split, folder)
    return split


def with_blocks(folder: ClassFolder, blocks: int) -> ClassFolder:
    """Makes groups of neighbours: each class's cases, in the order of their names, are cut into that many blocks.

    For sets whose neighbouring numbers are slices of one scan and whose patients are not known: at most the scans
    that a cut runs through lie in two groups.

    Args:
        folder: The cases.
        blocks: Groups of each class; several times the number of folds.

    Raises:
        MedmomError: The data say what belongs together, or come split.
    """
    listed = next((case for case in folder.cases if case.group != case.name), None)
    if listed is not None:
        raise MedmomError(
            f"data.blocks {blocks}: {folder.folder} says what belongs together ({listed.name} to {listed.group}). "
            "Set --data.blocks null."
        )
    if any(case.fold not in (None, TEST) for case in folder.cases):
        raise MedmomError(f"data.blocks {blocks}: {folder.folder} comes split. Set --data.blocks null.")
    members: dict[tuple[str, ...], list[CaseFiles]] = defaultdict(list)
    for case in sorted(folder.cases, key=lambda case: natural_key(case.name)):
        members[case.classes or ()].append(case)
    group = {
        case.name: f"{';'.join(classes)} block {k + 1}"
        for classes, listed_cases in members.items()
        for k, places in enumerate(np.array_split(np.arange(len(listed_cases)), blocks))
        for case in (listed_cases[place] for place in places)
    }
    cases = tuple(replace(case, group=group[case.name]) for case in folder.cases)
    notes = tuple(note for note in folder.notes if not note.startswith("no column patient"))
    made = f"{len(set(group.values()))} groups of neighbours: {blocks} blocks of each class, in the order of the names"
    return replace(folder, cases=cases, notes=(*notes, made))


def check_classes(split: Split, folder: ClassFolder) -> None:
    """Demands that every class has a training case.

    Raises:
        MedmomError: A class has none.
    """
    classes = {case.name: case.classes or () for case in folder.cases}
    trained = Counter(name for case in split.train for name in classes[case])
    for name in folder.classes.names:
        if not trained[name]:
            found = sum(name in classes[case] for case in split.validation)
            where = f"{found} validation images are of class {name}" if found else f"no image is of class {name}"
            raise MedmomError(
                f"{folder.folder}: {where}, and no training image is. Add some, choose another --data.fold, or take "
                "the class out."
            )


def _own_split(cases: Sequence[CaseFiles], fold: int) -> Split:
    """Follows the split that came with the data."""
    known = sorted({case.fold for case in cases if case.fold}, key=natural_key)
    held_out = VALIDATION if VALIDATION in known else str(fold)
    if held_out not in known or len(known) < 2:
        raise MedmomError(
            f"--data.fold {fold}: the data come split into {', '.join(known)}. "
            f"{'Choose one of these.' if known[0].isdigit() else 'Give images of train and of val.'}"
        )
    train = sorted(case.name for case in cases if case.fold != held_out)
    validation = sorted(case.name for case in cases if case.fold == held_out)
    groups = {case.group for case in cases if case.fold == held_out}
    shared = next((case for case in cases if case.fold != held_out and case.group in groups), None)
    if shared is not None:
        raise MedmomError(
            f"{shared.name}: it is trained on, but others of {shared.group} validate. Correct the column fold, so that "
            "a patient is in one part."
        )
    return Split(tuple(train), tuple(validation))
