"""What a network costs: parameters, operations, and the memory of a training step, without running it.

Everything is counted on torch's meta device, where tensors have shapes and no values: a step of a network of 100
million parameters is planned in a second, and in no memory. Forward, loss and backward take place there as they do in
training, with checkpoints and inversion, and every tensor is noted when it comes and when it goes.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from medmom.models.encoder import NetworkMemory
from medmom.models.factorise import count_parameters
from medmom.models.gates import LOW_PRECISION_BITS, check_reversible
from medmom.models.low_rank import LowRankLayer
from medmom.models.momentum import MomentumStage

MEMORIES: tuple[str, ...] = get_args(NetworkMemory)


class Activations(NamedTuple):
    """Bytes of all that is neither weight nor gradient of a weight, in one training step.

    Attributes:
        kept: At the end of the forward pass, logits and images included.
        peak: The most at any moment from the images to the last gradient.
    """

    kept: int
    peak: int


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        num_parameters: Of the network.
        parameter_bytes: Of the weights as they are stored; their gradients take as much again.
        flops: Operations of one image's forward pass in training: two for each multiply-add of a convolution or
            matrix product; all else is not counted.
        activations: Of a training step, by memory.
        refused: Why a memory is none for this network, by memory.
    """

    num_parameters: int
    parameter_bytes: int
    flops: int
    activations: Mapping[str, Activations]
    refused: Mapping[str, str]


def measure_cost(
    network: nn.Module,
    image_shape: Sequence[int],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    mixed: torch.dtype | None = None,
    memories: Iterable[str] = MEMORIES,
) -> Cost:
    """Counts parameters, operations and, for every memory, the bytes of a training step.

    Bytes are those of the tensors. A GPU takes more: blocks of memory are rounded up, convolutions work in space of
    their own, and an optimizer may have passing tensors when the activations are gone. In mixed precision the copies
    of the weights that convolutions read are counted as activations, and what autocast keeps of them until the
    forward pass ends is not.

    Args:
        network: With an attribute ``memory``, in the precision of its weights, on any device; it stays as it is.
        image_shape: A batch, (B, C, *spatial).
        loss: From the network's outputs in training to a scalar, on the meta device. Whatever it asks the value of is
            answered with 1. The sum of all outputs where absent.
        mixed: What convolutions compute in under mixed precision, ``torch.bfloat16`` or ``torch.float16``.
        memories: Those to be planned.

    Returns:
        The cost.
    """
    network = _on_meta(network).train()
    parameters = list(network.parameters())
    dtype = parameters[0].dtype
    flops = _count_flops(network, torch.empty(1, *image_shape[1:], dtype=dtype, device="meta"))
    if mixed is not None:
        _mix(network, mixed)
    activations, refused = {}, {}
    for memory in memories:
        try:
            network.memory = memory  # type: ignore[assignment]
            if mixed is not None or dtype in (torch.bfloat16, torch.float16):
                _check_precision(network)
        except ValueError as error:
            refused[memory] = str(error)
            continue
        activations[memory] = _measure_step(network, image_shape, loss or _sum)
    return Cost(
        num_parameters=count_parameters(network),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        flops=flops,
        activations=activations,
        refused=refused,
    )


def choose_memory(cost: Cost, limit: float, *, beside: float = 0) -> str:
    """The fastest memory that fits.

    ``"plain"`` if it does; else, as all others take the same time, the one that needs the least; never ``"exact"``,
    which is slower.

    Args:
        cost: Of the network.
        limit: Bytes that a training step may take.
        beside: Bytes of it that are no activations: weights, gradients, optimizer.

    Returns:
        One of those in ``cost.activations``.

    Raises:
        ValueError: None fits; the smallest need is named.
    """
    peaks = {memory: each.peak for memory, each in cost.activations.items() if memory != "exact"}
    least = min(peaks, key=peaks.__getitem__)
    if "plain" in peaks and peaks["plain"] + beside <= limit:
        return "plain"
    if peaks[least] + beside <= limit:
        return least
    raise ValueError(
        f"No memory fits into {limit / 2**30:.3g} GiB: the least, {least}, needs "
        f"{(peaks[least] + beside) / 2**30:.3g} GiB ({beside / 2**30:.3g} of them for weights, gradients and "
        "optimizer). Allow more, or take a smaller patch, batch or network."
    )


