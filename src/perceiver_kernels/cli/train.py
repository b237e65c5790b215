"""Train a byte-level Perceiver AR on the standard library; score it on held-out files against zlib."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_kernels as pk
from perceiver_kernels.cli.checkpoint import Resumable
from perceiver_kernels.cli.corpus import deflate_bits

BYTES = 256


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long.

    The first `short_share` of the time goes to pieces of `short_context` bytes, where a step costs a fraction
    of a full one and shows as much of the language; the rest goes to the full context. Positions are rotary
    only, so that what is learnt on short pieces holds anywhere. The learning rate falls to zero over `steps`,
    or over `seconds` where there are none.
    """

    context: int = 8192
    latents: int = 512
    short_context: int = 512
    short_share: float = 0.6
    dim: int = 128
    depth: int = 3
    heads: int = 2
    lr: float = 4e-3
    seconds: float = 150.0
    steps: int | None = None
    evaluations: int = 10
    seed: int = 0

    def model(self) -> pk.PerceiverAR:
        """A fresh model, the same for the same seed."""
        torch.manual_seed(self.seed)
        config = pk.PerceiverARConfig(
            vocab_size=BYTES,
            dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            max_seq_len=self.context,
            num_latents=self.latents,
            positions="none",
            rotary_fraction=1.0,
            tie_embeddings=True,
        )
        return pk.PerceiverAR(config)

    def context_at(self, done: float) -> int:
        """Bytes of context once the share `done` of training is over."""
        return min(self.short_context, self.context) if done < self.short_share else self.context


class HeldOut:
    """Runs of held-out text, spread evenly, each scored in windows that lie end to end.

    A window predicts its last `latents` bytes from the `context - latents` before them and each other. So the
    scored bytes of a run are one piece of text, which zlib gets as one stream with the same text before it.
    """

    def __init__(self, text: Tensor, context: int, latents: int, runs: int = 8, windows: int = 16) -> None:
        self.latents = latents
        before = context - latents + 1  # the byte after position i is what position i predicts
        length = before + windows * latents
        if len(text) < length:
            raise ValueError(f"held-out text has {len(text):,} bytes, a run needs {length:,}")
        starts = torch.linspace(0, len(text) - length, runs).long().tolist()
        pieces = [text[start : start + length].long() for start in starts]
        self.windows = [[piece[i * latents :][: context + 1] for piece in pieces] for i in range(windows)]
        self.scored = runs * windows * latents
        as_bytes = [bytes(piece.tolist()) for piece in pieces]
        self.zlib_bits = sum(deflate_bits(piece[before:], piece[:before]) for piece in as_bytes) / runs

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module, context: int, windows: int | None = None) -> float:
        """Mean bits per byte with `context` bytes in view, over `windows` windows a run, None for all."""
        model.eval()
        losses = []
        for window in self.windows[:windows]:
            for piece in window:
                logits = model(piece[None, -context - 1 : -1], num_latents=self.latents)
                losses.append(F.cross_entropy(logits[0], piece[-self.latents :]).item())
        model.train()
        return sum(losses) / len(losses) / math.log(2)


class Training(Resumable):
    """A model in training by a :class:`Recipe`."""

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.model = recipe.model()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.draw = torch.Generator().manual_seed(recipe.seed)
        self.done, self.seconds, self.evaluated = 0.0, 0.0, 0
        self.points: list[dict[str, Any]] = []

    def steps(self, text: Tensor, evaluate: Callable[[int], float]) -> Iterator[dict[str, Any]]:
        """Go on to the end, yielding after every step what there is to plot, which ``points`` keeps.

        A point has step, seconds, done (0 to 1), context, train_bits, and now and then held_out_bits, which
        is `evaluate(context)`. The time that evaluation takes does not count towards `recipe.seconds`.
        """
        recipe = self.recipe
        while self.evaluated <= recipe.evaluations:
            context = recipe.context_at(self.done)
            point: dict[str, Any] = {"step": len(self.points), "seconds": round(self.seconds, 3)}
            point |= {"done": self.done, "context": context}
            if self.done >= self.evaluated / recipe.evaluations:
                point["held_out_bits"] = evaluate(context)
                self.evaluated = math.floor(self.done * recipe.evaluations) + 1
            if self.done < 1:
                point["train_bits"] = self.step(text, context)
            self.points.append(point)
            yield point

    def step(self, text: Tensor, context: int) -> float:
        """One step on a random piece; returns its loss in bits per byte."""
        recipe, begin, number = self.recipe, time.perf_counter(), len(self.points) + 1
        rate = min(1.0, number / 20) * 0.5 * (1 + math.cos(math.pi * self.done))
        self.optimizer.param_groups[0]["lr"] = recipe.lr * rate
        start = int(torch.randint(len(text) - context, (), generator=self.draw))
        tokens = text[start : start + context + 1].long()
        logits = self.model(tokens[None, :-1], num_latents=recipe.latents)
        loss = F.cross_entropy(logits[0], tokens[-logits.shape[1] :])
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds += time.perf_counter() - begin
        part = self.seconds / recipe.seconds if recipe.steps is None else number / recipe.steps
        self.done = min(1.0, part)
        return loss.item() / math.log(2)


def continuation(model: pk.PerceiverAR, text: Tensor, length: int, seed: int = 0) -> tuple[bytes, bytes]:
    """A prompt of held-out bytes that leaves room for `length` more, and what the model writes after it."""
    prompt = text[: model.config.max_seq_len - length].long()[None]
    draw = torch.Generator().manual_seed(seed)
    full = model.generate(prompt, length, temperature=0.7, top_p=0.95, generator=draw)[0].tolist()
    return bytes(full[: prompt.shape[1]]), bytes(full[prompt.shape[1] :])
