"""Anything that can be put in order as tokens: text, images, audio, notes, and sequences that mix them."""

from perceiver_kernels.data.audio import MuLaw, ResidualCodes, read_wav, write_wav
from perceiver_kernels.data.images import Images
from perceiver_kernels.data.interleaved import Interleaved
from perceiver_kernels.data.modality import Modality
from perceiver_kernels.data.notes import Note, Notes
from perceiver_kernels.data.text import Bytes

__all__ = [
    "Bytes",
    "Images",
    "Interleaved",
    "Modality",
    "MuLaw",
    "Note",
    "Notes",
    "ResidualCodes",
    "read_wav",
    "write_wav",
]
