"""What a run, of one process or of several, tells in the output folder."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medmom.data.casefiles import CaseFiles
from medmom.data.files import read_json, write_json
from medmom.errors import MedmomError
from medmom.inference.case_list import collect_statistics, list_cases
from medmom.inference.lock import CALL_LOCK, call_lock, folder_lock
from medmom.inference.manifest import CaseRecord, RunManifest, input_hashes, write_manifest
from medmom.inference.outputs import STATISTICS, Outputs
from medmom.inference.ranks import Ranks
from medmom.inference.statistics import write_statistics

EVERY_S = 10.0
"""Time between two writings while the run goes on."""

START_S = 60.0
"""How long a process that has ended waits for one that has not begun."""

MANIFEST = re.compile(r"run(-(?P<rank>\d+))?\.json")


@dataclass(frozen=True)
class Gathered:
    """What is known of all cases that were asked for when a process ends.

    Attributes:
        failed: One line for each case of any process that has no label map.
        has_all: Whether every process has ended, so that this one has the last word.
        absent: Numbers of processes that never began.
    """

    failed: tuple[str, ...] = ()
    has_all: bool = True
    absent: tuple[int, ...] = ()

    @property
    def has_failed(self) -> bool:
        """Whether the process should end with an error.

        Of several only the last tells it, for all: launchers such as ``torchrun`` stop the others where one fails.
        """
        return bool(self.absent) or (self.has_all and bool(self.failed))


class RunLog:
    """Keeps ``run.json`` and ``cases.json``, and in the end the collected statistics.

    Each process of several writes a ``run-<rank>.json`` of its own, and whichever ends writes the lists anew, one
    at a time, from those and from the sidecars: the last has them whole. Nobody waits for another's work, so that a
    process that died holds up none; what it did counts by its sidecars, and its other cases are listed as not reached.
    The list holds the cases that were asked for now: an earlier call's others and its errors are not taken over.

    Where the output is one file nothing is written: its sidecar tells all. A context manager; at its end the lists are
    written, also where the run is cut short, unless a process alone has done nothing.

    Args:
        outputs: Where.
        cases: All that was asked for, also of other processes.
        about: What lists and sidecars tell of model and classes: ``labels``, and ``model`` with its ``checksum``.
        settings: All that can change a label; plain types, as in the sidecars.
        device: In words.
        ranks: The place of this process.

    Attributes:
        gathered: What was known at the end.
    """

    def __init__(
        self,
        outputs: Outputs,
        cases: Sequence[CaseFiles],
        about: Mapping[str, Any],
        *,
        settings: Mapping[str, Any],
        device: str,
        ranks: Ranks,
    ) -> None:
        self.outputs, self.cases, self.about = outputs, cases, about
        self.ranks = ranks
        self._path = outputs.manifest(ranks)
        model = {key: about["model"][key] for key in ("network", "checksum") if key in about["model"]}
        call = _call(cases, model, settings, ranks)
        self._manifest = RunManifest(_now(), None, call, settings, model, device, ranks, ())
        self._records: list[CaseRecord] = []
        self._written: float | None = None
        self._held = ExitStack()
        self.gathered = Gathered()
        if ranks.world_size > 1 and self._path is not None:
            # From now on the others know that this process is there.
            self._write_own()

    def add(
        self,
        case: CaseFiles,
        prediction: Path | None,
        *,
        about: Mapping[str, Any] | None = None,
        error: str | None = None,
        skipped: bool = False,
    ) -> None:
        """Notes what became of a case, and writes it down if that was not done for a while.

        Args:
            case: One of this process's own.
            prediction: Its label map; None where there is none.
            about: What its sidecar tells; None where there is none.
            error: Why there is no label map, in one line.
            skipped: Whether the label map was there before.
        """
        about = about or {}
        record = CaseRecord(
            name=case.name,
            inputs=about.get("inputs") or _inputs(case),
            prediction=None if prediction is None else prediction.name,
            prediction_sha256=about.get("prediction_sha256"),
            seconds={} if skipped else about.get("seconds", {}),
            peak_ram_mib=None if skipped else about.get("peak_ram_mib"),
            error=error,
            skipped=skipped,
        )
        self._records.append(record)
        if self._path is not None and (self._written is None or time.monotonic() - self._written > EVERY_S):
            self._write_own()
            if self.ranks.world_size == 1:
                self._write_list(self._rows([self._manifest.as_dict()]))

    def __enter__(self) -> Self:
        """Gives itself, and keeps other calls away from the output until its end.

        Raises:
            MedmomError: Another call is writing there, or nothing can be written.
        """
        path = self.outputs.predictions[0]
        place, name = path.parent, CALL_LOCK
        if self._path is None:
            # Other files of the folder are others' affair. Of a long name there is a digest.
            place, name = path, f"{CALL_LOCK}.{hashlib.sha256(path.name.encode()).hexdigest()[:16]}"
        try:
            lock = call_lock(path.parent, self._manifest.call, name=name, is_shared=self.ranks.world_size > 1)
            is_alone = self._held.enter_context(lock)
        except OSError as error:
            raise MedmomError(f"{place}: cannot be written ({error.strerror}). Choose another place.") from error
        if not is_alone:
            self._held.close()
            raise MedmomError(f"{place}: another medmom predict is writing there. Let it end, or name another output.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes all that is known.

        Of several processes one that did not begin yet is waited for, a minute at most; not where the run is cut short.

        Raises:
            MedmomError: The folder cannot be written; not where the run is cut short, which is told instead.
        """
        self._manifest = replace(self._manifest, ended=_now() if kind is None else None)
        with self._held:
            try:
                self.gathered = self._ended(may_wait=kind is None)
            except MedmomError:
                if kind is None:
                    raise

    def _ended(self, *, may_wait: bool) -> Gathered:
        if self._path is None or (self.ranks.world_size == 1 and not self._records):
            return Gathered(tuple(record.error for record in self._records if record.error))
        self._write_own()
        if self.ranks.world_size == 1:
            return self._gather()
        if may_wait:
            self._wait_for_others()
        try:
            with folder_lock(self._path.parent):
                return self._gather()
        except OSError as error:
            raise MedmomError(f"{self._path.parent}: cannot be written ({error.strerror}). Check the disk.") from error

    def _write_own(self) -> None:
        if self._path is not None:
            self._manifest = replace(self._manifest, cases=tuple(self._records))
            write_manifest(self._path, self._manifest)
            self._written = time.monotonic()

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + START_S
        while len(self._manifests()) < self.ranks.world_size and time.monotonic() < deadline:
            time.sleep(0.2)

    def _gather(self) -> Gathered:
        manifests = self._manifests()
        rows = self._rows(manifests.values())
        self._write_list(rows)
        self._write_statistics(rows)
        self._remove_old()
        return Gathered(
            failed=tuple(row["error"] for row in rows if row["error"]),
            has_all=sum(bool(manifest.get("ended")) for manifest in manifests.values()) == self.ranks.world_size,
            absent=tuple(rank for rank in range(self.ranks.world_size) if rank not in manifests),
        )

    def _manifests(self) -> dict[int, Mapping[str, Any]]:
        """What the processes of this call wrote so far, by rank."""
        found: dict[int, Mapping[str, Any]] = {}
        for rank in range(self.ranks.world_size):
            if rank == self.ranks.rank:
                found[rank] = self._manifest.as_dict()
                continue
            path = self.outputs.manifest(replace(self.ranks, rank=rank))
            told = None if path is None else _read(path)
            if told is not None and told.get("call") == self._manifest.call:
                found[rank] = told
        return found

    def _rows(self, manifests: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        records = {record["name"]: record for manifest in manifests for record in manifest["cases"]}
        checksum, settings = self.about["model"]["checksum"], self._manifest.settings
        return list_cases(self.cases, self.outputs.predictions, records, checksum=checksum, settings=settings)

    def _write_list(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.outputs.listing is not None:
            write_json(self.outputs.listing, {**self.about, "cases": rows})

    def _write_statistics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.outputs.listing is None:
            return
        statistics = collect_statistics(rows, self.outputs.predictions)
        # Those of an earlier call would be taken for this one's.
        if statistics or any(self.outputs.listing.with_name(name).exists() for name in STATISTICS):
            try:
                write_statistics(self.outputs.listing.parent, statistics)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise MedmomError(
                    f"{self.outputs.listing.parent}: statistics in a sidecar are not as this medmom writes them "
                    f"({error!r}). Run again without --skip-existing."
                ) from error

    def _remove_old(self) -> None:
        """Takes away what earlier calls with another number of processes told of themselves."""
        if self.outputs.listing is None:
            return
        current = {self.outputs.manifest(replace(self.ranks, rank=rank)) for rank in range(self.ranks.world_size)}
        for path in self.outputs.listing.parent.iterdir():
            if MANIFEST.fullmatch(path.name) and path not in current and _read(path) is not None:
                with suppress(OSError):
                    path.unlink()


def _call(cases: Sequence[CaseFiles], model: Mapping[str, Any], settings: Mapping[str, Any], ranks: Ranks) -> str:
    """A digest of what all processes of one call have in common, without a word between them."""
    common = [ranks.job, ranks.world_size, model, settings, [case.name for case in cases]]
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Mapping[str, Any] | None:
    """A manifest; None where it is not there or something else."""
    try:
        told = read_json(path)
    except (MedmomError, ValueError, RecursionError):
        return None
    if not (isinstance(told, dict) and {"call", "settings"} <= told.keys() and isinstance(told.get("cases"), list)):
        return None
    is_whole = all(isinstance(case, dict) and {"name", "prediction", "error"} <= case.keys() for case in told["cases"])
    return told if is_whole else None


def _inputs(case: CaseFiles) -> list[dict[str, str | None]]:
    """Checksums of the files of a case that failed, as far as they can be read."""
    hashes: list[dict[str, str | None]] = []
    for path in case.images:
        try:
            hashes += [dict(entry) for entry in input_hashes([path])]
        except (MedmomError, OSError):
            hashes.append({"path": str(path), "sha256": None})
    return hashes


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
