"""What ranks of a group tell each other: sums in rank order, and whether their arguments agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

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


@contextmanager
def refusing(group: ProcessGroup, given: Any) -> Iterator[None]:
    """What raises inside, the checks before a :func:`compare`, makes that of the other ranks raise too."""
    try:
        yield
    except Exception as error:
        with suppress(ValueError):  # the others' error
            _exchange(group, given, _REFUSED, 0, f"{type(error).__name__}: {error}")
        raise


def compare(
    group: ProcessGroup, given: Any, length: int, seed: int, facts: Mapping[str, Any]
) -> tuple[tuple[int, ...], int]:
    """Every rank's ``length``, and rank 0's ``seed``.

    Raises ``ValueError`` on every rank where the ``repr`` of a fact differs, or where one of them raised an
    error when :func:`refusing`. ``given`` is the tensor that tells where the group's messages may lie.
    """
    text = json.dumps({name: repr(value) for name, value in facts.items()})
    rows = _exchange(group, given, length, seed, text)
    return tuple(length for length, _ in rows), rows[0][1]


_REFUSED = -1  # in place of a length


def _exchange(group: ProcessGroup, given: Any, length: int, seed: int, text: str) -> list[tuple[int, int]]:
    """Every rank's ``length`` and ``seed``; of the ``text`` only a digest travels unless it's an error."""
    said = text.encode()
    digest = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little", signed=True)
    device = _message_device(group, given)
    row = torch.tensor([length, seed, digest, len(said)], device=device)
    rows = _gather(group, row).tolist()
    if all(length != _REFUSED and digest == rows[0][2] for length, _, digest, _ in rows):
        return [(length, seed) for length, seed, _, _ in rows]
    longest = max(size for *_, size in rows)
    padded = torch.tensor(list(said.ljust(longest)), dtype=torch.uint8, device=device)
    pairs = zip(_gather(group, padded).tolist(), rows, strict=True)
    texts = [bytes(told[: row[3]]).decode() for told, row in pairs]
    for rank, (length, *_) in enumerate(rows):
        if length == _REFUSED:
            raise ValueError(f"rank {rank} of the group refused its arguments: {texts[rank]}")
    raise ValueError(_first_difference([json.loads(text) for text in texts]))


def _first_difference(facts: list[dict[str, str]]) -> str:
    first = facts[0]
    rank, name = next(
        (rank, name)
        for rank, here in enumerate(facts)
        for name in first | here
        if here.get(name) != first.get(name)
    )
    return (
        f"{name} must be the same on every rank, got {first.get(name)} on rank 0 "
        f"and {facts[rank].get(name)} on rank {rank}"
    )


def _message_device(group: ProcessGroup, given: Any) -> torch.device:
    """CPU memory where the group's library reads it, else the tensor's GPU, or any where it is no tensor."""
    kinds = [device.type for device in group._device_types]
    if "cpu" not in kinds and isinstance(given, Tensor) and given.device.type in kinds:
        return given.device
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def _gather(group: ProcessGroup, row: Tensor) -> Tensor:
    """The ranks' rows (n,) as (ranks, n)."""
    rows = row.new_empty(group.size(), len(row))
    with _explained(group, "comparing the ranks' arguments"):
        _all_gather(rows, row.unsqueeze(0), group=group)
    return rows
