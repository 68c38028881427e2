"""Windows that run in order give MONAI's logits, plane by plane, in the memory of one row of windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor, nn

from medmom.inference.ring import Ring
from medmom.inference.stream import (
    StreamPlan,
    num_windows,
    planes_at_once,
    stream_logits,
    window_logits,
    window_starts,
)
from medmom.inference.windows import sliding_window

CPU = torch.device("cpu")


class Blur(nn.Module):
    """A network whose logits depend on where in the window a voxel lies, and on its neighbours."""

    def __init__(self, in_channels: int, num_classes: int, dims: int = 3) -> None:
        super().__init__()
        kind = nn.Conv3d if dims == 3 else nn.Conv2d
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = kind(in_channels, num_classes, 3, padding=1)
        self.num_runs, self.largest = 0, 0.0
        self.batches: list[int] = []

    def forward(self, window: Tensor) -> Tensor:
        self.num_runs += len(window)
        self.batches.append(len(window))
        ramp = torch.linspace(0.5, 2, window.shape[2]).reshape(-1, *[1] * (window.ndim - 3))
        logits = self.body(window) * ramp
        self.largest = max(self.largest, float(logits.abs().max()))
        return logits


class Constant(nn.Module):
    """Gives one number for all voxels and classes."""

    def __init__(self, value: float, num_classes: int = 3) -> None:
        super().__init__()
        self.value, self.num_classes = value, num_classes

    def forward(self, window: Tensor) -> Tensor:
        return torch.full((len(window), self.num_classes, *window.shape[2:]), self.value)


def a_plan(patch: Sequence[int], **changes: Any) -> StreamPlan:
    values = {"overlap": 0.5, "axis": 2, "batch": 1, "dtype": torch.float32, "on_device": False, **changes}
    return StreamPlan(tuple(patch), **values)


def an_image(shape: Sequence[int], channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)


def whole(network: nn.Module | Sequence[nn.Module], image: np.ndarray, plan: StreamPlan, **options: Any) -> Tensor:
    """All planes, joined."""
    parts = list(stream_logits(network, image, plan, device=CPU, **options))
    assert [place.start for place, _ in parts] == [0, *[place.stop for place, _ in parts[:-1]]]
    assert parts[-1][0].stop == image.shape[1 + plan.axis]
    for place, logits in parts:
        assert logits.shape[1 + plan.axis] == place.stop - place.start
        assert logits.dtype == torch.float32
    return torch.cat([logits for _, logits in parts], dim=1 + plan.axis)


def monai_logits(network: nn.Module, image: np.ndarray, patch: Sequence[int], overlap: float) -> Tensor:
    with torch.inference_mode():
        return sliding_window(patch, overlap=overlap)(torch.from_numpy(image)[None], network)[0]


SIZES = [
    ((20, 17, 23), (8, 8, 8)),
    ((8, 8, 8), (8, 8, 8)),  # one window
    ((5, 19, 3), (8, 6, 8)),  # smaller than a window on two axes
    ((7, 7, 40), (8, 8, 10)),
    ((11, 13, 5), (8, 8)),  # slice by slice
    ((5, 21, 1), (8, 8)),
    ((1, 9, 9), (4, 4, 4)),
]


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(("shape", "patch"), SIZES)
def test_logits_are_those_of_monai(shape: Sequence[int], patch: Sequence[int], overlap: float) -> None:
    image = an_image(shape, channels=2)
    network = Blur(2, 3, len(patch))
    expected = monai_logits(network, image, patch, overlap)
    for axis in range(3):
        found = whole(network, image, a_plan(patch, overlap=overlap, axis=axis))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_windows_run_in_batches(channels: int, batch: int) -> None:
    image, network = an_image((20, 17, 13), channels), Blur(channels, 25)
    found = whole(network, image, a_plan((8, 8, 8), batch=batch))
    assert max(network.batches) == batch
    torch.testing.assert_close(found, monai_logits(network, image, (8, 8, 8), 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "patch"), SIZES)
def test_as_many_windows_as_counted(shape: Sequence[int], patch: Sequence[int]) -> None:
    for overlap in (0, 0.5, 0.75):
        told: list[int] = []
        network = Blur(1, 2, len(patch))
        whole(network, an_image(shape), a_plan(patch, overlap=overlap, batch=2), advance=told.append)
        assert sum(told) == network.num_runs == num_windows(shape, patch, overlap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_logits_do_not_depend_on_how_planes_are_cut(
    axis: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, network, plan = an_image((13, 14, 15)), Blur(1, 3), a_plan((8, 8, 8), axis=axis, dtype=dtype)
    at_once = whole(network, image, plan)
    monkeypatch.setattr("medmom.inference.stream.CHUNK_BYTES", 1)
    parts = list(stream_logits(network, image, plan, device=CPU))
    assert len(parts) == image.shape[1 + axis]
    assert torch.equal(torch.cat([logits for _, logits in parts], dim=1 + axis), at_once)


def test_the_sums_hold_one_row_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    rings: list[Ring] = []
    start = Ring.__init__

    def noted(self: Ring, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        rings.append(self)

    monkeypatch.setattr(Ring, "__init__", noted)
    whole(Blur(1, 3), an_image((9, 11, 60)), a_plan((8, 8, 8), axis=2, dtype=torch.float16))
    (ring,) = rings
    assert ring.sums.shape == (3, 9, 11, 8)
    assert ring.sums.dtype == torch.float16


def test_planes_that_left_may_be_kept_and_written_to() -> None:
    image, network = an_image((9, 9, 20)), Blur(1, 3)
    expected = monai_logits(network, image, (8, 8, 8), 0.5)
    for place, logits in stream_logits(network, image, a_plan((8, 8, 8)), device=CPU):
        torch.testing.assert_close(logits, expected[..., place], rtol=0, atol=1e-5)
        logits.zero_()
        logits.requires_grad_()  # a tensor of inference mode refuses


def weight_sums(shape: Sequence[int], patch: Sequence[int], overlap: float) -> tuple[Tensor, Tensor]:
    """Summed weights and number of windows at each voxel."""
    weights, number = torch.zeros(*shape), torch.zeros(*shape)
    for corner in itertools.product(*window_starts(shape, patch, overlap)):
        place = tuple(slice(start, start + edge) for start, edge in zip(corner, patch, strict=True))
        weights[place] += compute_importance_map(tuple(patch), mode="gaussian", sigma_scale=0.125)
        number[place] += 1
    return weights, number


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 2e4])
@pytest.mark.parametrize("overlap", [0, 0.5, 0.75])
def test_float16_sums_keep_the_stated_error(overlap: float, size: float) -> None:
    shape, patch = (21, 17, 19), (8, 8, 8)
    network, image = Blur(1, 3), an_image(shape, seed=2)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(size)
    exact = whole(network, image, a_plan(patch, overlap=overlap))
    found = whole(network, image, a_plan(patch, overlap=overlap, dtype=torch.float16))
    largest = network.largest
    total, number = weight_sums(shape, patch, overlap)
    # A power of two less than what the sums need: the scale is made from a bound on them.
    total *= 2.0 ** -math.ceil(math.log2(float(total.max()))) / 2
    unit = 2.0**-11
    bound = (1 + unit) ** number * (number * unit * largest + number * 2.0**-25 / total)
    error = (found - exact).abs()
    assert (error <= bound + 1e-5 * largest).all()
    assert float(error.max()) > 0.05 * float(bound.min())  # the bound is no empty one


def test_float16_weights_sum_to_one_at_most() -> None:
    for overlap in (0, 0.25, 0.5, 0.75):
        found = whole(Constant(65000.0), an_image((20, 17, 23)), a_plan((8,) * 3, overlap=overlap, dtype=torch.float16))
        torch.testing.assert_close(found, torch.full_like(found, 65000.0), rtol=2e-2, atol=0)


def test_logits_too_large_for_float16_are_refused() -> None:
    with pytest.raises(OverflowError, match=r"1e\+06 is too large for sums in float16"):
        whole(Constant(1e6), an_image((9, 9, 9)), a_plan((8, 8, 8), dtype=torch.float16))
    whole(Constant(1e6), an_image((9, 9, 9)), a_plan((8, 8, 8)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_output_that_is_not_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        whole(Constant(value), an_image((9, 9, 9)), a_plan((8, 8, 8), dtype=dtype))


def test_a_network_of_another_output_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(1, 2, 6, 6, 6\)"):
        whole(nn.Conv3d(1, 2, 3), an_image((9, 9, 9)), a_plan((8, 8, 8)))


@pytest.mark.parametrize("mirrors", [(0,), (2,), (0, 1), (0, 1, 2)])
def test_mirrored_passes_are_averaged(mirrors: Sequence[int]) -> None:
    image, network = an_image((13, 9, 10)), Blur(1, 3)
    found = whole(network, image, a_plan((8, 8, 8)), mirrors=mirrors)
    expected = []
    for count in range(len(mirrors) + 1):
        for axes in itertools.combinations([1 + axis for axis in mirrors], count):
            flipped = np.flip(image, axes).copy()
            # Windows of a mirrored image start elsewhere: mirror window by window.
            assert flipped.shape == image.shape
            expected.append(whole(Mirrored(network, axes), image, a_plan((8, 8, 8))))
    assert len(expected) == 2 ** len(mirrors)
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=0), rtol=0, atol=1e-5)


class Mirrored(nn.Module):
    def __init__(self, network: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        self.network, self.axes = network, [1 + axis for axis in axes]

    def forward(self, window: Tensor) -> Tensor:
        return self.network(window.flip(self.axes)).flip(self.axes)


def test_mirrors_of_a_network_that_mirrors_along_change_nothing() -> None:
    image, network = an_image((13, 9, 10), channels=2), nn.Identity()
    plan = a_plan((8, 8, 8))
    torch.testing.assert_close(whole(network, image, plan, mirrors=(0, 1, 2)), whole(network, image, plan))


def test_slices_are_not_mirrored_along_the_axis_they_lack() -> None:
    assert whole(Blur(1, 2, 2), an_image((9, 9, 3)), a_plan((8, 8)), mirrors=(0, 1)).shape == (2, 9, 9, 3)
    with pytest.raises(ValueError, match="not mirrored along axes"):
        whole(Blur(1, 2, 2), an_image((9, 9, 3)), a_plan((8, 8)), mirrors=(2,))


@pytest.mark.parametrize("mirrors", [(), (0, 2)])
def test_constant_windows_run_once_a_row(mirrors: Sequence[int]) -> None:
    image = an_image((30, 30, 24), channels=3)
    image[:, 9:] = 0  # a corner window's place must not be taken for constants of the same numbers
    image[:, :9, 20:] = np.float32([1, 2, 3]).reshape(3, 1, 1, 1)
    network = Blur(3, 3)
    found = whole(network, image, a_plan((8, 8, 8)), mirrors=mirrors)
    passes = 2 ** len(mirrors)
    # Of 7 x 7 windows in each of 5 rows, 3 x 7 vary or are (1, 2, 3), two of these in one place; all others are 0.
    assert network.num_runs == 5 * 21 * passes
    image_mean = [
        whole(Mirrored(network, axes), image + 0, a_plan((8, 8, 8)))
        for count in range(len(mirrors) + 1)
        for axes in itertools.combinations([1 + axis for axis in mirrors], count)
    ]
    torch.testing.assert_close(found, torch.stack(image_mean).mean(dim=0), rtol=0, atol=1e-5)
    if not mirrors:
        torch.testing.assert_close(found, monai_logits(network, image, (8, 8, 8), 0.5), rtol=0, atol=1e-5)


def test_a_window_that_is_constant_in_one_channel_alone_is_not_constant() -> None:
    image = an_image((20, 20, 20), channels=2)
    image[0] = 0
    network = Blur(2, 3)
    whole(network, image, a_plan((8, 8, 8)))
    assert network.num_runs == num_windows((20, 20, 20), (8, 8, 8), 0.5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_windows_outside_the_body_do_not_run(axis: int) -> None:
    image, network = an_image((40, 24, 24)), Blur(1, 3)
    body = np.zeros((40, 24, 24), dtype=bool)
    body[20:23, 10:12, 3:20] = True
    told: list[int] = []
    found = whole(network, image, a_plan((8, 8, 8), axis=axis), body=body, advance=told.append)
    assert sum(told) == num_windows(body.shape, (8, 8, 8), 0.5) > 2 * network.num_runs
    expected = monai_logits(network, image, (8, 8, 8), 0.5)
    torch.testing.assert_close(found[:, body], expected[:, body], rtol=0, atol=1e-5)
    assert torch.equal(found[:, ~body], torch.tensor([[0.0], [-10.0], [-10.0]]).expand(3, int((~body).sum())))


def test_an_image_without_body_is_background() -> None:
    body = np.zeros((12, 12, 12), dtype=bool)
    found = whole(Blur(1, 3), an_image((12, 12, 12)), a_plan((8, 8, 8)), body=body)
    assert (found[0] == 0).all()
    assert (found[1:] == -10).all()


def test_a_body_in_a_padded_image_is_found() -> None:
    body = np.zeros((5, 12, 12), dtype=bool)
    body[4, 11, 11] = True
    network = Blur(1, 3)
    found = whole(network, an_image((5, 12, 12)), a_plan((8, 8, 8), overlap=0, axis=0), body=body)
    assert network.num_runs == 1
    assert float(found[0, 4, 11, 11]) != 0


@pytest.mark.parametrize("num_classes", [2, 25])
def test_planes_leave_in_bounded_pieces(num_classes: int) -> None:
    assert planes_at_once(num_classes, (263, 263, 549), 2) == max(1, 2**25 // (4 * num_classes * 263 * 263))
    assert planes_at_once(num_classes, (5, 5, 3), 2) == 3
    assert planes_at_once(200, (2000, 2000, 3), 2) == 1


def test_mirrors_leave_the_windows_as_they_are() -> None:
    windows = torch.rand(1, 1, 4, 4, 4)
    before = windows.clone()
    window_logits(nn.Identity(), windows, (0,))
    assert torch.equal(windows, before)
