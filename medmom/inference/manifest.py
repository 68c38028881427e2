"""What a run of predict was: files in and out by their checksums, settings, device, versions and time."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medmom.data.atomic import write_json
from medmom.data.files import content_files, is_series
from medmom.errors import MedmomError
from medmom.inference.ranks import Ranks
from medmom.package import software_versions


@dataclass(frozen=True)
class CaseRecord:
    """What became of one case.

    Attributes:
        name: Of the case.
        inputs: Path as given and sha256 of each of its files; None for one that cannot be read.
        prediction: File name of the label map; None where there is none.
        prediction_sha256: Of that file.
        seconds: By part of the work; empty where nothing was computed.
        peak_ram_mib: Most memory that the process had held until then; None where that is not known.
        error: Why there is no label map, in one line; else None.
        skipped: Whether the label map was there before and still holds.
    """

    name: str
    inputs: Sequence[Mapping[str, str | None]] = ()
    prediction: str | None = None
    prediction_sha256: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_ram_mib: float | None = None
    error: str | None = None
    skipped: bool = False


@dataclass(frozen=True)
class RunManifest:
    """What one process of a run did.

    Files are named as they were given; users and machines are not.

    Attributes:
        started: Time in UTC, ISO 8601.
        ended: The same; None while the run goes on, or where it was cut off.
        call: Digest that the processes of one call share.
        settings: What the command was asked for.
        model: Name of the network and checksum of its package.
        device: In words.
        ranks: The place of the process.
        cases: In the order in which they were done.
    """

    started: str
    ended: str | None
    call: str
    settings: Mapping[str, Any]
    model: Mapping[str, Any]
    device: str
    ranks: Ranks
    cases: Sequence[CaseRecord]

    def as_dict(self) -> dict[str, Any]:
        """Gives plain types, with versions and totals."""
        return {
            "started": self.started,
            "ended": self.ended,
            "call": self.call,
            "settings": dict(self.settings),
            "model": dict(self.model),
            "device": self.device,
            "versions": software_versions(),
            "rank": self.ranks.rank,
            "world_size": self.ranks.world_size,
            "totals": {
                "cases": len(self.cases),
                "predicted": sum(case.prediction is not None and not case.skipped for case in self.cases),
                "skipped": sum(case.skipped for case in self.cases),
                "failed": sum(case.error is not None for case in self.cases),
                "seconds": round(sum(sum(case.seconds.values()) for case in self.cases), 3),
            },
            "cases": [asdict(case) for case in self.cases],
        }


def write_manifest(path: str | Path, manifest: RunManifest) -> None:
    """Writes a manifest as JSON, whole or not at all.

    Raises:
        MedmomError: The place cannot be written.
    """
    write_json(path, manifest.as_dict())


def file_sha256(path: str | Path) -> str:
    """Gives the sha256 of a file's bytes as 64 hexadecimal digits; the file is read in pieces.

    Raises:
        MedmomError: The file cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MedmomError(f"{path}: cannot be read ({error.strerror}). Check path and permissions.") from error


def input_hashes(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """Gives ``path``, as given, and ``sha256`` of all files that images consist of, in order.

    A DICOM series of several files has one sha256: that of theirs, sorted, so that their names do not matter.

    Args:
        paths: The files of a case; of a pair (``.hdr`` and ``.img``) either half stands for both, and of a DICOM
            series its folder or any file for all.

    Raises:
        MedmomError: A file cannot be read.
    """
    return [entry for path in map(Path, paths) for entry in _hashes(path)]


def _hashes(path: Path) -> list[dict[str, str]]:
    files = content_files(path)
    hashes = [file_sha256(file) for file in files]
    if is_series(path) and len(files) > 1:
        return [{"path": str(path), "sha256": hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()}]
    return [{"path": str(file), "sha256": sha256} for file, sha256 in zip(files, hashes, strict=True)]


def device_in_words(device: torch.device) -> str:
    """Gives the name of a GPU, or model and number of threads of the CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return f"CPU {_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
