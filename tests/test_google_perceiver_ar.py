"""Google's parameter tree, as its code lays it out, against the architecture written out in numpy."""

import numpy as np
import pytest
import torch

from perceiver_kernels.integrations.google_perceiver_ar import GooglePerceiverAR, from_haiku

VOCABULARY, DIM, DEPTH, LENGTH, LATENTS = 19, 24, 2, 30, 11
CROSS_HEADS, HEADS, WAVELENGTH = 1, 3, 40
OPTIONS = {
    "num_cross_attend_heads": CROSS_HEADS,
    "num_transformer_heads": HEADS,
    "max_wavelength": WAVELENGTH,
}


def tree(absolute=False, cross_widening=1, widening=2):
    draw = np.random.default_rng(0)

    def linear(n, m):
        return {"w": draw.normal(size=(n, m)) / n**0.5, "b": draw.normal(size=m) / 3}

    def norm():
        return {"scale": 1 + draw.normal(size=DIM) / 3, "offset": draw.normal(size=DIM) / 3}

    params = {
        "perceiver_ar/~/embed": {"embeddings": draw.normal(size=(VOCABULARY, DIM))},
        "perceiver_ar/~/linear": linear(DIM, DIM),
        "perceiver_ar/layer_norm": norm(),
        "perceiver_ar/~/logits": linear(DIM, VOCABULARY),
    }
    if absolute:
        params["perceiver_ar/~/embed_1"] = {"embeddings": draw.normal(size=(50, DIM))}
    for name, norms, factor in (
        ("cross_attention", 3, cross_widening),
        ("self_attention", 2, widening),
        ("self_attention_1", 2, widening),
    ):
        for i in range(norms):
            params[f"perceiver_ar/~/{name}/layer_norm" + (f"_{i}" if i else "")] = norm()
        for i in range(4):
            params[f"perceiver_ar/~/{name}/attention/linear" + (f"_{i}" if i else "")] = linear(DIM, DIM)
        params[f"perceiver_ar/~/{name}/dense/linear"] = linear(DIM, factor * DIM)
        params[f"perceiver_ar/~/{name}/dense/linear_1"] = linear(factor * DIM, DIM)
    return {path: {n: x.astype(np.float32) for n, x in leaves.items()} for path, leaves in params.items()}


def turn(x, positions, fraction):
    """Pairs of neighbours as complex numbers; log-spaced wavelengths from 1 to the longest, ends included."""
    pairs = int(x.shape[-1] * fraction / 2)
    frequencies = WAVELENGTH ** -np.linspace(0, 1, pairs) if pairs else np.zeros(0)
    z = x[..., : 2 * pairs : 2] + 1j * x[..., 1 : 2 * pairs : 2]
    z = z * np.exp(1j * positions[:, None] * frequencies)
    turned = np.stack((z.real, z.imag), -1).reshape(*z.shape[:-1], 2 * pairs)
    return np.concatenate((turned, x[..., 2 * pairs :]), -1)


