from __future__ import annotations

import pytest
import torch

from medmom.device import torch_device
from medmom.errors import MedmomError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["gpus"],
)
def test_a_name_gives_its_device(gpus: None, name: str, device: str) -> None:
    assert torch_device(name) == torch.device(device)


@pytest.mark.parametrize(("gpus", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")], indirect=["gpus"])
def test_a_gpu_that_is_not_there_is_refused_with_the_number_that_are(
    gpus: None, name: str, request: pytest.FixtureRequest
) -> None:
    there = request.node.callspec.params["gpus"]
    with pytest.raises(MedmomError, match=f"--device {name}: this machine shows {there} GPUs"):
        torch_device(name)


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.parametrize("name", ["", "gpu", "mps", "cpu:0", "cpu:", "cuda:", "cuda:x", "cuda:-1", "cuda:1:1", "CUDA"])
def test_a_name_that_is_no_device_is_refused(gpus: None, name: str) -> None:
    with pytest.raises(MedmomError, match=f"--device {name}: choose auto, cpu, cuda or cuda:N"):
        torch_device(name)
