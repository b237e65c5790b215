"""Inspection and its command: all that is told is that of the dense weights; memory is M x chunk."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from perceiver_kernels import PerceiverAR, PerceiverARConfig, layers
from perceiver_kernels.cli import main
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.memory import peak_growth
from perceiver_kernels.inspection import Attended, inspect_attention, inspect_model
from perceiver_kernels.layers import CrossAttention
from perceiver_kernels.rotary import apply_rotary
from perceiver_kernels.testing.cases import CASES, Case
from perceiver_kernels.testing.inputs import make_inputs

DENSE = [case for case in CASES if case.lengths is None and not case.dropout_p]
CONFIG = PerceiverARConfig(
    vocab_size=11, dim=16, depth=2, num_heads=4, num_kv_heads=2, max_seq_len=64, num_latents=6
)


def dense_weights(query: Tensor, key: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    """(B, H, M, N) weights, 0 in rows that see nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def check(got: Attended, weights: Tensor, places: Tensor, top: int) -> None:
    """``got`` against weights (B, H, M, N) of queries that stand at ``places`` (B, M)."""
    keys = weights.shape[-1]
    want = weights.topk(min(top, keys), dim=-1)
    torch.testing.assert_close(got.shares, want.values)
    assert torch.equal(got.keys, want.indices.masked_fill(want.values == 0, -1))
    torch.testing.assert_close(got.entropy, torch.special.entr(weights).sum(-1))
    distance = (places.unsqueeze(-1) - torch.arange(keys)).abs()
    alive = (weights.sum(-1) > 0).sum(-1).clamp(min=1)
    for e in range(len(got.edges) - 1):
        within = (distance >= got.edges[e]) & (distance < got.edges[e + 1])
        share = (weights * within.unsqueeze(1)).sum((-2, -1)) / alive
        torch.testing.assert_close(got.by_distance[..., e], share)
    assert distance.numel() == 0 or got.edges[-1] > distance.max()


