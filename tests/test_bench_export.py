"""The benchmark of exports gives every way the same logits, and compares what comes back."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medmom.data.preparation import restore
from medmom.geometry import Geometry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
bench, ways = import_module("bench_export"), import_module("bench_export_ways")
# Not on the path for the other tests.
sys.path.pop(0)


def made(folder: Path, num_classes: int = 4, **options: Any) -> Any:
    shapes = {"working": (14, 11, 9), "own": (24, 19, 13), **options}
    problem = ways.Problem(str(folder / "logits.bin"), num_classes, spacing=1.5, threads=1, **shapes)
    bench.write_logits(problem, seed=0)
    return problem


def labels_of(name: str, problem: Any, folder: Path) -> np.ndarray:
    result = bench.run_way(name, problem, folder / f"{name}.npy")
    assert result.get("failure") is None
    assert result["seconds"] > 0
    labels: np.ndarray = np.load(folder / f"{name}.npy", allow_pickle=False)
    return labels


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_grids_have_one_extent() -> None:
    problem = ways.Problem("", 2, (14, 11, 9), (24, 19, 13), 1.5, 1)
    working, own = (Geometry(*pair) for pair in zip((problem.working, problem.own), problem.affines(), strict=True))
    assert (working.orientation, own.orientation) == ("RAS", "LPS")
    assert own.reoriented("RAS").with_shape(working.shape).is_close(working, 1e-9)


def test_medmom_restores_the_logits_of_the_file(tmp_path: Path) -> None:
    problem = made(tmp_path)
    working, own = (Geometry(*pair) for pair in zip((problem.working, problem.own), problem.affines(), strict=True))
    logits = problem.logits().permute(0, 2, 3, 1).float().numpy()
    labels = labels_of("medmom", problem, tmp_path)
    assert len(np.unique(labels)) == 4
    np.testing.assert_array_equal(labels, restore(logits, working, own))


@pytest.mark.parametrize("name", ["monai", "monai-float32"])
def test_monai_gives_the_same_labels(name: str, tmp_path: Path) -> None:
    problem = made(tmp_path)
    assert np.mean(labels_of(name, problem, tmp_path) == labels_of("medmom", problem, tmp_path)) > 0.999


def nnunet_twin(logits: torch.Tensor, plans: Any, configuration: Any, labels: Any, properties: Any, **_: Any) -> Any:
    """Interpolates as nnU-Net does, the array's own axes from edge to edge."""
    assert logits.dtype == torch.float16
    assert plans.transpose_backward == [0, 1, 2]
    shape = properties["shape_before_cropping"]
    extents = np.multiply(shape, properties["spacing"])
    np.testing.assert_allclose(extents, np.multiply(logits.shape[1:], configuration.spacing))
    values = torch.nn.functional.interpolate(logits[None].float(), shape, mode="trilinear", align_corners=False)
    return values[0].argmax(0).to(torch.uint8).numpy()


@pytest.mark.parametrize("name", ["nnunet", "nnunet-torch"])
def test_nnunet_gets_the_axes_of_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = made(tmp_path)
    expected = labels_of("medmom", problem, tmp_path)
    package = SimpleNamespace(
        resample_data_or_seg_to_shape=print,
        resample_torch_fornnunet=print,
        LabelManager=lambda names, regions: names,
        convert_predicted_logits_to_segmentation_with_correct_shape=nnunet_twin,
    )
    monkeypatch.setattr(ways, "import_module", lambda _: package)
    monkeypatch.setattr(bench, "version", lambda _: "0")
    assert np.mean(labels_of(name, problem, tmp_path) == expected) > 0.999


def test_totalsegmentator_gets_a_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = made(tmp_path, own=(14, 11, 9))
    package = SimpleNamespace(resample_one_hot_crop=lambda labels, shape, **_: labels.reshape(shape))
    expected = labels_of("medmom", problem, tmp_path)
    monkeypatch.setattr(ways, "import_module", lambda _: package)
    monkeypatch.setattr(bench, "version", lambda _: "0")
    np.testing.assert_array_equal(labels_of("totalsegmentator", problem, tmp_path), expected)


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = bench.run_way("totalsegmentator", made(tmp_path), tmp_path / "label.npy")
    assert result == {"failure": "not installed (totalsegmentator)"}


def test_what_does_not_fit_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(name: str, *_: Any) -> dict[str, Any]:
        asked.append(name)
        return {"seconds": 2.0, "extra": 2**28, "version": "1"}

    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(bench, "equal_share", lambda *_: 1.0)
    options = Namespace(ways=list(ways.WAYS), limit=16.0, peer_python="")
    tall = ways.Problem("", 25, (263, 263, 549), (512, 512, 824), 1.5, 2)
    rows = {row[0]: row for row in bench.compare(tall, options, tmp_path)}
    # Logits in float32, the result in float64 and in float32.
    need = 25 * (4 * 263 * 263 * 549 + 12 * 512 * 512 * 824) / 2**30
    assert rows["MONAI, as Invertd (float64)"][1] == f"does not fit (needs {need:.1f} GiB)"
    assert "monai" not in asked
    assert asked[0] == "medmom"
    assert rows["medmom"][4] == "bounded"


def test_share_of_mixed_cells_counts_corners() -> None:
    labels = np.zeros((2, 3, 3), dtype=np.uint8)
    labels[0, 2, 2] = 1
    assert bench.mixed_share(labels) == 1 / 8


def test_peak_is_that_of_the_work() -> None:
    before = bench.peak_bytes(reset=True)
    torch.ones(2**24).sum()
    peak = bench.peak_bytes() - before
    assert 0.8 * 2**26 < peak < 2 * 2**26
    assert bench.peak_bytes(reset=True) - before < 2**25


def test_small_run_writes_a_page(tmp_path: Path) -> None:
    bench.main(["--small", "--ways", "medmom", "--threads", "1", "--out", str(tmp_path), "--folder", str(tmp_path)])
    page = (tmp_path / "benchmarks" / "export.md").read_text(encoding="utf-8")
    assert "## 3 classes, 26x21x12 to 48x40x12" in page
    assert "| 100.0000% | bounded |" in page


@pytest.mark.slow
def test_small_run_tries_every_way(tmp_path: Path) -> None:
    bench.main(["--small", "--out", str(tmp_path), "--folder", str(tmp_path)])
    page = (tmp_path / "benchmarks" / "export.md").read_text(encoding="utf-8")
    assert all(f"| {way.title} | " in page for way in ways.WAYS.values())
