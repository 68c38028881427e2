from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Numbers in a batch: on a CPU what its cache holds, elsewhere few launches and bounded copies.
CPU_BATCH, DEVICE_BATCH = 2**19, 2**24
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}


# What is surely no shard: these are asked at every step.
PLAIN = (Tensor, nn.Parameter)


class Batch(NamedTuple):
    """Flat tensors of one group, type and device; on a CPU long tensors come in pieces.

    Attributes:
        group: Options of the parameter group; while compiling ``lr`` is a 0-dim tensor, so that a schedule asks for
            no new compilation.
        group_index: Its place in ``param_groups``.
        params: To be changed in place; complex numbers as pairs, half precision as float32.
        grads: Not to be changed; already negated where the group maximizes.
        state: By buffer, to be changed in place.
        steps: For each tensor, the count of its parameter's updates, this one included.
        found_inf: 1 where this step must change nothing, as torch's fused kernels take it; None: it may.
    """

    group: dict[str, Any]
    group_index: int
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    steps: list[Tensor]
    found_inf: Tensor | None

    def part(self, which: slice) -> Batch:
        """Some of the tensors, as a batch."""
        state = {name: tensors[which] for name, tensors in self.state.items()}
        return self._replace(params=self.params[which], grads=self.grads[which], state=state, steps=self.steps[which])


class Batches:
    """What an update works on: the parameters that have a gradient, batch by batch, and the numbers beside them.

    Attributes:
        groups: Options of all parameter groups, as in ``Batch``.
        scalars: By name, one number for each parameter that has a gradient, in the order of the groups.
        totals: By name, one number for the whole optimizer.
        spans: For each group, where its parameters stand in the lists of ``scalars`` and in ``sums``.
        owners: For each tensor of the batches, in their order, the place of its parameter in the lists of ``scalars``.
        finite: Whether the loss is finite, on its device; None where it is known to be.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        buffers: tuple[str, ...],
        totals: dict[str, Tensor],
        finite: Tensor | None,
        *,
        fused: bool,
        whole: bool,
    ) -> None:
        self.groups = groups
        self.scalars: dict[str, list[Tensor]] = {}
        self.totals = totals
        self.spans = [slice(0, 0)] * len(groups)
        self.finite = finite
        self._buffers = buffers
        self._fused = fused
        self._whole = whole or fused
        self._batches: list[Batch] = []
        self._open_lists: list[list[Tensor]] = []
        self._key: tuple[Any, ...] = ()
        self._size = 0
        self.owners: list[int] = []
        self._shares: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        """Each batch once; what was written is taken back where the loss is not finite."""
        for batch in self._batches:
            params, grads = batch.params, batch.grads
            dtype = WIDER.get(params[0].dtype, params[0].dtype)
            if params[0].dtype != dtype or not params[0].is_contiguous():
                params = [p.reshape(-1).to(dtype).contiguous() for p in params]
            if grads[0].dtype != dtype:
                grads = [g.to(dtype) for g in grads]
            if batch.group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            written = [] if self._fused else [params, *batch.state.values()]
            before = self.copies(written)
            yield batch._replace(params=params, grads=grads)
            self.settle(written, before)
            if params is not batch.params:
                for stored, worked in zip(batch.params, params, strict=True):
                    stored.copy_(worked.view(stored.shape))

    def copies(self, written: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Values to go back to; none where the loss is known to be finite."""
        return [] if self.finite is None else [[t.clone() for t in tensors] for tensors in written]

    def settle(self, written: Sequence[Sequence[Tensor]], before: Sequence[Sequence[Tensor]]) -> None:
        """Goes back to the copies, where there are any and the loss is not finite; asks the device nothing."""
        if self.finite is not None and before:
            for now, then in zip(chain(*written), chain(*before), strict=True):
                now.copy_(torch.where(self.finite.to(now.device), now, then))

    def sums(self, found: Sequence[Tensor]) -> Tensor:
        """Adds up what was found tensor by tensor.

        Args:
            found: For each batch, in their order, shape (k, tensors of the batch).

        Returns:
            Shape (k, parameters that have a gradient): the sum over the pieces of a parameter and over the
            processes that hold its shards, the mean over processes that hold copies of it.
        """
        home = self.totals["skipped"].device
        sums = torch.cat([f.to(home) for f in found], dim=1)
        if len(self.owners) > len(self._shares):
            owners = torch.tensor(self.owners, device=home)
            sums = sums.new_zeros(len(sums), len(self._shares)).index_add_(1, owners, sums)
        return over_processes(sums, self._shares)

    def stacked(self, name: str, span: slice = slice(None)) -> Tensor:
        """A number of each parameter in ``span``, from ``scalars``: 1-D, double precision, where the totals are."""
        home = self.totals["skipped"].device
        return torch.stack([number.to(home) for number in self.scalars[name][span]]).double()

    def add(self, index: int, param: Tensor, tensors: Sequence[Tensor], step: Tensor) -> None:
        """Takes in the next parameter.

        Args:
            index: The place of its group.
            param: As the network holds it.
            tensors: Flat: parameter, gradient, then the buffers.
            step: Count of its updates.
        """
        first, place = tensors[0], len(self._shares)
        device, is_line = first.device, first.is_contiguous()
        limit = math.inf if self._fused else CPU_BATCH if device.type == "cpu" and not self._whole else DEVICE_BATCH
        pieces: Iterable[Sequence[Tensor]] = (tensors,)
        if limit == CPU_BATCH < first.numel() and is_line:
            pieces = zip(*(t.split(CPU_BATCH) for t in tensors), strict=True)
        key = (index, device, first.dtype, tensors[1].dtype, is_line)
        for piece in pieces:
            if key != self._key or self._size >= limit:
                self._open(index, device)
                self._key, self._size = key, 0
            for held, tensor in zip(self._open_lists, piece, strict=True):
                held.append(tensor)
            self._batches[-1].steps.append(step)
            self._size += piece[0].numel()
            self.owners.append(place)
        self._shares.append(_shards(param))
        begin = self.spans[index].start if self.spans[index].stop else place
        self.spans[index] = slice(begin, place + 1)

    def _open(self, index: int, device: torch.device) -> None:
        """Begins a batch."""
        found_inf = None if self.finite is None else (~self.finite).float().to(device)
        state: dict[str, list[Tensor]] = {name: [] for name in self._buffers}
        batch = Batch(self.groups[index], index, [], [], state, [], found_inf)
        self._batches.append(batch)
        self._open_lists = [batch.params, batch.grads, *state.values()]


