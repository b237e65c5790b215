"""Train a byte-level Perceiver AR on the standard library's sources, and score it on held-out files against zlib."""

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
from perceiver_kernels.cli.corpus import deflate_bits

BYTES = 256


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long; the learning rate falls to zero over `steps`, or over `seconds` without them."""

    context: int = 8192
    latents: int = 1024
    dim: int = 192
    depth: int = 4
    heads: int = 3
    batch: int = 1
    lr: float = 3e-3
    prefix_dropout: float = 0.0
    seconds: float = 150.0
    steps: int | None = None
    evaluations: int = 8
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
            prefix_dropout=self.prefix_dropout,
        )
        return pk.PerceiverAR(config)


class HeldOut:
    """Runs of held-out text, spread evenly, each scored in windows that lie end to end.

    A window predicts its last `latents` bytes from the `context - latents` before them and each other. So the
    scored bytes of a run are one piece of text, which zlib gets as one stream with the same text before it.
    """

    def __init__(self, text: Tensor, context: int, latents: int, runs: int = 8, windows: int = 12) -> None:
        self.latents = latents
        before = context - latents + 1  # the byte after position i is what position i predicts
        length = before + windows * latents
        if len(text) < length:
            raise ValueError(f"held-out text has {len(text):,} bytes, a run needs {length:,}")
        starts = torch.linspace(0, len(text) - length, runs).long().tolist()
        self.runs = [text[start : start + length].long() for start in starts]
        self.windows = [[run[i * latents :][: context + 1] for run in self.runs] for i in range(windows)]
        self.scored = runs * windows * latents
        as_bytes = [bytes(run.tolist()) for run in self.runs]
        self.zlib_bits = sum(deflate_bits(run[before:], run[:before]) for run in as_bytes) / runs

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module, windows: int | None = None) -> float:
        """Mean bits per byte over the first `windows` windows of every run, None for all of them."""
        model.eval()
        losses = []
        for window in self.windows[:windows]:
            for text in window:
                logits = model(text[None, :-1], num_latents=self.latents)
                losses.append(F.cross_entropy(logits[0], text[-self.latents :]).item())
        model.train()
        return sum(losses) / len(losses) / math.log(2)


def optimizers(model: pk.PerceiverAR, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW for all; betas and clipping as for other small Perceiver ARs."""
    return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def train(
    model: pk.PerceiverAR, text: Tensor, recipe: Recipe, evaluate: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Train in place, yielding after every step: step, seconds, share done, training bits per byte, and now and then held_out.

    The time that evaluation takes does not count towards `recipe.seconds`.
    """
    draw = torch.Generator().manual_seed(recipe.seed)
    opts = optimizers(model, recipe.lr)
    rates = [[group["lr"] for group in opt.param_groups] for opt in opts]
    span = torch.arange(recipe.context + 1)
    done, spent, step, evaluated = 0.0, 0.0, 0, 0
    while True:
        point: dict[str, Any] = {"step": step, "seconds": round(spent, 3), "done": done}
        if done >= evaluated / recipe.evaluations:
            point["held_out_bits"] = evaluate()
            evaluated = math.floor(done * recipe.evaluations) + 1
        if done >= 1:
            yield point
            return
        begin = time.perf_counter()
        warm = min(1.0, (step + 1) / 20)
        for opt, lrs in zip(opts, rates, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        starts = torch.randint(len(text) - recipe.context, (recipe.batch, 1), generator=draw)
        tokens = text[starts + span].long()
        logits = model(tokens[:, :-1], num_latents=recipe.latents)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, -recipe.latents :].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        spent += time.perf_counter() - begin
        done = min(1.0, spent / recipe.seconds if recipe.steps is None else step / recipe.steps)
        yield point | {"train_bits": loss.item() / math.log(2)}


def continuation(model: pk.PerceiverAR, text: Tensor, length: int, seed: int = 0) -> tuple[bytes, bytes]:
    """A prompt of held-out bytes that just leaves room for `length` more, and what the model writes after it."""
    prompt = text[: model.config.max_seq_len - length].long()[None]
    draw = torch.Generator().manual_seed(seed)
    full = model.generate(prompt, length, temperature=0.7, top_p=0.95, generator=draw)[0].tolist()
    return bytes(full[: prompt.shape[1]]), bytes(full[prompt.shape[1] :])
