from __future__ import annotations

import argparse
import keyword
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from medmom import __version__, commands
from medmom.errors import MedmomError

DESCRIPTION = """\
Momentum networks for medical images: train, predict, evaluate, report; scans and pictures, to segment or to classify.

  medmom inspect FOLDER                        what is in a folder of images, and what is wrong with it
  medmom train RECIPE --data.folder FOLDER     train a network; ends with a model package
  medmom predict MODEL SCANS --out FOLDER      segment images, each on its own grid
  medmom predict MODEL SCANS --out FILE.csv    classify images
  medmom evaluate PREDICTIONS REFERENCES       Dice, IoU, recall, precision, HD95, NSD; or accuracy, AUROC and others
  medmom report RUN_OR_SCORES                  one HTML page with pictures, tables and curves
  medmom postprocess RUN                       choose on validation cases how label maps are cleaned
  medmom export MODEL --to onnx --out FOLDER   a model as ONNX, or as MONAI bundle
  medmom import nnunet FOLDER --out MODEL      a trained nnU-Net as model package
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
    if options.command == "predict" and not any(word.startswith("-") for word in rest):
        # argparse ends the list of inputs at the first option after the model.
        options.inputs, rest = [*options.inputs, *rest], []
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
    rooms = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        *(_add_inspect, _add_train, _add_predict, _add_evaluate, _add_report),
        *(_add_postprocess, _add_export, _add_import, _add_demo),
    ):
        add(rooms)
    return parser


def _command(rooms: Any, name: str, text: str, help_: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = rooms.add_parser(
        name, description=text, help=help_, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    command.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default auto)")
    command.set_defaults(run=getattr(commands, f"{name}_" if keyword.iskeyword(name) else name))
    return command


def _add_inspect(rooms: Any) -> None:
    text = (
        "Lists the cases of a folder with their shapes, spacings, intensities and label volumes, names every\n"
        "fault with file and mend (exit code 2), and proposes spacing, patch and normalisation with reasons.\n"
        "With --augment it draws what the network of a recipe is fed: patches, changed at random as in training.\n"
        "Of a run folder or model package it tells what the model is, and checks every byte of it."
    )
    command = _command(
        rooms, "inspect", text, "what is in a folder of images, and what is wrong with it; what a model is"
    )
    command.add_argument(
        "folder",
        type=Path,
        help="MSD decathlon, nnU-Net raw, images/ + labels/, a CSV file, a folder a class, or a model",
    )
    command.add_argument("--data.group", dest="group", metavar="COLUMN", help="column of cases.csv that is the patient")
    command.add_argument("--augment", metavar="RECIPE", help="draw a sheet of training patches instead")
    command.add_argument("--out", type=Path, metavar="PNG", help="the sheet (default augment.png)")


def _add_train(rooms: Any) -> None:
    command = _command(rooms, "train", TRAIN, "train a network on labelled scans")
    command.add_argument("recipe", nargs="?", help="a YAML file or the name of a shipped recipe")
    command.add_argument("--out", type=Path, metavar="RUN", help="new folder for the run (default: one under runs/)")
    command.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run; needs no recipe")
    command.add_argument(
        "--init-from", type=Path, metavar="MODEL", help="take the weights that fit from a run, package or checkpoint"
    )
    command.format_help = lambda: _train_help(command)  # type: ignore[method-assign]


def _add_predict(rooms: Any) -> None:
    text = (
        "Segments or classifies scans and pictures with a trained model. Each label map lies on its scan's own grid;\n"
        "classes go into one CSV file with calibrated probabilities. The model is loaded once; a scan that fails does\n"
        "not stop the others, is named at the end, and makes the exit code 2.\n"
        "Under torchrun or srun each process does its share of the scans; start again with --skip-existing to finish\n"
        "what was cut off."
    )
    command = _command(rooms, "predict", text, "segment images, each on its own grid, or classify them")
    command.add_argument("model", type=Path, help="run folder or model package")
    command.add_argument("inputs", nargs="*", help="files, folders, DICOM series, patterns, CSV tables")
    command.add_argument(
        "--out", type=Path, required=True, help="a file for one input, else a folder; to classify: a .csv file"
    )
    command.add_argument("--fold", choices=["validation"], help="take the validation cases of the run instead")
    command.add_argument("--skip-existing", action="store_true", help="leave out what an earlier run did, by content")
    segment = command.add_argument_group("to segment")
    segment.add_argument("--tta", action="store_true", help="average over mirror images; better, 4 or 8 times as long")
    segment.add_argument("--fast", action="store_true", help="let windows overlap by a quarter instead of a half")
    segment.add_argument(
        "--all-windows", action="store_true", help="run windows of a CT that hold nothing but air, too"
    )
    segment.add_argument("--max-ram", metavar="SIZE", help="memory that the process may hold, such as 2GiB")
    segment.add_argument("--max-vram", metavar="SIZE", help="the same of the GPU")
    segment.add_argument("--preview", action="store_true", help="a picture of three planes for each scan")
    segment.add_argument(
        "--probabilities", choices=["uint8", "uint16"], help="a file for each class, in steps of 1/255 or 1/65535"
    )
    segment.add_argument("--entropy", action="store_true", help="a map of how unsure the model is, from 0 to 1")
    segment.add_argument(
        "--with", type=Path, action="append", default=[], metavar="MODEL", help="average with this model; repeatable"
    )
    segment.add_argument("--dicom-seg", action="store_true", help="a DICOM Segmentation too, for each DICOM series")
    segment.add_argument(
        "--reference-series", type=Path, metavar="SERIES", help="the DICOM series of the one image, for its DICOM-SEG"
    )
    classify = command.add_argument_group("to classify")
    classify.add_argument("--explain", action="store_true", help="a picture a case of what counted")


def _add_evaluate(rooms: Any) -> None:
    text = (
        "Scores predictions against references: Dice, IoU, recall, precision, HD95 and NSD for each case and class,\n"
        "with 95 % bootstrap intervals over patients. A listed case without a prediction is a miss and counts.\n"
        "Of classes (a .csv file of predict): accuracy, recall, precision, F1, AUROC, AUPRC, kappa and calibration."
    )
    command = _command(rooms, "evaluate", text, "score predictions against references")
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
    command.add_argument("--summary", type=Path, metavar="FILE", help="besides, nnU-Net's summary.json of label maps")
    command.add_argument(
        "--nsd-tolerance", type=float, metavar="MM", help="within it surfaces touch (default: the model's, else 2 mm)"
    )


def _add_import(rooms: Any) -> None:
    text = (
        "Makes a model package of each fold of a trained nnU-Net v2 folder, such as\n"
        "Dataset001_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres. Nothing in a checkpoint is run; what a package does\n"
        "otherwise than nnU-Net is said in a sentence."
    )
    command = _command(rooms, "import", text, "make a model package of an nnU-Net model")
    command.add_argument("kind", choices=["nnunet"], help="whose model it is")
    command.add_argument("folder", type=Path, help="with plans.json, dataset.json and fold_0, fold_1, ...")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the package; of several folds each")
    command.add_argument("--configuration", metavar="C", help="such as 3d_fullres (default: that of the checkpoint)")
    command.add_argument("--folds", nargs="+", metavar="F", help="their numbers (default: all that are there)")


def _add_report(rooms: Any) -> None:
    text = "Writes one self-contained HTML page: overlays of the best, median and worst case, tables, learning curves."
    command = _command(rooms, "report", text, "one HTML page with pictures, tables and curves")
    command.add_argument("source", type=Path, metavar="RUN_OR_SCORES", help="run folder or scores.json")
    command.add_argument("--out", type=Path, required=True, help="the HTML file")
    command.add_argument("--images", type=Path, metavar="FOLDER", help="where the scans lie, if not where they were")


def _add_postprocess(rooms: Any) -> None:
    text = (
        "Chooses on validation predictions whether to keep only the largest part of a class, and whether to smooth\n"
        "its border; what helps beyond chance goes into the model package, and predict applies it. Run before it:\n\n"
        "  medmom predict RUN --fold validation --out RUN/validation"
    )
    command = _command(rooms, "postprocess", text, "choose the cleanup of label maps on validation cases")
    command.add_argument("run_folder", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--predictions", type=Path, help="what predict wrote (default RUN/validation)")
    command.add_argument("--none", action="store_true", help="take the cleanup out of the package")


def _add_export(rooms: Any) -> None:
    text = (
        "Writes a model in another format: a MONAI bundle (a folder that MONAI's tools run; medmom must be installed\n"
        "there), or ONNX with preparation and restoring described in a JSON file beside it."
    )
    command = _command(rooms, "export", text, "a model as MONAI bundle or as ONNX")
    command.add_argument("model", type=Path, help="run folder or model package")
    command.add_argument("--to", choices=["monai-bundle", "onnx"], required=True, help="the format")
    command.add_argument("--out", type=Path, required=True, help="a new folder; of ONNX a folder or an .onnx file")


def _add_demo(rooms: Any) -> None:
    text = "Makes CT phantoms, trains on them, segments unseen ones, scores them and writes a report. No data needed."
    command = _command(rooms, "demo", text, "the whole road on made-up scans, in a few minutes")
    command.add_argument("--out", type=Path, help="new folder for everything (default: one under runs/)")
    command.add_argument("--minutes", type=float, default=4.0, help="time for training (default 4)")


def _train_help(command: argparse.ArgumentParser) -> str:
    from medmom.recipe import describe_keys
    from medmom.recipe_file import shipped_recipes

    command.description = TRAIN.format(recipes=", ".join(shipped_recipes()))
    command.epilog = describe_keys()
    return argparse.ArgumentParser.format_help(command)
