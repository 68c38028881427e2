"""What the commands do; each imports what it needs, so that the others start quickly."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medmom.errors import MedmomError

CLASSIFYING: Mapping[str, tuple[Any, str]] = {"explain": (False, "segments; only what a classifier found is explained")}
"""Options of predict for classifiers alone: the default, and why a model that segments has none."""

SEGMENTING: Mapping[str, tuple[Any, str]] = {
    "tta": (False, "classifies; mirror images are for label maps"),
    "fast": (False, "classifies; there are no windows"),
    "all_windows": (False, "classifies; there are no windows"),
    "max_ram": (None, "classifies, in little memory"),
    "max_vram": (None, "classifies, in little memory"),
    "preview": (False, "classifies; pictures are drawn by --explain"),
    "probabilities": (None, "classifies; probabilities stand in the table"),
    "entropy": (False, "classifies; probabilities stand in the table"),
    "dicom_seg": (False, "classifies; a DICOM-SEG holds label maps"),
    "reference_series": (None, "classifies; a DICOM-SEG holds label maps"),
    "with": ([], "classifies; ensembles are for label maps"),
    "skip_existing": (False, "classifies, all images into one table"),
}
"""The same the other way round."""


def inspect(options: argparse.Namespace, rest: list[str]) -> int:
    """Tells what is in a folder, exit code 2 where something is wrong with it; or what a model is."""
    if options.augment is not None:
        return _draw_patches(options)
    if options.out is not None:
        raise MedmomError(f"--out {options.out}: is the sheet that --augment RECIPE draws. Name the recipe too.")
    if is_model(options.folder):
        from medmom.describe import describe_model

        print(describe_model(options.folder))
        return 0
    from medmom.data.class_inspect import format_class_inspection, holds_classes, inspect_classes
    from medmom.data.inspect import format_inspection, inspect_folder

    if holds_classes(options.folder):
        classes = inspect_classes(options.folder, group=options.group, quiet=options.quiet)
        print(format_class_inspection(classes))
        return 2 if classes.faults else 0
    with tqdm(desc="Reading", unit="case", disable=options.quiet, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        inspection = inspect_folder(options.folder, group=options.group, progress=progress)
    print(format_inspection(inspection))
    return 2 if inspection.faults else 0


def _draw_patches(options: argparse.Namespace) -> int:
    from medmom.patches import draw_patches
    from medmom.recipe_file import RecipeFile, recipe_path

    changes = ["--data.folder", str(options.folder), *(["--data.group", options.group] if options.group else [])]
    out = draw_patches(
        RecipeFile(recipe_path(options.augment), changes), options.out or Path("augment.png"), quiet=options.quiet
    )
    print(f"Sheet: {out}")
    return 0


def train(options: argparse.Namespace, rest: list[str]) -> int:
    """Trains a network, or goes on training one."""
    from medmom import train
    from medmom.package import is_classifier
    from medmom.recipe_file import RecipeFile, recipe_path
    from medmom.run import next_run

    if options.resume is not None:
        if options.recipe or rest or options.init_from:
            raise MedmomError(f"--resume {options.resume}: takes no recipe and no changes; the run has its own.")
        model = train.resume(options.resume, device=options.device, quiet=options.quiet)
    else:
        if options.recipe is None:
            raise MedmomError("no recipe given; name a file or a shipped recipe, see `medmom train --help`.")
        path = recipe_path(options.recipe)
        out = options.out or next_run(path.stem)
        start = [] if options.init_from is None else ["--model.init_from", str(options.init_from)]
        model = train.train(RecipeFile(path, [*rest, *start]), out, device=options.device, quiet=options.quiet)
    print(f"Model package: {model}")
    ending = "validation.csv" if is_classifier(model) else "validation"
    print(f"Next: medmom predict {model.parent} --fold validation --out {model.parent / ending}")
    return 0


def predict(options: argparse.Namespace, rest: list[str]) -> int:
    """Segments or classifies images; exit code 2 where one failed."""
    from medmom.package import is_classifier

    # An option of the other kind of model, at its default, was not given.
    other = SEGMENTING if is_classifier(options.model) else CLASSIFYING
    for name, (default, reason) in other.items():
        if getattr(options, name) != default:
            raise MedmomError(f"--{name.replace('_', '-')}: {options.model} {reason}. Leave it out.")
    return _segment(options) if other is CLASSIFYING else _classify(options)


def _segment(options: argparse.Namespace) -> int:
    from medmom.inference.extras import Wanted
    from medmom.inference.memory import parse_size
    from medmom.inference.predict import predict
    from medmom.inference.predictor import Settings

    settings = Settings(
        overlap=0.25 if options.fast else 0.5,
        tta=options.tta,
        skip_air=not options.all_windows,
        max_ram=None if options.max_ram is None else parse_size(options.max_ram, option="--max-ram"),
        max_vram=None if options.max_vram is None else parse_size(options.max_vram, option="--max-vram"),
    )
    wanted = Wanted(
        preview=options.preview,
        probabilities=options.probabilities,
        entropy=options.entropy,
        dicom_seg=options.dicom_seg or options.reference_series is not None,
        reference=options.reference_series,
        skip_existing=options.skip_existing,
    )
    models = [options.model, *getattr(options, "with")]
    outcomes, gathered = predict(**_asked(options) | {"model": models}, settings=settings, wanted=wanted)
    num_skipped = sum(outcome.skipped for outcome in outcomes)
    there = f", {num_skipped} of them were there already" if num_skipped else ""
    _tell(outcomes, f"scans segmented{there}: {options.out}")
    if gathered.absent:
        numbers = ", ".join(map(str, gathered.absent))
        print(f"medmom: processes {numbers} never began. Run again with --skip-existing.", file=sys.stderr)
    return 2 if gathered.has_failed else 0


def _classify(options: argparse.Namespace) -> int:
    from medmom.inference.class_predict import predict_classes

    outcomes = predict_classes(**_asked(options), explain=options.explain)
    return _tell(outcomes, f"images classified: {options.out}")


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What predict is asked for with either kind of model."""
    return {name: getattr(options, name) for name in ("model", "inputs", "out", "device", "fold", "quiet")}


