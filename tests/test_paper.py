"""benchmarks/paper: the copy task drops nothing and resumes to the same bits; fair contenders."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.paper import (
    context_scaling,
    copy_task,
    inspect_copy,
    latents_at_test_time,
    long_text,
    text_training,
    training_step,
)
from benchmarks.paper.copy_task import Recipe, Training
from perceiver_kernels.cli.report import CommandError

pytestmark = pytest.mark.cpu_only("trained and measured there")
TINY = Recipe(
    positions=256,
    latents=24,
    vocabulary=7,
    dim=16,
    heads=2,
    step_latents=64,
    first_reach=16,
    goal=0.0,
    cooldown=3,
    sampled=64,
)


def losses(training: Training) -> list[tuple[Any, ...]]:
    return [(point["positions"], point["loss"], point["accuracy"]) for point in training.log]


def test_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, first = Training(TINY), Training(TINY)
    whole.accuracy = first.accuracy = 1.2  # so that the window doubles at once, before and after the break
    for _ in range(10):
        whole.step()
    for _ in range(5):
        first.step()
    first.save(tmp_path / "a.pt")
    torch.rand(5)  # what torch's own generator does in between is of no account
    again = Training.load(tmp_path / "a.pt", TINY)
    for _ in range(5):
        again.step()
    assert losses(again) == losses(whole)
    assert {point["positions"] for point in whole.log} >= {32, 64}
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {n: v for n, v in vars(again).items() if n in ("reach", "accuracy", "cooling")} == {
        n: v for n, v in vars(whole).items() if n in ("reach", "accuracy", "cooling")
    }


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    training = Training(TINY)
    training.save(path)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CommandError, match="made by another recipe"):
        Training.load(path, Recipe())
    data = path.read_bytes()
    at = data.index(training.model.token_embedding.weight.detach().numpy().tobytes())
    for damaged in (b"", data[: len(data) // 2], b"no checkpoint", data[:at] + bytes(4) + data[at + 4 :]):
        path.write_bytes(damaged)
        with pytest.raises(CommandError, match=r"a\.pt is no checkpoint of this training"):
            Training.load(path, TINY)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, path = Training(TINY), tmp_path / "a.pt"
    step, before = Training.step, signal.getsignal(signal.SIGINT)

    def interrupted(self: Training) -> Any:
        if len(self.log) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_task.train(training, path, minutes=1, save_minutes=1)
    assert signal.getsignal(signal.SIGINT) is before
    assert losses(Training.load(path, TINY)) == losses(training)
    assert len(training.log) == 3


def test_the_command_trains_a_little_evaluates_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    line = ["copy_task", "--positions", "256", "--latents", "16", "--output", str(tmp_path)]
    for minutes in ("0.01", "0.02"):
        monkeypatch.setattr(sys, "argv", [*line, "--minutes", minutes])
        copy_task.main()
    result = json.loads((tmp_path / "copy-task-256.json").read_text())
    assert (result["told"], result["finished"]) == (4 * 128, False)
    assert [point["step"] for point in result["log"]] == list(range(0, 10 * len(result["log"]), 10))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"copy-task-256.{ending}" for ending in ("json", "png", "pt", "safetensors")}
    assert "going on after step" in capsys.readouterr().out
    assert result["of"] == 4 * 128
    assert result["peak_bytes"] is None or result["peak_bytes"] > 2**26
    monkeypatch.setattr(
        sys, "argv", [*line, "--minutes", "0.03", "--streamed", "--output", str(tmp_path / "s")]
    )
    copy_task.main()
    monkeypatch.setattr(sys, "argv", [*line, "--minutes", "0", "--streamed", "--evaluate-minutes", "0"])
    with pytest.raises(SystemExit):
        copy_task.main()  # the checkpoint is one of another recipe
    assert "made by another recipe" in capsys.readouterr().err
    sys.argv += ["--output", str(tmp_path / "s")]
    copy_task.main()
    result = json.loads((tmp_path / "s" / "copy-task-256.json").read_text())
    assert (result["told"], result["of"], len(result["runs"])) == (16, 4 * 128, 1)
    inspected = ["inspect_copy", str(tmp_path / "copy-task-256.safetensors"), "--output", str(tmp_path / "i")]
    monkeypatch.setattr(sys, "argv", [*inspected, "--runs", "3", "--latents", "5"])
    inspect_copy.main()
    assert {path.name for path in (tmp_path / "i").iterdir()} == {
        "inspect-copy-256.json",
        "inspect-copy-256.png",
    }
    result = json.loads((tmp_path / "i" / "inspect-copy-256.json").read_text())
    rows = result["rows"]
    assert [row["latent"] for row in rows] == [*range(127, 132), *range(188, 193), *range(250, 255)]
    assert all(row["latent"] + row["source"] == 254 for row in rows)
    for wrong in (["--positions", "1000"], ["--latents", "0"], ["--cooldown", "0"]):
        monkeypatch.setattr(sys, "argv", [*line, *wrong])
        with pytest.raises(SystemExit):
            copy_task.main()
        assert f"{wrong[0]} must be" in capsys.readouterr().err


class Oracle:
    """In place of predict: copies from the mirrored place, notes what it was asked."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.told: list[int] = []
        self.lengths: list[int] = []

    def __call__(self, model: Any, tokens: Tensor, places: Tensor, latents: int) -> Tensor:
        assert tokens.shape[1] == len(places)
        assert (places.diff() > 0).all()
        self.lengths.append(len(places))
        told = places[-latents:] + 1
        assert (told.diff() == 1).all()
        assert told[-1] < self.positions
        self.told += told.tolist()
        source = torch.searchsorted(places, self.positions - 1 - told)
        assert torch.equal(places[source], self.positions - 1 - told)  # its source is there
        logits = torch.nn.functional.one_hot(tokens[:, source], TINY.vocabulary).float()
        return logits + 0 * sum(p.sum() for p in model.parameters())


