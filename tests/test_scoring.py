"""Strided scores are those of each window by itself, whatever is cached, padded or longer than the model."""

import pytest
import torch
from conftest import seeded

from perceiver_kernels.models import PerceiverAR, PerceiverARConfig

VOCAB = 13
MODELS = [
    {},
    {"positions": "learned", "cross_after": (0,), "latents_per_position": 2, "streamed": True},
]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "dim": 32, "depth": 2, "num_heads": 4, "max_seq_len": 40, "num_latents": 8}
    return PerceiverAR(PerceiverARConfig(**sizes, ff_mult=2, dropout=0.1, **request.param)).double().eval()


def draw(*shape):
    return torch.randint(0, VOCAB, shape, generator=seeded(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def window_by_window(model, tokens, window, stride):
    """Token by token: the first window that ends behind its input, from a model that sees just that."""
    length = tokens.shape[1] - 1
    window = min(window, length)
    scores = []
    for place in range(length):
        end = window + stride * max(0, -(-(place + 1 - window) // stride))
        end = min(end, length)
        seen = tokens[:, max(0, end - model.config.max_seq_len) : end]
        logits = model(seen, num_latents=window)[:, window - (end - place)]
        scores.append(logits.log_softmax(-1).gather(-1, tokens[:, place + 1 : place + 2]))
    return torch.cat(scores, dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 1), (8, 8), (5, 3), (1, 1), (40, 7)])
@pytest.mark.parametrize("length", [2, 6, 9, 30, 41, 67])
@torch.no_grad()
def test_scores_are_those_of_each_window(model, window, stride, length, use_cache):
    tokens = draw(2, length)
    got = model.score(tokens, stride, num_latents=window, use_cache=use_cache)
    assert got.shape == (2, length - 1)
    close(got, window_by_window(model, tokens, window, stride))


@torch.no_grad()
def test_one_window_is_the_likelihood(model):
    """All inputs latent: the chain rule over all tokens, and what `loss` averages."""
    tokens = draw(3, 30)
    close(model.score(tokens, num_latents=29).mean(), -model.loss(tokens, num_latents=29))


@torch.no_grad()
def test_padding_is_scored_zero_and_moves_nothing(model):
    tokens, pad_mask = draw(2, 30), torch.zeros(2, 30, dtype=torch.bool)
    pad_mask[0, :12], pad_mask[1, 25:] = True, True
    got = model.score(tokens, 4, pad_mask=pad_mask)
    assert ((got == 0) == (pad_mask[:, 1:] | pad_mask[:, :-1])).all()
    assert torch.equal(model.score(torch.where(pad_mask, 3, tokens), 4, pad_mask=pad_mask), got)
    close(got, model.score(tokens, 4, pad_mask=pad_mask, use_cache=False))
    close(got[1, :7], model.score(tokens[1:, :8], 4)[0])


@torch.no_grad()
def test_no_key_is_computed_twice(model):
    rows = []
    hook = model.cross.attention.k_proj.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[1])
    )
    model.score(draw(1, 31), 4)
    hook.remove()
    assert rows == [8, 4, 4, 4, 4, 4, 2]


def test_mode_dtype_and_progress(model, capsys):
    tokens = draw(1, 20).int()
    try:
        model.train()
        got = model.score(tokens, 4, progress=True)
        assert model.training
    finally:
        model.eval()
    assert "Scoring" in capsys.readouterr().out
    assert torch.equal(got, model.score(tokens.long(), 4))
    assert got.dtype == torch.float64
    half = PerceiverAR(model.config).bfloat16().score(tokens)
    assert half.dtype == torch.float32
    assert not half.requires_grad


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (draw(2, 1), {}, "tokens must have at least 2 positions, got 1"),
        (draw(4), {}, r"tokens must be \(B, N\), got \(4,\)"),
        (draw(1, 9), {"stride": 9}, "stride must be from 1 to num_latents 8, got 9"),
        (draw(1, 9), {"num_latents": 41}, "num_latents must be from 1 to max_seq_len 40, got 41"),
    ],
)
def test_bad_calls(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        model.score(tokens, **options)