def _tell(outcomes: Sequence[Any], ending: str) -> int:
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"medmom: {outcome.error}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} {ending}")
    return 2 if failed else 0


def evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    """Scores predictions."""
    from medmom.data.atomic import write_json
    from medmom.evaluation.class_scores import evaluate_classes, format_class_scores, is_class_table
    from medmom.evaluation.nnunet_summary import write_summary
    from medmom.evaluation.scores import evaluate, format_scores

    if is_class_table(options.predictions):
        if options.summary is not None:
            raise MedmomError(f"--summary {options.summary}: is of label maps, and these are classes. Leave it out.")
        scores = evaluate_classes(options.predictions, options.references, progress=not options.quiet)
        out = options.out or options.predictions.with_name(f"{options.predictions.stem}_scores.json")
        write_json(out, scores)
        print(format_class_scores(scores))
        print(f"Scores: {out}")
        return 0
    scores = evaluate(
        options.predictions,
        options.references,
        cases=options.cases,
        nsd_tolerance=options.nsd_tolerance,
        progress=not options.quiet,
    )
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    out = options.out or folder / "scores.json"
    write_json(out, scores)
    print(format_scores(scores))
    print(f"Scores: {out}")
    if options.summary is not None:
        write_summary(options.summary, scores)
        print(f"Summary: {options.summary}")
    return 0


def report(options: argparse.Namespace, rest: list[str]) -> int:
    """Writes a report."""
    from medmom.evaluation.report import write_report

    write_report(options.source, options.out, images=options.images)
    print(f"Report: {options.out}")
    return 0


def postprocess(options: argparse.Namespace, rest: list[str]) -> int:
    """Chooses the cleanup of a model's label maps, or takes it out."""
    from medmom.evaluation.choose_cleanup import format_choice
    from medmom.postprocess import choose, take_out

    if options.none:
        print("The cleanup was taken out." if take_out(options.run_folder) else "There was no cleanup.")
        return 0
    print(format_choice(choose(options.run_folder, options.predictions, quiet=options.quiet)))
    return 0


def export(options: argparse.Namespace, rest: list[str]) -> int:
    """Writes a model in another format."""
    if options.to == "onnx":
        from medmom.export.onnx import export_onnx

        print(f"ONNX: {export_onnx(options.model, options.out)}")
    else:
        from medmom.export.monai_bundle import export_monai_bundle

        print(f"MONAI bundle: {export_monai_bundle(options.model, options.out)}")
    return 0


def import_(options: argparse.Namespace, rest: list[str]) -> int:
    """Makes model packages of another tool's models."""
    from medmom.nnunet.importing import import_nnunet

    folders = import_nnunet(
        options.folder, options.out, configuration=options.configuration, folds=options.folds or None
    )
    for folder in folders:
        print(f"Model package: {folder}")
    others = "".join(f" --with {folder}" for folder in folders[1:])
    print(f"Next: medmom predict {folders[0]} IMAGES --out LABELS{others}")
    return 0


def demo(options: argparse.Namespace, rest: list[str]) -> int:
    """Goes the whole road on made-up scans."""
    from medmom.demo import run_demo
    from medmom.run import next_run

    report = run_demo(
        options.out or next_run("demo"), minutes=options.minutes, device=options.device, quiet=options.quiet
    )
    print(f"Report: {report}")
    return 0


def is_model(path: Path) -> bool:
    """Whether a path leads to a model package or a run with one."""
    from medmom.package_files import DESCRIPTION

    return any((place / DESCRIPTION).is_file() for place in (path, path / "model"))
