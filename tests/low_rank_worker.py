"""One process of a distributed training at low rank, for ``test_low_rank_ddp.py``: it can be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from low_rank_tasks import RULES, make_layer
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
STEPS = 12
CASES = {f"{rule}, {local_steps}": (rule, local_steps) for rule in RULES for local_steps in (0, 1, 4)}


def make_network() -> nn.Module:
    first = make_layer(9, 7, 3, highest=4, storage=7, bias=True)
    second = make_layer(8, 9, 2, highest=4, storage=8, bias=True, seed=1)
    torch.manual_seed(0)
    # Without what bends in between, the gradients would be of rank 2, and wider bases in part by rounding.
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(8, 2).double())


def train(name: str, *, rank: int | None = None) -> tuple[dict[str, Tensor], list[list[int]]]:
    """State and ranks after a few steps: with a rank of one process with its half of each batch, else of one alone."""
    rule, local_steps = CASES[name]
    network: Any = make_network()
    module: Any = network if rank is None else DistributedDataParallel(network)
    optimizer = RULES[rule](network.parameters(), lr=0.05, local_steps=local_steps, tolerance=1e-3)
    ranks = []
    for step in range(STEPS):
        # First the ranks grow, then they fall.
        optimizer.param_groups[0]["tolerance"] = 1e-3 if step < 8 else 0.6
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (7, 2))
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        ranks.append([network[0].rank, network[2].rank])
    optimizer.eval()
    weights = {f"{place}": network[place].matrix() for place in (0, 2)}
    return {**{key: p.detach() for key, p in network.named_parameters()}, **weights}, ranks


def work(rank: int, folder: Path) -> None:
    """Trains every case and writes what this process ends with."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    try:
        torch.save({name: train(name, rank=rank) for name in CASES}, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
