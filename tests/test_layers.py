"""The layers against plain float64 mathematics, and what they promise about masks, dropout and caches."""

import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch import nn

from perceiver_kernels.kv_cache import KVCache
from perceiver_kernels.layers import CrossAttention, FeedForward, SelfAttention
from perceiver_kernels.rotary import apply_rotary, rotary_cos_sin
from perceiver_kernels.rows import gather_rows, kept_indices

DIM = 24


def plain_attention(layer, latents, inputs, cos, sin, key_mask=None, rotary_heads=1.0):
    """The layer's formula, one head and one query at a time."""
    batch, num_latents, _ = latents.shape
    total = inputs.shape[1]
    queries = layer.norm(latents)
    context = queries if layer.kv_norm is None else layer.kv_norm(inputs)
    q = layer.q_proj(queries).view(batch, num_latents, layer.num_heads, -1)
    k = layer.k_proj(context).view(batch, total, layer.num_kv_heads, -1)
    v = layer.v_proj(context).view(batch, total, layer.num_kv_heads, -1)
    turned_q = apply_rotary(
        q, cos[..., -num_latents:, :], sin[..., -num_latents:, :], layout=layer.rotary_layout
    )
    turned_k = apply_rotary(k, cos, sin, layout=layer.rotary_layout)
    group, turning = layer.num_heads // layer.num_kv_heads, int(layer.num_kv_heads * rotary_heads)
    q = torch.stack([(turned_q if h // group < turning else q)[:, :, h] for h in range(layer.num_heads)], 2)
    k = torch.stack([(turned_k if h < turning else k)[:, :, h] for h in range(layer.num_kv_heads)], 2)
    rows = []
    for b in range(batch):
        for i in range(num_latents):
            seen = torch.arange(total) <= total - num_latents + i
            if key_mask is not None:
                seen = seen & key_mask[b]
            heads = []
            for h in range(layer.num_heads):
                g = h * layer.num_kv_heads // layer.num_heads
                scores = (
                    k[b, seen, g]
                    @ q[b, i, h]
                    * (layer.head_dim**-0.5 if layer.scale is None else layer.scale)
                )
                if layer.softcap is not None:
                    scores = layer.softcap * (scores / layer.softcap).tanh()
                heads.append(scores.softmax(0) @ v[b, seen, g])
            rows.append(torch.cat(heads))
    return layer.out_proj(torch.stack(rows).view(batch, num_latents, -1))


def perturbed(layer):
    """Weights that no initialisation gives, so that a norm of the wrong module would show."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def data(latents=4, prefix=9, batch=2, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(batch, latents, DIM, dtype=dtype), torch.randn(batch, prefix, DIM, dtype=dtype)


VARIANTS = [
    {"num_heads": 3},
    {"num_heads": 4, "num_kv_heads": 2, "bias": True},
    {"num_heads": 4, "num_kv_heads": 1, "head_dim": 7, "value_dim": 10, "rotary_fraction": 0.9},
    {"num_heads": 3, "rotary_layout": "interleaved", "rotary_fraction": 1.0, "rotary_base": 100.0},
    {"num_heads": 2, "rotary_fraction": 0.0, "softcap": 3.0, "scale": 0.7},
    {"num_heads": 6, "num_kv_heads": 3, "rotary_heads": 0.4, "rotary_endpoint": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("prefix_length", [0, 1, 9])
def test_cross_attention_is_the_formula(options, prefix_length):
    latents, prefix = data(prefix=prefix_length)
    layer = perturbed(CrossAttention(DIM, **options).double())
    key_mask = torch.rand(2, prefix_length + 4) < 0.7
    key_mask[:, prefix_length] = True  # every latent sees something
    positions = torch.randint(0, 50, (2, prefix_length + 4))
    for mask, at in ((None, None), (key_mask, None), (None, positions), (key_mask, positions[0])):
        angles = torch.arange(prefix_length + 4) if at is None else at
        cos, sin = layer.rotary(angles, torch.float64)
        want = plain_attention(
            layer,
            latents,
            torch.cat((prefix, latents), 1),
            cos,
            sin,
            mask,
            rotary_heads=options.get("rotary_heads", 1.0),
        )
        got = layer(latents, prefix, key_mask=mask, positions=at)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            layer(latents, prefix, key_mask=mask, rotary=(cos, sin)), want, rtol=1e-10, atol=1e-10
        )


def test_self_attention_is_the_formula():
    latents, _ = data(latents=6)
    layer = perturbed(SelfAttention(DIM, 3).double())
    cos, sin = layer.rotary(torch.arange(6), torch.float64)
    torch.testing.assert_close(layer(latents), plain_attention(layer, latents, latents, cos, sin))
    assert not any(name.startswith("kv_norm") for name in layer.state_dict())


def test_gradients_in_float64():
    latents, prefix = (x.requires_grad_() for x in data(latents=2, prefix=3, batch=1))
    mask = torch.tensor([[False, True, True, True, True]])
    cross, own = (kind(DIM, 2, 1, head_dim=4).double() for kind in (CrossAttention, SelfAttention))
    # fast_mode: one random direction instead of every input by itself
    assert torch.autograd.gradcheck(
        lambda x, y: cross(x, y, key_mask=mask), (latents, prefix), fast_mode=True
    )
    assert torch.autograd.gradcheck(own, (latents,), fast_mode=True)


def test_queries_keys_and_values_reach_the_op_as_views(monkeypatch):
    seen = {}

    def op(query, key, value, **options):
        seen.update(query=query, key=key, value=value)
        return torch.zeros_like(query)

    monkeypatch.setattr("perceiver_kernels.layers.perceiver_attention", op)
    latents, prefix = data(dtype=torch.float32)
    CrossAttention(DIM, 3)(latents, prefix)
    for tensor in seen.values():
        assert tensor.transpose(1, 2).is_contiguous()


def test_a_later_input_moves_nothing_before_it():
    latents, prefix = data(dtype=torch.float32)
    layer = CrossAttention(DIM, 3)
    before = layer(latents, prefix)
    changed = latents.clone()
    changed[:, 2] += 1
    after = layer(changed, prefix)
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] != after[:, 2:]).any(-1).all()


def test_bfloat16_keeps_float32_angles():
    """At positions near 100,000 a bfloat16 layer stays as close to float64 as its arithmetic allows."""
    latents, prefix = data(latents=8, prefix=56)
    layer = CrossAttention(DIM, 2, rotary_fraction=1.0).double()
    positions = torch.arange(100_000, 100_064)
    want = layer(latents, prefix, positions=positions)
    got = layer.bfloat16()(latents.bfloat16(), prefix.bfloat16(), positions=positions)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 0.03 * want.norm()


def test_autocast():
    latents, prefix = data(dtype=torch.float32)
    layer = CrossAttention(DIM, 3)
    want = layer(latents, prefix)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = layer(latents, prefix)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.03 * want.norm()


# Prefix dropout


@pytest.mark.parametrize(("length", "p"), [(10, 0.3), (10, 0.99), (7, 0.5), (1, 0.9), (0, 0.5), (1000, 0.97)])
def test_kept_indices_are_an_exact_ascending_subset(length, p):
    torch.manual_seed(0)
    kept = kept_indices(5, length, p, DEVICE)
    assert kept.shape == (5, length - int(length * p))
    assert (kept.diff(dim=-1) > 0).all()
    assert length == 0 or (kept.min() >= 0 and kept.max() < length)
    if length == 1000:
        assert len({tuple(row.tolist()) for row in kept}) == 5
        many = kept_indices(2000, 20, 0.5, DEVICE)
        frequency = many.flatten().bincount(minlength=20) / 2000
        assert (frequency - 0.5).abs().max() < 0.06


def test_gather_rows():
    x = torch.randn(3, 7, 4)
    indices = torch.tensor([[0, 6], [2, 3], [5, 5]])
    want = torch.stack([x[b, indices[b]] for b in range(3)])
    assert torch.equal(gather_rows(x, indices), want)
    assert torch.equal(gather_rows(x[:, :, 0], indices), want[:, :, 0])
    assert torch.equal(
        gather_rows(x[:, 1:], indices.clamp(max=5)), gather_rows(x[:, 1:].contiguous(), indices.clamp(max=5))
    )


@pytest.mark.parametrize("p", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("per_example", [False, True])
def test_prefix_dropout_is_attention_over_the_kept_prefix(p, per_example):
    """Same result as masking the dropped keys, with the kept keys' own positions and masks."""
    latents, prefix = data(latents=4, prefix=16)
    layer = CrossAttention(DIM, 3, prefix_dropout=p).double().train()
    positions = torch.stack((torch.arange(20), torch.arange(100, 120))) if per_example else torch.arange(20)
    key_mask = torch.rand(2, 20) < 0.8
    key_mask[:, 16] = True
    torch.manual_seed(5)
    got = layer(latents, prefix, key_mask=key_mask, positions=positions)
    torch.manual_seed(5)
    kept = kept_indices(2, 16, p, DEVICE)
    visible = torch.ones(2, 20, dtype=torch.bool)
    visible[:, :16] = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    want = layer.eval()(latents, prefix, key_mask=key_mask & visible, positions=positions)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not torch.equal(want, layer(latents, prefix, key_mask=key_mask, positions=positions))


def test_prefix_dropout_gathers_before_norm_and_projection():
    latents, prefix = data(latents=4, prefix=100, dtype=torch.float32)
    layer = CrossAttention(DIM, 3, prefix_dropout=0.8)
    rows = {}
    for name in ("kv_norm", "k_proj", "v_proj"):
        module = getattr(layer, name)
        module.register_forward_pre_hook(
            lambda module, args, name=name: rows.update({name: args[0].shape[1]})
        )
    layer.train()(latents, prefix)
    assert rows == {"kv_norm": 24, "k_proj": 24, "v_proj": 24}
    layer.eval()(latents, prefix)
    assert rows == {"kv_norm": 104, "k_proj": 104, "v_proj": 104}


def test_prefix_dropout_gives_the_dropped_no_gradient():
    latents, prefix = data(latents=2, prefix=10, dtype=torch.float32)
    prefix.requires_grad_()
    CrossAttention(DIM, 3, prefix_dropout=0.5).train()(latents, prefix).sum().backward()
    assert ((prefix.grad != 0).any(-1).sum(1) == 5).all()


def test_attention_dropout_in_training_only():
    latents, prefix = data(dtype=torch.float32)
    layer = CrossAttention(DIM, 3, dropout=0.5)
    assert not torch.equal(layer(latents, prefix), layer(latents, prefix))
    layer.eval()
    assert torch.equal(layer(latents, prefix), layer(latents, prefix))


# Cache


@pytest.mark.parametrize("steps", [[13], [1] * 13, [5, 1, 7], [12, 1]])
def test_cached_attention_is_attention_over_everything(steps):
    torch.manual_seed(0)
    x = torch.randn(2, 13, DIM, dtype=torch.float64)
    layer = CrossAttention(DIM, 4, 2).double().eval()
    cos, sin = layer.rotary(torch.arange(13), torch.float64)
    key_mask = torch.rand(2, 13) < 0.7
    key_mask[:, 0] = True
    want = layer(x, key_mask=key_mask)
    cache, end, got = KVCache(13), 0, []
    with torch.no_grad():
        for step in steps:
            new, end = x[:, end : end + step], end + step
            got.append(
                layer.attend(new, new, rotary=(cos[:end], sin[:end]), key_mask=key_mask[:, :end], cache=cache)
            )
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-10, atol=1e-10)
        # More latents than new inputs: the window refills over what is cached.
        cache.length = 12
        again = layer.attend(x[:, 6:], x[:, 12:], rotary=(cos, sin), key_mask=key_mask, cache=cache)
    torch.testing.assert_close(again, want[:, 6:], rtol=1e-10, atol=1e-10)


def test_cache_refuses_more_than_it_holds():
    cache = KVCache(3)
    key = torch.zeros(1, 1, 2, 4)
    cache.append(key, key)
    with pytest.raises(ValueError, match="the cache holds 3 positions, which is less than 4"):
        cache.append(key, key)


# Everything else


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(training):
    latents, prefix = data(dtype=torch.float32)
    layer = CrossAttention(DIM, 4, 2, prefix_dropout=0.5 if training else 0.0).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (layer, compiled):
        torch.manual_seed(3)
        out = run(latents, prefix)
        layer.zero_grad()
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(grads[0], grads[1])


def test_feed_forward():
    torch.manual_seed(0)
    layer = FeedForward(6, mult=2.5).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    up, down = layer[1].weight, layer[4].weight
    assert up.shape == (15, 6)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), nn.functional.gelu(normed @ up.T) @ down.T)

    layer = FeedForward(6, mult=2.5, activation="squared_relu").double()
    up, down = layer[1].weight, layer[4].weight
    torch.testing.assert_close(layer(x), (normed @ up.T).clamp(min=0) ** 2 @ down.T)

    layer = FeedForward(6, mult=2.5, activation="geglu").double()
    up, gate, down = layer[1].weight[:15], layer[1].weight[15:], layer[4].weight
    torch.testing.assert_close(layer(x), (normed @ up.T * nn.functional.gelu(normed @ gate.T)) @ down.T)

    with pytest.raises(ValueError, match="activation must be one of gelu, squared_relu, geglu, got 'swiglu'"):
        FeedForward(6, activation="swiglu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "dim 24 is not a multiple of num_heads 5: give head_dim"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads is 3, which does not divide num_heads 4"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 2, "num_kv_heads": -1}, "num_kv_heads must be at least 1, got -1"),
        ({"num_heads": 2, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_heads": 2, "value_dim": 0}, "value_dim must be at least 1, got 0"),
        ({"num_heads": 2, "rotary_fraction": 1.5}, r"rotary_fraction must be in \[0, 1\], got 1.5"),
        ({"num_heads": 2, "rotary_heads": -0.1}, r"rotary_heads must be in \[0, 1\], got -0.1"),
        (
            {"num_heads": 2, "rotary_layout": "neox"},
            "rotary_layout must be one of half, interleaved, got 'neox'",
        ),
        ({"num_heads": 2, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_heads": 2, "prefix_dropout": -0.1}, r"prefix_dropout must be in \[0, 1\), got -0.1"),
        ({"num_heads": 2.0}, "num_heads must be an int, got float"),
        ({"num_heads": 2, "chunk_size": "4"}, "chunk_size must be an int, got str"),
        ({"num_heads": 2, "chunk_size": None}, "chunk_size must be an int, got NoneType"),
        ({"num_heads": 2, "chunk_size": 4.0}, "chunk_size must be an int, got float"),
        ({"num_heads": 2, "streamed": "no"}, "streamed must be a bool, got str"),
        ({"num_heads": 2, "bias": 1}, "bias must be a bool, got int"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(
        TypeError if "an int" in message or "a bool" in message else ValueError, match=message
    ):
        CrossAttention(DIM, **options)


def test_sizes_from_numpy():
    layer = CrossAttention(np.int64(DIM), np.int32(4))
    assert (type(layer.dim), type(layer.num_heads), type(layer.head_dim)) == (int, int, int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x, p: f(x[0], p), r"latents must be \(B, M, 24\), got \(4, 24\)"),
        (lambda f, x, p: f(x[..., :5], p), r"latents must be \(B, M, 24\), got \(2, 4, 5\)"),
        (lambda f, x, p: f(x, p[:1]), r"prefix must be \(2, N - M, 24\), got \(1, 9, 24\)"),
        (lambda f, x, p: f(x, p[..., :3]), r"prefix must be \(2, N - M, 24\), got \(2, 9, 3\)"),
        (lambda f, x, p: f(x, p, key_mask=torch.ones(2, 9, dtype=torch.bool)), r"key_mask must be \(2, 13\)"),
        (
            lambda f, x, p: f(x, p, positions=torch.arange(9)),
            r"rotary positions must be \(13,\) or \(2, 13\)",
        ),
        (
            lambda f, x, p: f(x, p, positions=torch.arange(13), rotary=rotary_cos_sin(torch.arange(13), 4)),
            "give either positions or rotary, not both",
        ),
        (
            lambda f, x, p: f(x, p, rotary=rotary_cos_sin(torch.arange(13), 10)),
            "more than the head dim 8 holds",
        ),
        (lambda f, x, p: SelfAttention(DIM, 3)(x, p), "SelfAttention takes no prefix"),
        (lambda f, x, p: SelfAttention(DIM, 3)(x, group="ranks"), "SelfAttention takes no group"),
        (lambda f, x, p: f(x, p.to("meta")), f"prefix is on meta, but latents is on {DEVICE}"),
        (
            lambda f, x, p: f(x, p, positions=torch.arange(13, device="meta")),
            f"positions is on meta, but latents is on {DEVICE}",
        ),
        (
            lambda f, x, p: f(x, p, rotary=(torch.ones(13, 2), torch.ones(13, 3))),
            r"cos and sin must have one shape, got \(13, 2\) and \(13, 3\)",
        ),
    ],
)
def test_bad_calls(call, message):
    latents, prefix = data(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        call(CrossAttention(DIM, 3), latents, prefix)


@pytest.mark.parametrize("given", [[1.0], np.zeros(3), "text"])
@pytest.mark.parametrize("name", ["latents", "key_mask", "positions"])
def test_what_is_no_tensor(name, given):
    latents, prefix = data(dtype=torch.float32)
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got {type(given).__name__}$"):
        CrossAttention(DIM, 3)(**{"latents": latents, "prefix": prefix, name: given})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"latents": None}, "latents must be a torch.Tensor, got NoneType"),
        ({"latents": torch.zeros(2, 4, DIM).long()}, "latents must have one of the dtypes float32"),
        ({"prefix": torch.zeros(2, 9, DIM).double()}, "prefix is float64, but latents is float32"),
        ({"key_mask": torch.ones(2, 13)}, "key_mask must be bool, got float32"),
        ({"rotary": torch.ones(2, 13, 2)}, "rotary must be cos and sin, a pair of tensors, got Tensor"),
        ({"rotary": (torch.ones(13, 2), None)}, "sin must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_types(call, message):
    latents, prefix = data(dtype=torch.float32)
    with pytest.raises(TypeError, match=message):
        CrossAttention(DIM, 3)(**{"latents": latents, "prefix": prefix} | call)
