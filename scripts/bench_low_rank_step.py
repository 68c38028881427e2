# mypy: disable-error-code="no-untyped-call"
"""Time and memory of low-rank networks beside their dense ones; `--help` says how."""

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_measure import PRECISIONS, Trial, forget_gradients, memory_use
from bench_page import make_parser, page_head, ready, table, write_page
from bench_times import interleaved, ratio_of_medians
from torch import Tensor, nn

from medmom import models, optim
from medmom.models.factorise import compact, count_parameters, to_dense, to_low_rank
from medmom.models.presets import SIZES

DESCRIPTION = """\
Time of a training step (forward, backward, optimizer), of the optimizer alone and of a prediction, and the bytes of
weights, gradients, optimizer and activations: dense networks beside the same ones with weights of low rank, all alive
in one process and run in turns.

  python scripts/bench_low_rank_step.py --threads 2 --channels-last                            # CPU
  python scripts/bench_low_rank_step.py --presets mom3d_xs --patch 16 --rounds 3 --predict-presets        # a quick look
  python scripts/bench_low_rank_step.py --device cuda --amp bf16 --channels-last --presets mom3d_s mom3d_m --patch 96
"""

WHAT = """\
Patch {patch}^3, batch {batch}, one output, no deep supervision. Medians of {rounds} interleaved rounds in one process;
ratios of medians to the dense network with HeavyBall in the same run, with a 95 % bootstrap interval. The share is of
every layer's full rank; tolerance 0, so that no rank falls below it, which is the dearest case. *Adam on the factors*
is torch's AdamW. *K = 10*: ten steps make one cycle, in most of which the bases are twice as wide. Weights, gradients
and optimizer are counted after a step; activations are what is held between forward and backward pass. A prediction is
a forward pass without gradients of patch {predict_patch}^3, batch 1, in the memory layout of `medmom predict`, three
times as often."""

MIB = 2**20


class Contender(NamedTuple):
    """A network with its optimizer.

    Attributes:
        network: In training.
        optimizer: Of its parameters.
        cycle: Steps that make one cycle of the rule.
    """

    network: Any
    optimizer: Any
    cycle: int = 1


def contenders(preset: str, share: float, options: Namespace) -> dict[str, Contender]:
    """The dense network and its low-rank ones, by row."""

    def low(gradients: Any, room: int = 1) -> nn.Module:
        return to_low_rank(_network(preset, options), share, gradients=gradients, room=room)

    dense, also, factors = _network(preset, options), _network(preset, options), low("factors")
    rows = {
        "dense, HeavyBall": Contender(dense, optim.HeavyBall(dense.parameters())),
        "dense, AdamW": Contender(also, torch.optim.AdamW(also.parameters(), fused=True)),
        "Adam on the factors": Contender(factors, torch.optim.AdamW(factors.parameters())),
    }
    for rule in (optim.LowRankHeavyBall, optim.LowRankAdam):
        for steps in (0, 10):
            network = low("tangent", 2 if steps else 1)
            made = rule(network.parameters(), tolerance=0.0, local_steps=steps)
            rows[rule.__name__ + (f", K = {steps}" if steps else "")] = Contender(network, made, max(1, steps))
    return rows


