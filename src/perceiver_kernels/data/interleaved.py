"""Sequences that mix modalities: captions and their images, speech and its text, in any order and number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.data.modality import Modality, token_row

END = 0
Segment = tuple[str, Any]  # the modality's name and a sample of it


class Interleaved:
    """Segments of several modalities in one sequence, each between its own begin token and a common end.

    Token 0 is the end, 1 ... k begin a segment of each of the k modalities, and then come the modalities'
    own vocabularies, one after the other: no token means two things.

    Where a token stands, and what may follow it, depends on the tokens before it here: unlike a single
    modality's, :meth:`positions` and :meth:`allowed` take the tokens themselves.

    Args:
        modalities: by name, in the order of their tokens.
    """

    def __init__(self, modalities: Mapping[str, Modality[Any]]) -> None:
        if not modalities:
            raise ValueError("modalities must name at least one")
        self.modalities = dict(modalities)
        self._begin = {name: i for i, name in enumerate(self.modalities, start=1)}
        self._names = list(self.modalities)
        self._first: dict[str, int] = {}
        self.vocab_size = 1 + len(self.modalities)
        for name, modality in self.modalities.items():
            self._first[name] = self.vocab_size
            self.vocab_size += modality.vocab_size
        deepest = max(len(modality.axes) for modality in self.modalities.values())
        self.axes = ("place", *(f"axis {i}" for i in range(deepest)))

    def __repr__(self) -> str:
        return f"Interleaved({self.modalities})"

    def encode(self, sample: Iterable[Segment]) -> Tensor:
        """Segments (name, sample) to tokens (n,)."""
        parts = []
        for name, inner in sample:
            if name not in self.modalities:
                raise ValueError(f"a segment must be one of {', '.join(self._names)}, got {name!r}")
            tokens = self.modalities[name].encode(inner) + self._first[name]
            parts += [torch.tensor([self._begin[name]]), tokens, torch.tensor([END])]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> list[Segment]:
        """Tokens (n,) to segments. ValueError: a segment that is not whole, or a token where it can't be."""
        tokens = token_row(tokens, self.vocab_size)
        segments = []
        for name, begin, end in self._segments(tokens):
            if end is None:
                raise ValueError(f"the {name} that begins at place {begin - 1} has no end")
            segments.append((name, self.modalities[name].decode(tokens[begin:end] - self._first[name])))
        return segments

    def positions(self, tokens: Tensor) -> Tensor:
        """Where tokens stand: int64 (n, len(axes)), the place in the sequence, then in the segment's axes.

        Begin and end tokens, and axes that a modality doesn't have, are at 0.
        """
        tokens = token_row(tokens, self.vocab_size)
        table = torch.zeros(len(tokens), len(self.axes), dtype=torch.int64)
        table[:, 0] = torch.arange(len(tokens))
        for name, begin, end in self._segments(tokens):
            inner = self.modalities[name].positions((len(tokens) if end is None else end) - begin)
            table[begin : begin + len(inner), 1 : 1 + inner.shape[1]] = inner
        return table

    def allowed(self, tokens: Tensor) -> Tensor:
        """What may stand at each place given the tokens before it: bool (n + 1, vocab_size).

        The last row is for the token that comes next, so a model that is held to it writes whole samples.
        """
        tokens = token_row(tokens, self.vocab_size)
        mask = torch.zeros(len(tokens) + 1, self.vocab_size, dtype=torch.bool)
        outside = torch.ones(len(tokens) + 1, dtype=torch.bool)  # where a segment may begin
        for name, begin, end in self._segments(tokens):
            modality, first = self.modalities[name], self._first[name]
            places = (len(tokens) if end is None else end) - begin + 1  # that of the end included
            inner = places if modality.longest is None else min(places, modality.longest)
            mask[begin : begin + inner, first : first + modality.vocab_size] = modality.allowed(inner)
            whole = [modality.is_whole(length) for length in range(places)]
            mask[begin : begin + places, END] = torch.tensor(whole)
            outside[begin : begin + places] = False
        mask[outside, 1 : 1 + len(self.modalities)] = True
        return mask

    def _segments(self, tokens: Tensor) -> Iterator[tuple[str, int, int | None]]:
        """Name, first place and place of the end (None: not there yet) of each segment."""
        ends, place = (tokens == END).nonzero().flatten().tolist(), 0
        while place < len(tokens):
            marker = int(tokens[place])
            if not 1 <= marker <= len(self.modalities):
                raise ValueError(f"a segment must begin at place {place}, got token {marker}")
            name, begin = self._names[marker - 1], place + 1
            end = next((end for end in ends if end >= begin), None)
            inner = tokens[begin:end] - self._first[name]
            wrong = (inner < 0) | (inner >= self.modalities[name].vocab_size)
            if wrong.any():
                at = begin + int(wrong.nonzero()[0])
                raise ValueError(f"token {int(tokens[at])} at place {at} is none of {name}'s")
            yield name, begin, end
            place = len(tokens) if end is None else end + 1
