"""What ranks of a group tell each other: sums in rank order, and whether their arguments agree."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from perceiver_kernels.spec import accumulator_dtype

Group = ProcessGroup | DeviceMesh | None

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_NUMBERS = 20  # in a row that ranks compare


def resolve_group(group: Group) -> ProcessGroup:
    """The process group that was meant. Raises ``ValueError`` or ``TypeError`` where it is none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: torch.distributed is not initialised, call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a one-dimensional DeviceMesh, got {group.ndim} dimensions: take mesh[name]"
            )
        return group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup that this rank is in, a DeviceMesh or None, "
            f"got {type(group).__name__}"
        )
    return group


def sum_over_group(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """The sum over ranks of each tensor, in rank order: the same bits on all. Not differentiable.

    Sums in float32 (float64 and integers in themselves), returned in the tensors' own dtypes.
    """

    def add(parts: list[Tensor]) -> list[Tensor]:
        return [part.sum(0, dtype=_sum_dtype(part)).to(part.dtype) for part in parts]

    columns = [tensor.reshape(-1, 1) for tensor in tensors]
    sums = reduce_over_group(columns, add, group, "summing over the ranks")
    return [total.view(tensor.shape) for total, tensor in zip(sums, tensors, strict=True)]


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return accumulator_dtype(tensor) if tensor.is_floating_point() else tensor.dtype


def reduce_over_group(
    tensors: Sequence[Tensor],
    reduce: Callable[[list[Tensor]], list[Tensor]],
    group: ProcessGroup,
    what: str,
) -> list[Tensor]:
    """``reduce`` of the ranks' (rows, channels) tensors, a block of rows each; the same bits on all.

    ``reduce`` gets (ranks, rows of a block, channels) of each tensor and takes the first dimension away. Each
    block is reduced by one rank, in rank order; the library underneath only moves bytes. Each rank sends
    ``2 (ranks - 1)`` messages of one block: an all-reduce's bytes.
    """
    ranks = group.size()
    if ranks == 1 or all(tensor.numel() == 0 for tensor in tensors):
        return list(tensors)
    blocks = [_row_blocks(tensor, ranks) for tensor in tensors]
    mine = _pack(blocks)
    received = torch.empty_like(mine)
    with _explained(group, what):
        dist.all_to_all_single(received, mine, group=group)
    reduced = _pack([tensor.unsqueeze(0) for tensor in reduce(_unpack(received, blocks))])
    gathered = reduced.new_empty(ranks, reduced.shape[1])
    with _explained(group, what):
        _all_gather(gathered, reduced, group=group)
    results = _unpack(gathered, blocks)
    return [result.flatten(0, 1)[: tensor.shape[0]] for result, tensor in zip(results, tensors, strict=True)]


def _row_blocks(tensor: Tensor, ranks: int) -> Tensor:
    """(rows, channels) to (ranks, rows / ranks, channels), filled up with zeros."""
    missing = -tensor.shape[0] % ranks
    return torch.unflatten(F.pad(tensor, (0, 0, 0, missing)), 0, (ranks, -1))


def _pack(blocks: Sequence[Tensor]) -> Tensor:
    """(blocks, ...) of several tensors as bytes, (blocks, bytes): one message for each block."""
    return torch.cat([block.contiguous().flatten(1).view(torch.uint8) for block in blocks], dim=1)


def _unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(packed, [block[0].numel() * block.element_size() for block in like], dim=1)
    return [
        part.contiguous().view(block.dtype).view(-1, *block.shape[1:])
        for part, block in zip(parts, like, strict=True)
    ]


@contextmanager
def _explained(group: ProcessGroup, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are such
        raise RuntimeError(
            f"context parallel: {what} failed on rank {group.rank()} of {group.size()}: another rank has "
            f"died, raised an error (its own traceback says which), or took longer than the group's timeout. "
            f"The group can't be used any more. Cause: {error}"
        ) from error


def compare(
    group: ProcessGroup, device: torch.device, length: int, seed: int, facts: Mapping[str, int | float]
) -> tuple[tuple[int, ...], int]:
    """Every rank's ``length``, and rank 0's ``seed``.

    Raises ``ValueError``, on every rank, where one of them called :func:`refuse` or a fact differs.
    """
    rows = _gather_numbers(group, device, [length, seed, *(_encode(value) for value in facts.values())])
    for rank, row in enumerate(rows):
        if row[0] < 0:
            raise ValueError(f"rank {rank} of the group refused its arguments: its own error says why")
        for name, value, here, first in zip(facts, facts.values(), row[2:], rows[0][2:], strict=False):
            if here != first:
                kind = type(value)
                raise ValueError(
                    f"{name} must be the same on every rank, got {_decode(first, kind)} on rank 0 "
                    f"and {_decode(here, kind)} on rank {rank}"
                )
    return tuple(row[0] for row in rows), rows[0][1]


def refuse(group: ProcessGroup, device: torch.device) -> None:
    """Let the other ranks' :func:`compare` raise, before this rank raises an error of its own."""
    _gather_numbers(group, device, [-1])


def _gather_numbers(group: ProcessGroup, device: torch.device, numbers: list[int]) -> list[list[int]]:
    row = torch.tensor([numbers + [0] * (_NUMBERS - len(numbers))], device=device)
    rows = row.new_empty(group.size(), _NUMBERS)
    with _explained(group, "comparing the ranks' arguments"):
        _all_gather(rows, row, group=group)
    gathered: list[list[int]] = rows.tolist()
    return gathered


def _encode(value: int | float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0]) if isinstance(value, float) else int(value)


def _decode(number: int, kind: type) -> int | float:
    value: int | float = struct.unpack("d", struct.pack("q", number))[0] if kind is float else kind(number)
    return value
