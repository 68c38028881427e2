"""Several models give the mean of their probabilities, in the sums of one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_stream import Blur, Constant, Mirrored, a_plan, an_image, monai_logits, weight_sums, whole
from tiny import LABELS, save_image, save_tiny, tiny_network
from torch import Tensor, nn

from medmom.cleanup import Cleanup
from medmom.data.files import read_image
from medmom.data.preparation import Preparation
from medmom.errors import MedmomError
from medmom.inference import footprint
from medmom.inference import predictor as room
from medmom.inference.ensemble import Ensemble
from medmom.inference.memory import plan_stream
from medmom.inference.predictor import Predictor, Settings
from medmom.inference.ring import Ring
from medmom.inference.stream import StreamPlan, stream_logits
from medmom.labels import Labels
from medmom.models import MomentumUNet
from medmom.package import Package, load_package

CPU = torch.device("cpu")
CT = Preparation((1.0, 1.0, 1.0), "ct", clip=(-1000.0, 1000.0), mean=0.0, std=500.0)


def blurs(count: int = 3, dims: int = 3, channels: int = 2) -> list[Blur]:
    """Networks of one shape and of different weights, sure of what they say."""
    networks = [Blur(channels, 4, dims) for _ in range(count)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in itertools.chain(*(network.parameters() for network in networks)):
            weight.normal_(0, 1, generator=generator)
    return networks


class Sure(nn.Module):
    """Gives a network's probabilities."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, window: Tensor) -> Tensor:
        found: Tensor = self.network(window).softmax(1)
        return found


# Windows and sums


@pytest.mark.parametrize(("patch", "mirrors"), [((8, 8, 8), ()), ((8, 8, 8), (0, 2)), ((8, 8), ()), ((8, 8), (0, 1))])
def test_three_are_the_mean_of_three_single_runs(patch: tuple[int, ...], mirrors: tuple[int, ...]) -> None:
    networks, image = blurs(dims=len(patch)), an_image((13, 15, 11), channels=2)
    for plan in (a_plan(patch), a_plan(patch, axis=0, batch=3, overlap=0.25)):
        single = [whole([network], image, plan, mirrors=mirrors) for network in networks]
        found = whole(networks, image, plan, mirrors=mirrors)
        torch.testing.assert_close(found, torch.stack(single).mean(dim=0), rtol=0, atol=1e-6)
        assert not torch.equal(single[0], single[1])
        assert 0 <= found.min() <= found.max() <= 1
        torch.testing.assert_close(found.sum(dim=0), torch.ones(image.shape[1:]), rtol=0, atol=1e-6)


def test_one_alone_blends_probabilities_and_not_logits() -> None:
    (network,), image = blurs(1), an_image((13, 15, 11), channels=2)
    found = whole([network], image, a_plan((8, 8, 8)))
    torch.testing.assert_close(found, monai_logits(Sure(network), image, (8, 8, 8), 0.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, whole(Ensemble([network]), image, a_plan((8, 8, 8))), rtol=0, atol=0)
    assert (found - whole(network, image, a_plan((8, 8, 8))).softmax(dim=0)).abs().max() > 1e-3


def test_mirrored_passes_are_averaged_as_probabilities() -> None:
    networks, image = blurs(2), an_image((13, 9, 10), channels=2)
    found = whole(networks, image, a_plan((8, 8, 8)), mirrors=(0, 1))
    passes = [Mirrored(network, axes) for network in networks for axes in ((), (1,), (2,), (1, 2))]
    assert len(passes) == 8
    expected = torch.stack([whole(Sure(one), image, a_plan((8, 8, 8))) for one in passes]).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_order_of_members_changes_nothing() -> None:
    networks, image = blurs(), an_image((13, 9, 10), channels=2)
    first, *others = (whole(some, image, a_plan((8, 8, 8))) for some in itertools.permutations(networks))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 0.5, 0.75])
def test_float16_sums_keep_the_stated_error(overlap: float) -> None:
    shape, patch = (21, 17, 19), (8, 8, 8)
    networks, image = blurs(), an_image(shape, channels=2)
    exact = whole(networks, image, a_plan(patch, overlap=overlap))
    found = whole(networks, image, a_plan(patch, overlap=overlap, dtype=torch.float16))
    total, number = weight_sums(shape, patch, overlap)
    total *= 2.0 ** -np.ceil(np.log2(float(total.max()))) / 2
    unit = 2.0**-11
    assert ((found - exact).abs() <= (1 + unit) ** number * (number * unit + number * 2.0**-25 / total)).all()
    assert found.max() <= 1


