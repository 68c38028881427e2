# mypy: disable-error-code="no-untyped-call"
"""Time of a training step with momentum, without it, and of other packages' networks; `--help` says how."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_measure import PRECISIONS, forget_gradients
from bench_networks import HOSTS, Chain
from bench_page import image_path, make_parser, page_head, ready, reason, table, write_page
from bench_plots import plot_times
from bench_times import interleaved, ratio_of_medians
from torch import Tensor, nn

from medmom.models import presets
from medmom.models.unet import MomentumUNet

DESCRIPTION = """\
Time of a step (forward, Dice and cross-entropy, backward; no optimizer) of a momentum network against

  no momentum  the very same network, its blocks one after the other
  gate 0       the very same network with its gate at 0, which gives the same numbers but works out the velocity
  ResidualEncoderUNet of dynamic-network-architectures, the host: as many parameters, another implementation
               (pip install --no-deps dynamic-network-architectures==0.4.4)
  DynUNet      of MONAI, with the same kernels, strides and channels; it has fewer parameters

all alive in one process and run in turns, so that what slows one slows the others. One output, no deep supervision.
The ratio is that of the medians, its interval a bootstrap over the rounds.

  python scripts/bench_step.py --threads 2                                        # CPU, 15 pairs at 64^3
  python scripts/bench_step.py --preset mom3d_xs --patch 16 --pairs 3             # a quick look
  python scripts/bench_step.py --device cuda --amp bf16 --channels-last --patch 128 --batch 2 --pairs 50
"""

WHAT = """\
Forward, Dice and cross-entropy, backward; no optimizer, no deep supervision. Patch {patch}^3, batch {batch}, {layout}.
Medians of {rounds} interleaved rounds in one process; ratios of medians with a 95 % bootstrap interval over rounds. The
rows of one preset are one network, switched between steps: with gate 0 it still works out the velocity."""

PEERS = ("monai", "dynamic-network-architectures")

Step = Callable[[], None]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy minus the mean soft Dice of all classes."""
    probabilities = logits.float().softmax(1)
    reference = nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    axes = tuple(range(2, logits.ndim))
    common, both = (probabilities * reference).sum(axes), (probabilities + reference).sum(axes)
    return nn.functional.cross_entropy(logits.float(), labels) - (2 * common / (both + 1)).mean()


class Bench:
    """The networks, and one batch for all of them.

    Args:
        options: Of the command line.

    Attributes:
        network: Ours.
        num_parameters: By row.
        steps: By row.
        notes: Why a row is absent.
    """

    def __init__(self, options: Namespace) -> None:
        self._options = options
        torch.manual_seed(options.seed)
        self._layout = torch.channels_last_3d if options.channels_last else torch.contiguous_format
        ours: MomentumUNet = getattr(presets, options.preset)(
            1, 3, gate=options.gate, memory=options.memory, deep_supervision=False
        )
        image = torch.randn(options.batch, 1, *[options.patch] * 3, device=options.device)
        self._image = image.contiguous(memory_format=self._layout)
        self._labels = torch.randint(0, 3, (options.batch, *[options.patch] * 3), device=options.device)
        self.num_parameters: dict[str, int] = {}
        self.steps: dict[str, Step] = {}
        self.notes: list[str] = []
        self.network = ours
        self._add_ours(ours)
        for name, build in HOSTS.items():
            if name in options.peers:
                try:
                    self._add(name, build(ours))
                except ModuleNotFoundError as error:
                    self.notes.append(f"{name}: {reason(error)}.")

    def _add_ours(self, ours: MomentumUNet) -> None:
        preset, gate = self._options.preset, self._options.gate
        stages: list[Any] = list(ours.encoder.stages)
        momentum = [stage.momentum for stage in stages]
        chains = [Chain(stage.momentum.blocks) for stage in stages]

        def place(parts: list[Any]) -> None:
            for stage, part in zip(stages, parts, strict=True):
                stage.momentum = part

        def run_with(gate: float) -> None:
            place(momentum)
            ours.gate = gate

        self._add(f"{preset}, gate {gate:g}", ours, lambda: run_with(gate))
        if self._options.memory == "plain":
            self._add(f"{preset}, gate 0", ours, lambda: run_with(0))
            self._add(f"{preset}, no momentum", ours, lambda: place(chains))

    def _add(self, name: str, network: nn.Module, prepare: Step = lambda: None) -> None:
        network.to(self._options.device, memory_format=self._layout).train()  # type: ignore[call-overload]
        self.num_parameters[name] = sum(parameter.numel() for parameter in network.parameters())
        self.steps[name] = lambda: self._step(network, prepare)

    def _step(self, network: Any, prepare: Step) -> None:
        prepare()
        amp = self._options.amp
        with torch.autocast(self._image.device.type, PRECISIONS[amp], enabled=amp != "off"):
            logits = network(self._image)
        loss_of(logits, self._labels).backward()
        forget_gradients(network.parameters())


