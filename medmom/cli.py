from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from medmom import __version__
from medmom.errors import MedmomError

DESCRIPTION = """\
Momentum networks for medical images: train, predict, evaluate, report; scans and pictures, to segment or to classify.

  medmom inspect FOLDER                        what is in a folder of images, and what is wrong with it
  medmom train RECIPE --data.folder FOLDER     train a network; ends with a model package
  medmom predict MODEL SCANS --out FOLDER      segment images, each on its own grid
  medmom predict MODEL SCANS --out FILE.csv    classify images
  medmom evaluate PREDICTIONS REFERENCES       Dice, IoU, recall, precision, HD95, NSD; or accuracy, AUROC and others
  medmom report RUN_OR_SCORES                  one HTML page with pictures, tables and curves
  medmom demo                                  all of this on made-up scans, in a few minutes
"""

TRAIN = """\
Trains a network on a folder of labelled scans or pictures, or of classified ones, and writes a model package.

RECIPE is a YAML file or the name of a shipped one: {recipes}.
Every value of a recipe can be changed here, as --section.key value:

  medmom train hippocampus --data.folder Task04 --model.preset mom3d_xs --training.max_minutes 30
  medmom train polyps --data.folder Kvasir-SEG --init-from runs/other/model
  medmom train modality --data.folder MedNIST --training.max_minutes 15
  medmom train my_recipe.yaml --data.fold 1 --out runs/fold1
  medmom train --resume runs/fold1
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line: exit code 0, or 2 with one line for what the user can mend."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(
        format="%(message)s", level=logging.WARNING if getattr(options, "quiet", False) else logging.INFO
    )
    # What libraries say to their developers is no news to the user of a command.
    warnings.filterwarnings("ignore", module=r"(lightning|monai|torch)\b")
    # A name in letters that the font of a picture lacks.
    warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
    try:
        code = options.run(options, rest)
    except MedmomError as error:
        print(f"medmom: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("medmom: stopped.", file=sys.stderr)
        code = 130
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without the usage."""
        print(f"medmom: {message}; see `{self.prog} --help`.", file=sys.stderr)
        self.exit(2)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("medmom", description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"medmom {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_train, _add_predict, _add_evaluate, _add_report, _add_demo):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, list[str]], int], text: str, help_: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, description=text, help=help_, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default auto)")
    command.set_defaults(run=run)
    return command


def _add_inspect(commands: Any) -> None:
    text = (
        "Lists the cases of a folder with their shapes, spacings, intensities and label volumes, names every\n"
        "fault with file and mend (exit code 2), and proposes spacing, patch and normalisation with reasons.\n"
        "With --augment it draws what the network of a recipe is fed: patches, changed at random as in training."
    )
    command = _command(commands, "inspect", _inspect, text, "what is in a folder of images, and what is wrong with it")
    command.add_argument(
        "folder", type=Path, help="MSD decathlon, nnU-Net raw, images/ + labels/, a CSV file, or a folder a class"
    )
    command.add_argument("--data.group", dest="group", metavar="COLUMN", help="column of cases.csv that is the patient")
    command.add_argument("--augment", metavar="RECIPE", help="draw a sheet of training patches instead")
    command.add_argument("--out", type=Path, metavar="PNG", help="the sheet (default augment.png)")


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", _train, TRAIN, "train a network on labelled scans")
    command.add_argument("recipe", nargs="?", help="a YAML file or the name of a shipped recipe")
    command.add_argument("--out", type=Path, metavar="RUN", help="new folder for the run (default: one under runs/)")
    command.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run; needs no recipe")
    command.add_argument(
        "--init-from", type=Path, metavar="MODEL", help="take the weights that fit from a run, package or checkpoint"
    )
    command.format_help = lambda: _train_help(command)  # type: ignore[method-assign]


def _add_predict(commands: Any) -> None:
    text = (
        "Segments or classifies scans and pictures with a trained model. Each label map lies on its scan's own grid;\n"
        "classes go into one CSV file with calibrated probabilities. The model is loaded once; a scan that fails does\n"
        "not stop the others, is named at the end, and makes the exit code 2."
    )
    command = _command(commands, "predict", _predict, text, "segment images, each on its own grid, or classify them")
    command.add_argument("model", type=Path, help="run folder or model package")
    command.add_argument("inputs", nargs="*", help="files, folders or patterns")
    command.add_argument(
        "--out", type=Path, required=True, help="a file for one input, else a folder; to classify: a .csv file"
    )
    command.add_argument("--fold", choices=["validation"], help="take the validation cases of the run instead")
    command.add_argument(
        "--tta", action="store_true", help="to segment: average over mirror images; better, and 4 or 8 times as long"
    )
    command.add_argument("--explain", action="store_true", help="to classify: a picture a case of what counted")