def test_sums_that_round_above_one_are_probabilities() -> None:
    class Certain(nn.Module):
        def forward(self, window: Tensor) -> Tensor:
            logits = torch.zeros(len(window), 2, *window.shape[2:])
            logits[:, 1] = 100
            return logits

    plan = a_plan((8, 8, 8), overlap=0.75, dtype=torch.float16)
    image = an_image((20, 19, 18))
    assert whole(Sure(Certain()), image, plan).max() > 1
    assert whole([Certain()], image, plan).max() == 1


def test_outside_the_body_background_is_certain() -> None:
    networks, image = blurs(), an_image((40, 24, 24), channels=2)
    body = np.zeros((40, 24, 24), dtype=bool)
    body[20:23, 10:12, 3:20] = True
    found = whole(networks, image, a_plan((8, 8, 8)), body=body)
    everywhere = whole(networks, image, a_plan((8, 8, 8)))
    assert torch.equal(found[:, body], everywhere[:, body])
    assert torch.equal(found[:, ~body], torch.tensor([[1.0], [0], [0], [0]]).expand(4, int((~body).sum())))
    assert max(network.num_runs for network in networks) < 2 * min(network.num_runs for network in networks)


def test_constant_windows_run_once_a_row_and_member() -> None:
    networks, image = blurs(), an_image((30, 30, 24), channels=2)
    image[:, 9:] = 0
    whole(networks, image, a_plan((8, 8, 8)))
    # Of 7 x 7 windows in each of 5 rows, 3 x 7 vary.
    assert [network.num_runs for network in networks] == [5 * 22] * 3


def test_each_member_gets_its_channels() -> None:
    networks, images = blurs(channels=1), [an_image((13, 9, 5), seed=seed) for seed in range(2)]
    ensemble = Ensemble(networks, [slice(0, 1), slice(1, 2), slice(0, 1)])
    found = whole(ensemble, np.concatenate(images), a_plan((8, 8, 8)))
    single = [whole([network], images[k], a_plan((8, 8, 8))) for network, k in zip(networks, (0, 1, 0), strict=True)]
    torch.testing.assert_close(found, torch.stack(single).mean(dim=0), rtol=0, atol=1e-6)
    parts = list(stream_logits(ensemble, images, a_plan((8, 8, 8)), device=CPU))
    assert torch.equal(torch.cat([planes for _, planes in parts], dim=3), found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_member_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        whole([Constant(0.0), Constant(value)], an_image((9, 9, 9)), a_plan((8, 8, 8)))


def test_an_ensemble_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="0 members"):
        Ensemble([])
    with pytest.raises(ValueError, match="1 members with 2 places"):
        Ensemble([nn.Identity()], [slice(0, 1)] * 2)


# Memory


def test_sums_and_plan_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rings: list[Ring] = []
    start = Ring.__init__

    def noted(self: Ring, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        rings.append(self)

    monkeypatch.setattr(Ring, "__init__", noted)
    networks = blurs()
    for some in ([networks[0]], networks):
        whole(some, an_image((9, 11, 60), channels=2), a_plan((8, 8, 8)))
    assert [ring.sums.shape for ring in rings] == [(4, 9, 11, 8)] * 2
    case: tuple[Any, ...] = ((2, 60, 60, 90), (60, 60, 90), (8, 8, 8), 0.5, 4)
    one, three = (plan_stream(Ensemble(some), *case, device=CPU) for some in ([networks[0]], networks))
    assert one == three


def test_a_window_takes_what_the_largest_member_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(nn.Module):
        def __init__(self, mib: int) -> None:
            super().__init__()
            self.mib = mib

        def forward(self, window: Tensor) -> Tensor:
            return window + torch.ones(self.mib * 2**18).mean()

    ensemble = Ensemble([Greedy(32), Greedy(96), Greedy(64)])
    monkeypatch.setattr(footprint, "peak", lambda: 2**40)
    assert 95 < footprint.window_bytes(ensemble, 1, (8, 8, 8), device=CPU) / 2**20 < 110


def test_where_memory_cannot_be_looked_at_the_largest_bound_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "STATUS", Path("nowhere"))
    networks = [tiny_network(seed=seed).eval() for seed in range(3)]
    one = footprint.window_bytes(networks[0], 1, (16, 16, 16), device=CPU)
    assert footprint.window_bytes(Ensemble(networks), 1, (16, 16, 16), device=CPU) == one


WORKER = """
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
from medmom.inference.footprint import peak, resident
from medmom.inference.stream import StreamPlan, stream_logits
from medmom.models.presets import mom3d_xs
networks = [mom3d_xs(1, 25).eval() for _ in range(3)]
image = np.random.default_rng(0).normal(size=(1, 128, 128, 64)).astype(np.float32)
plan = StreamPlan((64, 64, 64), 0.0, 2, 1, torch.float32, False)
start = resident()
for place, planes in stream_logits(networks[:int(sys.argv[1])], image, plan, device=torch.device("cpu")):
    del planes
print(json.dumps(peak() - start))
"""


