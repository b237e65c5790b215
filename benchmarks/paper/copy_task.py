"""The paper's copy task: the second half of a sequence is the first half mirrored; every token of it is told.

    python -m benchmarks.paper.copy_task                      131,072 positions, 1,024 latents
    python -m benchmarks.paper.copy_task --positions 2048     the same in two minutes

Straight training on so long a context stays on the floor: at first each key gets 1/N of the gradient. So the
context grows. Positions are the absolute sinusoids of the full length from the start, training sees a window
around the mirror point, and the window doubles whenever accuracy passes 99 % (which position to copy from,
j = N - 1 - p, is the same in every window). Latents are drawn anywhere in the window's second half. The final
evaluation is at full length with nothing left out: every token of the second half of sequences never seen,
each from all that stands before it.

Ctrl-C, or running out of --minutes, leaves a checkpoint; the same command goes on from it, to the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels import PerceiverAR, PerceiverARConfig
from perceiver_kernels.cli import charts
from perceiver_kernels.cli.machine import caption, provenance
from perceiver_kernels.cli.report import CommandError, Result, out, progress, write_json

TRAINING, HELD_OUT = 1, 2  # seeds


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how long."""

    positions: int = 131_072
    latents: int = 1024
    vocabulary: int = 256
    dim: int = 128
    depth: int = 1
    heads: int = 4
    lr: float = 2e-3
    step_latents: int = 1024  # predictions of a training step, over all its examples
    first_reach: int = 64  # half the first window
    passed: float = 0.99  # smoothed accuracy at which the window doubles
    goal: float = 0.998  # and at which, at full length, the learning rate starts to fall
    patience: int = 600  # or after so many steps there
    cooldown: int = 300  # steps in which it falls to 0
    warmup: int = 20

    def model(self) -> PerceiverAR:
        """A fresh model, the same every time."""
        torch.manual_seed(0)
        config = PerceiverARConfig(
            vocab_size=self.vocabulary,
            dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            max_seq_len=self.positions,
            num_latents=self.latents,
            positions="sinusoidal",
            rotary_fraction=0.0,
        )
        return PerceiverAR(config)


def predict(model: PerceiverAR, tokens: Tensor, first: int, latents: int) -> Tensor:
    """Logits (B, latents, vocabulary) of what follows each of the last of ``tokens`` (B, n)."""
    places = torch.arange(first, first + tokens.shape[1])
    inputs = model.embed(tokens, places)
    return model.logits(model.read(inputs[:, -latents:], inputs, places))


