"""One contender of long_text: trained on real text for so many seconds and scored, in its own process."""

from __future__ import annotations

import resource
import signal
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Transformer
from perceiver_kernels.cli.corpus import load_corpus
from perceiver_kernels.cli.memory import peak_resident
from perceiver_kernels.cli.train import BYTES, HeldOut, Recipe, Training


class ByteTransformer(Transformer):
    """The Transformer as :class:`Training` and :class:`HeldOut` call a model."""

    def forward(self, tokens: Tensor, num_latents: int = 1) -> Tensor:
        """(B, N) to logits of all N in training, of the last ``num_latents`` otherwise."""
        logits = super().forward(tokens)
        return logits if self.training else logits[:, -num_latents:]


@dataclass(frozen=True)
class Contender(Recipe):
    """One model's training. ``depth`` counts self-attention layers after the one cross-attention."""

    kind: str = "perceiver_ar"
    short_context: int = 1024
    heads: int = 4
    evaluations: int = 1  # before and after

    def model(self) -> nn.Module:
        """A fresh model, the same for the same seed."""
        if self.kind == "perceiver_ar":
            return super().model()
        torch.manual_seed(self.seed)
        return ByteTransformer(BYTES, self.dim, self.depth + 1, self.heads)


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Train and score one contender: what a fresh process runs.

    ``setting``: recipe, threads, memory_bytes, longest (context of all), runs and windows of
    :class:`HeldOut`.
    """
    torch.set_num_threads(setting["threads"])
    limit = setting["memory_bytes"]  # torch then raises where the system would end this process, or another
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    recipe = Contender(**setting["recipe"])
    text, held_text = load_corpus()
    try_step(recipe, text)
    training = Training(recipe)
    held = HeldOut(held_text, setting["longest"], recipe.latents, setting["runs"], setting["windows"])
    points = list(training.steps(text, lambda context: held.bits_per_byte(training.model, context)))
    full = [p for p in points if p["context"] == recipe.context]
    seconds = (full[-1]["seconds"] - full[0]["seconds"]) / (len(full) - 1) if len(full) > 1 else None
    return {
        "held_out_bits": points[-1]["held_out_bits"],
        "short_context": recipe.context_at(0.0),
        "held_out_bits_short": held.bits_per_byte(training.model, recipe.context_at(0.0)),
        "zlib_bits": held.zlib_bits,
        "scored_bytes": held.scored,
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": len(points) - 1,
        "steps_full": len(full) - 1,
        "step_seconds": seconds,
        "seconds": training.seconds,
        "peak_bytes": peak_resident(),
        "train_bits": [[p["seconds"], round(p["train_bits"], 4)] for p in points[:-1:10]],
    }


def try_step(recipe: Contender, text: Tensor) -> None:
    """One step at full context, on a model that is thrown away.

    The process is ended by SIGALRM where it takes longer than training has for that context.
    """
    signal.setitimer(signal.ITIMER_REAL, recipe.seconds * (1 - recipe.short_share))
    Training(replace(recipe, short_share=0.0)).step(text, recipe.context)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
