"""What a run tells of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from medmom.errors import MedmomError
from medmom.inference.manifest import (
    CaseRecord,
    RunManifest,
    device_in_words,
    file_sha256,
    input_hashes,
    write_manifest,
)
from medmom.inference.ranks import Ranks


def manifest(*cases: CaseRecord) -> RunManifest:
    return RunManifest(
        started="2025-01-02T03:04:05+00:00",
        ended="2025-01-02T03:05:05+00:00",
        call="c0ffee",
        settings={"overlap": 0.5},
        model={"checksum": "abc", "network": "MomentumUNet"},
        device="CPU Some, 1 thread",
        ranks=Ranks(1, 1, 3),
        cases=cases,
    )


def test_checksum_is_that_of_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    content = bytes(range(256)) * 20_000
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedmomError, match=r"gone\.nii: cannot be read \(No such file"):
        file_sha256(tmp_path / "gone.nii")
    with pytest.raises(MedmomError, match=r"gone\.hdr: cannot be read"):
        input_hashes([tmp_path / "gone.hdr"])


@pytest.mark.parametrize("given", ["a.hdr", "a.img"])
def test_either_half_of_a_pair_stands_for_both(given: str, tmp_path: Path) -> None:
    for name in ("a.hdr", "a.img", "b.nii"):
        (tmp_path / name).write_text(name)
    hashes = input_hashes([tmp_path / given, tmp_path / "b.nii"])
    assert [Path(entry["path"]).name for entry in hashes] == ["a.hdr", "a.img", "b.nii"]
    assert [entry["sha256"] for entry in hashes] == [
        hashlib.sha256(name.encode()).hexdigest() for name in ("a.hdr", "a.img", "b.nii")
    ]


def test_paths_are_told_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.nii").touch()
    monkeypatch.chdir(tmp_path)
    assert [entry["path"] for entry in input_hashes(["a.nii"])] == ["a.nii"]


def test_manifest_has_versions_ranks_and_totals(tmp_path: Path) -> None:
    done = CaseRecord("a", [{"path": "a.nii", "sha256": "1"}], "a.nii.gz", "2", {"read": 0.5, "network": 1.25}, 812.5)
    skipped = CaseRecord("b", [{"path": "b.nii", "sha256": "3"}], "b.nii.gz", "4", skipped=True)
    failed = CaseRecord("c", [{"path": "c.nii", "sha256": None}], error="c.nii: the file is empty.")
    write_manifest(tmp_path / "run.json", manifest(done, skipped, failed))
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["totals"] == {"cases": 3, "predicted": 1, "skipped": 1, "failed": 1, "seconds": 1.75}
    assert (told["rank"], told["world_size"]) == (1, 3)
    assert told["model"]["checksum"] == "abc"
    assert {"medmom", "torch", "python"} <= told["versions"].keys()
    assert told["cases"][0] == {
        "name": "a",
        "inputs": [{"path": "a.nii", "sha256": "1"}],
        "prediction": "a.nii.gz",
        "prediction_sha256": "2",
        "seconds": {"read": 0.5, "network": 1.25},
        "peak_ram_mib": 812.5,
        "error": None,
        "skipped": False,
    }


def test_device_is_told_in_words() -> None:
    words = device_in_words(torch.device("cpu"))
    assert words.startswith("CPU ")
    assert words.endswith(("1 thread", f"{torch.get_num_threads()} threads"))
    assert len(words) > len("CPU , 1 thread")
