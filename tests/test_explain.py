from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from medmom.inference.explain import SOFTWARE, Explanation, _Seen, draw_explanation, explain
from medmom.models import MomentumResNet, SliceClassifier

PLAN = {"channels": (8, 16), "blocks": (1, 4), "norm": "group"}


def classifier(dims: int, out_channels: int, kind: type = MomentumResNet, **options: object) -> MomentumResNet:
    torch.manual_seed(0)
    plan = {"kernels": [[3] * dims] * 2, "strides": [[1] * dims, [2] * dims]}
    return kind(1, out_channels, **PLAN, **plan, **options)


def blobs(num: int, dims: int, *, seed: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise in which every second image has a bright square somewhere: images, whether, where it begins."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 1, *[size] * dims, generator=rng) * 0.3
    places = torch.randint(1, size - 6, (num, dims), generator=rng)
    for k in range(0, num, 2):
        images[(k, 0, *[slice(int(start), int(start) + 5) for start in places[k]])] += 3
    return images, (torch.arange(num) + 1) % 2, places


def trained(dims: int, **options: object) -> MomentumResNet:
    network = classifier(dims, 2, **options)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(30 if dims == 2 else 12):
        images, wanted, _ = blobs(16, dims, seed=step, size=16 if dims == 2 else 12)
        loss = torch.nn.functional.cross_entropy(network(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def finder() -> MomentumResNet:
    return trained(2)


def centre(heat: np.ndarray) -> np.ndarray:
    """Of the upper half of the heat, along each axis."""
    return np.argwhere(heat > 0.5).mean(axis=0)


def test_heat_lies_where_the_class_is(finder: MomentumResNet) -> None:
    images, _, places = blobs(40, 2, seed=99)
    seen = [explain(finder, images[k : k + 1], 1) for k in range(0, 40, 2)]
    assert all(found.heat.min() >= 0 and found.heat.max() == pytest.approx(1) for found in seen)
    assert all(found.place is None for found in seen)
    # A network may look at one edge of the square: the heat has to move with it, along either axis.
    centres, wanted = np.array([centre(found.heat) for found in seen]), places[::2].numpy() + 2
    for axis in range(2):
        assert np.corrcoef(centres[:, axis], wanted[:, axis])[0, 1] > 0.8
    assert np.abs(centres - wanted).mean() < 3


def test_heat_is_the_gradient_weighted_sum_of_the_features(finder: MomentumResNet) -> None:
    image = blobs(2, 2, seed=3)[0][:1]
    features = finder.encoder(image)[-1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(finder.head(features)[0, 1], features)
    coarse = (gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1, keepdim=True).relu()
    wanted = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear", align_corners=False)[0, 0]
    found = explain(finder, image, 1).heat
    np.testing.assert_allclose(found, (wanted / wanted.max()).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "hybrid"])
def test_memory_of_the_network_changes_no_heat(memory: str, finder: MomentumResNet) -> None:
    image = blobs(2, 2, seed=3)[0][:1]
    plain = explain(finder, image, 1).heat
    finder.memory = memory
    try:
        np.testing.assert_allclose(explain(finder, image, 1).heat, plain, atol=1e-4)
        assert finder.memory == memory
    finally:
        finder.memory = "plain"


def test_network_is_left_as_it_was(finder: MomentumResNet) -> None:
    before = {name: weight.clone() for name, weight in finder.state_dict().items()}
    explain(finder, blobs(2, 2, seed=3)[0][:1], 0)
    assert all(torch.equal(before[name], weight) for name, weight in finder.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in finder.parameters())
    assert not any(module.training for module in finder.modules())
    assert not any(module._forward_hooks or module._backward_hooks for module in finder.modules())


def test_heat_of_a_class_that_nothing_speaks_for_is_zero(finder: MomentumResNet) -> None:
    heat = np.minimum(
        explain(finder, torch.zeros(1, 1, 16, 16), 0).heat, explain(finder, torch.zeros(1, 1, 16, 16), 1).heat
    )
    assert np.isfinite(heat).all()
    with torch.no_grad():
        finder.head.linear.weight.data, kept = torch.zeros(2, 16), finder.head.linear.weight.data
    try:
        assert explain(finder, torch.zeros(1, 1, 16, 16), 1).heat.max() == 0
    finally:
        finder.head.linear.weight.data = kept


def test_slice_with_the_class_is_shown(finder: MomentumResNet) -> None:
    network = classifier(2, 2, SliceClassifier, pooling="mean").eval()
    network.load_state_dict(finder.state_dict())
    images, _, _ = blobs(12, 2, seed=5)
    # Only the slice 4 has a square.
    volume = torch.stack([images[4 if k == 4 else 2 * k + 1, 0] for k in range(6)], dim=-1)[None, None]
    found = explain(network, volume, 1)
    assert found.place == 4
    np.testing.assert_array_equal(found.image, images[4])
    np.testing.assert_allclose(found.heat, explain(finder, images[4:5], 1).heat, atol=1e-5)
    assert explain(network, volume, 1, is_multilabel=True).place == 4


def test_slice_through_the_hottest_place_of_a_volume_is_shown() -> None:
    network = trained(3)
    images, _, places = blobs(2, 3, seed=9, size=12)
    found = explain(network, images[:1], 1)
    assert found.place is not None
    assert abs(found.place - int(places[0, 2]) - 2) <= 2
    np.testing.assert_array_equal(found.image, images[0, ..., found.place])
    assert np.abs(centre(found.heat) - places[0, :2].numpy() - 2).mean() < 3


def drawn(explanation: Explanation, *, is_volume: bool, caption: str = "case\nclass 0.9\n") -> np.ndarray:
    picture = Image.open(io.BytesIO(draw_explanation(explanation, caption, is_volume=is_volume)))
    assert picture.info["Software"] == SOFTWARE
    return np.asarray(picture.convert("RGB"), np.float32)


def bright(part: np.ndarray) -> tuple[float, float]:
    """Centre of the brightest part of a picture below its caption, as shares of its height and width."""
    rows, columns = np.nonzero(part.sum(axis=2) > 0.8 * part.sum(axis=2).max())
    return float(rows.mean() / part.shape[0]), float(columns.mean() / part.shape[1])


@pytest.mark.parametrize("is_volume", [False, True])
def test_picture_shows_image_and_heat_the_right_way_round(is_volume: bool) -> None:
    image, heat = np.zeros((1, 40, 20), np.float32), np.zeros((40, 20), np.float32)
    image[0, 4:8, 2:5] = 1
    heat[30:36, 14:18] = 1
    found = drawn(Explanation(image, heat, None), is_volume=is_volume)[80:]
    left, right = np.array_split(found, 2, axis=1)
    row, column = bright(left)
    # A volume is seen from the feet: both axes are turned.
    assert (row > 0.5, column > 0.5) == (is_volume, is_volume)
    # The heat lies in the opposite corner, on the right side alone.
    beside = np.abs(right - left[:, : right.shape[1]]).sum(axis=2)
    rows, columns = np.nonzero(beside > 0.5 * beside.max())
    assert (rows.mean() / len(beside) > 0.5, columns.mean() / beside.shape[1] > 0.5) == (not is_volume, not is_volume)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_drawn(channels: int) -> None:
    image = np.random.default_rng(0).normal(size=(channels, 9, 200)).astype(np.float32)
    found = drawn(
        Explanation(image, np.zeros((9, 200), np.float32), 3), is_volume=True, caption="$a_b\n" + "word " * 80
    )
    assert found.std() > 1
    coloured = np.abs(found[..., 0] - found[..., 2]).max() > 30
    assert coloured == (channels == 3)


def test_gradients_stop_before_the_encoder(finder: MomentumResNet) -> None:
    seen = _Seen(finder)
    seen(blobs(2, 2, seed=3)[0])[0, 1].backward()
    assert all(weight.grad is None for weight in finder.encoder.parameters())
    finder.zero_grad(set_to_none=True)
