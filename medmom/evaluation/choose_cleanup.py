"""Which cleanup of label maps validation cases ask for: nothing is done that they do not show to help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmom.cleanup import Cleanup
from medmom.evaluation.matching import Matching
from medmom.evaluation.paired import Gain, Pairs, paired_gain

MIN_PATIENTS = 5
"""Fewer patients choose nothing."""

SIGMAS = (0.7, 1.0, 1.5)
"""Smoothings that are tried, in voxel edges; narrower ones change single voxels alone."""

OPTIMISTIC = (
    "Chosen on these very cases: their scores with the cleanup are optimistic. Judge it on cases that chose nothing."
)


@dataclass(frozen=True)
class Trial:
    """A candidate for one class, and what became of it.

    Attributes:
        name: The class.
        candidate: ``"largest part"`` or ``"smoothing"``.
        mm: Standard deviation of the smoothing in mm; None of the other.
        gain: Of the Dice of the class.
        is_taken: Whether it is part of the choice.
        reason: Why, or why not, in a few words.
    """

    name: str
    candidate: str
    mm: float | None
    gain: Gain
    is_taken: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The cleanup that validation cases ask for, and all that was tried.

    Attributes:
        cleanup: Empty where nothing helps.
        trials: In the order in which they were judged.
        num_cases: Validation cases.
        num_patients: Their patients.
        notes: Sentences for the reader.
    """

    cleanup: Cleanup
    trials: tuple[Trial, ...]
    num_cases: int
    num_patients: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        rows = []
        for trial in self.trials:
            row = asdict(trial)
            rows.append({"class": row.pop("name"), **row.pop("gain"), **row})
        counts = {"num_cases": self.num_cases, "num_patients": self.num_patients}
        return {"cleanup": self.cleanup.as_dict(), **counts, "trials": rows, "notes": list(self.notes)}


def choose_cleanup(matching: Matching, *, progress: bool = False) -> Choice:
    """Chooses, class by class, what to do with label maps after the network.

    A candidate is taken where the mean Dice of its class over the cases gains, the lower end of the 90 % bootstrap
    interval of that gain over patients lies above 0, and no other class loses; else it is left off. First the
    largest part of each class is tried, then, with what was taken, smoothing by 0.7, 1 and 1.5 voxel edges (the cube
    root of a voxel's volume, median over the cases) of all classes together, of which each class takes the width
    with the largest gain; these widths are then tried together, and the weakest dropped until all hold.

    The cases have chosen, so that their scores with the cleanup are optimistic. With several candidates a class,
    some of many classes will pass by chance (one in twenty at each that does nothing on the average).

    A case without a prediction counts as before, with Dice 0; classes that are not annotated in a case are left out
    of it, and a class that is neither in the prediction nor in the reference, or is so after the cleanup, too.

    Args:
        matching: Predictions without cleanup, with references.
        progress: Whether to show a bar on standard error.

    Returns:
        The choice; empty with fewer than 5 patients. A class that fewer have is left as it is.

    Raises:
        MedmomError: Predictions and references have no class in common, a file cannot be read or has an unknown
            value, or a prediction lies on another grid than its reference.
    """
    patients = [case.patient for case in matching.cases]
    num_patients = len(set(patients))
    if num_patients < MIN_PATIENTS:
        note = f"{num_patients} {'patient' if num_patients == 1 else 'patients'}, fewer than {MIN_PATIENTS}: nothing "
        return Choice(Cleanup(), (), len(patients), num_patients, (f"{note}is chosen.",))
    study = _Study(Pairs.find(matching, progress=progress), patients)
    study.try_largest()
    study.try_smoothing()
    notes = (OPTIMISTIC,) if study.cleanup else ()
    return Choice(study.cleanup, tuple(study.trials), len(patients), num_patients, notes)


def format_choice(choice: Choice) -> str:
    """The table for the terminal: a line a class and candidate (of the smoothings the best), then the choice.

    Args:
        choice: What ``choose_cleanup`` gives.
    """
    shown: dict[tuple[str, str], Trial] = {}
    for trial in choice.trials:
        key = (trial.name, trial.candidate)
        if key not in shown or _rank(trial) > _rank(shown[key]):
            shown[key] = trial
    rows = [["class", "candidate", "dice before", "after", "gain", "90 % interval", ""], *map(_row, shown.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows if shown else []:
        told = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:6], widths[2:6], strict=True)]
        lines.append("  ".join([*told, *numbers, row[6]]).rstrip())
    cases = f"{choice.num_cases} cases of {choice.num_patients} patients"
    return "\n".join([*lines, f"Cleanup chosen on {cases}: {choice.cleanup}.", *choice.notes])


