"""Perceiver and Perceiver IO trained on scikit-learn's handwritten digits: accuracy on held-out images.

    python benchmarks/digits.py --json benchmarks/results/digits.json

An image is a set of 64 pixels, each its brightness and the Fourier features of its place: shuffling the set
changes nothing. 1,347 of the 1,797 images train, the others are held out (shuffled once, by a fixed seed).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.report import Result, out, progress, write_json
from perceiver_kernels.models import Perceiver, PerceiverIO, PerceiverIOConfig
from perceiver_kernels.models.positions import fourier_features

SIDE, CLASSES, BANDS, HELD_OUT = 8, 10, 4, 450


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, their labels, held-out images, their labels; images are (n, 64, features)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    features = fourier_features(places, (SIDE, SIDE), BANDS)
    # From -3 to 3: its brightness counts for a pixel about as much as the 18 features of its place.
    pixels = torch.tensor(data.images, dtype=torch.float32).flatten(1) * (3 / 8) - 3
    inputs = torch.cat((pixels.unsqueeze(-1), features.expand(len(pixels), -1, -1)), dim=-1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:-HELD_OUT], order[-HELD_OUT:]
    return inputs[train], labels[train], inputs[held], labels[held]


class Classifier(nn.Module):
    """A Perceiver IO with one learned query, which asks for the class."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        super().__init__()
        self.body = PerceiverIO(config)
        self.query = nn.Parameter(0.2 * torch.randn(1, config.dim))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 64, features) to logits (B, 10)."""
        logits: Tensor = self.body(inputs, self.query)[:, 0]
        return logits


def build(name: str, features: int) -> nn.Module:
    """A fresh model of either kind, the same every time."""
    torch.manual_seed(0)
    config = PerceiverIOConfig(
        input_dim=features,
        output_dim=CLASSES,
        dim=64,
        num_latents=16,
        depth=2,
        num_heads=4,
        num_cross_heads=4,
        rounds=2 if name == "perceiver" else 1,
        ff_mult=2.0,
        dropout=0.1,
    )
    return Perceiver(config) if name == "perceiver" else Classifier(config)


def train(model: nn.Module, inputs: Tensor, labels: Tensor, epochs: int) -> Iterator[float]:
    """Train in place by AdamW, learning rate falling to 0; yields the mean loss of every epoch."""
    batch, lr = 64, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        losses = []
        order = torch.randperm(len(inputs), generator=draw)
        for chosen in order[: len(inputs) // batch * batch].split(batch):
            loss = F.cross_entropy(model(inputs[chosen]), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of images that are told right."""
    model.eval()
    return (model(inputs).argmax(-1) == labels).double().mean().item()


def main() -> None:
    """Train both, print and write their accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40, help="default 40")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    command = shlex.join(["python", "benchmarks/digits.py", *sys.argv[1:]])
    result: Result = {**provenance(), "command": command, "epochs": args.epochs, "models": {}}
    inputs, labels, held_inputs, held_labels = digits()
    for name in ("perceiver", "perceiver_io"):
        model = build(name, inputs.shape[-1])
        row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "loss": []}
        result["models"][name] = row
        begin = time.perf_counter()
        with progress() as bar:
            task = bar.add_task(name, total=args.epochs)
            for loss in train(model, inputs, labels, args.epochs):
                row["loss"].append(loss)
                bar.update(task, advance=1, description=f"{name}, loss {loss:.3f}")
        row["seconds"] = time.perf_counter() - begin
        row["held_out_accuracy"] = accuracy(model, held_inputs, held_labels)
        out.print(
            f"{name}: {row['parameters']:,} parameters, {row['seconds']:.0f} s, "
            f"{row['held_out_accuracy']:.1%} of {len(held_labels)} held-out digits right"
        )
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