def plain(
    params,
    tokens,
    latents,
    fraction=0.25,
    turned_heads=1.0,
    sign=1,
    activation=lambda x: np.maximum(x, 0) ** 2,
):
    """One example (N,) without padding to (M, vocabulary), in float64."""

    def apply(path, x):
        leaves = {n: leaf.astype(np.float64) for n, leaf in params[f"perceiver_ar/{path}"].items()}
        if "w" in leaves:
            return x @ leaves["w"] + leaves["b"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * leaves["scale"] + leaves["offset"]

    def layer(path, z, inputs, heads):
        cross = inputs is not None
        queries = apply(f"{path}/layer_norm", z)
        keys = apply(f"{path}/layer_norm_1", inputs) if cross else queries
        q, k, v = (
            apply(f"{path}/attention/linear{suffix}", x).reshape(len(x), heads, -1).swapaxes(0, 1)
            for suffix, x in (("", queries), ("_1", keys), ("_2", keys))
        )
        at_q, at_k = (sign * np.arange(x.shape[1] - 1, -1, -1.0) for x in (q, k))
        turning = int(turned_heads * heads)
        q, k = (
            np.concatenate((turn(x[:turning], at, fraction), x[turning:])) for x, at in ((q, at_q), (k, at_k))
        )
        scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
        scores = np.where(at_k * sign >= (at_q * sign)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(z), -1)
        z = z + apply(f"{path}/attention/linear_3", out)
        hidden = activation(apply(f"{path}/dense/linear", apply(f"{path}/layer_norm_{1 + cross}", z)))
        return z + apply(f"{path}/dense/linear_1", hidden)

    x = params["perceiver_ar/~/embed"]["embeddings"].astype(np.float64)[tokens]
    if "perceiver_ar/~/embed_1" in params:
        x = x + params["perceiver_ar/~/embed_1"]["embeddings"][np.arange(len(x) - 1, -1, -1)]
    z = layer("~/cross_attention", apply("~/linear", x[-latents:]), x, CROSS_HEADS)
    for name in ("self_attention", "self_attention_1"):
        z = layer(f"~/{name}", z, None, HEADS)
    return apply("~/logits", apply("layer_norm", z))


def gelu(x):
    """The approximation that jax takes unless told otherwise."""
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def tokens(batch=2):
    return np.random.default_rng(1).integers(1, VOCABULARY, size=(batch, LENGTH))


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"fraction_to_rotate": 1.0}, {"fraction": 1.0}),
        ({"fraction_heads_to_rotate": 0.7}, {"turned_heads": 0.7}),
        ({"use_negative_rotary_positions": True}, {"sign": -1}),
        ({"activation_name": "gelu"}, {"activation": gelu}),
    ],
    ids=["", "all_channels", "some_heads", "negative", "gelu"],
)
def test_logits(options, formula):
    params, x = tree(), tokens()
    got = from_haiku(params, **OPTIONS, **options).double()(torch.tensor(x), num_latents=LATENTS)
    want = np.stack([plain(params, row, LATENTS, **formula) for row in x])
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-10, atol=1e-10)


def test_absolute_positions_and_other_widenings():
    params, x = tree(absolute=True, cross_widening=3, widening=1), tokens()
    got = from_haiku(params, **OPTIONS).double()(torch.tensor(x), num_latents=LENGTH)
    want = np.stack([plain(params, row, LENGTH, fraction=0.0) for row in x])
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-10, atol=1e-10)


def test_left_padding_is_a_shorter_input():
    params, x = tree(), tokens()
    pad = torch.arange(LENGTH) < torch.tensor([[0], [12]])
    got = from_haiku(params, **OPTIONS).double()(torch.tensor(x), num_latents=LATENTS, pad_mask=pad)
    want = np.stack([plain(params, row, LATENTS) for row in (x[0],)] + [plain(params, x[1, 12:], LATENTS)])
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-10, atol=1e-10)


def test_trains_in_float32():
    model = from_haiku(tree(), **OPTIONS)
    assert next(model.parameters()).dtype == torch.float32
    model(torch.tensor(tokens()), num_latents=LATENTS).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_other_architectures_are_refused_by_name():
    params = tree()
    params["perceiver_ar/~/cross_attention_1/layer_norm"] = params["perceiver_ar/layer_norm"]
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['~/cross_attention_1/layer_norm'\]"):
        from_haiku(params, **OPTIONS)
    params = tree()
    del params["perceiver_ar/~/linear"]
    with pytest.raises(ValueError, match=r"missing \['~/linear'\], unexpected \[\]"):
        from_haiku(params, **OPTIONS)
    params = tree()
    params["perceiver_ar/~/linear"]["w"] = np.zeros((DIM, 2 * DIM))
    with pytest.raises(ValueError, match="latents have 48 channels and inputs 24"):
        from_haiku(params, **OPTIONS)
    params = tree()
    del params["perceiver_ar/~/self_attention/attention/linear_3"]["b"]
    with pytest.raises(
        ValueError, match=r"blocks.0.attention.out_proj.bias must have shape \(24,\), got None"
    ):
        from_haiku(params, **OPTIONS)
    with pytest.raises(ValueError, match="activation_name must be one of sq_relu"):
        GooglePerceiverAR(8, 8, 1, activation_name="swish")


def test_bad_inputs_are_refused():
    model = from_haiku(tree(), **OPTIONS)
    with pytest.raises(ValueError, match="num_latents must be from 1 to the input's 30 positions, got 31"):
        model(torch.tensor(tokens()), num_latents=31)
    right = torch.arange(LENGTH).expand(2, -1) > 20
    with pytest.raises(ValueError, match="pad on the left"):
        model(torch.tensor(tokens()), num_latents=4, pad_mask=right)
