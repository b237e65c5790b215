"""The demo's training: its text, its windows, its checkpoints, and what an interruption leaves."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver_kernels.cli import report
from perceiver_kernels.cli.checkpoint import checkpointed
from perceiver_kernels.cli.corpus import deflate_bits, load_corpus, sources
from perceiver_kernels.cli.train import HeldOut, Recipe, Training


def test_corpus_is_split_by_file() -> None:
    train_text, held_text = (bytes(t.numpy().tobytes()) for t in load_corpus())
    assert 0.03 < len(held_text) / len(train_text) < 0.3
    assert all(held not in train_text for held in held_text.split(b"\0") if len(held) > 200)
    assert all("test" not in path.parts for path in sources())


def test_deflate_uses_the_context() -> None:
    text = bytes(range(256)) * 4
    assert deflate_bits(text, text) < deflate_bits(text, b"") < 8
    plain = 8 * (len(zlib.compress(text, 9)) - 6) / len(text)  # zlib adds 6 bytes of header and checksum
    assert deflate_bits(text, b"") == pytest.approx(plain, abs=0.2)


def test_held_out_windows_lie_end_to_end() -> None:
    text = torch.arange(100_000).remainder(251).to(torch.uint8)
    held = HeldOut(text, context=64, latents=16, runs=2, windows=3)
    scored = torch.cat([window[0][-16:] for window in held.windows])
    assert torch.equal(scored, text[49 : 49 + 48].long())
    assert held.scored == 96

    class Uniform(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, num_latents: int) -> torch.Tensor:
            return torch.zeros(1, num_latents, 256)

    assert held.bits_per_byte(Uniform(), 64) == pytest.approx(8.0)


@pytest.mark.cpu_only("the demo trains there")
def test_training_is_reproducible_and_lengthens_its_context() -> None:
    text = load_corpus()[0][:50_000]
    recipe = Recipe(
        context=64, latents=16, short_context=32, dim=16, depth=1, heads=1, steps=4, evaluations=2
    )
    runs = [list(Training(recipe).steps(text, float)) for _ in range(2)]
    assert [p["context"] for p in runs[0]] == [32, 32, 32, 64, 64]
    assert [p["held_out_bits"] for p in runs[0] if "held_out_bits" in p] == [32.0, 32.0, 64.0]
    assert [p.get("train_bits") for p in runs[0]] == [p.get("train_bits") for p in runs[1]]


TINY_TRAINING = Recipe(
    context=64, latents=16, short_context=32, dim=16, depth=1, heads=1, steps=9, evaluations=3
)


@pytest.mark.cpu_only("the demo trains there")
@pytest.mark.parametrize("stop", [0, 3, 6, 9])
def test_training_goes_on_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    text = load_corpus()[0][:50_000]
    whole, first = Training(TINY_TRAINING), Training(TINY_TRAINING)
    points = [{**point, "seconds": 0} for point in whole.steps(text, float)]
    assert len(points) == 10
    for point in first.steps(text, float):
        if point["step"] == stop:
            break
    first.save(tmp_path / "a.pt")
    torch.rand(5)  # what torch's own generator does in between is of no account
    again = Training.load(tmp_path / "a.pt", TINY_TRAINING)
    assert len(list(again.steps(text, float))) == 9 - stop
    assert [{**point, "seconds": 0} for point in again.points] == points
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def ctrl_c() -> Iterator[Any]:
    """Python's own handler, also where the tests run in the background and ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.cpu_only("the demo trains there")
def test_ctrl_c_ends_the_step_and_saves(tmp_path: Path, ctrl_c: Any) -> None:
    path, before = tmp_path / "new" / "a.pt", ctrl_c
    training = Training.load_or_begin(path, TINY_TRAINING)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for point in checkpointed(training, training.steps(load_corpus()[0][:50_000], float), path):
            if point["step"] == 4:
                signal.raise_signal(signal.SIGINT)  # to this very thread, at once
    assert signal.getsignal(signal.SIGINT) is before
    again = Training.load_or_begin(path, TINY_TRAINING)
    assert again.points == training.points
    assert [point["step"] for point in again.points] == [0, 1, 2, 3, 4]
    assert os.listdir(path.parent) == ["a.pt"]

    def twice() -> Iterator[int]:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)  # to this very thread, at once
        yield 1

    with pytest.raises(KeyboardInterrupt):
        list(checkpointed(again, twice(), path.parent / "b.pt"))
    assert os.listdir(path.parent) == ["a.pt"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.cpu_only("the demo trains there")
def test_damaged_or_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    training = Training(TINY_TRAINING)
    training.save(path)
    with pytest.raises(report.CommandError, match="made by another recipe"):
        Training.load(path, Recipe())
    data = path.read_bytes()
    at = data.index(training.model.token_embedding.weight.detach().numpy().tobytes())
    for damaged in (b"", data[: len(data) // 2], b"no checkpoint", data[:at] + bytes(4) + data[at + 4 :]):
        path.write_bytes(damaged)
        with pytest.raises(report.CommandError, match=r"a\.pt is no checkpoint of this training"):
            Training.load(path, TINY_TRAINING)
    for foreign in ([1, 2], {"recipe": vars(TINY_TRAINING)}):
        torch.save(foreign, path)
        with pytest.raises(report.CommandError, match=r"a\.pt is no checkpoint of this training"):
            Training.load(path, TINY_TRAINING)
