"""Notes as events in time: the performance vocabulary of MIDI models (Oore et al. 2018, arXiv 1808.03715)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from perceiver_kernels.data.modality import Modality, at_least

PITCHES, VELOCITIES = 128, 128  # as in MIDI


class Note(NamedTuple):
    """A note of ``pitch`` 0 to 127 (60 is middle C), ``velocity`` 1 to 127, from and to in seconds."""

    start: float
    end: float
    pitch: int
    velocity: int


class Notes(Modality[list[Note]]):
    """Lists of notes as tokens: note on (128), note off (128), wait (1 to ``waits`` steps), velocity (bins).

    With the defaults the 388 events of the Music Transformer's MAESTRO (Huang et al. 2018). Times are rounded
    to steps, velocities to the middle of their bin; a note lasts at least one step, and one that starts while
    its pitch still sounds ends the earlier one. :meth:`decode` undoes :meth:`encode` up to that rounding.

    Args:
        steps: steps a second.
        waits: longest wait in steps; longer ones are several tokens.
        bins: number of velocity bins, a divisor of 128.
    """

    def __init__(self, *, steps: int = 100, waits: int = 100, bins: int = 32) -> None:
        at_least(1, steps=steps, waits=waits, bins=bins)
        if VELOCITIES % bins:
            raise ValueError(f"bins must divide {VELOCITIES}, got {bins}")
        self.steps, self.waits, self.bins = steps, waits, bins
        self._off, self._wait = PITCHES, 2 * PITCHES  # first token of each kind
        self._velocity = self._wait + waits
        self.vocab_size = self._velocity + bins

    def __repr__(self) -> str:
        return f"Notes(steps={self.steps}, waits={self.waits}, bins={self.bins})"

    def encode(self, sample: Iterable[Note]) -> Tensor:
        """Notes, in any order, to tokens (n,)."""
        events = []
        for start, end, pitch, velocity in self._rounded(sample):
            events.append((end, 0, pitch, 0))  # what ends is written before what starts
            events.append((start, 1, pitch, velocity * self.bins // VELOCITIES))
        tokens: list[int] = []
        now, loudness = 0, -1
        for step, starts, pitch, velocity in sorted(events):
            while now < step:
                wait = min(step - now, self.waits)
                tokens.append(self._wait + wait - 1)
                now += wait
            if starts and velocity != loudness:
                tokens.append(self._velocity + velocity)
                loudness = velocity
            tokens.append(pitch if starts else self._off + pitch)
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> list[Note]:
        """Tokens to notes, ordered by start, then pitch.

        Any tokens make sense, as a model may write them: a note off without its note says nothing, a note
        that nothing ends lasts to the last event, one before any velocity has the middle one.
        """
        notes: list[Note] = []
        sounding: dict[int, tuple[int, int]] = {}  # pitch to start and velocity
        now, velocity = 0, VELOCITIES // 2

        def finish(pitch: int) -> None:
            start, loudness = sounding.pop(pitch)
            if now > start:
                notes.append(Note(start / self.steps, now / self.steps, pitch, loudness))

        for token in self.check(tokens).tolist():
            if token >= self._velocity:
                width = VELOCITIES // self.bins
                velocity = max(1, (token - self._velocity) * width + width // 2)
            elif token >= self._wait:
                now += token - self._wait + 1
            else:
                pitch = token % PITCHES
                if pitch in sounding:
                    finish(pitch)
                if token < self._off:
                    sounding[pitch] = (now, velocity)
        for pitch in list(sounding):
            finish(pitch)
        return sorted(notes)

    def _rounded(self, sample: Iterable[Note]) -> list[tuple[int, int, int, int]]:
        """Notes in steps, none shorter than one, none of a pitch that already sounds."""
        rounded: dict[tuple[int, int], tuple[int, int]] = {}
        for note in sample:
            start, end, pitch, velocity = Note(*note)
            if not 0 <= start <= end < float("inf"):
                raise ValueError(f"a note must have 0 <= start <= end, got {note}")
            if not 0 <= pitch < PITCHES or not 1 <= velocity < VELOCITIES:
                raise ValueError(f"a note must have pitch 0 to 127 and velocity 1 to 127, got {note}")
            key = (pitch, round(start * self.steps))
            ends = max(round(end * self.steps), key[1] + 1)
            rounded[key] = max(rounded.get(key, (0, 0)), (ends, velocity))  # of two at once, the longer
        notes = []
        following: dict[int, int] = {}  # pitch to the next start
        for (pitch, begin), (ends, velocity) in sorted(rounded.items(), reverse=True):
            notes.append((begin, min(ends, following.get(pitch, ends)), pitch, velocity))
            following[pitch] = begin
        return notes
