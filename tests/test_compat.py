"""flash-attn's functions: their documented meaning as a plain formula in float64."""

import math

import pytest
import torch
from conftest import seeded

from perceiver_kernels.compat import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def draw(seed, *shape, dtype=torch.float32, **options):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype, **options)


def plain(q, k, v, causal=False, scale=None, softcap=0.0, first=0):
    """One example, (M, H, D) over keys from ``first`` on of (N, Hkv, D): out (M, H, Dv) and lse (H, M)."""
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(q.shape[1]).unsqueeze(1), torch.arange(k.shape[1])
    seen = (j >= first) & (j <= i + k.shape[1] - q.shape[1] if causal else torch.tensor(True))
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.nan_to_num(scores.softmax(-1))  # a query that sees no key: 0
    return (weights @ v).transpose(0, 1), scores.logsumexp(-1)


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.3}, {"softcap": 1.5}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (5, 2), (7, 7), (1, 33)])
def test_flash_attn_func(queries, keys, causal, options):
    leaves = draw(0, 2, queries, 6, 16), draw(1, 2, keys, 2, 16), draw(2, 2, keys, 2, 24)
    leaves = [t.requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, lse, weights = flash_attn_func(*leaves, causal=causal, return_attn_probs=True, **options)
    assert weights is None
    assert torch.equal(out, flash_attn_func(*leaves, causal=causal, deterministic=True, **options))
    scale, softcap = options.get("softmax_scale"), options.get("softcap", 0.0)
    rows = [plain(*(t[b] for t in exact), causal, scale, softcap) for b in range(2)]
    want = torch.stack([row for row, _ in rows])
    close(out, want)
    close(lse, torch.stack([row for _, row in rows]))
    dout = draw(3, *out.shape)
    got, grads = (torch.autograd.grad(o, ls, dout.to(o)) for o, ls in ((out, leaves), (want, exact)))
    for a, b in zip(got, grads, strict=True):
        close(a, torch.nan_to_num(b))


def test_flash_attn_func_copies_nothing_and_keeps_the_layout():
    q, kv = draw(0, 2, 5, 4, 16), draw(1, 2, 9, 2, 4, 16)
    out = flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], causal=True)
    assert out.shape == q.shape
    assert out.is_contiguous()


def test_dropout_has_the_seed_of_torch():
    q, k = draw(0, 1, 64, 2, 16), draw(1, 1, 200, 2, 16)
    ones = torch.ones(1, 200, 2, 16)
    torch.manual_seed(1)
    first = flash_attn_func(q, k, ones, dropout_p=0.25)
    assert not torch.equal(first, flash_attn_func(q, k, ones, dropout_p=0.25))
    torch.manual_seed(1)
    assert torch.equal(first, flash_attn_func(q, k, ones, dropout_p=0.25))
    assert abs(first.mean().item() - 1.0) < 0.02  # kept weights are scaled up


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_varlen_func(causal):
    q_lengths, k_lengths = (3, 0, 7, 4), (9, 5, 7, 2)
    q_ends, k_ends = ([0, *torch.tensor(ls).cumsum(0).tolist()] for ls in (q_lengths, k_lengths))
    q, k, v = draw(0, 14, 4, 16), draw(1, 23, 2, 16), draw(2, 23, 2, 16)
    ends = [torch.tensor(e, dtype=torch.int32) for e in (q_ends, k_ends)]
    out, lse, _ = flash_attn_varlen_func(q, k, v, *ends, 7, 9, causal=causal, return_attn_probs=True)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, *ends, 7, 9, causal=causal))
    for b in range(4):
        rows, keys = slice(*q_ends[b : b + 2]), slice(*k_ends[b : b + 2])
        want, want_lse = plain(q[rows], k[keys], v[keys], causal)
        close(out[rows], want)
        close(lse[:, rows], want_lse)


def turned(x, positions, cos, sin, interleaved):
    """x (L, H, D) at positions (L,), by rotation of each pair as complex numbers."""
    x, half = x.double(), cos.shape[-1]
    angle = torch.complex(cos[positions].double(), sin[positions].double()).unsqueeze(1)
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.split(half, -1)
    z = torch.complex(a, b) * angle
    new = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((new, x[..., 2 * half :]), -1)


