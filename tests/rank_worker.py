"""One process of a run that shares its cases, for ``test_run_log.py``: what predict does around a case, without one.

python rank_worker.py INPUTS OUT [SECONDS A CASE]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tiny import LABELS

from medmom.data.casefiles import CaseFiles
from medmom.data.files import read_image
from medmom.errors import MedmomError
from medmom.inference.inputs import find_inputs
from medmom.inference.manifest import input_hashes
from medmom.inference.outputs import plan_outputs, write_prediction
from medmom.inference.ranks import Ranks, deal, find_ranks, stopped_in_order
from medmom.inference.run_log import Gathered, RunLog
from medmom.inference.skipping import is_done, read_sidecar
from medmom.inference.statistics import label_statistics

CHECKSUM, SETTINGS = "abc", {"overlap": 0.5}


def work(inputs: Path, out: Path, ranks: Ranks, *, seconds: float = 0.0, skip: bool = True) -> Gathered:
    """Thresholds this process's share of the images."""
    begun = begin(inputs, out, ranks)
    cases, outputs, about = begun.cases, begun.outputs, begun.about
    with stopped_in_order(), begun as log:
        for index in deal(cases, ranks):
            case, path = cases[index], outputs.predictions[index]
            if skip and is_done(case, path, checksum=CHECKSUM, settings=SETTINGS, also=outputs.also(index)):
                log.add(case, path, about=read_sidecar(path), skipped=True)
                continue
            time.sleep(seconds)
            try:
                told = segment(case, path, about, outputs.also(index))
            except MedmomError as error:
                log.add(case, None, error=str(error))
            else:
                log.add(case, path, about=told)
    return log.gathered


def begin(inputs: Path, out: Path, ranks: Ranks) -> RunLog:
    about = {"labels": LABELS.as_dict(), "model": {"network": "Threshold", "checksum": CHECKSUM}}
    cases = find_inputs([inputs], 1)
    outputs = plan_outputs(cases, out, ranks=ranks)
    return RunLog(outputs, cases, about, settings=SETTINGS, device="none", ranks=ranks)


def segment(case: CaseFiles, path: Path, about: Mapping[str, Any], also: Sequence[Path]) -> dict[str, Any]:
    image = read_image(case.images[0])
    label = (image.array[0] > 0).astype(np.uint8)
    told = {
        **about,
        "image": [str(file.absolute()) for file in case.images],
        "inputs": input_hashes(case.images),
        "settings": SETTINGS,
        "statistics": label_statistics(label, image, LABELS),
        "seconds": {"read": 0.25},
    }
    return write_prediction(path, label, LABELS, image, told, also=also)


def write_images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        image = np.random.default_rng(number).normal(size=(6, 5, 4)).astype(np.float32)
        file = nib.Nifti1Image(image, np.eye(4))
        file.header.set_xyzt_units("mm")
        nib.save(file, folder / f"{name}.nii.gz")
    return folder


if __name__ == "__main__":
    inputs, out, *seconds = sys.argv[1:]
    found = work(Path(inputs), Path(out), find_ranks(), seconds=float(seconds[0]) if seconds else 0.0)
    sys.exit(2 if found.has_failed else 0)
