# mypy: disable-error-code="no-untyped-call"
"""Networks by preset, memory and gate, the hosts they are compared with, and the bits of their exact stages."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from bench_measure import Trial
from bench_page import reason
from torch import Tensor, nn

from medmom.models import presets
from medmom.models.unet import MomentumUNet

BIT_ROWS = (("exact", 7 / 8), ("exact", 1.0), ("reversible", 0.9), ("reversible", 1.0))

CUDNN = ((False, False), (False, True), (True, False))
"""Settings of benchmark and deterministic that bits are compared under."""


class Row(NamedTuple):
    """A network as it is asked for."""

    preset: str
    memory: str
    gate: float

    def __str__(self) -> str:
        return f"{self.preset} {self.memory}, gate {self.gate:g}"

    def __repr__(self) -> str:
        return f"{self.preset}:{self.memory}:{self.gate:g}"

    @classmethod
    def parse(cls, text: str) -> "Row":
        """The row of PRESET:MEMORY:GATE.

        Raises:
            ArgumentTypeError: It is not of this form, or there is no such network.
        """
        try:
            preset, memory, gate = text.split(":")
            row = cls(preset, memory, float(gate))
            row.network()
        except (ValueError, AttributeError) as error:
            raise ArgumentTypeError(f"{text} is no PRESET:MEMORY:GATE; {error}") from None
        return row

    def network(self) -> MomentumUNet:
        """One channel in, three classes, one output."""
        made: MomentumUNet = getattr(presets, self.preset)(
            1, 3, memory=self.memory, gate=self.gate, deep_supervision=False
        )
        return made

    def trial(self, patch: int, options: Namespace) -> Trial:
        """The network with an image of that edge; ``options`` say device, batch, amp and seed."""
        torch.manual_seed(options.seed)
        network = self.network().to(options.device)
        source, cotangent = (torch.randn(options.batch, width, *[patch] * 3).to(options.device) for width in (1, 3))
        return Trial(network, source, cotangent, options.amp)


NONLINEARITY = {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}


class Chain(nn.Module):
    """Blocks one after the other, in the place of a momentum stage.

    Args:
        blocks: Of the stage.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def flow(self, x: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, None]:
        """Features behind all blocks; there is no velocity."""
        for block in self.blocks:
            x = block(x)
        return x, None


def host(network: MomentumUNet) -> nn.Module:
    """The network without momentum, as dynamic-network-architectures builds it; 3-D.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    shape = network.arguments
    made: nn.Module = import_module("dynamic_network_architectures.architectures.unet").ResidualEncoderUNet(
        shape["in_channels"],
        len(shape["channels"]),
        shape["channels"],
        nn.Conv3d,
        shape["kernels"],
        shape["strides"],
        shape["blocks"],
        shape["out_channels"],
        [1] * (len(shape["channels"]) - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        deep_supervision=False,
        **NONLINEARITY,
    )
    return made


def dynunet(network: MomentumUNet) -> nn.Module:
    """MONAI's U-Net with the kernels, strides and channels of a network; 3-D."""
    shape = network.arguments
    made: nn.Module = import_module("monai.networks.nets").DynUNet(
        spatial_dims=3,
        in_channels=shape["in_channels"],
        out_channels=shape["out_channels"],
        kernel_size=shape["kernels"],
        strides=shape["strides"],
        upsample_kernel_size=shape["strides"][1:],
        filters=shape["channels"],
        norm_name=("INSTANCE", {"affine": True}),
        res_block=False,
    )
    return made


HOSTS = {"ResidualEncoderUNet": host, "DynUNet": dynunet}


@contextmanager
def cudnn(benchmark: bool, deterministic: bool) -> Iterator[None]:
    """Settings of cuDNN for the time being."""
    flags: Any = torch.backends.cudnn
    before = flags.benchmark, flags.deterministic
    flags.benchmark, flags.deterministic = benchmark, deterministic
    try:
        yield
    finally:
        flags.benchmark, flags.deterministic = before


def compare_bits(memory: str, gate: float, options: Namespace) -> list[str]:
    """How many inputs of momentum blocks are the same on both ways, the largest difference, and what was raised.

    Args:
        memory: reversible or exact.
        gate: Of the network.
        options: As of ``Row.trial``, and ``exact_preset`` and ``exact_patch``.
    """
    trial = Row(options.exact_preset, memory, gate).trial(options.exact_patch, options)
    network: Any = trial.module
    deep = [stage.momentum for stage in network.encoder.stages if stage.momentum.memory == memory]
    with torch.no_grad():
        for parameter in network.parameters():
            # Branches begin at 0, which would hide a difference.
            if not parameter.any():
                parameter.fill_(0.5)
    inputs: list[list[Tensor]] = []
    for block in [block for momentum in deep for block in momentum.blocks]:
        seen: list[Tensor] = []
        inputs.append(seen)
        block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach().clone()))
    raised = "nothing"
    try:
        trial.step()
    except (RuntimeError, ValueError, OverflowError) as error:
        raised = reason(error)
    pairs = [(seen[0], seen[1]) for seen in inputs if len(seen) == 2]
    equal = sum(torch.equal(forth, back) for forth, back in pairs)
    worst = max((float((forth - back).abs().max()) for forth, back in pairs), default=float("nan"))
    return [f"{equal} of {len(inputs)}", f"{worst:.1e}", raised]


def bit_rows(options: Namespace) -> list[list[str]]:
    """Bits of every memory and setting of cuDNN, see ``compare_bits``; on a CPU there is one setting."""
    rows = []
    is_gpu = options.device.type == "cuda"
    for benchmark, deterministic in CUDNN if is_gpu else CUDNN[:1]:
        for memory, gate in BIT_ROWS:
            with cudnn(benchmark, deterministic):
                found = compare_bits(memory, gate, options)
            setting = f"benchmark {benchmark}, deterministic {deterministic}" if is_gpu else "none"
            rows.append([f"{memory}, gate {gate:g}", setting, *found])
    return rows