def is_readable(value: Tensor) -> bool:
    """Whether Python can read a number without waiting for a device or asking for a new compilation."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def inner(*pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Tensor:
    """Inner products of flat tensors with their partners in another list, shape (pairs, tensors)."""
    products = [torch.dot(a, b) for first, second in pairs for a, b in zip(first, second, strict=True)]
    return torch.stack(products).view(len(pairs), -1)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    if type(tensor) in PLAIN:
        return tensor
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether the numbers of two tensors of one shape lie in the same order in memory."""
    return (first.is_contiguous() and second.is_contiguous()) or first.stride() == second.stride()


def flat(tensor: Tensor, like: Tensor) -> Tensor:
    """All numbers of a tensor in the order in which those of ``like`` (dense) lie in memory, complex ones as pairs.

    A view where both are alike, else a copy.
    """
    if not alike(tensor, like):
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    line = tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
    return torch.view_as_real(line).view(-1) if line.is_complex() else line


def over_processes(values: Tensor, shards: Sequence[float]) -> Tensor:
    """Totals over all processes; a process holds one of ``shards[i]`` shards of what ``values[:, i]`` speaks of."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    weights = shards[0] if len(set(shards)) == 1 else values.new_tensor(shards)
    values = values * weights / dist.get_world_size()
    dist.all_reduce(values)
    return values


def _shards(param: Any) -> float:
    if type(param) in PLAIN or not hasattr(param, "device_mesh"):
        return 1.0
    cut = zip(param.device_mesh.shape, param.placements, strict=True)
    return float(math.prod(size for size, placement in cut if placement.is_shard()))
