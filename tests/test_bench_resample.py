"""The benchmark of resampling runs, and names what is absent."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = str(Path(__file__).resolve().parent.parent / "scripts")
sys.path.insert(0, SCRIPTS)
bench: Any = import_module("bench_resample")
# Not on the path for the other tests.
sys.path.pop(0)


def result(name: str, scan: np.ndarray) -> Any:
    return bench.Result(1.0, 2.0, bench.COMPETITORS[name](scan, bench.grids(scan.shape[::-1])[1].shape))


def test_target_has_the_extent_of_the_scan_and_the_size_of_its_spacing() -> None:
    source, target = bench.grids(bench.SHAPES[False])
    assert target.shape == (273, 273, 280)
    np.testing.assert_allclose(np.multiply(target.shape, target.spacing), np.multiply(source.shape, source.spacing))


def test_values_are_those_of_scipy() -> None:
    scan = bench.phantom(bench.SHAPES[True], seed=0)
    ours, theirs = (result(name, scan) for name in ("medmom", "scipy.ndimage.zoom"))
    # scipy's leave the range of the scan at the edges of organs.
    kept = np.clip(theirs.values, scan.min(), scan.max())
    assert bench.difference(ours.values, kept) < 1e-5


def test_table_says_who_is_faster_and_who_is_absent() -> None:
    ours, theirs = np.zeros((20, 20, 20)), np.linspace(0, 1, 8000).reshape(20, 20, 20)
    results = {
        "medmom": bench.Result(0.5, 3.0, theirs + 1e-3),
        "nnU-Net v2": bench.Result(5.0, 30.0, theirs),
        "skimage.transform.resize": bench.Result(reason="not installed (skimage)"),
        "TotalSegmentator": bench.Result(2.0, 1.0, ours),
    }
    assert bench.rows(results, "nnU-Net v2") == [
        ["medmom", "0.5", "1", "3", "1.0e-03"],
        ["nnU-Net v2", "5", "10", "30", "reference"],
        ["skimage.transform.resize", "not installed (skimage)", "", "", ""],
        ["TotalSegmentator", "2", "4", "1", "another grid"],
    ]
    yes, no = bench.acceptance(results, "nnU-Net v2")
    assert "yes (10)" in yes
    assert "no (1.0e-03)" in no


def test_small_run_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", bench.phantom(bench.SHAPES[True], seed=0))
    measured = bench.measure("medmom", tmp_path, 1)
    assert measured.values.shape == bench.grids(bench.SHAPES[True])[1].shape
    assert measured.seconds > 0
    assert measured.mib >= 0


def test_page_names_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(name: str, folder: Path, repeats: int) -> Any:
        absent = name not in ("medmom", "scipy.ndimage.zoom")
        return (
            bench.Result(reason="not installed")
            if absent
            else result(name, np.load(folder / "scan.npy", allow_pickle=False))
        )

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.syspath_prepend(SCRIPTS)
    text = bench.main(["--small", "--out", str(tmp_path)]).read_text(encoding="utf-8")
    assert "64 x 60 x 40 voxels, int16, 0.8 x 0.8 x 1.5 mm, order 3, to 34 x 32 x 40 voxels" in " ".join(text.split())
    assert "| nnU-Net v2 | not installed |" in text
    assert "| scipy.ndimage.zoom | 1 | 1 | 2 | reference |" in text


@pytest.mark.peers
def test_values_are_those_of_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(SCRIPTS)
    text = bench.main(["--small", "--repeats", "1", "--out", str(tmp_path)]).read_text(encoding="utf-8")
    assert "| skimage.transform.resize | " in text
    assert "Values within 0.0001 of its range: yes" in text