@pytest.mark.parametrize(
    ("new", "rotary"), [(0, None), (1, None), (4, None), (1, False), (4, False), (1, True), (4, True)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_flash_attn_with_kvcache(new, causal, rotary, shuffled):
    batch, capacity, queries = 3, 40, max(new, 2)
    caches = [draw(s, 5, capacity, 2, 16) for s in (1, 2)]
    caches[0][:, 30:] = math.nan  # nothing there counts
    lengths = torch.tensor([5, 0, 26], dtype=torch.int32)
    rows = torch.tensor([4, 0, 3], dtype=torch.int32) if shuffled else torch.arange(3)
    q, k, v = draw(3, batch, queries, 4, 16), draw(4, batch, new, 2, 16), draw(5, batch, new, 2, 16)
    cos, sin = draw(6, 40, 6).cos(), draw(6, 40, 6).sin()
    options = {} if rotary is None else {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary}
    before = [cache.clone() for cache in caches]
    out, lse = flash_attn_with_kvcache(
        q, *caches, *((k, v) if new else ()), cache_seqlens=lengths, softmax_scale=0.3, causal=causal,
        cache_batch_idx=rows if shuffled else None, return_softmax_lse=True, **options,
    )  # fmt: skip
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        qb, kb, slots = q[b], k[b], torch.arange(length, length + new)
        if rotary is not None:
            steps = torch.arange(queries) if causal else torch.zeros(queries, dtype=torch.int64)
            qb, kb = turned(qb, length + steps, cos, sin, rotary), turned(kb, slots, cos, sin, rotary)
        close(caches[0][row, slots], kb.double())
        assert torch.equal(caches[1][row, slots], v[b])
        keys, values = (
            torch.cat((c[row, :length].double(), x.double())) for c, x in zip(before, (kb, v[b]), strict=True)
        )
        want, want_lse = plain(qb, keys, values, causal, 0.3)
        close(out[b], want)
        close(lse[b], want_lse)
        for cache, old in zip(caches, before, strict=True):
            cache[row, slots] = old[row, slots]
    for cache, old in zip(caches, before, strict=True):  # and nothing else was written
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


def test_kvcache_with_one_length_for_all_and_left_padding():
    q, cache = draw(0, 2, 3, 4, 16), draw(1, 2, 20, 4, 16)
    close(flash_attn_with_kvcache(q, cache, cache)[0], plain(q[0], cache[0], cache[0])[0])
    first = torch.tensor([4, 0])
    for causal in (False, True):
        out = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=11, cache_leftpad=first, causal=causal)
        for b in range(2):
            close(out[b], plain(q[b], cache[b, :11], cache[b, :11], causal, first=first[b])[0])


def test_half_precision_is_taken_as_it_is():
    q, k = draw(0, 1, 4, 2, 64, dtype=torch.bfloat16), draw(1, 1, 300, 2, 64, dtype=torch.bfloat16)
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out[0].double(), plain(q[0], k[0], k[0], True)[0], rtol=2e-2, atol=2e-2)


REFUSED = {
    "window_size must be (-1, -1), got (128, 0)": {"window_size": (128, 0)},
    "alibi_slopes must be None": {"alibi_slopes": torch.ones(2)},
    "block_table must be None: paged caches": {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
    "k and v must be given together": {"k": torch.zeros(1, 1, 2, 16)},
    "cache_seqlens must be given with k and v": {
        "k": torch.zeros(1, 1, 2, 16), "v": torch.zeros(1, 1, 2, 16)},
    "rotary_cos needs k, v and rotary_sin": {"rotary_cos": torch.ones(9, 4)},
    "k_cache holds 9 positions, and cache_seqlens asks for 10": {
        "k": torch.zeros(1, 1, 2, 16), "v": torch.zeros(1, 1, 2, 16), "cache_seqlens": 9},
    "k_cache holds 9 positions, and cache_seqlens asks for -1": {"cache_seqlens": -1},
    "rotary_cos holds 4 positions, and cache_seqlens asks for 6": {
        "k": torch.zeros(1, 1, 2, 16), "v": torch.zeros(1, 1, 2, 16), "cache_seqlens": 5,
        "rotary_cos": torch.ones(4, 4), "rotary_sin": torch.ones(4, 4)},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    q, cache = draw(0, 1, 2, 2, 16), draw(1, 1, 9, 2, 16)
    untouched = cache.clone()
    options = REFUSED[message]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        flash_attn_with_kvcache(q, cache, cache, **options)
    assert message in str(caught.value)
    assert torch.equal(cache, untouched)
    shared = {"window_size", "alibi_slopes"} & options.keys()
    if shared:
        with pytest.raises(ValueError, match=shared.pop()):
            flash_attn_func(q, cache, cache, **options)


def test_the_weights_of_dropout_are_refused():
    q = draw(0, 1, 2, 2, 16)
    with pytest.raises(ValueError, match="return_attn_probs is not served with dropout_p"):
        flash_attn_func(q, q, q, dropout_p=0.1, return_attn_probs=True)
