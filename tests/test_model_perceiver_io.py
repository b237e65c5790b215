"""Perceiver and Perceiver IO: against plain torch; what moves their outputs, what must not; real digits."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import DEVICE, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.models import Perceiver, PerceiverIO, PerceiverIOConfig
from perceiver_kernels.models.perceiver_io import Block, Encoder
from perceiver_kernels.models.positions import fourier_features

CONFIG = PerceiverIOConfig(
    input_dim=5, output_dim=3, dim=16, num_latents=4, depth=2, num_heads=4, num_cross_heads=2, query_dim=6
)


def build(kind: type[Encoder], **changes: Any) -> Any:
    torch.manual_seed(0)
    model = kind(dataclasses.replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        model.latents.mul_(5)  # so that attention tells them well apart
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def plain_block(block: Block, x: Tensor, inputs: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """A block by torch's own attention over one example at a time, without its masked inputs."""
    queries, outs = block.norm(x), []
    context = queries if block.input_norm is None else block.input_norm(inputs)
    for i in range(len(x)):
        rows = context[i] if key_mask is None else context[i][key_mask[i]]
        q, k, v = (
            projection(source).reshape(len(source), block.num_heads, -1).transpose(0, 1)
            for projection, source in (
                (block.q_proj, queries[i]),
                (block.k_proj, rows),
                (block.v_proj, rows),
            )
        )
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    x = x + block.out_proj(torch.stack(outs))
    return x + block.feed_forward(x)


@pytest.mark.parametrize("rounds", [1, 3])
def test_encoder_is_plain_attention_round_after_round(rounds: int) -> None:
    model, inputs = build(Encoder, rounds=rounds), draw(2, 9, 5)
    key_mask = torch.rand(2, 9, generator=seeded(2)) < 0.6
    x = model.latents.expand(2, -1, -1)
    for i in range(rounds):
        weights = model.first if i == 0 else model.later
        x = plain_block(weights.read, x, inputs, key_mask)
        for block in weights.process:
            x = plain_block(block, x, None, None)
    close(model.encode(inputs, key_mask), x)


def test_outputs_are_what_their_queries_read() -> None:
    model, inputs, queries = build(PerceiverIO), draw(2, 9, 5), draw(2, 7, 6)
    out = model(inputs, queries)
    close(out, model.head(plain_block(model.write, queries, model.encode(inputs), None)))
    order = torch.randperm(7, generator=seeded(3))
    close(model(inputs, queries[:, order]), out[:, order])
    close(model(inputs, queries[0]), model(inputs, queries[:1].expand(2, -1, -1)))
    assert (model(inputs.flip(-1), queries) - out).abs().amax((1, 2)).min() > 1e-6


@pytest.mark.parametrize("kind", [Perceiver, PerceiverIO])
def test_inputs_are_a_set_and_masked_ones_are_none_of_it(kind: type[Encoder]) -> None:
    model, inputs = build(kind, rounds=2), draw(2, 9, 5)
    rest = (draw(3, 6),) if kind is PerceiverIO else ()
    out = model(inputs, *rest)
    close(model(inputs[:, torch.randperm(9, generator=seeded(4))], *rest), out)
    key_mask = torch.arange(9).expand(2, -1) < torch.tensor([[9], [5]])
    masked = model(inputs, *rest, key_mask=key_mask)
    close(masked[0], out[0])
    close(masked[1:], model(inputs[1:, :5], *rest))
    changed = torch.where(key_mask.unsqueeze(-1), inputs, inputs + 3)
    assert torch.equal(model(changed, *rest, key_mask=key_mask), masked)
    assert (out[1] - masked[1]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", [Perceiver, PerceiverIO])
def test_every_parameter_learns(kind: type[Encoder]) -> None:
    model = build(kind, rounds=2)
    rest = (draw(3, 6),) if kind is PerceiverIO else ()
    model(draw(2, 9, 5), *rest).square().sum().backward()
    for name, parameter in model.named_parameters():
        # A bias of k moves all scores of a query alike: its gradient is zero but for rounding.
        assert parameter.grad.abs().max() > 1e-9 or name.endswith("k_proj.bias"), name


def test_fourier_features_by_hand() -> None:
    got = fourier_features(torch.tensor([[0, 3], [7, 1]]), (8, 5), bands=2).double()
    want = []
    for row, column in ((0, 3), (7, 1)):
        line: list[Tensor] = []
        for place, size in ((row, 8), (column, 5)):
            p = torch.tensor(-1 + 2 * place / (size - 1), dtype=torch.float64)
            angles = [torch.pi * p * f for f in (1, size / 2)]
            line += [p, *(angle.sin() for angle in angles), *(angle.cos() for angle in angles)]
        want.append(torch.stack(line))
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-5)


def test_fourier_features_of_distant_positions() -> None:
    """The highest band of a long axis: alternating cosines, which float32 angles would miss by 0.01."""
    size = 2**17
    got = fourier_features(torch.tensor([[size - 3], [size - 2]]), (size,), bands=3).double()
    for row, place in zip(got, (size - 3, size - 2), strict=True):
        p = 2 * place / (size - 1) - 1
        want = [math.sin(math.pi * p * f) for f in (1, (1 + size / 2) / 2, size / 2)]
        torch.testing.assert_close(row[1:4], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


BAD = [
    (lambda: build(Encoder, depth=-1), "depth must be at least 0, got -1"),
    (lambda: build(Encoder, num_heads=3), "num_heads is 3, which does not divide dim 16"),
    (lambda: build(PerceiverIO, query_dim=5), "query_dim must be a multiple of num_cross_heads, got 5"),
    (lambda: build(Perceiver)(draw(2, 9, 4)), r"inputs must be \(B, N, 5\), got \(2, 9, 4\)"),
    (
        lambda: build(Perceiver)(draw(2, 9, 5), torch.ones(2, 8) > 0),
        r"key_mask must be \(2, 9\), got \(2, 8\)",
    ),
    (
        lambda: build(PerceiverIO)(draw(2, 9, 5), draw(3, 7, 6)),
        r"queries must be \(2, O, 6\), got \(3, 7, 6\)",
    ),
    (lambda: fourier_features(torch.zeros(3, 1), (8, 8), 4), r"positions must be \(..., 2\), got \(3, 1\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_says_what_came(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    path = Path(__file__).parent.parent / "benchmarks" / "digits.py"
    spec = importlib.util.spec_from_file_location("benchmark_digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.cpu_only("a dozen epochs of tiny steps")
@pytest.mark.parametrize(("name", "least"), [("perceiver", 0.93), ("perceiver_io", 0.88)])
def test_learns_real_digits(digits: ModuleType, name: str, least: float) -> None:
    """Held-out digits after a dozen epochs; without the pixels' places there is much less to see."""
    inputs, labels, held_inputs, held_labels = digits.digits()
    model: nn.Module = digits.build(name, inputs.shape[-1]).to(DEVICE)
    for _ in digits.train(model, inputs, labels, epochs=12):
        pass
    assert digits.accuracy(model, held_inputs, held_labels) >= least
    blind = held_inputs.clone()
    blind[..., 1:] = 0
    assert digits.accuracy(model, blind, held_labels) < 0.4
