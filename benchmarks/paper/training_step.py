"""One training step of each contender at one context: built, warmed up, measured in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines import SparseTransformer, Transformer, TransformerXL
from perceiver_kernels import PerceiverAR, PerceiverARConfig, layers
from perceiver_kernels.cli.memory import peak_growth

VOCABULARY = 256
Step = Callable[[], Tensor]


def eager_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What a model does without a fused op: all scores, a mask over them, softmax, product."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    queries, keys = scores.shape[-2:]
    ahead = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ value


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the last positions of tokens (1, n) given logits (1, m, vocabulary)."""
    return F.cross_entropy(logits[0], tokens[0, -logits.shape[1] :])


def build(setting: dict[str, Any], context: int) -> tuple[nn.Module, Step]:
    """A model whose predictions see up to ``context`` tokens, and its loss on random ones.

    ``setting``: kind, dim, depth, heads, latents, prefix_dropout. Perceiver AR and Transformer-XL predict the
    last ``latents`` tokens; Transformer-XL gets the states of all tokens before as memory, as if the steps
    before had made them (no time or gradient is spent on them here, they only have to be kept).
    """
    kind, dim, depth, heads = (setting[name] for name in ("kind", "dim", "depth", "heads"))
    latents = min(setting["latents"], context)
    sizes = {"dim": dim, "depth": depth, "num_heads": heads}
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (1, context + 1), generator=draw)
    if kind == "transformer":
        model: Any = Transformer(VOCABULARY, **sizes)
        return model, lambda: loss_of(model(tokens[:, :-1]), tokens)
    if kind == "sparse_transformer":
        stride = 2 ** round((context.bit_length() - 1) / 2)  # the power of 2 near sqrt(N)
        model = SparseTransformer(VOCABULARY, **sizes, stride=stride)
        return model, lambda: loss_of(model(tokens[:, :-1]), tokens)
    if kind == "transformer_xl":
        model = TransformerXL(VOCABULARY, **sizes, memory=context - latents)
        memory = [torch.randn(1, context - latents, dim, generator=draw) for _ in range(depth)]
        segment = tokens[:, -latents - 1 : -1]
        return model, lambda: loss_of(model(segment, memory)[0], tokens)
    config = PerceiverARConfig(
        vocab_size=VOCABULARY,
        **sizes,
        max_seq_len=context,
        num_latents=latents,
        prefix_dropout=setting["prefix_dropout"],
        streamed=kind == "perceiver_ar_streamed",
    )
    model = PerceiverAR(config)
    return model, lambda: loss_of(model(tokens[:, :-1]), tokens)


def run(setting: dict[str, Any], context: int) -> Callable[[], None]:
    """A full training step: forward, backward, AdamW."""
    torch.manual_seed(0)
    model, step = build(setting, context)
    optimizer = torch.optim.AdamW(model.parameters())

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        step().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return call


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of the first step, the model's and the optimiser's own included, and seconds of later ones.

    ``setting``: what :func:`build` takes, and context, repeat (but none after a step of over ``limit``
    seconds), threads.
    """
    torch.set_num_threads(setting["threads"])
    if setting["kind"] == "perceiver_ar_eager":
        layers.perceiver_attention = eager_attention  # type: ignore[assignment]
    run(setting, min(setting["context"], 128))()  # what any first call allocates
    holder: list[Callable[[], None]] = []

    def first() -> None:
        holder.append(run(setting, setting["context"]))
        holder[0]()

    peak = peak_growth(first)
    seconds = []
    for _ in range(setting["repeat"]):
        begin = time.perf_counter()
        holder[0]()
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] > setting["limit"]:
            break
    return {"peak_bytes": peak, "seconds": seconds}
