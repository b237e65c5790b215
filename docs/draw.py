"""Draw docs/visibility.png, perceiver_ar.png and perceiver_cost.png, masks by the package's own rule."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from perceiver_kernels.reference import visible
from perceiver_kernels.spec import make_spec

HERE = Path(__file__).parent
SEEN, HIDDEN, LATENT, INK, SOFT = "#4393c3", "#f0f0f0", "#d6604d", "#333333", "#777777"


def mask(queries: int, keys: int, **options: object) -> torch.Tensor:
    """Visibility (M, N) of one example, from the reference."""
    defaults = dict.fromkeys(("q_offset", "key_mask", "scale", "softcap", "dropout_seed"))
    query, key = torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1)
    spec = make_spec(query, key, key, **({"is_causal": True, "dropout_p": 0.0} | defaults | options))  # type: ignore[arg-type]
    return visible(spec, queries, keys, query.device)[0]


def grid(axis: Axes, seen: torch.Tensor, title: str) -> None:
    """One cell for each (query, key) pair: blue where the query sees the key."""
    queries, keys = seen.shape
    for i in range(queries):
        for j in range(keys):
            color = SEEN if seen[i, j] else HIDDEN
            axis.add_patch(Rectangle((j, i), 0.92, 0.92, facecolor=color, edgecolor="none"))
    axis.set(xlim=(-0.1, keys), ylim=(queries, -0.1), aspect="equal")
    axis.set_xticks([0.46, keys - 0.54], ["key 0", f"key {keys - 1}"], size=8, color=SOFT)
    axis.set_yticks([0.46, queries - 0.54], ["query 0", f"query {queries - 1}"], size=8, color=SOFT)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, size=9, color=INK, loc="left")


def draw_visibility() -> None:
    """Four uses of the one rule."""
    padded = torch.arange(16)[None] >= 4
    panels = [
        (mask(5, 16), "default, q_offset = N - M = 11:\nthe last query sees every key"),
        (mask(5, 16, key_mask=padded), "key_mask: four keys of left padding"),
        (
            mask(5, 16, q_offset=6),
            "q_offset = 6: chunked prefill into a static\ncache; what lies behind may be uninitialised",
        ),
        (mask(5, 16, q_offset=-2), "q_offset = -2: queries 0 and 1 see no key\n(out 0, lse -inf)"),
    ]
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    for axis, (seen, title) in zip(figure.subplots(2, 2).ravel(), panels, strict=True):
        grid(axis, seen, title)
    figure.savefig(HERE / "visibility.png", dpi=130)


def draw_model() -> None:
    """Perceiver AR in one picture: N inputs, one cross-attention onto M latents, a stack over those."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.2, 27.5), ylim=(-1.7, 10.2))
    axis.axis("off")
    inputs, latents, left = 20, 5, 0.0
    for j in range(inputs):
        color = LATENT if j >= inputs - latents else "#d9d9d9"
        axis.add_patch(Rectangle((left + j, 0), 0.86, 0.86, facecolor=color, edgecolor="none"))
    first = left + inputs - latents
    axis.annotate("N inputs (8 thousand to a million)", (0, -0.8), size=10, color=INK, va="center")
    axis.annotate("the last M are the latents", (first, -0.8), size=10, color=LATENT, va="center")
    seen = mask(latents, inputs)
    for i in range(latents):
        for j in range(inputs):
            color = SEEN if seen[i, j] else HIDDEN
            axis.add_patch(
                Rectangle(
                    (left + j, 1.6 + 0.5 * (latents - 1 - i)), 0.86, 0.42, facecolor=color, edgecolor="none"
                )
            )
    axis.annotate(
        "perceiver_attention\nM queries over N keys,\ncausal from the bottom right:\nthe cost of context",
        (20.7, 2.85),
        size=10,
        color=SEEN,
        va="center",
        weight="bold",
    )
    for layer in range(3):
        y = 4.9 + 1.25 * layer
        box = FancyBboxPatch(
            (first, y), latents - 0.14, 0.8, boxstyle="round,pad=0.02", facecolor="#f4a582", edgecolor="none"
        )
        axis.add_patch(box)
        axis.annotate(
            "self-attention", (first + latents / 2, y + 0.4), ha="center", va="center", size=8, color=INK
        )
    axis.annotate("deep stack over\nM latents only", (20.7, 6.5), size=10, color=LATENT, va="center")
    for begin, end in ((0.95, 1.5), (4.2, 4.8), (8.3, 8.9)):
        x = first + latents / 2
        axis.add_patch(FancyArrowPatch((x, begin), (x, end), arrowstyle="-|>", mutation_scale=9, color=SOFT))
    axis.annotate(
        "next-token logits of the last M positions", (first + latents, 9.35), ha="right", size=10, color=INK
    )
    figure.savefig(HERE / "perceiver_ar.png", dpi=130)


def draw_cost() -> None:
    """Who is asked about whom: a Transformer's layer, and Perceiver AR's one reading and its layers."""
    inputs, latents = 24, 5
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-1.2, 64), ylim=(27.5, -5.5), aspect="equal")
    axis.axis("off")
    for left, queries, keys, color, title in (
        (0, inputs, inputs, "#bdbdbd", "a Transformer, in every layer:\nN x N"),
        (29, latents, inputs, SEEN, "Perceiver AR, once:\nM x N, the cross-attention"),
        (57, latents, latents, LATENT, "then in every layer:\nM x M"),
    ):
        top = inputs - queries
        for i, row in enumerate(mask(queries, keys)):
            for j, seen in enumerate(row):
                cell = color if seen else HIDDEN
                place = (left + j, top + i)
                axis.add_patch(Rectangle(place, 0.88, 0.88, facecolor=cell, edgecolor="none"))
        axis.annotate(title, (left, top - 1), size=9, color=INK, va="bottom")
        axis.annotate(
            f"{'N' if keys == inputs else 'M'} keys", (left, inputs + 1), size=8, color=SOFT, va="top"
        )
        name = "N queries" if queries == inputs else "M"
        axis.annotate(name, (left - 0.5, inputs - queries / 2), size=8, color=SOFT, ha="right", va="center",
                      rotation=90)  # fmt: skip
    figure.savefig(HERE / "perceiver_cost.png", dpi=130)


if __name__ == "__main__":
    draw_visibility()
    draw_model()
    draw_cost()
