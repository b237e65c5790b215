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


def train(
    model: pk.PerceiverAR, text: Tensor, recipe: Recipe, evaluate: Callable[[int], float]
) -> Iterator[dict[str, Any]]:
    """Train in place, yielding after every step what there is to plot.

    A point has step, seconds, done (0 to 1), context, train_bits, and now and then held_out_bits, which is
    `evaluate(context)`. The time that evaluation takes does not count towards `recipe.seconds`.
    """
    draw = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01)
    done, spent, step, evaluated = 0.0, 0.0, 0, 0
    while True:
        context = recipe.context_at(done)
        point: dict[str, Any] = {"step": step, "seconds": round(spent, 3), "done": done, "context": context}
        if done >= evaluated / recipe.evaluations:
            point["held_out_bits"] = evaluate(context)
            evaluated = math.floor(done * recipe.evaluations) + 1
        if done >= 1:
            yield point
            return
        begin = time.perf_counter()
        optimizer.param_groups[0]["lr"] = (
            recipe.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * done))
        )
        start = int(torch.randint(len(text) - context, (), generator=draw))
        tokens = text[start : start + context + 1].long()
        logits = model(tokens[None, :-1], num_latents=recipe.latents)
        loss = F.cross_entropy(logits[0], tokens[-recipe.latents :])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent += time.perf_counter() - begin
        done = min(1.0, spent / recipe.seconds if recipe.steps is None else step / recipe.steps)
        yield point | {"train_bits": loss.item() / math.log(2)}


def continuation(model: pk.PerceiverAR, text: Tensor, length: int, seed: int = 0) -> tuple[bytes, bytes]:
    """A prompt of held-out bytes that leaves room for `length` more, and what the model writes after it."""
    prompt = text[: model.config.max_seq_len - length].long()[None]
    draw = torch.Generator().manual_seed(seed)
    full = model.generate(prompt, length, temperature=0.7, top_p=0.95, generator=draw)[0].tolist()
    return bytes(full[: prompt.shape[1]]), bytes(full[prompt.shape[1] :])