def rows(times: dict[str, list[float]], num_parameters: dict[str, int]) -> list[list[str]]:
    """Name, parameters, time and ratio to the network without momentum, or else to the first row."""
    names = list(times)
    base = next((name for name in names if name.endswith(", no momentum")), names[0])
    return [
        [
            name,
            f"{num_parameters[name]:,}".replace(",", " "),
            f"{np.median(times[name]):.1f}",
            "1" if name == base else str(ratio_of_medians(times[name], times[base])),
        ]
        for name in names
    ]


def acceptance(times: dict[str, list[float]]) -> list[str]:
    """Whether momentum costs 3 % or less; nothing where the network without it was not run."""
    names = list(times)
    base = next((name for name in names if name.endswith(", no momentum")), None)
    if base is None:
        return []
    ratio = ratio_of_medians(times[names[0]], times[base])
    return [f"{names[0]} takes 1.03 of no momentum or less: {'yes' if ratio.value <= 1.03 else 'no'} ({ratio})."]


def parser() -> ArgumentParser:
    made = make_parser(DESCRIPTION, device="cpu", amp="off")
    names = [name for name, size in presets.SIZES.items() if size.spatial_dims == 3]
    made.add_argument("--preset", choices=names, default="mom3d_m", help="the momentum network")
    made.add_argument("--gate", type=float, default=0.9, help="of the momentum network")
    made.add_argument(
        "--memory", default="plain", help="of the momentum network; the rows without momentum are run for plain alone"
    )
    made.add_argument("--patch", type=int, default=64, help="voxels along each edge")
    made.add_argument("--batch", type=int, default=1, help="samples a step")
    made.add_argument("--pairs", type=int, default=15, help="interleaved rounds, after one that is not kept")
    made.add_argument(
        "--peers",
        nargs="*",
        choices=["ResidualEncoderUNet", "DynUNet"],
        default=["ResidualEncoderUNet", "DynUNet"],
        help="to run",
    )
    made.add_argument("--channels-last", action="store_true", help="memory layout of images and weights")
    return made


def main(argv: Sequence[str]) -> Path:
    """Measures, writes page and plot, prints the page's path and the table."""
    options = ready(parser(), argv)
    bench = Bench(options)
    times = interleaved(bench.steps, options.pairs, options.device, "steps")
    plot_times(times, image_path(options.out, "step"))
    layout = "channels last" if options.channels_last else "channels first"
    text = table(["network", "parameters", "ms", "ratio"], rows(times, bench.num_parameters))
    lines = [*acceptance(times), *bench.notes]
    parts = [
        page_head("Time of a step", "bench_step.py", argv, options, PEERS),
        WHAT.format(patch=options.patch, batch=options.batch, layout=layout, rounds=options.pairs),
        text,
        *lines,
        "![Times of every step](../images/step.png)",
    ]
    path = write_page(options.out, "step", parts)
    print(path, text, *lines, sep="\n")
    return path


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