def _network(preset: str, options: Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    network: nn.Module = getattr(models, preset)(1, 3, deep_supervision=False)
    layout = torch.channels_last_3d if options.channels_last else torch.contiguous_format
    return network.to(options.device, memory_format=layout).train()  # type: ignore[call-overload, no-any-return]


def step_of(contender: Contender, image: Tensor, amp: str) -> Callable[[], None]:
    """Forward, backward and optimizer."""

    def step() -> None:
        for _ in range(contender.cycle):
            with torch.autocast(image.device.type, PRECISIONS[amp], enabled=amp != "off"):
                logits = contender.network(image)
            logits.float().square().mean().backward()
            contender.optimizer.step()
            forget_gradients(contender.network.parameters())

    return step


def update_of(contender: Contender) -> Callable[[], None]:
    """The optimizer alone, on gradients that stay."""

    def update() -> None:
        for _ in range(contender.cycle):
            contender.optimizer.step()

    return update


def prediction_of(network: nn.Module, image: Tensor, amp: str) -> Callable[[], None]:
    """A forward pass without gradients."""
    network.eval()

    def predict() -> None:
        with torch.inference_mode(), torch.autocast(image.device.type, PRECISIONS[amp], enabled=amp != "off"):
            network(image)

    return predict


def held(contender: Contender) -> int:
    """Bytes of weights, gradients and optimizer."""
    parameters = list(contender.network.parameters())
    states = [value for state in contender.optimizer.state.values() for value in state.values()]
    grads = [p.grad for p in parameters if p.grad is not None]
    return sum(tensor.nbytes for tensor in (*parameters, *grads, *states) if isinstance(tensor, Tensor))


def section(preset: str, share: float, options: Namespace) -> list[str]:
    """The tables of one network at one share."""
    image = _image(options)
    rows = contenders(preset, share, options)
    for contender in rows.values():
        step_of(contender, image, options.amp)()
    cycles = {name: contender.cycle for name, contender in rows.items()}
    steps = {name: step_of(contender, image, options.amp) for name, contender in rows.items()}
    times = _per_step(interleaved(steps, options.rounds, options.device, f"{preset}, steps"), cycles)
    for contender in rows.values():
        with torch.autocast(image.device.type, PRECISIONS[options.amp], enabled=options.amp != "off"):
            logits = contender.network(image)
        logits.float().square().mean().backward()
    updates = {name: update_of(contender) for name, contender in rows.items()}
    alone = _per_step(interleaved(updates, options.rounds, options.device, f"{preset}, optimizers"), cycles)
    sizes = {name: held(contender) for name, contender in rows.items()}
    kept = {name: memory_use(_trial(contender.network, image, options.amp)).kept for name, contender in rows.items()}
    base = next(iter(rows))
    lines = [
        [
            name,
            f"{np.median(times[name]):.1f}",
            "1" if name == base else str(ratio_of_medians(times[name], times[base])),
            f"{np.median(alone[name]):.2f}",
            f"{sizes[name] / MIB:.1f} ({sizes[name] / sizes[base]:.2f})",
            f"{kept[name] / MIB:.1f} ({kept[name] / kept[base]:.2f})",
        ]
        for name in rows
    ]
    head = ["network, rule", "step ms", "ratio", "optimizer ms", "weights to optimizer, MiB", "activations, MiB"]
    dense, low = rows[base].network, rows["LowRankHeavyBall"].network
    title = f"## {preset}, {share:g} of the full rank: {_count(low)} of {_count(dense)} parameters"
    return [title, table(head, lines)]


def predictions(options: Namespace) -> str:
    """Times of a prediction: by factors, and by what they multiply out to, beside the dense network."""
    generator = torch.Generator().manual_seed(options.seed)
    image = torch.randn(1, 1, *[options.predict_patch] * 3, generator=generator).to(options.device)
    lines = []
    for preset in options.predict_presets:
        dense = _network(preset, options).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        networks = {"dense": dense}
        for share in options.predict_shares:
            low = to_low_rank(_copy(dense), share)
            networks |= {f"{share}": compact(low), f"{share} multiplied out": to_dense(_copy(low))}
        steps = {name: prediction_of(network, image, options.amp) for name, network in networks.items()}
        times = interleaved(steps, 3 * options.rounds, options.device, f"{preset}, predictions")
        for share in options.predict_shares:
            ratios = [ratio_of_medians(times[f"{share}{how}"], times["dense"]) for how in ("", " multiplied out")]
            lines.append([preset, f"{np.median(times['dense']):.0f}", f"{share:g}", *map(str, ratios)])
    return table(["network", "dense ms", "share", "by factors", "multiplied out"], lines)


def _copy(network: nn.Module) -> nn.Module:
    forget_gradients(network.parameters())
    return copy.deepcopy(network)


def _image(options: Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    image = torch.randn(options.batch, 1, *[options.patch] * 3, generator=generator).to(options.device)
    return image.contiguous(memory_format=torch.channels_last_3d if options.channels_last else torch.contiguous_format)


def _trial(network: nn.Module, image: Tensor, amp: str) -> Trial:
    return Trial(network, image, torch.randn(len(image), 3, *image.shape[2:], device=image.device), amp)


def _per_step(times: dict[str, list[float]], cycles: dict[str, int]) -> dict[str, list[float]]:
    return {name: [time / cycles[name] for time in found] for name, found in times.items()}


def _count(network: nn.Module) -> str:
    network = compact(_copy(network))
    return f"{count_parameters(network):,}".replace(",", " ")


def parser() -> ArgumentParser:
    made = make_parser(DESCRIPTION, device="cpu", amp="off")
    names = [name for name, size in SIZES.items() if size.spatial_dims == 3]
    made.add_argument("--presets", choices=names, nargs="+", default=["mom3d_xs", "mom3d_xw"])
    made.add_argument("--shares", type=float, nargs="+", default=[0.45], help="of the full rank")
    made.add_argument("--patch", type=int, default=40, help="voxels along each edge")
    made.add_argument("--batch", type=int, default=2, help="samples a step")
    made.add_argument("--rounds", type=int, default=7, help="interleaved rounds, after one that is not kept")
    made.add_argument("--channels-last", action="store_true", help="memory layout of images and weights")
    made.add_argument("--predict-presets", choices=names, nargs="*", default=["mom3d_xs", "mom3d_xw", "mom3d_s"])
    made.add_argument("--predict-shares", type=float, nargs="+", default=[0.1, 0.2, 0.45])
    made.add_argument("--predict-patch", type=int, default=64)
    return made


def main(argv: Sequence[str]) -> Path:
    """Measures, writes the page, prints its path and the tables."""
    options = ready(parser(), argv)
    parts = [
        page_head("Low rank: time and memory", "bench_low_rank_step.py", argv, options, ["monai"]),
        WHAT.format(**vars(options)),
    ]
    for preset in options.presets:
        for share in options.shares:
            parts += section(preset, share, options)
    if options.predict_presets:
        parts += ["## Predictions", predictions(options)]
    path = write_page(options.out, "low_rank_step", parts)
    print(path, *parts[2:], sep="\n\n")
    return path


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