class Training:
    """A model in training: everything that the next step depends on, so that it can be saved and taken up."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = recipe.model()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.draw = torch.Generator().manual_seed(TRAINING)
        self.reach = min(recipe.first_reach, recipe.positions // 2)
        self.accuracy = 0.0  # smoothed
        self.settled = 0  # steps at full length
        self.cooling = 0  # those since the learning rate began to fall
        self.seconds = 0.0
        self.log: list[dict[str, Any]] = []

    @property
    def done(self) -> bool:
        """Whether the learning rate has come down to 0."""
        return self.cooling >= self.recipe.cooldown

    def step(self) -> dict[str, Any]:
        """One step; returns what there is to log."""
        recipe, middle, begin = self.recipe, self.recipe.positions // 2, time.perf_counter()
        latents = min(recipe.latents, self.reach)
        batch = max(1, recipe.step_latents // latents)
        # The last latent reads position end - 1 and tells end; what is told lies in the second half. A run
        # that would reach over an edge is moved to it, or the outermost tokens would hardly ever be told.
        over = latents // 2
        end = int(torch.randint(latents - 1 - over, self.reach + over, (), generator=self.draw))
        end = middle + min(max(end, latents - 1), self.reach - 1)
        half = torch.randint(recipe.vocabulary, (batch, self.reach), generator=self.draw)
        window = torch.cat((half, half.flip(1)), dim=1)
        first = middle - self.reach
        logits = predict(self.model, window[:, : end - first], first, latents)
        targets = window[:, end - first - latents + 1 : end - first + 1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        share = min(1.0, (len(self.log) + 1) / recipe.warmup) * (1 - self.cooling / recipe.cooldown)
        self.optimizer.param_groups[0]["lr"] = recipe.lr * share
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

        right = (logits.argmax(-1) == targets).double().mean().item()
        self.accuracy += 0.1 * (right - self.accuracy)
        self.seconds += time.perf_counter() - begin
        point = {"step": len(self.log), "positions": 2 * self.reach, "seconds": round(self.seconds, 2)}
        point |= {"loss": loss.item(), "accuracy": right, "smoothed": self.accuracy}
        self.log.append(point)
        if self.reach < middle:
            if self.accuracy >= recipe.passed:
                self.reach, self.accuracy = min(2 * self.reach, middle), 0.0
        else:
            self.settled += 1
            if self.cooling or self.accuracy >= recipe.goal or self.settled >= recipe.patience:
                self.cooling += 1
        return point

    def save(self, path: Path) -> None:
        """Write everything into one file, whole or not at all."""
        state = {name: value for name, value in vars(self).items() if name not in PARTS}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        state |= {"recipe": asdict(self.recipe), "draw": self.draw.get_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    @classmethod
    def load(cls, path: Path, recipe: Recipe) -> Training:
        """Take up what :meth:`save` wrote. CommandError: a damaged file, or one of another recipe."""
        try:
            with zipfile.ZipFile(path) as file:  # torch itself looks at no checksum
                if file.testzip() is not None:
                    raise ValueError("its checksum is wrong")
            state = torch.load(path, weights_only=True)
            if state["recipe"] != asdict(recipe):
                raise CommandError(f"{path} was made by another recipe; remove it or give another --output")
            training = cls(recipe)
            training.draw.set_state(state["draw"])
            for name in ("model", "optimizer"):
                getattr(training, name).load_state_dict(state[name])
            vars(training).update({name: state[name] for name in vars(training) if name not in PARTS})
        except CommandError:
            raise
        except Exception as error:  # torch names no common base for what a damaged file can raise
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise CommandError(f"{path} is no checkpoint of this task: {problem}") from error
        return training


PARTS = ("recipe", "model", "optimizer", "draw")  # of a Training: saved each in its own way


@torch.no_grad()
def evaluate(model: PerceiverAR, recipe: Recipe, sequences: int) -> Iterator[tuple[int, int]]:
    """(tokens right, tokens told) run by run: together the whole second half of every held-out sequence."""
    model.eval()
    middle, draw = recipe.positions // 2, torch.Generator().manual_seed(HELD_OUT)
    for _ in range(sequences):
        half = torch.randint(recipe.vocabulary, (1, middle), generator=draw)
        sequence = torch.cat((half, half.flip(1)), dim=1)
        for begin in range(middle, 2 * middle, recipe.latents):
            targets = sequence[:, begin : begin + recipe.latents]
            told = targets.shape[1]
            logits = predict(model, sequence[:, : begin + told - 1], 0, told)
            yield int((logits.argmax(-1) == targets).sum()), told
    model.train()


def train(training: Training, path: Path, minutes: float, save_minutes: float) -> bool:
    """Train until done, or out of time, or Ctrl-C; whether it is to be evaluated (not after Ctrl-C)."""
    stop: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    saved = time.monotonic()
    stages = 1 + round(math.log2(training.recipe.positions / 2 / training.recipe.first_reach))
    try:
        with progress() as bar:
            task = bar.add_task("training", total=stages)
            while not training.done and not stop and training.seconds < 60 * minutes:
                point = training.step()
                doublings = round(math.log2(training.reach / training.recipe.first_reach))
                stage = doublings + (training.cooling > 0)
                text = f"{point['positions']:,} positions, step {point['step']}, "
                text += f"accuracy {point['smoothed']:.2%}"
                bar.update(task, completed=stage, description=text)
                if point["positions"] < 2 * training.reach:
                    bar.console.print(f"{point['seconds']:7.1f} s  {text}: the window doubles")
                if time.monotonic() - saved > 60 * save_minutes:
                    training.save(path)
                    saved = time.monotonic()
    finally:
        signal.signal(signal.SIGINT, before)
    training.save(path)
    return not stop


def draw_chart(training: Training, accuracy: float, path: Path, foot: str) -> None:
    """Accuracy of every training step, and the window that it was reached in, over time."""
    figure, (upper, lower) = charts.canvas(1, 2, (8, 5.4))
    seconds = [point["seconds"] for point in training.log]
    upper.plot(seconds, [100 * p["accuracy"] for p in training.log], ".", color=charts.OURS, markersize=2)
    recipe = training.recipe
    upper.set_title(
        f"Mirrored copy, {recipe.positions:,} positions, {recipe.latents:,} latents: "
        f"{accuracy:.3%} of the second half of held-out sequences",
        size=9,
        loc="left",
    )
    upper.set_ylabel("accuracy of a training step, %", size=8)
    lower.step(seconds, [p["positions"] for p in training.log], color=charts.INK, where="post")
    lower.set_yscale("log", base=2)
    lower.set_ylabel("positions in the window", size=8)
    lower.set_xlabel("seconds of training", size=8)
    charts.save(figure, path, foot)


def main() -> None:
    """Train or go on, evaluate at full length, write copy-task-N.json and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=Recipe.positions, help="a power of 2 (%(default)s)")
    parser.add_argument("--latents", type=int, help="default: 1024, at most a quarter of the positions")
    parser.add_argument("--depth", type=int, default=Recipe.depth, help="self-attention layers (%(default)s)")
    parser.add_argument("--minutes", type=float, default=40.0, help="longest training (%(default)s)")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between checkpoints (%(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="held-out sequences (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path("copy-task"), metavar="DIR", help="%(default)s")
    args = parser.parse_args()
    if args.positions < 256 or args.positions & (args.positions - 1):
        parser.error(f"--positions must be a power of 2 of at least 256, got {args.positions}")
    latents = min(Recipe.latents, args.positions // 4) if args.latents is None else args.latents
    if not 1 <= latents <= args.positions // 2:
        parser.error(f"--latents must be from 1 to half the positions, got {latents}")
    if args.threads:
        torch.set_num_threads(args.threads)
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show at once
    recipe = Recipe(positions=args.positions, latents=latents, depth=args.depth)
    name = args.output / f"copy-task-{args.positions}"
    path = name.with_suffix(".pt")
    command = shlex.join(["python", "-m", "benchmarks.paper.copy_task", *sys.argv[1:]])
    result: Result = {**provenance(), "command": command, "recipe": asdict(recipe)}
    try:
        training = Training.load(path, recipe) if path.exists() else Training(recipe)
    except CommandError as error:
        parser.exit(2, f"{error}\n")
    result["parameters"] = sum(p.numel() for p in training.model.parameters())
    if training.log:
        out.print(f"{path}: going on after step {len(training.log)}, {training.seconds:.0f} s of training")
    if not train(training, path, args.minutes, args.save_minutes):
        out.print(f"stopped after step {len(training.log)}; the same command goes on from {path}")
        sys.exit(130)
    right = told = 0
    begin = time.perf_counter()
    with progress() as bar:
        runs = -(-recipe.positions // 2 // latents)
        task = bar.add_task("evaluating at full length", total=args.sequences * runs)
        for hits, count in evaluate(training.model, recipe, args.sequences):
            right, told = right + hits, told + count
            bar.update(task, advance=1, description=f"evaluating at full length, {right:,} of {told:,} right")
    result |= {"train_seconds": training.seconds, "evaluation_seconds": time.perf_counter() - begin}
    result |= {"finished": training.done, "accuracy": right / told, "right": right, "told": told}
    out.print(
        f"{recipe.positions:,} positions, {latents:,} latents: {right:,} of {told:,} mirrored tokens right "
        f"({right / told:.4%}) after {training.seconds:.0f} s of training"
    )
    write_json(name.with_suffix(".json"), result | {"log": training.log})
    training.model.save(name.with_suffix(".safetensors"))
    draw_chart(training, right / told, name.with_suffix(".png"), caption(result))
    if training.done:
        path.unlink()  # the same command begins anew


if __name__ == "__main__":
    main()