def test_evaluation_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(TINY.positions)
    monkeypatch.setattr(copy_task, "predict", oracle)
    counts = list(copy_task.evaluate(TINY.model(), TINY, sequences=2))  # 24 latents don't divide 128
    assert sum(told for *_, told in counts) == sum(right for _, right, _ in counts) == 2 * 128
    assert sorted(oracle.told) == sorted([*range(128, 256)] * 2)
    firsts = [begin for begin, *_ in counts]
    assert firsts[:6] == firsts[6:]
    assert firsts[:3] == [128, 128 + 4 * 24, 128 + 2 * 24]  # any first few are spread evenly


def test_an_untrained_model_guesses() -> None:
    _, right, told = map(sum, zip(*copy_task.evaluate(TINY.model(), TINY, sequences=4), strict=True))
    assert 0.05 < right / told < 0.3


def test_windows_grow_to_the_full_length_and_tell_their_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(TINY.positions)
    monkeypatch.setattr(copy_task, "predict", oracle)
    training = Training(TINY)
    training.log = [{}] * TINY.warmup
    while training.reach < 128:
        point = training.step()
        assert point["accuracy"] == 1.0
    doubled = [p["positions"] for p in training.log[TINY.warmup :]]
    assert [k for k, _ in itertools.groupby(doubled)] == [32, 64, 128]
    training.recipe = Recipe(**{**vars(TINY), "cooldown": 400, "goal": 2.0})  # out of reach
    oracle.told.clear()
    for _ in range(300):
        training.step()
    assert min(oracle.told) == 128
    assert max(oracle.told) == 255
    assert oracle.told.count(255) > 10  # at random places alone it would be 300 of 105
    assert oracle.told.count(128) > 10
    assert (training.settled, training.cooling) == (300, 0)
    assert max(oracle.lengths) == 64 + 24  # a sample of the prefix
    training.recipe = Recipe(**{**vars(TINY), "goal": 2.0, "patience": 302})
    rates = []
    while not training.done:
        training.step()
        rates.append(training.optimizer.param_groups[0]["lr"] / TINY.lr)
    assert rates == pytest.approx([1, 1, 2 / 3, 1 / 3])  # patience ends with the second step
    training.settled, training.cooling = 0, 1
    oracle.lengths.clear()
    training.recipe = Recipe(**{**vars(TINY), "cooldown": 100})
    for _ in range(50):
        training.step()
    assert max(oracle.lengths) > 200  # and then all of it


def test_predict_is_the_model_and_windows_keep_their_places() -> None:
    model = Recipe(**{**vars(TINY), "depth": 2}).model().double().eval()
    tokens = torch.randint(7, (2, 60))
    places = torch.arange(60)
    got = copy_task.predict(model, tokens, places, 24)
    torch.testing.assert_close(got, model(tokens, num_latents=24), rtol=1e-9, atol=1e-9)
    assert (copy_task.predict(model, tokens, 50 + places, 24) - got).abs().max() > 1e-6
    streamed = Recipe(**{**vars(TINY), "depth": 2, "streamed": True}).model().double().eval()
    torch.testing.assert_close(copy_task.predict(streamed, tokens, places, 24), got, rtol=1e-9, atol=1e-9)


SETTING = {"dim": 32, "depth": 2, "heads": 2, "latents": 16, "prefix_dropout": 0.0}


