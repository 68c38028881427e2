# mypy: disable-error-code="no-untyped-call"
"""One scan, one way of segmenting it, in a process of its own: `python bench_predict_run.py ROAD JOB.json`."""

import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    AsDiscreted,
    Compose,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    ScaleIntensityRanged,
    Spacingd,
)

from medmom.cli import main
from medmom.package import load_package

# Whatever the command imports later is imported before memory is read.
importlib.import_module("medmom.inference.predict")

MIB = 2**20

Job = dict[str, Any]
"""What is to be done: ``model``, ``image``, ``out``, ``device``, ``options``, ``overlap``."""


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status, such as VmRSS or VmHWM."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def by_medmom(job: Job) -> Job:
    """The command, with its sidecar's parts."""

    def command() -> Job:
        words = [job["model"], job["image"], "--out", job["out"], "--device", job["device"], *job["options"]]
        try:
            main(["predict", *words, "--quiet"])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"medmom predict ended with code {end.code}") from end
        about = json.loads(Path(job["out"].replace(".nii.gz", ".json")).read_text(encoding="utf-8"))
        return {"parts": about.get("seconds", {})}

    return measured(command)


def by_monai(job: Job) -> Job:
    """The same with MONAI's own transforms, inferer and inversion, in float32 as far as it lets itself be asked."""

    def road() -> Job:
        package, device = load_package(job["model"]), torch.device(job["device"])
        network, seen = package.network.to(device), package.preparation
        low, high = ((value - seen.mean) / seen.std for value in seen.clip)
        before = Compose(
            [
                LoadImaged("image", ensure_channel_first=True),
                Orientationd("image", axcodes="RAS", labels=None),
                Spacingd("image", pixdim=seen.spacing, mode="bilinear", dtype=np.float32),
                ScaleIntensityRanged("image", *seen.clip, low, high, clip=True),
            ]
        )
        after = Compose(
            [
                Invertd("pred", transform=before, orig_keys="image", nearest_interp=False, to_tensor=True),
                AsDiscreted("pred", argmax=True),
                SaveImaged(
                    "pred",
                    output_dir=str(Path(job["out"]).parent),
                    output_postfix="",
                    output_dtype=np.uint8,
                    resample=False,
                    separate_folder=False,
                    print_log=False,
                ),
            ]
        )
        marks = [time.monotonic()]
        with torch.inference_mode():
            data = before({"image": job["image"]})
            marks.append(time.monotonic())
            inferer = SlidingWindowInferer(
                package.patch, overlap=job["overlap"], mode="gaussian", sw_device=device, device=torch.device("cpu")
            )
            # A plain tensor: MetaTensors are several times slower in the windows.
            logits = inferer(data["image"].as_tensor()[None], network)[0]
            marks.append(time.monotonic())
            data["pred"] = MetaTensor(logits, meta=data["image"].meta)
            del logits
            after(data)
        marks.append(time.monotonic())
        return {"parts": dict(zip(("read", "network", "restore and write"), np.diff(marks).tolist(), strict=True))}

    return measured(road)


def measured(road: Callable[[], Job]) -> Job:
    """Runs a road after all imports; seconds and peaks are those of the process from there on."""
    imports = status("VmRSS")
    started = time.monotonic()
    result = road()
    if torch.cuda.is_available():
        result["vram_mib"] = round(torch.cuda.max_memory_allocated() / MIB)
    seconds = time.monotonic() - started
    return {**result, "seconds": seconds, "imports_mib": imports / MIB, "peak_mib": status("VmHWM") / MIB}


ROADS = {"medmom": by_medmom, "monai": by_monai}

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).with_suffix(".result").write_text(json.dumps(ROADS[sys.argv[1]](job)), encoding="utf-8")
