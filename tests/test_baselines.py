"""The rivals in benchmarks/baselines: who sees whom, memory against recomputation, and that they learn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import seeded
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.baselines import SparseTransformer, Transformer, TransformerXL
from benchmarks.baselines.sparse import SparseAttention
from benchmarks.baselines.transformer_xl import RelativeAttention

pytestmark = pytest.mark.cpu_only("rivals are measured there")
SIZES: dict[str, int] = {"vocab_size": 11, "dim": 16, "depth": 3, "num_heads": 2}
KINDS: dict[str, Any] = {
    "transformer": lambda **sizes: Transformer(**sizes),
    "transformer_xl": lambda **sizes: Segment(**sizes),
    "strided": lambda **sizes: SparseTransformer(**sizes, stride=4),
    "fixed": lambda **sizes: SparseTransformer(**sizes, stride=4, pattern="fixed", summaries=2),
}


class Segment(nn.Module):
    """A Transformer-XL over one segment without memory."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.model = TransformerXL(**sizes, memory=0)

    def forward(self, tokens: Tensor) -> Tensor:
        logits, _ = self.model(tokens)
        return logits


def build(name: str, **changes: int) -> Any:
    torch.manual_seed(0)
    return KINDS[name](**SIZES | changes).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 5, 16, 30])
@pytest.mark.parametrize("name", KINDS)
def test_the_future_moves_nothing_and_the_past_does(name: str, length: int) -> None:
    model = build(name)
    tokens = torch.randint(11, (2, length), generator=seeded(2))
    before = model(tokens)
    assert before.shape == (2, length, 11)
    assert before.isfinite().all()
    for column in range(0, length, 3):
        other = tokens.clone()
        other[:, column] = (other[:, column] + 1) % 11
        moved = (model(other) - before).abs().amax((0, 2))
        assert (moved[:column] < 1e-14).all()
        # Through three layers every later position sees the column, but for a few in the "fixed" pattern,
        # where what no block's end has seen is not passed on.
        assert (moved[column:] > 1e-9).all() or (name == "fixed" and moved[column] > 1e-9)


