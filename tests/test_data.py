"""Modalities: real samples there and back, places, masks, and what is refused."""

from __future__ import annotations

import inspect
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import seeded
from torch import Tensor

from perceiver_kernels.data import (
    Bytes,
    Images,
    Interleaved,
    Modality,
    MuLaw,
    Note,
    Notes,
    ResidualCodes,
    read_wav,
    write_wav,
)

pytestmark = pytest.mark.cpu_only("data is prepared there")
RATE = 8000


def photograph() -> Tensor:
    """A part of scikit-learn's photograph of a flower, uint8 (24, 40, 3)."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the photographs are scikit-learn's")
    return torch.from_numpy(datasets.load_sample_image("flower.jpg")[200:224, 300:340].copy())


def pluck(seconds: float = 0.25) -> Tensor:
    """A plucked string in stereo (Karplus and Strong 1983): float32 (time, 2)."""
    string = torch.rand(RATE // 220, 2, generator=seeded(0)) * 1.8 - 0.9
    rows = list(string)
    for i in range(int(seconds * RATE) - len(string)):
        rows.append(0.498 * (rows[i] + rows[i + 1]))
    return torch.stack(rows)


def prelude() -> list[Note]:
    """The first two bars of Bach's prelude in C, BWV 846: each half bar is eight sixteenths."""
    notes, sixteenth = [], 0.21
    for half, chord in enumerate([(60, 64, 67, 72, 76)] * 2 + [(60, 62, 69, 74, 77)] * 2):
        begin = 8 * half
        played = [(0, 8, 0), (1, 7, 1)] + [(i, 1, 2 + (i - 2) % 3) for i in range(2, 8)]
        for at, lasts, voice in played:
            start = (begin + at) * sixteenth
            notes.append(Note(start, start + lasts * sixteenth, chord[voice], 70 + 3 * voice))
    return notes


def modalities() -> dict[str, Modality[Any]]:
    books = torch.randn(3, 16, 4, generator=seeded(1)) * torch.tensor([1.0, 0.4, 0.15])[:, None, None]
    return {
        "text": Bytes(),
        "raster": Images(24, 40),
        "planes": Images(24, 40, order="planes"),
        "wave": MuLaw(channels=2),
        "codes": ResidualCodes(books),
        "notes": Notes(),
    }


def sample_of(name: str) -> Any:
    return {
        "text": lambda: inspect.getsource(wave),
        "raster": photograph,
        "planes": photograph,
        "wave": pluck,
        "codes": lambda: pluck()[:1000].reshape(-1, 4),
        "notes": prelude,
    }[name]()


@pytest.mark.parametrize("name", modalities())
def test_what_comes_back_is_written_the_same_again(name: str) -> None:
    modality = modalities()[name]
    tokens = modality.encode(sample_of(name))
    assert tokens.dtype == torch.int64
    assert len(tokens) > 50
    assert tokens.min() >= 0
    assert tokens.max() < modality.vocab_size
    if name != "codes":  # the nearest codes of a sum of codes may be other ones
        assert torch.equal(modality.encode(modality.decode(tokens)), tokens)
    assert modality.is_whole(len(tokens))
    places = modality.positions(len(tokens))
    assert places.shape == (len(tokens), len(modality.axes))
    assert len(places.unique(dim=0)) == len(tokens)
    allowed = modality.allowed(len(tokens))
    assert allowed.shape == (len(tokens), modality.vocab_size)
    assert allowed[torch.arange(len(tokens)), tokens].all()
    assert (allowed.sum(-1) == modality.vocab_size // modality.kinds).all()


def test_python_source_comes_back() -> None:
    source = inspect.getsource(wave)
    tokens = Bytes().encode(source)
    assert Bytes().decode(tokens).decode() == source
    assert Bytes().encode("né").tolist() == [110, 195, 169]
    assert Bytes().decode(Bytes().encode(b"")) == b""


@pytest.mark.parametrize("order", ["raster", "planes"])
def test_photograph_comes_back_and_every_token_says_its_pixel(order: Any) -> None:
    image, modality = photograph(), Images(24, 40, order=order)
    tokens = modality.encode(image)
    assert torch.equal(modality.decode(tokens), image)
    row, column, channel = modality.positions(len(tokens)).unbind(-1)
    assert torch.equal(image[row, column, channel].long() + 256 * channel, tokens)
    first = (
        [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)] if order == "raster" else [(0, i, 0) for i in range(4)]
    )
    assert list(map(tuple, modality.positions(4).tolist())) == first


def test_a_colour_in_another_ones_place_is_refused() -> None:
    modality = Images(2, 2)
    tokens = modality.encode(torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3))
    tokens[4] -= 256
    with pytest.raises(
        ValueError, match=r"token 4 may not stand at place 4 of Images\(2, 2, 3, order='raster'"
    ):
        modality.decode(tokens)
    with pytest.raises(ValueError, match="tokens are 11, which is no whole sample"):
        modality.decode(tokens[:11])


