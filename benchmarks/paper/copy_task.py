"""The paper's copy task: the second half of a sequence is the first half mirrored; every token of it is told.

    python -m benchmarks.paper.copy_task                      131,072 positions, 1,024 latents
    python -m benchmarks.paper.copy_task --positions 2048     the same in two minutes
    python -m benchmarks.paper.copy_task --positions 1048576 --streamed --evaluate-minutes 15

Straight training on so long a context stays on the floor: at first each key gets 1/N of the gradient. So the
context grows. Positions are the absolute sinusoids of the full length from the start, training sees a window
around the mirror point, and the window doubles whenever accuracy passes 99 % (which position to copy from,
j = N - 1 - p, is the same in every window). Latents are drawn anywhere in the window's second half. Until
accuracy has settled at full length, a step sees no more than 16,384 positions of a longer prefix: the run
that is copied, its neighbours, which are the hard ones to tell apart, and others at random. The cooldown, in
which the learning rate falls to 0, sees all of them.

The final evaluation is at full length with nothing left out: every token of the second half of sequences
never seen, each from all that stands before it. (With --evaluate-minutes, as many runs of latents as there
is time for, spread evenly: any first few of them are.) Streamed, a step's memory doesn't grow with the
positions.

Ctrl-C, or running out of --minutes, leaves a checkpoint; the same command goes on from it, to the same bits.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels import PerceiverAR, PerceiverARConfig
from perceiver_kernels.cli import charts
from perceiver_kernels.cli.checkpoint import Resumable, checkpointed
from perceiver_kernels.cli.machine import caption, provenance
from perceiver_kernels.cli.memory import peak_resident
from perceiver_kernels.cli.report import CommandError, Result, mib, out, progress, write_json

TRAINING, HELD_OUT = 1, 2  # seeds


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how long."""

    positions: int = 131_072
    latents: int = 1024
    vocabulary: int = 256
    dim: int = 128
    depth: int = 1
    heads: int = 2  # with four, each sees so few frequencies that far places look like the source
    lr: float = 2e-3
    step_latents: int = 1024  # predictions of a training step, over all its examples
    first_reach: int = 64  # half the first window
    passed: float = 0.99  # smoothed accuracy at which the window doubles
    goal: float = 0.999  # and at which, at full length, the learning rate starts to fall
    patience: int = 4000  # or after so many steps there
    cooldown: int = 800  # steps in which it falls to 0
    sampled: int = 16_384  # positions of the prefix that a step before the cooldown sees, at most
    warmup: int = 20
    streamed: bool = False

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
            streamed=self.streamed,
        )
        return PerceiverAR(config)


def predict(model: PerceiverAR, tokens: Tensor, places: Tensor, latents: int) -> Tensor:
    """Logits (B, latents, vocabulary) of what follows each of the last of ``tokens`` (B, n).

    ``places`` (n,): their positions, in order.
    """
    if not model.config.streamed:
        inputs = model.embed(tokens, places)
        return model.logits(model.read(inputs[:, -latents:], inputs, places))
    prefix = model.embed_in_chunks(tokens[:, :-latents], places[:-latents])
    return model.logits(model.read(model.embed(tokens[:, -latents:], places[-latents:]), prefix, places))