def _on_meta(network: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


def _check_precision(network: nn.Module) -> None:
    """Refuses what the stages would refuse in training: on the meta device there is no autocast to tell them."""
    for part in network.modules():
        if isinstance(part, MomentumStage) and part.memory == "reversible" and part.gating == "fixed":
            check_reversible(part.gate, len(part.blocks), LOW_PRECISION_BITS)


def _count_flops(network: nn.Module, image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return int(counter.get_total_flops())


def _mix(network: nn.Module, dtype: torch.dtype) -> None:
    """Lets layers cast as autocast does on a GPU: convolutions and matrix products down, group normalisation up."""
    for part in list(network.modules()):
        if isinstance(part, LowRankLayer):
            part.mixed = dtype
        elif isinstance(part, _ConvNd | nn.Linear):
            for name in [name for name, _ in part.named_parameters(recurse=False)]:
                parametrize.register_parametrization(part, name, _Cast(dtype), unsafe=True)
            part.register_forward_pre_hook(partial(_cast_inputs, dtype))
        elif isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_pre_hook(partial(_cast_inputs, torch.float32))


class _Cast(nn.Module):
    """A weight in another precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def _cast_inputs(dtype: torch.dtype, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in inputs)


def _measure_step(network: nn.Module, image_shape: Sequence[int], loss: Callable[[Any], Tensor]) -> Activations:
    parameters = list(network.parameters())
    watch = _Watch([*parameters, *network.buffers()])
    with watch:
        outputs = network(torch.empty(*image_shape, dtype=parameters[0].dtype, device="meta"))
        num_forward = len(watch.events)
        value = loss(outputs)
        del outputs
        value.backward()  # type: ignore[no-untyped-call]
    beside = {watch.number(parameter.grad) for parameter in parameters if parameter.grad is not None}
    network.zero_grad(set_to_none=True)
    kept, _ = _add_up(watch.events[:num_forward], beside)
    return Activations(kept, _add_up(watch.events, beside)[1])


def _add_up(events: Sequence[tuple[int, int]], beside: set[int]) -> tuple[int, int]:
    """Bytes at the end and the most on the way, without the storages of these numbers."""
    live = peak = 0
    for number, num_bytes in events:
        if number not in beside:
            live += num_bytes
            peak = max(peak, live)
    return live, peak


def _sum(outputs: Any) -> Tensor:
    return torch.stack([output.float().sum() for output in tree_leaves(outputs)]).sum()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when the storage of a tensor on the meta device comes and when it goes.

    Args:
        known: Tensors that are not noted.

    Attributes:
        events: Number of a storage and its bytes, negative where it goes.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        # Keys are ids: a storage that Python refers to weakly stays one object as long as a tensor has it.
        self._storages: dict[int, tuple[int, weakref.ref[Any]]] = {}
        for tensor in known:
            self._enter(tensor.untyped_storage(), -1)

    def number(self, tensor: Tensor) -> int:
        """Number of the storage of a tensor that is noted or known (-1)."""
        return self._storages[id(tensor.untyped_storage())][0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if id(storage) not in self._storages:
                    number = len(self.events)
                    self.events.append((number, storage.nbytes()))
                    self._enter(storage, number)
        return result

    def _enter(self, storage: Any, number: int) -> None:
        key, num_bytes = id(storage), storage.nbytes()

        def leave(_: Any) -> None:
            del self._storages[key]
            if number >= 0:
                self.events.append((number, -num_bytes))

        self._storages[key] = number, weakref.ref(storage, leave)