@pytest.mark.slow
def test_three_take_the_memory_of_one() -> None:
    taken = []
    for count in (1, 3):
        done = subprocess.run(
            [sys.executable, "-c", WORKER, str(count)], capture_output=True, text=True, check=True, timeout=900
        )
        taken.append(json.loads(done.stdout.splitlines()[-1]) / 2**20)
    sums, window = 26 * 4 * 128 * 128 * 64 / 2**20, 25 * 4 * 64**3 / 2**20
    assert taken[0] > sums
    # One more window is kept while the next member runs; the rest is what the system keeps of freed memory.
    assert taken[1] - taken[0] < 3 * window < sums


# Models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny(folder / str(seed), network=tiny_network(seed=seed)) for seed in range(3)]


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_image(tmp_path / "scan.nii.gz", (21, 18, 13), affine=np.diag([1.0, 1, 1, 1]))


def told(predictor: Predictor, image: Any) -> tuple[np.ndarray, Any]:
    """Probabilities and prediction of an image that lies on its working grid."""
    parts: list[np.ndarray] = []
    given = predictor.read([image])
    found = predictor.segment(given, probabilities=lambda _, values: parts.append(values.copy()))
    (axis,) = (a for a in range(3) if parts[0].shape[1 + a] != found.label.shape[a])
    return np.concatenate(parts, axis=1 + axis), found


def single_runs(packages: Sequence[Package], image: Any, **options: Any) -> np.ndarray:
    """The mean of what each model alone gives as an ensemble of one, on the working grid."""
    total: Any = 0
    for package in packages:
        given = Predictor(package.folder, device="cpu").read([image])
        parts = list(stream_logits([package.network], given.working.image, given.plan[0], device=CPU, **options))
        total = total + torch.cat([planes for _, planes in parts], dim=1 + given.plan[0].axis).double()
    return np.asarray(total / len(packages))


def test_probabilities_and_labels_are_those_of_the_mean(models: list[Path], scan: Path) -> None:
    probabilities, found = told(Predictor(models, device="cpu"), scan)
    wanted = single_runs([load_package(model) for model in models], scan)
    np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
    np.testing.assert_array_equal(found.label, np.array(LABELS.values)[probabilities.argmax(axis=0)])
    for k, sure in enumerate(found.confidence.values()):
        wins = probabilities.argmax(axis=0) == k
        assert sure == pytest.approx(probabilities[k][wins].mean(), rel=1e-5) if wins.any() else np.isnan(sure)