class Training(Resumable):
    """A model in training."""

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
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

    def steps(self, minutes: float) -> Iterator[dict[str, Any]]:
        """What there is to log of every step until it's done or has taken so many minutes."""
        while not self.done and self.seconds < 60 * minutes:
            yield self.step()

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
        stop = end - first  # in the window
        places = torch.arange(stop) if self.cooling else self.sample(stop, latents)
        logits = predict(self.model, window[:, places], first + places, latents)
        targets = window[:, stop - latents + 1 : stop + 1]
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

    def sample(self, stop: int, latents: int) -> Tensor:
        """Which of a window's first ``stop`` positions a step sees: in order, the last are its latents."""
        prefix, most = stop - latents, self.recipe.sampled
        if prefix <= most:
            return torch.arange(stop)
        # The last of the latents tells position `stop`, which mirrors 2 * reach - 1 - stop.
        source, around = 2 * self.reach - 1 - stop, max(0, most // 2 - latents) // 2
        seen = torch.zeros(prefix, dtype=torch.bool)
        seen[max(0, source - around) : source + latents + around] = True
        far = torch.nonzero(~seen).flatten()
        spare = max(0, most - int(seen.sum()))
        seen[far[torch.randperm(len(far), generator=self.draw)[:spare]]] = True
        return torch.cat((torch.nonzero(seen).flatten(), torch.arange(prefix, stop)))


@torch.no_grad()
def evaluate(model: PerceiverAR, recipe: Recipe, sequences: int) -> Iterator[tuple[int, int, int]]:
    """(first position, tokens right, tokens told) of each run of latents.

    Together they are the whole second half of every held-out sequence. Runs of a sequence come in the order
    of their reversed bits: any first few of them are spread evenly.
    """
    model.eval()
    middle, draw = recipe.positions // 2, torch.Generator().manual_seed(HELD_OUT)
    runs = -(-middle // recipe.latents)
    order = sorted(range(runs), key=lambda run: f"{run:0{runs.bit_length()}b}"[::-1])
    for _ in range(sequences):
        half = torch.randint(recipe.vocabulary, (1, middle), generator=draw)
        sequence = torch.cat((half, half.flip(1)), dim=1)
        for run in order:
            begin = middle + run * recipe.latents
            targets = sequence[:, begin : begin + recipe.latents]
            told = targets.shape[1]
            seen = begin + told - 1
            logits = predict(model, sequence[:, :seen], torch.arange(seen), told)
            yield begin, int((logits.argmax(-1) == targets).sum()), told
    model.train()


def train(training: Training, path: Path, minutes: float, save_minutes: float) -> None:
    """Train until done or out of time. KeyboardInterrupt: after Ctrl-C, with everything saved."""
    stages = 1 + round(math.log2(training.recipe.positions / 2 / training.recipe.first_reach))
    with progress() as bar:
        task = bar.add_task("training", total=stages)
        for point in checkpointed(training, training.steps(minutes), path, 60 * save_minutes):
            doublings = round(math.log2(training.reach / training.recipe.first_reach))
            text = f"{point['positions']:,} positions, step {point['step']}, "
            text += f"accuracy {point['smoothed']:.2%}"
            bar.update(task, completed=doublings + (training.cooling > 0), description=text)
            if point["positions"] < 2 * training.reach:
                bar.console.print(f"{point['seconds']:7.1f} s  {text}: the window doubles")


def tell(training: Training, sequences: int, minutes: float) -> Result:
    """Evaluate at full length, in at most so many minutes: counts, and those of each run."""
    recipe, begin = training.recipe, time.perf_counter()
    total = sequences * -(-recipe.positions // 2 // recipe.latents)
    runs: list[dict[str, int]] = []
    right = told = 0
    with progress() as bar:
        task = bar.add_task("evaluating at full length", total=total)
        for first, hits, count in evaluate(training.model, recipe, sequences):
            runs.append({"first": first, "right": hits, "told": count})
            right, told = right + hits, told + count
            bar.update(task, advance=1, description=f"evaluating at full length, {right:,} of {told:,} right")
            if time.perf_counter() - begin > 60 * minutes:
                break
    seconds = time.perf_counter() - begin
    counts = {"accuracy": right / told, "right": right, "told": told, "of": sequences * recipe.positions // 2}
    return {"evaluation_seconds": seconds, "trained_window": 2 * training.reach, **counts, "runs": runs}


def draw_chart(training: Training, result: Result, path: Path) -> None:
    """Accuracy of every training step and its window over time; accuracy held out over positions."""
    figure, (upper, lower, held) = charts.canvas(1, 3, (8, 7.6))
    seconds = [point["seconds"] for point in training.log]
    upper.plot(seconds, [100 * p["accuracy"] for p in training.log], ".", color=charts.OURS, markersize=2)
    recipe = training.recipe
    upper.set_title(
        f"Mirrored copy, {recipe.positions:,} positions, {recipe.latents:,} latents: "
        f"{result['right']:,} of {result['told']:,} tokens held out right ({result['accuracy']:.3%})",
        size=9,
        loc="left",
    )
    upper.set_ylabel("accuracy of a training step, %", size=8)
    lower.step(seconds, [p["positions"] for p in training.log], color=charts.INK, where="post")
    lower.set_yscale("log", base=2)
    lower.set_ylabel("positions in the window", size=8)
    lower.set_xlabel("seconds of training", size=8)
    places = [run["first"] for run in result["runs"]]
    held.plot(places, [100 * run["right"] / run["told"] for run in result["runs"]], ".", color=charts.OURS)
    held.axvline(recipe.positions / 2 + training.reach, color=charts.PEER, linestyle=":")
    held.set_xlabel("first position of the run told (dotted: end of the window reached in training)", size=8)
    held.set_ylabel("held out, % right", size=8)
    held.xaxis.set_major_formatter("{x:,.0f}")
    for axis in (upper, lower, held):
        axis.tick_params(labelsize=8)
    charts.save(figure, path, caption(result))


def main() -> None:
    """Train or go on, evaluate at full length, write copy-task-N.json and .png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=Recipe.positions, help="a power of 2 (%(default)s)")
    parser.add_argument("--latents", type=int, help="default: 1024, at most a quarter of the positions")
    parser.add_argument("--depth", type=int, default=Recipe.depth, help="self-attention layers (%(default)s)")
    parser.add_argument(
        "--cooldown",
        type=int,
        default=Recipe.cooldown,
        metavar="STEPS",
        help="last, at full length (%(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="longest training (%(default)s)")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="between checkpoints (%(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="held-out sequences (%(default)s)")
    parser.add_argument(
        "--evaluate-minutes", type=float, default=math.inf, help="at most (default: no limit)"
    )
    parser.add_argument("--streamed", action="store_true", help="walk the positions in chunks")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path("copy-task"), metavar="DIR", help="%(default)s")
    args = parser.parse_args()
    if args.positions < 256 or args.positions & (args.positions - 1):
        parser.error(f"--positions must be a power of 2 of at least 256, got {args.positions}")
    latents = min(Recipe.latents, args.positions // 4) if args.latents is None else args.latents
    if not 1 <= latents <= args.positions // 2:
        parser.error(f"--latents must be from 1 to half the positions, got {latents}")
    if args.cooldown < 1:
        parser.error(f"--cooldown must be at least 1, got {args.cooldown}")
    if args.threads:
        torch.set_num_threads(args.threads)
    charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show at once
    recipe = Recipe(
        positions=args.positions,
        latents=latents,
        depth=args.depth,
        streamed=args.streamed,
        cooldown=args.cooldown,
    )
    name = args.output / f"copy-task-{args.positions}"
    path = name.with_suffix(".pt")
    command = shlex.join(["python", "-m", "benchmarks.paper.copy_task", *sys.argv[1:]])
    result: Result = {**provenance(), "command": command, "recipe": asdict(recipe)}
    try:
        training = Training.load_or_begin(path, recipe)
    except CommandError as error:
        parser.exit(2, f"{error}\n")
    result["parameters"] = sum(p.numel() for p in training.model.parameters())
    if training.log:
        out.print(f"{path}: going on after step {len(training.log)}, {training.seconds:.0f} s of training")
    try:
        train(training, path, args.minutes, args.save_minutes)
        result |= tell(training, args.sequences, args.evaluate_minutes)
    except KeyboardInterrupt:
        out.print(f"stopped after step {len(training.log)}; the same command goes on from {path}")
        sys.exit(130)
    result |= {"train_seconds": training.seconds, "finished": training.done, "peak_bytes": peak_resident()}
    out.print(
        f"{recipe.positions:,} positions, {latents:,} latents: {result['right']:,} of {result['told']:,} "
        f"mirrored tokens right ({result['accuracy']:.4%}) after {training.seconds:.0f} s of training; "
        f"{mib(result['peak_bytes'])} MiB at most in this process"
    )
    write_json(name.with_suffix(".json"), result | {"log": training.log[::10]})
    training.model.save(name.with_suffix(".safetensors"))
    draw_chart(training, result, name.with_suffix(".png"))
    if training.done:
        path.unlink()  # the same command begins anew


if __name__ == "__main__":
    main()
