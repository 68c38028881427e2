"""The benchmark of predict paints what it says, runs all roads and writes its page."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
scene, process, bench = (import_module(f"bench_predict{part}") for part in ("_scene", "_process", ""))
# Not on the path for the other tests.
sys.path.pop(0)

SHAPE, SPACING = (40, 32, 21), (2.0, 2.0, 3.0)


def body(num_organs: int = 6) -> object:
    return scene.make_body([n * mm for n, mm in zip(SHAPE, SPACING, strict=True)], num_organs, seed=1)


@pytest.mark.parametrize("num_organs", [1, 24, 103])
def test_organs_lie_in_the_body_and_apart(num_organs: int) -> None:
    made = scene.make_body((394.0, 394.0, 560.0), num_organs)
    assert len(made.centres) == len(made.hu) == num_organs
    assert len({round(value, 1) for value in made.hu}) == num_organs
    assert ((made.centres[:, :2] / made.half) ** 2).sum(axis=1).max() <= 1.05
    gaps = np.linalg.norm(made.centres[:, None] - made.centres, axis=-1) + 1e9 * np.eye(num_organs)
    assert num_organs == 1 or gaps.min() > made.radii.max()


def test_scan_does_not_depend_on_how_often_it_is_painted() -> None:
    first, second = (np.concatenate([s for s, _ in scene.paint(body(), SHAPE, SPACING)], axis=2) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == SHAPE


def test_every_organ_has_its_intensity() -> None:
    made = body()
    slabs = list(scene.paint(made, SHAPE, SPACING))
    image, label = (np.concatenate([slab[kind] for slab in slabs], axis=2) for kind in (0, 1))
    for number, hu in enumerate(made.hu, 1):
        assert abs(image[label == number].mean() - hu) < 3
    assert np.abs(np.median(image[0]) - scene.AIR) < 5


def test_phantom_file_is_a_sound_nifti(tmp_path: Path) -> None:
    scene.write_phantom(tmp_path / "a.nii.gz", body(), SHAPE, SPACING)
    file = nib.load(tmp_path / "a.nii.gz")
    assert file.get_data_dtype() == np.int16
    assert nib.aff2axcodes(file.affine) == ("R", "A", "S")
    np.testing.assert_allclose(file.header.get_zooms(), SPACING, rtol=1e-6)
    painted = np.concatenate([slab for slab, _ in scene.paint(body(), SHAPE, SPACING)], axis=2)
    np.testing.assert_array_equal(np.asarray(file.dataobj), painted)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_network_of_fewer_classes_gives_the_first_logits() -> None:
    network = scene.fit_network(9, spacing=3.0, window=16)
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(scene.cut_head(network, 4)(x), network(x)[:, :4])


def test_need_of_monai_grows_with_the_classes() -> None:
    size = scene.SIZES["usual"]
    need = [process.monai_need(size, count) / 2**30 for count in (3, 25, 104)]
    assert need == sorted(need)
    # The logits of 104 classes on the scan's own grid alone.
    assert need[2] > 104 * math.prod(size.shape) * 4 / 2**30 > 28


def test_failed_road_is_told_in_a_line(tmp_path: Path) -> None:
    result = process.Result(None, "does not fit (needs 40.1 GiB)")
    assert bench._figures(result) == ["-"] * 5
    assert bench._compared(result, result) == "-"


def test_slabs_and_the_command_run_on_a_small_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--small", "--case", "usual", "--check", "slabs", "--classes", "5", "--limit", "0"]
    page = bench.main([*words, "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
    text = page.read_text()
    assert text.strip() in f"{text}{capsys.readouterr().out}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    ours, theirs = (next(row for row in rows if row[0] == f"{name}, 5 classes") for name in ("medmom", "MONAI"))
    assert float(ours[1]) > 0
    assert float(ours[3]) > float(ours[4]) > 0
    assert theirs[-1].startswith("does not fit (needs 0.0 GiB)")
    by_scan: dict[str, set[str]] = {}
    for row in rows:
        if len(row) == 4 and row[1].isdigit():
            by_scan.setdefault(row[0], set()).add(row[2])
    assert [len(hashes) for hashes in by_scan.values()] == [1, 1]
    equal = [float(row[3].split()[0]) for row in rows if row[-1].endswith("%")]
    assert len(equal) == len(bench.HEIGHTS)
    assert min(equal) > 99.9


@pytest.mark.slow
def test_all_roads_run_on_small_scans(tmp_path: Path) -> None:
    words = ["--small", "--case", "tall", "usual", "--classes", "3", "--work", str(tmp_path / "work")]
    text = bench.main([*words, "--out", str(tmp_path)]).read_text()
    assert "medmom predict --max-ram 2GiB" in text
    row = next(line for line in text.splitlines() if line.startswith("| MONAI, 3 classes"))
    # Two ways of preparing a scan and a network that looks at noise: alike, not the same.
    assert 80 < float(row.split("equal ")[1].split(" %")[0]) <= 100
