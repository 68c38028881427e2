"""The plan keeps its budget, says what it takes, and names the smallest budget that would do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_network
from torch import Tensor, nn

from medmom.errors import MedmomError
from medmom.inference import footprint, memory
from medmom.inference.footprint import peak, resident, window_bytes
from medmom.inference.memory import GIB, parse_size, plan_stream, step_down
from medmom.inference.stream import StreamPlan, num_windows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20
TALL = {
    "shape": (1, 263, 263, 549),
    "own_shape": (512, 512, 824),
    "patch": (96, 96, 96),
    "overlap": 0.5,
    "num_classes": 25,
}
"""A CT from neck to knee, on a grid of 1.5 mm."""


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("1500MB", 1500 * 10**6),
        ("3G", 3 * GIB),
        ("3g", 3 * GIB),
        ("2.5", 5 * GIB // 2),
        (" 4 ", 4 * GIB),
        ("512 MiB", 512 * MIB),
        ("1TB", 10**12),
        ("0.5gib", GIB // 2),
        (".5", GIB // 2),
        ("100k", 100 * 1024),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, option="--max-ram") == size


@pytest.mark.parametrize("text", ["", "two", "-1", "0", "0GiB", "1,5GiB", "2 gigs", "nan", "inf", "1e3", "2GiBs", "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(MedmomError, match=r"^--max-ram .*no size of memory; give it as 2GiB, 1500MB, 3G or as a num"):
        parse_size(text, option="--max-ram")


def test_the_memory_of_this_process_is_known() -> None:
    before = resident()
    assert 50 * MIB < before <= peak()
    # Not from the allocator, which may have as much left over from other tests.
    with mmap(-1, 64 * MIB) as block:
        block[::PAGESIZE] = b"x" * (64 * MIB // PAGESIZE)
        assert resident() - before > 60 * MIB
        assert peak() >= resident() - MIB


def test_without_proc_the_system_is_asked_for_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = peak()
    monkeypatch.setattr(footprint, "STATUS", Path("nowhere"))
    assert peak() == pytest.approx(expected, rel=0.05)
    assert resident() == peak()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak() == pytest.approx(expected / 1024, rel=0.05)


def in_gib(monkeypatch: pytest.MonkeyPatch, *, start: float = 0.9, window: float = 0.3) -> None:
    monkeypatch.setattr(memory, "resident", lambda: int(start * GIB))
    monkeypatch.setattr(memory, "window_bytes", lambda *_, **__: int(window * GIB))


def plan(case: Mapping[str, Any] = TALL, **options: Any) -> tuple[StreamPlan, str]:
    return plan_stream(tiny_network(), **{**case, "device": CPU, **options})


def test_without_budget_sums_are_float32_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "window_bytes", None)
    found, told = plan()
    assert found == StreamPlan((96, 96, 96), 0.5, 2, 1, torch.float32, on_device=False)
    assert told == "Plan: 275 windows of 96 x 96 x 96 along z, one at a time, accumulator 0.65 GiB float32."
    assert num_windows((263, 263, 549), (96, 96, 96), 0.5) == 275


def test_float32_where_it_fits_and_float16_else(monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch)
    found, told = plan(max_ram=3 * GIB)
    assert found.dtype == torch.float32
    assert told.endswith("accumulator 0.65 GiB float32, 2.46 of 3.00 GiB RAM.")
    found, told = plan(max_ram=int(2.2 * GIB))
    assert found.dtype == torch.float16
    assert told.endswith("accumulator 0.34 GiB float16, 2.12 of 2.20 GiB RAM.")


def test_the_smallest_budget_that_does_is_named_and_does(monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch)
    with pytest.raises(MedmomError, match=r"^--max-ram 1GiB: this case needs at least 2\.12 GiB \(at the st") as told:
        plan(max_ram=GIB)
    offered = re.search(r"Give --max-ram ([0-9.]+GiB), or crop the image\.$", str(told.value))
    assert offered is not None
    assert offered[1] == "2.2GiB"
    plan(max_ram=parse_size(offered[1], option="--max-ram"))


def test_an_image_that_is_let_go_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch)
    found, _ = plan(max_ram=int(2.1 * GIB), image_bytes=-int(0.4 * GIB))
    assert found.dtype == torch.float32
    with pytest.raises(MedmomError, match=r"2\.52 GiB"):
        plan(max_ram=2 * GIB, image_bytes=int(0.4 * GIB))


def test_preparing_may_take_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch, start=0, window=0)
    case = {**TALL, "shape": (1, 512, 512, 10), "num_classes": 2, "patch": (32, 32, 8)}
    with pytest.raises(MedmomError, match=r"preparing 0\.8"):
        plan(case, max_ram=MIB)


@pytest.mark.parametrize(
    ("shape", "patch", "axis"),
    [
        ((40, 50, 60), (16, 16, 16), 2),
        ((60, 50, 40), (16, 16, 16), 0),
        ((50, 60, 50), (16, 16, 16), 1),
        ((50, 50, 50), (16, 16, 16), 2),
        ((64, 64, 20), (32, 32), 2),
        ((256, 256, 1), (64, 64), 1),
        ((50, 50, 8), (16, 16, 16), 1),
    ],
)
def test_planes_leave_along_the_axis_that_keeps_the_sums_small(
    shape: tuple[int, ...], patch: tuple[int, ...], axis: int
) -> None:
    found, _ = plan({**TALL, "shape": (1, *shape), "own_shape": shape, "patch": patch})
    smallest = [memory._Case((1, *shape), shape, patch, 0.5, 3, 0)._extents(axis) for axis in range(3)]
    assert found.axis == axis
    assert torch.tensor(smallest[axis]).prod() == min(torch.tensor(extents).prod() for extents in smallest)


@pytest.mark.parametrize("mirrors", [(), (0, 1, 2)])
def test_a_window_is_measured_once(mirrors: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_network().eval()
    found = window_bytes(network, 1, (32, 32, 32), device=CPU, mirrors=mirrors)
    assert found >= 4 * 32**3
    monkeypatch.setattr(footprint, "_on_cpu", None)
    assert window_bytes(network, 1, (32, 32, 32), device=CPU, mirrors=mirrors) == found


def test_a_measured_window_is_what_the_network_took(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(nn.Module):
        def forward(self, window: Tensor) -> Tensor:
            block = torch.ones(96 * MIB // 4)
            return window + block.mean()

    assert 95 * MIB < window_bytes(Greedy(), 1, (8, 8, 8), device=CPU) < 105 * MIB
    # Below a peak of before, the thread's figure counts.
    monkeypatch.setattr(footprint, "peak", lambda: 2**40)
    assert 95 * MIB < window_bytes(Greedy(), 1, (8, 8, 8), device=CPU) < 105 * MIB


def test_where_memory_cannot_be_looked_at_layers_give_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_network().eval()
    monkeypatch.setattr(footprint, "STATUS", Path("nowhere"))
    found = window_bytes(network, 1, (16, 16, 16), device=CPU)
    assert 2 * 16**3 * 4 * (1 + 4 * 3 + 3) < found < 16**3 * 4 * 200
    assert next(network.parameters()).device == CPU


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 16 GiB, 10 of them free, on which 1 GiB is taken."""
    held = SimpleNamespace(fraction=None)
    for name, value in {
        "mem_get_info": lambda _: (10 * GIB, 16 * GIB),
        "memory_reserved": lambda _: GIB,
        "memory_allocated": lambda _: GIB // 2,
        "set_per_process_memory_fraction": lambda share, _: setattr(held, "fraction", share),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return held


def test_as_many_windows_as_fit_run_at_once_on_a_gpu(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch, window=0.5)
    found, told = plan(device=CUDA)
    assert found == StreamPlan((96, 96, 96), 0.5, 2, 8, torch.float32, on_device=True)
    assert told.endswith("8 at a time, accumulator 0.65 GiB float32 on the GPU, 6.23 of 11.00 GiB VRAM.")
    assert gpu.fraction is None
    found, _ = plan(device=CUDA, max_vram=4 * GIB)
    assert (found.batch, found.on_device) == (4, True)
    assert gpu.fraction == 0.25


def test_sums_go_to_ram_and_then_to_float16_where_the_gpu_is_small(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_gib(monkeypatch, window=0.5)
    found, _ = plan(device=CUDA, max_vram=int(1.5 * GIB))
    assert (found.batch, found.on_device, found.dtype) == (1, False, torch.float32)
    found, told = plan(device=CUDA, max_vram=int(1.7 * GIB), max_ram=int(1.9 * GIB))
    assert (found.on_device, found.dtype) == (True, torch.float16)
    assert re.search(r"[0-9.]+ of 1\.70 GiB VRAM, [0-9.]+ of 1\.90 GiB RAM\.$", told)


def test_the_smallest_budget_of_a_gpu_is_named(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch, window=0.5)
    with pytest.raises(MedmomError, match=r"^--max-vram 1GiB: this case needs at least 1\..*Give --max-vram") as told:
        plan(device=CUDA, max_vram=GIB)
    offered = re.search(r"Give --max-vram ([0-9.]+GiB), or name --device cpu\.$", str(told.value))
    assert offered is not None
    plan(device=CUDA, max_vram=parse_size(offered[1], option="--max-vram"))
    with pytest.raises(MedmomError, match=r"^--max-ram 1GiB: this case needs at least .*Give --max-ram"):
        plan(device=CUDA, max_ram=GIB)


def test_a_gpu_that_others_fill_is_named(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    in_gib(monkeypatch, window=0.5)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 16 * GIB))
    with pytest.raises(MedmomError, match=r"^--device cuda: 1 GiB are free: .*\. Free some, or name --device cpu\.$"):
        plan(device=CUDA)


def test_stepping_down_ends() -> None:
    large = StreamPlan((96, 96, 96), 0.5, 2, 8, torch.float32, on_device=True)
    least = step_down(large)
    assert least == StreamPlan((96, 96, 96), 0.5, 2, 1, torch.float32, on_device=False)
    assert step_down(least) is None


WORKER = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
from medmom.geometry import Geometry
from medmom.data.case import Case
from medmom.data.preparation import Preparation, prepare, working_geometry
from medmom.inference.memory import GIB, plan_stream
from medmom.inference.footprint import peak, resident
from medmom.inference.restore import Restorer
from medmom.inference.stream import stream_logits
from medmom.models.presets import mom3d_xs
max_ram, classes = float(sys.argv[1]), 25
network = mom3d_xs(1, classes).eval()
own = Geometry((240, 240, 300), np.eye(4))
preparation = Preparation((1.5, 1.5, 1.5), "ct", clip=(-1000.0, 400.0), mean=0.0, std=200.0)
rng = np.random.default_rng(0)
image = rng.integers(-1000, 400, size=(1, *own.shape), dtype=np.int16)
working = working_geometry(preparation, own)
device = torch.device("cpu")
plan, told = plan_stream(network, (1, *working.shape), own.shape, (96,) * 3, 0.0, classes,
                         device=device, max_ram=int(max_ram * GIB))
case = prepare(Case("a", image, None, own, ()), preparation)
restorer = Restorer(working, own, classes, axis=plan.axis)
for place, logits in stream_logits(network, case.image, plan, device=device):
    restorer.push(place, logits)
label = restorer.finish()
print(json.dumps({"told": told, "peak": peak(), "shape": working.shape, "labels": len(np.unique(label))}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("max_ram", "dtype"), [(3, "float32"), (1.17, "float16")])
def test_the_true_peak_is_what_was_planned(max_ram: float, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(max_ram)], capture_output=True, text=True, check=True, timeout=900
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shape"] == [160, 160, 200]
    planned = re.search(rf"{dtype}, ([0-9.]+) of", found["told"])
    assert planned is not None, found["told"]
    share = found["peak"] / GIB / float(planned[1])
    assert share <= 1, found
    assert share >= 1 / 1.4, found