@pytest.mark.parametrize("kind", context_scaling.KINDS)
def test_contenders_train_and_see_their_context(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last prediction depends on every token of the context (memory is no token of Transformer-XL's)."""
    if kind == "perceiver_ar_eager":
        monkeypatch.setattr(training_step.layers, "perceiver_attention", training_step.eager_attention)
    torch.manual_seed(0)
    model, step = training_step.build({**SETTING, "kind": kind}, 64)
    before = step().item()
    assert abs(before - math.log(256)) < 1.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert step().item() < before - 0.3


def test_eager_fused_and_streamed_are_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for kind in ("perceiver_ar_fused", "perceiver_ar_streamed", "perceiver_ar_eager"):
        if kind == "perceiver_ar_eager":
            monkeypatch.setattr(training_step.layers, "perceiver_attention", training_step.eager_attention)
        torch.manual_seed(0)
        _, step = training_step.build({**SETTING, "kind": kind}, 64)
        values.append(step().item())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_reach_interpolates_and_says_when_it_ends() -> None:
    rows = [{"context": n, "s": (n / 1000) ** 2} for n in (1000, 2000, 4000)]
    assert context_scaling.reach(rows, "s", 9.0) == (pytest.approx(3000), False)
    assert context_scaling.reach(rows, "s", 16.0) == (4000, True)
    assert context_scaling.reach(rows, "s", 0.5) == (0.0, False)


def test_latents_at_test_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    size = ["--minutes", "0.01", "--context", "128", "--latents", "48", "--scored", "16", "--windows", "3"]
    monkeypatch.setattr(sys, "argv", ["latents_at_test_time", *size, "--output", str(tmp_path)])
    latents_at_test_time.main()
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    result = json.loads((tmp_path / "latents-at-test-time.json").read_text())
    assert [row["latents"] for row in result["rows"]] == [16, 32, 48, 64, 128]
    assert all(0 < row["bits"] < 10 and row["median_s"] > 0 for row in result["rows"])
    monkeypatch.setattr(sys, "argv", ["latents_at_test_time", "--scored", "64", "--latents", "32"])
    with pytest.raises(SystemExit):
        latents_at_test_time.main()
    assert "must rise, from 1: got 64, 32 and 8192" in capsys.readouterr().err


class Recalling(torch.nn.Module):
    """Tells every token from its own place: what :func:`latents_at_test_time.score` must line up."""

    def forward(self, tokens: Tensor, num_latents: int) -> Tensor:
        return 9.0 * torch.nn.functional.one_hot((tokens + 1)[:, -num_latents:] % 256, 256).float()


def test_scored_bytes_are_the_same_for_every_number_of_latents() -> None:
    text = torch.arange(5000, dtype=torch.int64).remainder(256).to(torch.uint8)
    pieces = latents_at_test_time.windows(text, 64, 4)
    assert pieces.shape == (4, 65)
    for latents in (8, 20, 64):
        bits = [bits for bits, _ in latents_at_test_time.score(Recalling(), pieces, latents, scored=8)]
        assert len(bits) == 4
        assert max(bits) < 0.06  # log2(1 + 255 / e^9); any other byte costs 13 bits


SCORING = {"threads": 1, "memory_bytes": 2**33, "longest": 128, "runs": 2, "windows": 1}
CONTENDER: dict[str, Any] = {
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "latents": 16,
    "context": 64,
    "short_context": 32,
}


@pytest.mark.parametrize("kind", long_text.NAMES)
def test_long_text_trains_and_scores_both_on_the_same_bytes(kind: str) -> None:
    setting = {**SCORING, "threads": torch.get_num_threads()}
    recipe = text_training.Contender(kind=kind, seconds=0.8, **CONTENDER)
    row = long_text.contend(recipe, setting)
    assert "error" not in row, row
    assert (row["kind"], row["context"], row["scored_bytes"]) == (kind, 64, 32)
    assert row["steps"] > row["steps_full"] > 0
    assert 2 < row["held_out_bits"] < 9
    assert row["train_bits"][-1][1] < row["train_bits"][0][1]


def test_long_text_says_what_does_not_fit() -> None:
    late = text_training.Contender(kind="transformer", seconds=1e-3, **CONTENDER)
    assert long_text.contend(late, SCORING)["error"] == "not one step in 0 s"
    large = text_training.Contender(kind="transformer", seconds=60, **{**CONTENDER, "context": 2**20})
    assert long_text.contend(large, SCORING | {"memory_bytes": 2**29})["error"] == "out of memory"


def test_the_transformer_learns_from_all_and_is_scored_on_the_last() -> None:
    model = text_training.Contender(kind="transformer", **CONTENDER).model()
    tokens = torch.randint(256, (1, 64))
    whole = model(tokens, num_latents=16)
    assert whole.shape == (1, 64, 256)
    assert torch.equal(model.eval()(tokens, num_latents=16), whole[:, -16:])


def test_long_text_draws_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def contend(recipe: text_training.Contender, setting: dict[str, Any]) -> dict[str, Any]:
        row = {"kind": recipe.kind, "context": recipe.context}
        if recipe.context == 128:
            if recipe.kind == "perceiver_ar":
                raise KeyboardInterrupt
            return row | {"error": "not one step in 24 s"}
        numbers = {
            "held_out_bits": 3.0,
            "held_out_bits_short": 3.1,
            "short_context": 64,
            "step_seconds": None,
            "zlib_bits": 2.0,
        }
        return row | numbers | {"steps": 10, "steps_full": 1}

    monkeypatch.setattr(long_text, "contend", contend)
    line = ["long_text", "--contexts", "64", "128", "--latents", "16", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    long_text.main()
    result = json.loads((tmp_path / "long-text.json").read_text())
    assert result["interrupted"]
    assert len(result["rows"]) == 3
    assert (tmp_path / "long-text.png").stat().st_size > 0