class _Study:
    """What was tried so far, with the Dice of each case and class under what was taken."""

    def __init__(self, pairs: Pairs, patients: Sequence[str]) -> None:
        self.pairs, self.patients = pairs, patients
        self.names = pairs.names
        self.cleanup = Cleanup()
        self.trials: list[Trial] = []
        self.dice = np.zeros((len(patients), len(self.names)))

    def try_largest(self) -> None:
        """Judges the largest part of each class; one class's parts are nothing to another."""
        self.dice, parts = self.pairs.dice([Cleanup(), Cleanup(largest=self.names)])
        taken = []
        for k, name in enumerate(self.names):
            gain = self._gain(parts, k)
            reason = _fault(gain)
            self.trials.append(Trial(name, "largest part", None, gain, not reason, reason or "taken"))
            if not reason:
                taken.append(name)
                self.dice[:, k] = parts[:, k]
        self.cleanup = Cleanup(largest=tuple(taken))

    def try_smoothing(self) -> None:
        """Judges each width of all classes, then the best of each together, fewer until all hold."""
        edge = self.pairs.edge
        widths = [float(f"{sigma * edge:.3g}") for sigma in SIGMAS]
        tables = self.pairs.dice([self._smoothed(dict.fromkeys(self.names, mm)) for mm in widths])
        best: dict[str, Trial] = {}
        for k, name in enumerate(self.names):
            for mm, table in zip(widths, tables, strict=True):
                gain = self._gain(table, k)
                reason = _fault(gain)
                trial = Trial(name, "smoothing", mm, gain, False, reason or "another width gains more")
                self.trials.append(trial)
                if not reason and (name not in best or _rank(trial) > _rank(best[name])):
                    best[name] = trial
        while best:
            chosen = {name: trial.mm for name, trial in best.items() if trial.mm is not None}
            (table,) = self.pairs.dice([self._smoothed(chosen)])
            gains = {name: self._gain(table, k) for k, name in enumerate(self.names)}
            losers = [name for name, gain in gains.items() if gain.gain is not None and gain.gain < 0]
            failed = [name for name in best if _fault(gains[name])]
            if not failed and not losers:
                break
            # A class that was not smoothed may lose by a neighbour: the weakest goes until none does.
            for name in failed or [min(best, key=lambda name: gains[name].gain or 0.0)]:
                self._settle(best.pop(name), False, "not with the others" if failed else f"costs {losers[0]}")
        for name, trial in best.items():
            self._settle(trial, True, "taken", gains[name])
        if best:
            self.cleanup, self.dice = self._smoothed(chosen), table

    def _smoothed(self, widths: dict[str, float]) -> Cleanup:
        return Cleanup(self.cleanup.largest, tuple(widths.items()))

    def _settle(self, trial: Trial, is_taken: bool, reason: str, gain: Gain | None = None) -> None:
        place = self.trials.index(trial)
        self.trials[place] = Trial(trial.name, trial.candidate, trial.mm, gain or trial.gain, is_taken, reason)

    def _gain(self, table: np.ndarray, k: int) -> Gain:
        return paired_gain(self.dice[:, k], table[:, k], self.patients)


def _fault(gain: Gain) -> str | None:
    """Why a candidate is not taken, or None."""
    if gain.num_patients < MIN_PATIENTS or gain.gain is None or gain.low is None:
        return f"fewer than {MIN_PATIENTS} patients"
    if gain.num_changed == 0:
        return "changes nothing"
    if gain.gain <= 0:
        return "no gain"
    return None if gain.low > 0 else "gain not sure"


def _rank(trial: Trial) -> tuple[bool, float]:
    return trial.is_taken, -np.inf if trial.gain.gain is None else trial.gain.gain


def _row(trial: Trial) -> list[str]:
    gain = trial.gain
    interval = "-" if gain.low is None or gain.high is None else f"{gain.low:+.4f} to {gain.high:+.4f}"
    shown = zip((gain.before, gain.after, gain.gain), ("", "", "+"), strict=True)
    numbers = ["-" if number is None else f"{number:{sign}.4f}" for number, sign in shown]
    width = "" if trial.mm is None else f" {trial.mm:g} mm"
    return [trial.name, f"{trial.candidate}{width}", *numbers, interval, trial.reason]
