"""A look at every file of a data folder: what is there, what is wrong with it, and how to train on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmom.data.case import find_cases
from medmom.data.casefiles import CaseFolder
from medmom.data.checkup import Row, check_case
from medmom.data.plan import Proposal, propose, propose_pictures


@dataclass(frozen=True)
class Fault:
    """Something to mend before training.

    Attributes:
        case: Name of the case; empty where a file belongs to none.
        text: File, fact and mend in one line.
    """

    case: str
    text: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """All that was found.

    Attributes:
        folder: The cases as listed.
        rows: One for each readable image.
        faults: In the order of the cases.
        proposal: Values for a recipe; None where no image could be read.
    """

    folder: CaseFolder
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    proposal: Proposal | None


def inspect_folder(
    folder: str | Path, *, group: str | None = None, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Reads every image and label map of a folder once and collects what it finds.

    Faults are: a file that cannot be read (``read_image`` and ``read_label`` say why), a missing label map, a
    file that belongs to no case, another number of channels than ``dataset.json`` names, image and label on
    different grids, a label value that has no name, a label map with no voxel of any annotated class, and
    two cases with the same image.

    Args:
        folder: As for ``find_cases``.
        group: As for ``find_cases``.
        progress: Called with the number of cases done and the number of all.

    Raises:
        MedmomError: The folder cannot be understood at all.
    """
    listed = find_cases(folder, group=group)
    rows, faults = [], []
    has_labels = any(case.label for case in listed.cases)
    first: dict[bytes, Path] = {}
    for number, case in enumerate(listed.cases, start=1):
        row, texts = check_case(case, listed, first, needs_label=has_labels)
        rows += [row] if row else []
        faults += [Fault(case.name, text) for text in texts]
        if progress:
            progress(number, len(listed.cases))
    if not has_labels:
        faults.append(
            Fault("", f"{listed.folder}: no case has a label map. Put them into labels (labelsTr, masks) by case name.")
        )
    faults += [Fault("", _unused(path)) for path in listed.unused]
    return Inspection(listed, tuple(rows), tuple(faults), _proposal(listed, rows))


def _proposal(listed: CaseFolder, rows: Sequence[Row]) -> Proposal | None:
    """Proposes for the volumes; for pictures where there is nothing else."""
    volumes = [row for row in rows if row.bits is None]
    if volumes:
        return propose([row.geometry for row in volumes], listed.channels, [row.foreground for row in volumes])
    return propose_pictures([row.geometry for row in rows], [len(row.intensities) for row in rows]) if rows else None


def _unused(path: Path) -> str:
    if path.parent.name.startswith(("label", "mask")):
        return f"{path}: a label map without an image. Add the image or remove the label map."
    return f"{path}: an image that belongs to no case. Correct its name or channel number, or list it."


def format_inspection(inspection: Inspection) -> str:
    """Gives the tables of cases and volumes, every fault, and the proposal with its reasons."""
    listed, rows = inspection.folder, inspection.rows
    num_groups = len({case.group for case in listed.cases})
    classes = ", ".join(
        f"{name} {value}" for name, value in zip(listed.labels.names, listed.labels.values, strict=True)
    )
    parts = [
        f"{listed.folder}: {len(listed.cases)} cases in {num_groups} groups; channels {', '.join(listed.channels)}; "
        f"labels {classes}"
    ]
    parts += [f"note: {note}" for note in listed.notes]
    volumes, pictures = [row for row in rows if row.bits is None], [row for row in rows if row.bits is not None]
    parts += ["", *_columns(_case_table(volumes, listed.channels))] if volumes else []
    parts += ["", *_columns(_picture_table(pictures, listed.labels.foreground))] if pictures else []
    if any(row.volumes for row in volumes):
        table = _volume_table(volumes, listed.labels.foreground)
        parts += ["", "label volumes in ml (- not annotated)", *_columns(table)]
    parts += ["", f"{len(inspection.faults)} faults" if inspection.faults else "no fault found"]
    parts += [f"  {fault.text}" for fault in inspection.faults]
    if inspection.proposal:
        parts += ["", "proposal", *(f"  {line}" for line in _proposal_lines(inspection.proposal))]
    return "\n".join(parts)


def _case_table(rows: Sequence[Row], channels: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield ("case", "group", "shape", "spacing mm", "axes", "channel", "min", "0.5 %", "median", "99.5 %", "max")
    for row in rows:
        shape = "x".join(map(str, row.geometry.shape))
        spacing = "x".join(f"{edge:.3g}" for edge in row.geometry.spacing)
        for index, numbers in enumerate(row.intensities):
            channel = channels[index] if index < len(channels) else f"? {index}"
            group = "-" if row.group == row.case else row.group
            start = (row.case, group, shape, spacing, row.geometry.orientation) if index == 0 else ("",) * 5
            yield (*start, channel, *(f"{number:.4g}" for number in numbers))


def _picture_table(rows: Sequence[Row], classes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield ("case", "group", "pixels", "colour", "bits", "min", "median", "max", *(f"{name} %" for name in classes))
    for row in rows:
        lowest, _, medians, _, highest = zip(*row.intensities, strict=True)
        shares = row.volumes or {}
        yield (
            row.case,
            "-" if row.group == row.case else row.group,
            "x".join(map(str, row.geometry.shape[:2])),
            "grey" if len(row.intensities) == 1 else "colour",
            str(row.bits),
            f"{min(lowest):.4g}",
            "/".join(f"{number:.4g}" for number in medians),
            f"{max(highest):.4g}",
            *(f"{100 * shares[name]:.3g}" if name in shares else "-" for name in classes),
        )


def _volume_table(rows: Sequence[Row], classes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    yield ("case", *classes)
    for row in rows:
        if row.volumes is not None:
            yield (row.case, *(f"{row.volumes[name]:.4g}" if name in row.volumes else "-" for name in classes))


def _columns(table: Iterator[tuple[str, ...]]) -> list[str]:
    """Aligns a table: the first column left, the others right."""
    lines = list(table)
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _proposal_lines(proposal: Proposal) -> Iterator[str]:
    """Writes the proposal in the keys of a recipe, and why."""
    preparation = proposal.preparation
    if preparation.spacing:
        yield f"preparation.spacing: {_list(preparation.spacing)}"
    yield f"preparation.intensity: {preparation.intensity}"
    if preparation.clip:
        yield f"preparation.clip: {_list(preparation.clip)}"
        yield f"preparation.mean: {preparation.mean:.4g}"
        yield f"preparation.std: {preparation.std:.4g}"
    is_flat = preparation.size is not None
    if is_flat:
        yield f"preparation.colour: {preparation.colour}"
    key, unit = ("preparation.size and data.patch", "pixels") if is_flat else ("data.patch", "voxels")
    for plan in proposal.patches:
        yield (
            f"{key}: {_list(plan.patch)}  ({plan.device}: at most {plan.budget} {unit}; carries "
            f"{plan.num_stages} stages)"
        )
    yield from (f"why {reason}" for reason in proposal.reasons)


def _list(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