def pattern(name: str, second: bool, length: int, stride: int, summaries: int) -> Tensor:
    """Section 4.3 of the paper, entry by entry."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            seen[i, j] = {
                ("strided", False): i - j <= stride,
                ("strided", True): (i - j) % stride == 0,
                ("fixed", False): i // stride == j // stride,
                ("fixed", True): j % stride >= stride - summaries,
            }[name, second]
    return seen


@pytest.mark.parametrize(("stride", "summaries"), [(4, 1), (5, 3), (8, 8), (1, 1)])
@pytest.mark.parametrize("length", [1, 4, 7, 24, 33])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", ["strided", "fixed"])
def test_sparse_patterns_are_the_dense_masks(
    name: Any, second: bool, length: int, stride: int, summaries: int
) -> None:
    torch.manual_seed(0)
    attention = SparseAttention(16, 2, name, second, stride, summaries)
    leaves = [draw(3, 2, 2, length, 8)[i].requires_grad_() for i in range(3)]
    dout = draw(2, 2, length, 8).flip(2)
    got = attention.mix(*leaves)
    q, k, v = leaves
    seen = pattern(name, second, length, stride, summaries)
    scores = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf)
    # A query that sees nothing gives 0.
    weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1) * seen
    want = weights @ v
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, leaves, dout) for x in (got, want)), strict=True):
        close(a, b)


def test_relative_scores_are_the_formula() -> None:
    """(q_i + u) . k_j + (q_i + v) . W r_{i - j}, term by term."""
    torch.manual_seed(0)
    attention = RelativeAttention(8, 2).double()
    nn.init.normal_(attention.content_bias)
    nn.init.normal_(attention.position_bias)
    x, memory = draw(1, 5, 8), draw(1, 3, 8) * 2
    context = attention.norm(torch.cat((memory, x), 1))[0]
    q = attention.q_proj(context[3:]).reshape(5, 2, 4)
    k, v = attention.kv_proj(context).reshape(8, 2, 2, 4).unbind(1)
    out = torch.zeros(5, 2, 4, dtype=torch.float64)
    for head in range(2):
        for i in range(5):
            scores = []
            for j in range(3 + i + 1):
                distance = 3 + i - j
                angle = distance * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
                r = attention.r_proj(torch.cat((angle.sin(), angle.cos())).double()).reshape(2, 4)[head]
                content = (q[i, head] + attention.content_bias[head, 0]) @ k[j, head]
                place = (q[i, head] + attention.position_bias[head, 0]) @ r
                scores.append((content + place) / 2)
            out[i, head] = torch.stack(scores).softmax(0) @ v[: 3 + i + 1, head]
    torch.testing.assert_close(attention(x, memory)[0], attention.out_proj(out.flatten(1)), rtol=0, atol=1e-6)


def xl_segments(model: TransformerXL, tokens: Tensor, segment: int) -> Tensor:
    """Logits of all tokens, segment after segment."""
    memory, parts = None, []
    for piece in tokens.split(segment, dim=1):
        logits, memory = model(piece, memory)
        parts.append(logits)
    return torch.cat(parts, 1)


def xl_banded(model: TransformerXL, tokens: Tensor, segment: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """All tokens at once, each seeing what the memory would have held: the same masks, nothing cached."""
    place = torch.arange(tokens.shape[1])
    first = place // segment * segment - model.memory
    hidden = place[None] < first[:, None]
    plain = F.scaled_dot_product_attention

    def banded(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return plain(q, k, v, attn_mask=attn_mask.masked_fill(hidden, -torch.inf))

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", banded)
        logits, _ = model(tokens)
    return logits


@pytest.mark.parametrize(("segment", "memory"), [(4, 0), (4, 3), (4, 9), (7, 5), (1, 6), (30, 4), (5, 99)])
def test_transformer_xl_memory_is_recomputation(
    segment: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = TransformerXL(**SIZES, memory=memory).double()
    for attention in model.attentions:
        nn.init.normal_(attention.content_bias)
        nn.init.normal_(attention.position_bias)
    tokens = torch.randint(11, (2, 30), generator=seeded(3))
    got = xl_segments(model, tokens, segment)
    torch.testing.assert_close(got, xl_banded(model, tokens, segment, monkeypatch), rtol=0, atol=1e-9)
    whole, _ = model(tokens)
    same = (got - whole).abs().amax() < 1e-9
    assert same == (memory >= 30 or segment >= 30)  # a memory of everything is one long segment


def test_no_gradient_goes_to_the_memory() -> None:
    torch.manual_seed(0)
    model = TransformerXL(**SIZES, memory=4).double()
    tokens = torch.randint(11, (1, 12), generator=seeded(4))
    _, memory = model(tokens[:, :6])
    assert [tuple(states.shape) for states in memory] == [(1, 4, 16)] * 3
    assert not any(states.requires_grad for states in memory)


@pytest.mark.parametrize("name", KINDS)
def test_they_learn_to_look_back(name: str) -> None:
    """Six random tokens and the same again. "fixed" must squeeze a block into its ends, and is slow."""
    torch.manual_seed(0)
    model = KINDS[name](**SIZES | {"dim": 32, "depth": 2})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    source = seeded(5)
    for _ in range(150):
        half = torch.randint(11, (16, 2, 6), generator=source)
        tokens = torch.cat((half, half), 2).flatten(1)
        logits = model(tokens)[:, 5:11]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 6:12].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (logits.argmax(-1) == tokens[:, 6:12]).double().mean()
    assert right > (0.5 if name == "fixed" else 0.9)  # guessing: 0.09


BAD = [
    (lambda: Transformer(11, 15, 1, 2), "dim must be an even multiple of num_heads, got 15 and 2"),
    (lambda: RelativeAttention(9, 3), "dim must be even and a multiple of num_heads, got 9 and 3"),
    (lambda: SparseTransformer(11, 16, 1, 2, stride=4, pattern="rows"), "pattern must be one of strided, f"),
    (lambda: SparseAttention(16, 2, "fixed", True, 4, 5), "summaries must be from 1 to the stride 4, got 5"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_says_what_came(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
