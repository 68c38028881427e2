"""Packages of low-rank networks: the factors as far as they are in use, and predictions from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
import torch
from class_networks import tiny_slices
from test_package import rewrite, save_classifier
from tiny import save_image, save_tiny, tiny_network

from medmom.errors import MedmomError
from medmom.inference.predict import predict
from medmom.models import MomentumUNet, to_dense, to_low_rank
from medmom.models.factorise import list_ranks
from medmom.models.low_rank import LowRankLayer
from medmom.package import load_package


def dense_network() -> MomentumUNet:
    plan: dict[str, Any] = {"kernels": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MomentumUNet(1, 3, channels=(8, 12), blocks=(1, 3), **plan).eval()


def low_rank_network() -> Any:
    """As a rule leaves it: the layers' ranks below their highest, the storage wider than both."""
    network = to_low_rank(dense_network(), 0.5, gradients="tangent", room=2)
    with torch.no_grad():
        for index, layer in enumerate(part for part in network.modules() if isinstance(part, LowRankLayer)):
            rank = layer.rank - index % 3
            for factor in (layer.u, layer.s, layer.v):
                factor[:, rank:] = 0
            layer.s[rank:] = 0
            layer.ranks[0] = rank
    return network


def image() -> torch.Tensor:
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("run") / "model", network=low_rank_network())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for path in saved.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "model"


def test_package_gives_the_same_network_back(saved: Path) -> None:
    network, state = low_rank_network(), torch.get_rng_state()
    loaded = load_package(saved).network
    assert torch.equal(torch.get_rng_state(), state)
    assert list_ranks(loaded) == list_ranks(network)
    assert len({sizes.rank for sizes in list_ranks(loaded).values()}) > 1
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image()), network(image()), rtol=0, atol=0)


def test_package_holds_the_factors_in_use_alone(saved: Path) -> None:
    network = low_rank_network()
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    ranks = list_ranks(network)
    for name, (rank, rows, columns) in ranks.items():
        shapes = [tuple(tensors[f"{name}.{part}"].shape) for part in ("u", "s", "v")]
        assert shapes == [(rows, rank), (rank, rank), (columns, rank)]
        assert tensors[f"{name}.ranks"].tolist() == [rank, min(2, rank), rank]
    dense = sum(p.numel() for p in dense_network().parameters())
    kept = dense - sum(r.rows * r.columns - r.num_parameters for r in ranks.values())
    assert sum(t.numel() for t in tensors.values() if t.is_floating_point()) == kept < 0.7 * dense
    dense_path = save_tiny(saved.parent / "dense", network=dense_network()) / "model.safetensors"
    assert (saved / "model.safetensors").stat().st_size < 0.8 * dense_path.stat().st_size
    assert json.loads((saved / "model.json").read_text())["network"]["ranks"] == {k: r.rank for k, r in ranks.items()}


def test_saving_leaves_the_network_as_it_is(tmp_path: Path) -> None:
    network = low_rank_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    parameters = [id(p) for p in network.parameters()]
    save_tiny(tmp_path / "model", network=network)
    assert [id(p) for p in network.parameters()] == parameters
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_package_can_be_saved_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        folder = save_tiny(tmp_path / "model", network=low_rank_network())
    assert list_ranks(load_package(folder).network) == list_ranks(low_rank_network())


def test_loaded_package_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    network: Any = load_package(saved).network
    again = save_tiny(tmp_path / "model", network=network)
    for name in ("model.json", "model.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_dense_package_says_nothing_of_ranks(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", network=tiny_network())
    assert json.loads((folder / "model.json").read_text())["network"].keys() == {"name", "arguments"}
    assert list_ranks(load_package(folder).network) == {}


def test_classifier_survives_the_package(tmp_path: Path) -> None:
    network = to_low_rank(tiny_slices(3).eval(), 0.3, room=2)
    loaded = load_package(save_classifier(tmp_path / "model", network, slices=5, novelty=None)).network
    pictures = torch.randn(1, 1, 16, 16, 5, generator=torch.Generator().manual_seed(0))
    assert list_ranks(loaded) == list_ranks(network) != {}
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pictures), network(pictures), rtol=0, atol=0)


def first(ranks: dict[str, int]) -> str:
    return next(iter(ranks))


CHANGES: dict[str, tuple[Any, str]] = {
    "another rank": (lambda ranks: {**ranks, first(ranks): ranks[first(ranks)] + 1}, "size mismatch"),
    "too large": (lambda ranks: {**ranks, first(ranks): 10**9}, r"rank 1000000000, .* for a matrix of"),
    "no rank": (lambda ranks: {**ranks, first(ranks): 0}, "rank 0, .* for a matrix of"),
    "a word": (lambda ranks: {**ranks, first(ranks): "wide"}, "invalid literal"),
    "one missing": (lambda ranks: dict(list(ranks.items())[1:]), "Missing key"),
    "none": (lambda _: {}, "Missing key"),
    "a list": (list, "no attribute"),
    "no such layer": (lambda ranks: {**ranks, "encoder.tail": 4}, "encoder.tail is no linear layer or convolution of"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_changed_ranks_are_refused_in_one_line(folder: Path, change: Any, message: str) -> None:
    network = json.loads((folder / "model.json").read_text())["network"]
    rewrite(folder, network={**network, "ranks": change(network["ranks"])})
    with pytest.raises(MedmomError, match=rf"model: the package does not fit together \(.*{message}") as caught:
        load_package(folder)
    assert "\n" not in str(caught.value)


def test_prediction_is_that_of_the_network_multiplied_out(saved: Path, tmp_path: Path) -> None:
    case = save_image(tmp_path / "case.nii.gz", (18, 14, 12))
    merged = save_tiny(tmp_path / "merged", network=to_dense(low_rank_network()))  # type: ignore[arg-type]
    found = []
    for name, model in (("low", saved), ("dense", merged)):
        (outcome,) = predict(model, [case], tmp_path / name / "seg.nii.gz", quiet=True).outcomes
        assert outcome.prediction is not None
        found.append(np.asarray(nib.load(outcome.prediction).dataobj))
    assert len(np.unique(found[0])) > 1
    # Rounding may decide between two classes that are equally likely.
    assert (found[0] != found[1]).mean() < 0.001