def test_members_may_be_of_other_architectures(models: list[Path], scan: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    options = {"kernels": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
    other = MomentumUNet(1, 3, channels=(3, 4, 5), blocks=(1, 1, 1), **options)  # type: ignore[arg-type]
    both = [models[0], save_tiny(tmp_path / "other", network=other)]
    probabilities, _ = told(Predictor(both, device="cpu"), scan)
    np.testing.assert_allclose(probabilities, single_runs([load_package(m) for m in both], scan), atol=1e-6)


def test_folds_may_scale_a_ct_by_their_own_numbers(scan: Path, tmp_path: Path) -> None:
    wide = replace(CT, clip=(-3.0, 3.0), mean=0.0, std=1.0)
    ways = [wide, replace(wide, clip=(-1.0, 2.5), mean=0.4, std=0.7), wide]
    folders = [
        save_tiny(tmp_path / str(k), network=tiny_network(seed=k), preparation=way, channels=("CT",))
        for k, way in enumerate(ways)
    ]
    predictor = Predictor(folders, device="cpu")
    given = predictor.read([scan])
    assert len(given.also) == 1
    assert given.also[0].shape == given.working.image.shape
    probabilities, _ = told(predictor, scan)
    np.testing.assert_allclose(probabilities, single_runs([load_package(f) for f in folders], scan), atol=1e-6)


def test_no_order_of_the_models_changes_a_bit(models: list[Path], scan: Path) -> None:
    found = [told(Predictor(some, device="cpu"), scan)[0] for some in (models, models[::-1], models[1:] + models[:1])]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_one_in_a_list_is_the_model_itself(models: list[Path], scan: Path) -> None:
    alone, listed = Predictor(models[0], device="cpu"), Predictor([models[0]], device="cpu")
    assert listed.checksum == alone.checksum == alone.package.checksum
    assert listed.choices() == alone.choices()
    assert np.array_equal(told(listed, scan)[0], told(alone, scan)[0])


def test_checksum_and_choices_tell_the_ensemble_whatever_the_order(models: list[Path]) -> None:
    one, turned, other = (Predictor(some, device="cpu") for some in (models, models[::-1], models[:2]))
    assert (one.checksum, one.choices()) == (turned.checksum, turned.choices())
    assert len({one.checksum, other.checksum, one.package.checksum}) == 3
    assert one.choices()["ensemble"] == sorted(package.checksum for package in one.packages)
    assert one.choices() != other.choices()
    assert one.package.folder == models[0]
    assert turned.package.folder == models[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": ("T1",)}, "channels T1, but MRI in"),
        ({"patch": (16, 16, 8)}, "patch 16 x 16 x 8, but 16 x 16 x 16 in"),
        ({"preparation": Preparation((1.0, 1.0, 2.0), "zscore")}, r"preparation\.spacing \(1\.0, 1\.0, 2\.0\), but"),
        ({"preparation": CT}, "preparation.intensity ct, but zscore in"),
    ],
)
def test_models_that_differ_are_refused_by_name(
    models: list[Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    other = save_tiny(tmp_path / "other", **change)
    with pytest.raises(MedmomError, match=rf"^{other}: {words} .*{models[0]}\. Leave out one of the two"):
        Predictor([models[0], models[1], other], device="cpu")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (Labels(("background", "head", "tail"), (0, 1, 4)), "labels with 'tail' as 4, but with 'body' as 4"),
        (Labels(("background", "head", "body"), (0, 1, 2)), "labels with 'body' as 2, but with 'body' as 4"),
        (Labels(("background", "head"), (0, 1)), "labels of 2 classes, but of 3 classes"),
    ],
)
def test_models_of_other_labels_are_refused(
    models: list[Path], monkeypatch: pytest.MonkeyPatch, labels: Labels, words: str
) -> None:
    packages = {models[0]: load_package(models[0]), models[1]: replace(load_package(models[1]), table=labels)}
    monkeypatch.setattr(room, "load_package", packages.__getitem__)
    with pytest.raises(MedmomError, match=rf"^{models[1]}: {words} in {models[0]}\."):
        Predictor(models[:2], device="cpu")


def test_a_model_twice_or_none_is_refused(models: list[Path]) -> None:
    with pytest.raises(MedmomError, match=rf"^{models[1]}: the same model as {models[1]}\. Leave out one"):
        Predictor([*models, models[1]], device="cpu")
    with pytest.raises(MedmomError, match=r"^no model is given\."):
        Predictor([], device="cpu")


def test_a_cleanup_is_done_where_all_chose_it(
    models: list[Path], scan: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, cleanup = Predictor(models[:2], device="cpu"), Cleanup(largest=(LABELS.foreground[1],))
    before = plain(scan, quiet=True).label == 4
    packages = {model: replace(load_package(model), cleanup=cleanup) for model in models[:2]}
    monkeypatch.setattr(room, "load_package", lambda path: packages[path])
    clean = Predictor(models[:2], device="cpu")
    after = clean(scan, quiet=True).label == 4
    assert 0 < after.sum() < before.sum()
    assert clean.choices()["cleanup"] == cleanup.as_dict()
    assert not caplog.messages
    packages[models[1]] = replace(packages[models[1]], cleanup=None)
    mixed = Predictor(models[:2], device="cpu")
    np.testing.assert_array_equal(mixed(scan, quiet=True).label == 4, before)
    assert mixed.choices()["cleanup"] is None
    assert caplog.messages == [f"{models[0]} and {models[1]} chose different cleanups: the ensemble does none."]


def test_windows_are_mirrored_along_the_axes_of_all(tmp_path: Path, scan: Path) -> None:
    axes = ([2, 0], [0, 1, 2], [1])
    some = [
        save_tiny(tmp_path / str(k), network=tiny_network(seed=k), data={"mirror": mirror})
        for k, mirror in enumerate(axes)
    ]
    predictor = Predictor(some[:2], device="cpu", settings=Settings(tta=True))
    assert predictor.mirrors == (0, 2)
    wanted = single_runs([load_package(model) for model in some[:2]], scan, mirrors=(0, 2))
    np.testing.assert_allclose(told(predictor, scan)[0], wanted, atol=1e-6)
    with pytest.raises(MedmomError, match=r"no axis was mirrored in the training of all \(data\.mirror\)"):
        Predictor(some, device="cpu", settings=Settings(tta=True))


def test_images_of_all_preparations_are_part_of_the_plan(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def plan(network: nn.Module, shape: tuple[int, ...], *arguments: Any, **options: Any) -> tuple[StreamPlan, str]:
        asked.append(shape)
        return plan_stream(network, shape, *arguments, **options)

    monkeypatch.setattr(room, "plan_stream", plan)
    ways = [CT, CT, replace(CT, mean=5.0)]
    some = [
        save_tiny(tmp_path / str(k), network=tiny_network(seed=k), preparation=way, channels=("CT",))
        for k, way in enumerate(ways)
    ]
    for members in (some[:2], some):
        Predictor(members, device="cpu", settings=Settings(max_ram=2**34)).read([read_image(scan).path])
    assert asked == [(1, 21, 18, 13), (2, 21, 18, 13)]
