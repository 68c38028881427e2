"""One process of a distributed training, for ``test_ddp.py``: it is started from a file that can be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from unets import MEMORIES, loss_of, make_image, make_unet

WORLD = 2
STEPS = 2
# Buckets are laid out anew after the first step, so that the second goes another way.
BUCKET_MB = 0.001

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{memory: ("2-D", {"memory": memory}) for memory in MEMORIES},
    "reversible, channel gates": ("2-D", {"memory": "reversible", "gating": "channel"}),
    "hybrid, block gates": ("2-D", {"memory": "hybrid", "gating": "block", "coupling": "ema"}),
    "reversible, learned start": ("2-D", {"memory": "reversible", "velocity": "learned"}),
    "hybrid, carry, group": ("flat", {"memory": "hybrid", "velocity": "carry", "norm": "group", "block": "preact"}),
}


def train(name: str, *, rank: int | None = None) -> dict[str, Tensor]:
    """Weights after a few steps: with a rank those of one process with its half of each batch, else of one alone."""
    axes, changes = CASES[name]
    network = make_unet(axes, **changes)
    module: Any = network if rank is None else DistributedDataParallel(network, bucket_cap_mb=BUCKET_MB)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        image = make_image(network, batch=2 * WORLD, cells=4, seed=step)
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(module(image if rank is None else image.chunk(WORLD)[rank])))
        optimizer.step()
    return {key: parameter.detach() for key, parameter in network.named_parameters()}


def work(rank: int, folder: Path) -> None:
    """Trains every case and writes the weights that this process ends with."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    try:
        weights = {name: train(name, rank=rank) for name in CASES}
        torch.save(weights, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