def _add_evaluate(commands: Any) -> None:
    text = (
        "Scores predictions against references: Dice, IoU, recall, precision, HD95 and NSD for each case and class,\n"
        "with 95 % bootstrap intervals over patients. A listed case without a prediction is a miss and counts.\n"
        "Of classes (a .csv file of predict): accuracy, recall, precision, F1, AUROC, AUPRC, kappa and calibration."
    )
    command = _command(commands, "evaluate", _evaluate, text, "score predictions against references")
    command.add_argument("predictions", type=Path, help="folder of label maps, one file, or classes.csv")
    command.add_argument(
        "references",
        type=Path,
        nargs="?",
        help="folder of label maps, or one file; of classes: a CSV file or a folder a class; not needed where what "
        "predict wrote names the references",
    )
    command.add_argument("--out", type=Path, help="where the scores go (default PREDICTIONS/scores.json)")
    command.add_argument(
        "--cases",
        type=Path,
        metavar="FILE",
        help="cases to score (default PREDICTIONS/cases.json, else all references)",
    )
    command.add_argument(
        "--nsd-tolerance", type=float, metavar="MM", help="within it surfaces touch (default: the model's, else 2 mm)"
    )


def _add_report(commands: Any) -> None:
    text = "Writes one self-contained HTML page: overlays of the best, median and worst case, tables, learning curves."
    command = _command(commands, "report", _report, text, "one HTML page with pictures, tables and curves")
    command.add_argument("source", type=Path, metavar="RUN_OR_SCORES", help="run folder or scores.json")
    command.add_argument("--out", type=Path, required=True, help="the HTML file")
    command.add_argument("--images", type=Path, metavar="FOLDER", help="where the scans lie, if not where they were")


def _add_demo(commands: Any) -> None:
    text = "Makes CT phantoms, trains on them, segments unseen ones, scores them and writes a report. No data needed."
    command = _command(commands, "demo", _demo, text, "the whole road on made-up scans, in a few minutes")
    command.add_argument("--out", type=Path, help="new folder for everything (default: one under runs/)")
    command.add_argument("--minutes", type=float, default=4.0, help="time for training (default 4)")


def _train_help(command: argparse.ArgumentParser) -> str:
    from medmom.recipe import describe_keys
    from medmom.recipe_file import shipped_recipes

    command.description = TRAIN.format(recipes=", ".join(shipped_recipes()))
    command.epilog = describe_keys()
    return argparse.ArgumentParser.format_help(command)


def _inspect(options: argparse.Namespace, rest: list[str]) -> int:
    if options.augment is not None:
        return _draw_patches(options)
    if options.out is not None:
        raise MedmomError(f"--out {options.out}: is the sheet that --augment RECIPE draws. Name the recipe too.")
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


def _train(options: argparse.Namespace, rest: list[str]) -> int:
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


def _predict(options: argparse.Namespace, rest: list[str]) -> int:
    from medmom.inference.predict import predict
    from medmom.package import is_classifier

    if is_classifier(options.model):
        return _classify(options)
    if options.explain:
        raise MedmomError(
            f"--explain: {options.model} segments; only what a classifier found is explained. Leave it out."
        )
    outcomes = predict(
        options.model,
        options.inputs,
        options.out,
        device=options.device,
        fold=options.fold,
        quiet=options.quiet,
        tta=options.tta,
    )
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"medmom: {outcome.error}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} scans segmented: {options.out}")
    return 2 if failed else 0


def _classify(options: argparse.Namespace) -> int:
    from medmom.inference.class_predict import predict_classes

    if options.tta:
        raise MedmomError(f"--tta: {options.model} classifies; mirror images are for label maps. Leave it out.")
    outcomes = predict_classes(
        options.model,
        options.inputs,
        options.out,
        device=options.device,
        fold=options.fold,
        quiet=options.quiet,
        explain=options.explain,
    )
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"medmom: {outcome.error}", file=sys.stderr)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} images classified: {options.out}")
    return 2 if failed else 0


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    from medmom.data.atomic import write_json
    from medmom.evaluation.class_scores import evaluate_classes, format_class_scores, is_class_table
    from medmom.evaluation.scores import evaluate, format_scores

    if is_class_table(options.predictions):
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
    return 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from medmom.evaluation.report import write_report

    write_report(options.source, options.out, images=options.images)
    print(f"Report: {options.out}")
    return 0


def _demo(options: argparse.Namespace, rest: list[str]) -> int:
    from medmom.demo import run_demo
    from medmom.run import next_run

    report = run_demo(
        options.out or next_run("demo"), minutes=options.minutes, device=options.device, quiet=options.quiet
    )
    print(f"Report: {report}")
    return 0