def test_mu_law_is_close_and_finest_around_silence() -> None:
    modality, sample = MuLaw(channels=2), pluck()
    got = modality.decode(modality.encode(sample))
    # A step of the curve is 2 / 255; its slope there is (1 + 255 |x|) log(256) / 255.
    step = (1 + 255 * sample.abs()) * math.log(256) / 255 / 255
    assert ((got - sample).abs() <= 1.05 * step).all()
    assert ((got - sample).abs() > 0.2 * step).any()
    codes = torch.arange(256)
    assert torch.equal(MuLaw().encode(MuLaw().decode(codes)), codes)
    odd = MuLaw(levels=255)
    assert odd.decode(odd.encode(torch.zeros(3, 1))).eq(0).all()
    assert MuLaw().encode(torch.tensor([[-9.0], [9.0]])).tolist() == [0, 255]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(width: int, tmp_path: Path) -> None:
    sample = pluck(0.05)
    values = (sample.double() * 2 ** (8 * width - 1)).round().long().numpy()
    data = (
        (values + 128).astype("u1")
        if width == 1
        else values.astype("<i8").view("u1").reshape(-1, 8)[:, :width]
    )
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, RATE, 0, "NONE", ""))
        file.writeframes(np.ascontiguousarray(data).tobytes())
    got, rate = read_wav(tmp_path / "a.wav")
    assert rate == RATE
    assert (got - sample).abs().max() <= 1.01 * max(2.0 ** -(8 * width), 2.0**-24)  # half a step, in float32
    write_wav(tmp_path / "b.wav", got, rate)
    again, _ = read_wav(tmp_path / "b.wav")
    assert (again - got).abs().max() <= 2.0**-16
    assert again.shape == got.shape == sample.shape


def test_residual_codes_get_closer_book_by_book_and_take_a_codecs_own() -> None:
    modality = modalities()["codes"]
    assert isinstance(modality, ResidualCodes)
    frames = sample_of("codes")
    codes = modality.codes(modality.encode(frames))
    books = modality.codebooks
    left = frames
    for book, column in zip(books, codes.unbind(1), strict=True):  # by hand: no code of a book is nearer
        distance = (left[:, None] - book).square().sum(-1)
        torch.testing.assert_close(distance.gather(1, column[:, None])[:, 0], distance.min(1).values)
        left = left - book[column]
    torch.testing.assert_close(modality.decode(modality.tokens(codes)), frames - left)
    assert torch.equal(modality.codes(modality.tokens(codes)), codes)
    assert modality.tokens(torch.tensor([[5, 0, 15]])).tolist() == [5, 16, 47]


def test_prelude_comes_back_to_the_step() -> None:
    modality, notes = Notes(), prelude()
    got = modality.decode(modality.encode(notes))
    for note, want in zip(got, sorted(notes), strict=True):
        assert note.pitch == want.pitch
        assert abs(note.start - want.start) <= 0.005 + 1e-9
        assert abs(note.end - want.end) <= 0.005 + 1e-9
        assert abs(note.velocity - want.velocity) <= 2
    assert modality.vocab_size == 388


def test_notes_that_overlap_vanish_or_wait_long() -> None:
    modality = Notes()
    tokens = modality.encode([Note(0, 9, 60, 66), Note(3, 4, 60, 66), Note(3, 3, 61, 66)])
    again = modality.decode(tokens)
    assert torch.equal(modality.encode(again), tokens)  # nothing is written that says nothing
    assert again == [Note(0, 3, 60, 66), Note(3, 3.01, 61, 66), Note(3, 4, 60, 66)]
    tokens = modality.encode([Note(0, 2.5, 60, 66)])
    assert tokens.tolist() == [356 + 16, 60, 355, 355, 256 + 49, 128 + 60]
    # A model's own writing: an end without a note, a note without an end or a velocity.
    assert modality.decode(torch.tensor([128 + 5, 60, 265])) == [Note(0, 0.1, 60, 64)]


def test_interleaved_comes_back_and_allows_what_it_wrote() -> None:
    parts = {name: m for name, m in modalities().items() if name != "codes"}
    mixed = Interleaved(parts)
    image = photograph()
    segments = [
        ("text", b"a flower"),
        ("raster", image),
        ("text", b""),
        ("wave", pluck(0.01)),
        ("planes", image),
    ]
    segments.append(("notes", prelude()))
    tokens = mixed.encode(segments)
    got = mixed.decode(tokens)
    assert [name for name, _ in got] == [name for name, _ in segments]
    assert got[0][1] == b"a flower"
    assert torch.equal(got[1][1], image)
    assert torch.equal(got[4][1], image)
    assert torch.equal(mixed.encode(got), tokens)
    allowed = mixed.allowed(tokens)
    assert allowed.shape == (len(tokens) + 1, mixed.vocab_size)
    assert allowed[torch.arange(len(tokens)), tokens].all()
    assert allowed[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]  # a segment begins, whichever
    assert allowed[-1].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    assert allowed[1].sum() == 256 + 1  # a byte or the end
    places = mixed.positions(tokens)
    assert torch.equal(places[:, 0], torch.arange(len(tokens)))
    begin = 11  # text of 8 bytes between its marks, then the image's begin
    assert torch.equal(places[begin : begin + image.numel(), 1:], Images(24, 40).positions(image.numel()))
    assert places[begin - 1, 1:].eq(0).all()