@pytest.mark.cpu_only("compared there")
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_every_case_equals_the_dense_weights(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    spec = inputs.spec()
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    offset = torch.tensor([[spec.q_offset]]) if spec.q_offsets is None else spec.q_offsets.unsqueeze(1)
    places = (offset + torch.arange(queries)).expand(inputs.query.shape[0], -1)
    seen = torch.ones(inputs.query.shape[0], queries, keys, dtype=torch.bool)
    if case.is_causal:
        seen &= torch.arange(keys) <= places.unsqueeze(-1)
    if spec.key_mask is not None:
        seen &= spec.key_mask.unsqueeze(1)
    weights = dense_weights(inputs.query, inputs.key, seen, spec.scale, spec.softcap)
    options = {name: value for name, value in inputs.kwargs.items() if name != "dropout_p"}
    for top, chunk_size in ((3, 7), (8, 1000)):
        got = inspect_attention(inputs.query, inputs.key, **options, top=top, chunk_size=chunk_size)
        check(got, weights, places, top)


def test_low_precision_and_devices() -> None:
    query, key = (torch.randn(1, 2, n, 16, device=DEVICE, dtype=torch.bfloat16) for n in (5, 50))
    got = inspect_attention(query, key, chunk_size=8)
    want = inspect_attention(query.double().cpu(), key.double().cpu())
    assert got.shares.dtype == torch.float32
    torch.testing.assert_close(got.entropy.cpu().double(), want.entropy, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        got.by_distance.sum(-1).cpu(), torch.ones(1, 2, device="cpu"), rtol=1e-3, atol=0.0
    )


def layer_weights(layer: CrossAttention, inputs: Tensor, latents: int, positions: Tensor) -> Tensor:
    """The dense weights of a causal cross-attention, written out from its modules."""
    assert layer.kv_norm is not None
    q = layer.q_proj(layer.norm(inputs[:, -latents:])).unflatten(-1, (layer.num_heads, -1))
    k = layer.k_proj(layer.kv_norm(inputs)).unflatten(-1, (layer.num_kv_heads, -1))
    cos, sin = layer.rotary(positions, torch.float64)
    q = apply_rotary(q, cos[..., -latents:, :], sin[..., -latents:, :]).transpose(1, 2)
    k = apply_rotary(k, cos, sin).transpose(1, 2)
    total = inputs.shape[1]
    seen = torch.ones(latents, total, dtype=torch.bool).tril(total - latents)
    return dense_weights(q, k, seen[None], layer.head_dim**-0.5, layer.softcap or 0.0)


@pytest.mark.cpu_only("compared there")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@torch.no_grad()
def test_a_model_with_rotary_and_grouped_heads(streamed: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    model = PerceiverAR(dataclasses.replace(CONFIG, streamed=streamed, prefix_dropout=0.5, dropout=0.5))
    model.double().train()
    layer = model.cross.attention
    layer.softcap = softcap
    tokens = torch.randint(11, (2, 40))
    got = inspect_model(model, tokens, num_latents=5, top=4, chunk_size=9)
    assert model.training
    assert layer.training
    assert "attend" not in vars(layer)  # nothing stays behind
    assert list(got) == ["cross.attention"]
    model.eval()
    positions = torch.arange(40)
    inputs = model.embed(tokens, positions)
    weights = layer_weights(layer, inputs, 5, positions)
    check(got["cross.attention"], weights, torch.arange(35, 40).expand(2, -1), 4)


@pytest.mark.cpu_only("compared there")
@torch.no_grad()
def test_padding_is_never_attended_to_and_moves_nothing() -> None:
    torch.manual_seed(0)
    model = PerceiverAR(CONFIG).double()
    tokens = torch.randint(11, (1, 30))
    padded = torch.cat((torch.zeros(1, 8, dtype=torch.int64), tokens), dim=1)
    alone = inspect_model(model, tokens)["cross.attention"]
    got = inspect_model(model, padded, pad_mask=torch.arange(38)[None] < 8)["cross.attention"]
    torch.testing.assert_close(got.shares, alone.shares)
    assert torch.equal(got.keys, alone.keys + 8)
    torch.testing.assert_close(got.entropy, alone.entropy)


@torch.no_grad()
def test_refusals() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        inspect_attention(query, key, top=0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got -1"):
        inspect_model(PerceiverAR(CONFIG), torch.zeros(1, 9, dtype=torch.int64), chunk_size=-1)
    with pytest.raises(ValueError, match="model has no CrossAttention inside: Linear"):
        inspect_model(torch.nn.Linear(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="tokens must be"):
        inspect_model(model := PerceiverAR(CONFIG), torch.zeros(9, dtype=torch.int64))
    assert model.training
    assert "attend" not in vars(model.cross.attention)
    with pytest.raises(ValueError, match="several ranks can't be inspected"):
        inspect_model(OnRanks(), torch.zeros(1, 3, 16))


class OnRanks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = CrossAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.attend(x, x, slices=object())


class Generating(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = PerceiverAR(CONFIG)

    def forward(self, prompt: Tensor) -> Tensor:
        return self.model.generate(prompt, 2, use_cache=True, temperature=0.0)


@torch.no_grad()
def test_generation_over_a_cache_is_seen_too_and_nothing_stays_behind() -> None:
    torch.manual_seed(0)
    generating = Generating()
    before = layers.perceiver_attention, layers.streamed_attention
    (seen,) = inspect_model(generating, torch.randint(11, (1, 20))).values()
    assert (layers.perceiver_attention, layers.streamed_attention) == before
    assert int(seen.keys.max()) == 20  # the last step's: one latent, 21 keys
    assert seen.keys.shape[2] == 1


def grown(setting: dict[str, Any]) -> int | None:
    """Peak memory of an inspection of so many positions by a streamed model, in a fresh process."""
    config = dataclasses.replace(CONFIG, max_seq_len=2**17, num_latents=256, streamed=True)
    model = PerceiverAR(config)
    inspect_model(model, torch.zeros(1, 512, dtype=torch.int64))
    tokens = torch.randint(11, (1, setting["length"]))
    return peak_growth(lambda: inspect_model(model, tokens))


@pytest.mark.cpu_only("its memory is measured")
def test_memory_is_queries_times_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # for the fresh process to find this module
    peak = in_fresh_process(grown, {"length": 2**17})
    if peak is None:
        pytest.skip("this system keeps no high-water mark")
    assert peak < 128 * 2**20  # all weights at once are 4 heads x 256 x 131,072 floats, 512 MiB


def inspect(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.mark.cpu_only("the command works there")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, vocab_size=256, max_seq_len=300, num_latents=20)
    PerceiverAR(config).save(tmp_path / "model.safetensors")
    (tmp_path / "text.py").write_bytes(b"def f(x):\n    return x\n" * 50)
    files = ["--plot", tmp_path / "new" / "a.png", "--json", tmp_path / "a.json"]
    code, out, err = inspect(capsys, tmp_path / "model.safetensors", tmp_path / "text.py", *files)
    assert code == 0, err
    assert "the last 300 are read" in err
    assert "return x" in out
    assert (tmp_path / "new" / "a.png").stat().st_size > 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert {"machine", "commit", "version"} <= result.keys()
    assert (result["positions"], result["latents"]) == (300, 20)
    rows = result["layers"]["cross.attention"]
    assert [row["head"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert sum(row["by_distance"]) == pytest.approx(1.0, abs=1e-3)
        assert 1 <= row["spread_over_keys"] <= 300
        assert len(row["strongest_keys"]) == 20
    np.save(tmp_path / "tokens.npy", np.arange(100, dtype=np.uint8))
    cut = ["--end", "30", "--latents", "7", "--top", "2"]
    code, out, err = inspect(capsys, tmp_path / "model.safetensors", tmp_path / "tokens.npy", *cut, *files)
    assert code == 0, err
    assert "30 positions, 7 latents" in out


@pytest.mark.cpu_only("the command works there")
def test_the_command_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model, plot = tmp_path / "model.safetensors", tmp_path / "a.png"
    PerceiverAR(CONFIG).save(model)
    np.save(tmp_path / "tokens.npy", np.arange(10))
    code, out, err = inspect(capsys, model, tmp_path / "tokens.npy", "--plot", plot)
    assert code == 0
    assert "spread over (median)" in out
    assert "There is no picture: plots need matplotlib: pip install 'perceiver-kernels[demo]'" in err
    assert not plot.exists()


@pytest.mark.cpu_only("the command works there")
def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plot = tmp_path / "model.safetensors", ["--plot", tmp_path / "a.png"]
    PerceiverAR(CONFIG).save(model)
    for name, value in (("floats", np.zeros(3)), ("table", np.zeros((2, 2), int)), ("big", np.full(3, 11))):
        np.save(tmp_path / f"{name}.npy", value)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    for name, problem in {
        "floats.npy": "tokens must be integers, got torch.float64",
        "table.npy": "tokens must be (n,), got (2, 2)",
        "big.npy": "tokens must be from 0 to 10, got 11",
        "broken.npy": "broken.npy can't be read as tokens",
        "missing.npy": "missing.npy: no such file",
        "empty.txt": "empty.txt holds no tokens",
    }.items():
        code, _, err = inspect(capsys, model, tmp_path / name, *plot)
        assert code == 2
        assert problem in err
    code, _, err = inspect(capsys, tmp_path / "nope.safetensors", tmp_path / "big.npy", *plot)
    assert code == 2
    assert "nope.safetensors: no such file" in err
    data = model.read_bytes()
    for damaged in (b"", data[:-10], data[:100], b"{}"):
        model.write_bytes(damaged)
        code, _, err = inspect(capsys, model, tmp_path / "big.npy", *plot)
        assert code == 2
        assert "is no model that PerceiverAR.save wrote" in err
