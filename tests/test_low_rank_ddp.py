"""Two processes with half of the batch each take the steps at low rank that one takes with all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_rank_worker import CASES, WORLD, train, work
from torch import multiprocessing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Weights and ranks of every case by process."""
    folder = tmp_path_factory.mktemp("low_rank_ddp")
    multiprocessing.spawn(work, (folder,), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name: str, trained: list[Any]) -> None:
    (first, ranks), (second, others) = (by_case[name] for by_case in trained)
    assert ranks == others
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone, expected = train(name)
    assert ranks == expected
    assert len({tuple(pair) for pair in ranks}) > 1
    # Factors may differ by signs; the weights that they make may not.
    for key in ("0", "2", "0.bias", "2.bias", "4.weight"):
        torch.testing.assert_close(first[key], alone[key], rtol=0, atol=1e-8, msg=key)