def test_interleaved_masks_keep_a_random_writer_whole() -> None:
    """Drawing only from what is allowed, and stopping where a segment may begin, always decodes."""
    mixed = Interleaved({"text": Bytes(), "image": Images(2, 2), "wave": MuLaw(channels=2, levels=8)})
    draw, seen = seeded(3), set()
    for _ in range(12):
        tokens = torch.empty(0, dtype=torch.int64)
        while True:
            choices = mixed.allowed(tokens)[-1].nonzero().flatten()
            if len(tokens) > 30 and 1 in choices:
                break
            weight = torch.where(choices == 0, 60.0, 1.0)
            tokens = torch.cat((tokens, choices[torch.multinomial(weight, 1, generator=draw)]))
        whole = mixed.allowed(tokens)
        for n in range(0, len(tokens), 5):  # the future moves no row
            assert torch.equal(mixed.allowed(tokens[:n])[-1], whole[n])
        seen |= {name for name, _ in mixed.decode(tokens)}
    assert seen == {"text", "image", "wave"}


BAD = [
    (lambda: Bytes().encode(5), TypeError, "sample must be str or bytes, got int"),
    (lambda: Bytes().decode(torch.tensor([1, 256])), ValueError, "tokens must be from 0 to 255, got 256"),
    (lambda: Bytes().decode(torch.tensor([1.0])), TypeError, "tokens must be integers, got torch.float32"),
    (lambda: Bytes().decode(torch.ones(2, 2)), ValueError, r"tokens must be \(n,\), got \(2, 2\)"),
    (lambda: Images(0, 2), ValueError, "height must be an int of at least 1, got 0"),
    (lambda: Images(2, 2, order="rows"), ValueError, "order must be one of raster, planes, got 'rows'"),
    (lambda: Images(2, 2, levels=257), ValueError, "levels must be at most 256"),
    (lambda: Images(2, 2).encode(torch.zeros(2, 2, 3)), TypeError, "sample must be uint8, got torch.float32"),
    (
        lambda: Images(2, 2).encode(torch.zeros(3, 2, 2, dtype=torch.uint8)),
        ValueError,
        r"sample must be \(2, 2, 3\)",
    ),
    (
        lambda: Images(1, 1, levels=4).encode(torch.full((1, 1, 3), 9, dtype=torch.uint8)),
        ValueError,
        "values below 4, got 9",
    ),
    (
        lambda: Images(2, 2).positions(13),
        ValueError,
        "length must be from 0 to the image's 12 tokens, got 13",
    ),
    (lambda: MuLaw().encode(torch.zeros(3, 1, dtype=torch.int16)), TypeError, "floating point in"),
    (lambda: MuLaw().encode(torch.zeros(3)), ValueError, r"sample must be \(time, 1\), got \(3,\)"),
    (lambda: MuLaw().encode(torch.full((1, 1), math.nan)), ValueError, "sample must be finite"),
    (
        lambda: MuLaw(2).decode(torch.zeros(3, dtype=torch.int64)),
        ValueError,
        "tokens are 3, which is no whole",
    ),
    (lambda: ResidualCodes(torch.zeros(3, 4)), ValueError, "codebooks must be floating"),
    (lambda: ResidualCodes(torch.zeros(2, 3, 4)).tokens(torch.tensor([[0, 3]])), ValueError, "from 0 to 2"),
    (
        lambda: ResidualCodes(torch.zeros(2, 3, 4)).decode(torch.tensor([3, 0])),
        ValueError,
        "token 3 may not stand",
    ),
    (lambda: Notes(bins=3), ValueError, "bins must divide 128, got 3"),
    (lambda: Notes().encode([Note(2, 1, 60, 60)]), ValueError, "0 <= start <= end"),
    (lambda: Notes().encode([Note(0, 1, 128, 60)]), ValueError, "pitch 0 to 127"),
    (lambda: Interleaved({}), ValueError, "modalities must name at least one"),
    (
        lambda: Interleaved({"text": Bytes()}).encode([("image", b"")]),
        ValueError,
        "must be one of text, got 'image'",
    ),
    (
        lambda: Interleaved({"text": Bytes()}).decode(torch.tensor([1, 5])),
        ValueError,
        "text that begins at place 0 has",
    ),
    (
        lambda: Interleaved({"text": Bytes()}).decode(torch.tensor([5])),
        ValueError,
        "must begin at place 0, got token 5",
    ),
    (
        lambda: Interleaved({"text": Bytes()}).decode(torch.tensor([1, 1, 0])),
        ValueError,
        "token 1 at place 1 is none",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_says_what_came(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
