"""Dropout: Philox's published vectors, the same bits in every backend, the right rate."""

from __future__ import annotations

import pytest
import torch
from conftest import BY_NAME, USABLE, refusal, usual
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import autograd
from perceiver_kernels.reference import philox
from perceiver_kernels.spec import make_spec

BACKENDS = [name for name in USABLE if name != "sdpa"]  # sdpa refuses: its bits are torch's
P = 0.3


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "seed", "want"),
    [
        ((0, 0, 0, 0), 0, 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, -1, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 0xD16CFE09),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], seed: int, want: int) -> None:
    """The first words of the known answers that come with Random123."""
    assert philox(words(*counter), torch.tensor(seed)).item() == want


def kept(backend: str, seed: int | None, dtype: torch.dtype | None = None, batch: int = 2) -> Tensor:
    """Which entries a backend keeps: with an identity for value, out is the matrix of probabilities."""
    keys, dtype = 67, dtype or usual(backend)
    query, key = torch.zeros(batch, 4, 21, 8, dtype=dtype), torch.zeros(batch, 2, keys, 8, dtype=dtype)
    value = torch.eye(keys, 72, dtype=dtype).expand(batch, 2, keys, 72)  # a head dim that every backend takes
    options = {"is_causal": False, "dropout_p": P, "dropout_seed": seed, "backend": backend}
    out = pk.perceiver_attention(query, key, value, **options)[..., :keys]
    full = torch.full_like(out, 1 / keys / (1 - P))
    torch.testing.assert_close(out[out != 0], full[out != 0], rtol=0.01, atol=0)
    return out != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_backend_drops_the_same_entries(backend: str, seed: int, dtype: torch.dtype) -> None:
    if refusal(backend, BY_NAME["dropout"], dtype):
        pytest.skip(f"{backend} refuses it, as it should")
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 21, 67)), indexing="ij")
    want = philox((b, h, i, j), torch.tensor(seed)) >= int(P * 2**32)
    assert torch.equal(kept(backend, seed, dtype), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rate_and_independence_of_seeds(backend: str) -> None:
    one, other = kept(backend, 1), kept(backend, 2)
    assert abs(one.double().mean().item() - (1 - P)) < 5 * (P * (1 - P) / one.numel()) ** 0.5
    agree = (one == other).double().mean().item()
    assert abs(agree - (P**2 + (1 - P) ** 2)) < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entry_depends_on_its_place_alone(backend: str) -> None:
    assert torch.equal(kept(backend, 5, batch=1), kept(backend, 5, batch=3)[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_of_the_keys_drops_what_the_whole_call_drops(backend: str) -> None:
    """Forward and backward, across the index where an int32 turns negative."""
    first, queries, keys, dim = 2**31 - 20, 21, 67, 72
    dtype = usual(backend)
    query, key = torch.zeros(2, 4, queries, 8, dtype=dtype), torch.zeros(2, 4, keys, 8, dtype=dtype)
    value = torch.eye(keys, dim, dtype=dtype).repeat(2, 4, 1, 1).requires_grad_()
    options = dict.fromkeys(("q_offset", "key_mask", "scale", "softcap"))
    spec = make_spec(query, key, value, is_causal=False, dropout_p=P, dropout_seed=7, **options)
    out, _ = autograd.attention(query, key, value, spec.over_keys(first, first + keys), backend)
    out.backward(torch.eye(queries, dim, dtype=dtype).expand_as(out))

    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (2, 4, queries, keys)), indexing="ij")
    want = philox((b, h, i, first + j), torch.tensor(7)) >= int(P * 2**32)
    assert torch.equal(out[..., :keys] != 0, want)
    assert torch.equal(value.grad[..., :queries] != 0, want.mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_torch_draws_one(backend: str) -> None:
    torch.manual_seed(1)
    first, second = kept(backend, None), kept(backend, None)
    torch.manual_seed(1)
    assert torch.equal(kept(backend, None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_does_not_know_of_dropout(backend: str) -> None:
    query, key, value = (torch.randn(1, 2, rows, 8).to(usual(backend)) for rows in (3, 9, 9))
    _, plain = pk.perceiver_attention(query, key, value, return_lse=True, backend=backend)
    _, dropped = pk.perceiver_attention(query, key, value, dropout_p=0.9, return_lse=True, backend=backend)
    assert torch.equal(plain, dropped)
