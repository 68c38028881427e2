"""Two processes with half of the batch each learn what one learns from all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddp_worker import CASES, WORLD, train, work
from stages import difference
from torch import multiprocessing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Weights of every case by process."""
    folder = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(work, (folder,), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(name: str, trained: list[Any]) -> None:
    first, second = (by_case[name] for by_case in trained)
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone = train(name)
    assert difference(first, alone) < 1e-6
    for key, expected in alone.items():
        torch.testing.assert_close(first[key], expected, rtol=0, atol=1e-6, msg=key)
