"""Cached generation is recomputation; the window rule; sampling."""

import pytest
import torch
from conftest import seeded

from perceiver_kernels.data import Images
from perceiver_kernels.generation import (
    CachedDecoder,
    RecomputingDecoder,
    pad_left,
    sample,
    window_start,
)
from perceiver_kernels.models import PerceiverAR, PerceiverARConfig

VOCAB = 19


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny steps: waiting for a second thread would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MODELS = [
    {},
    {"positions": "learned", "position_shape": (4, 5, 3), "cross_after": (0,)},
    {"positions": "fourier", "latents_per_position": 2, "cross_after": (1,), "rotary_heads": 0.5},
]


def build(**changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCAB,
        "dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 60,
        "num_latents": 8,
        "ff_mult": 2,
        "prefix_dropout": 0.5,
        "dropout": 0.1,
    }
    return PerceiverAR(PerceiverARConfig(**options | changes)).double().eval()


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    return build(**request.param)


def draw(*shape):
    return torch.randint(0, VOCAB, shape, generator=seeded(1))


@pytest.mark.parametrize(("num_latents", "stride"), [(8, 4), (8, 1), (8, 8), (5, 3), (1, 1), (7, 2)])
def test_window_rule(num_latents, stride):
    starts = [window_start(n, num_latents, stride) for n in range(1, 60)]
    windows = [n - start for n, start in zip(range(1, 60), starts, strict=True)]
    assert windows[:num_latents] == list(range(1, num_latents + 1))
    assert max(windows) == num_latents
    assert min(windows[num_latents:]) == num_latents - stride + 1
    assert all(start % stride == 0 for start in starts)
    assert set(torch.tensor(starts).diff().tolist()) <= {0, stride}


@pytest.mark.parametrize(("num_latents", "stride"), [(8, 4), (8, 1), (8, 8), (5, 3), (1, 1), (30, 12)])
@pytest.mark.parametrize("first", [1, 20])
@torch.no_grad()
def test_cached_logits_are_recomputed_logits_at_every_step(model, num_latents, stride, first):
    """Ragged prompts: no padding, half a prompt of it, and all but one token."""
    tokens = draw(3, 36)
    pad_mask = torch.zeros(3, 36, dtype=torch.bool)
    pad_mask[1, : first // 2] = True
    pad_mask[2, : first - 1] = True
    cached = CachedDecoder(model, 36, num_latents, stride)
    recomputed = RecomputingDecoder(model, num_latents, stride)
    for n in range(first, 37):
        got, want = (decode(tokens[:, :n], pad_mask[:, :n]) for decode in (cached, recomputed))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_float32_logits_are_within_budget(model):
    tokens = draw(2, 50)
    single = PerceiverAR(model.config).eval()
    single.load_state_dict(model.state_dict())
    cached, recomputed = CachedDecoder(single, 50, 8, 4), RecomputingDecoder(single, 8, 4)
    double = RecomputingDecoder(model, 8, 4)
    errors = torch.zeros(2)
    for n in range(10, 51):
        want = double(tokens[:, :n])
        for i, decode in enumerate((cached, recomputed)):
            errors[i] += (decode(tokens[:, :n]) - want).norm() / want.norm()
    assert errors[0] <= 1.5 * errors[1] + 1e-6


@torch.no_grad()
def test_chunks_of_any_size_may_be_added(model):
    tokens = draw(2, 50)
    cached, recomputed = CachedDecoder(model, 50, 8, 4), RecomputingDecoder(model, 8, 4)
    for n in (3, 9, 10, 26, 50):
        torch.testing.assert_close(cached(tokens[:, :n]), recomputed(tokens[:, :n]), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_cache_does_the_work_once(model):
    """One row a step through the key projection, and one latent except where the window moves."""
    embedded, rows, latents = [], [], []
    hooks = [
        model.token_embedding.register_forward_pre_hook(lambda m, args: embedded.append(args[0].shape[1])),
        model.cross.attention.k_proj.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1])),
        model.cross.attention.q_proj.register_forward_pre_hook(
            lambda m, args: latents.append(args[0].shape[1])
        ),
    ]
    model.generate(draw(1, 20), 9, num_latents=8, stride=4)
    for hook in hooks:
        hook.remove()
    assert rows == [20] + [1] * 8
    each = model.config.latents_per_position
    assert latents == [each * n for n in (8, 5, 1, 1, 1, 5, 1, 1, 1)]
    assert embedded == [20, 5, 1, 1, 1, 5, 1, 1, 1]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_generate_with_and_without_the_cache(model, length, ragged):
    prompt = draw(3, length)
    pad_mask = (torch.arange(length) < torch.tensor([[0], [length // 2], [length - 1]])) if ragged else None
    options = {"pad_mask": pad_mask, "top_k": 5}
    a, b = (
        model.generate(prompt, 30, use_cache=cache, generator=seeded(7), **options) for cache in (True, False)
    )
    assert a.shape == (3, length + 30)
    assert a.dtype == prompt.dtype
    assert torch.equal(a, b)
    assert torch.equal(a[:, :length], prompt)


def test_in_one_go_or_in_two(model):
    prompt = draw(2, 4)
    whole = model.generate(prompt, 30, temperature=0.0)
    half = model.generate(prompt, 13, temperature=0.0)
    assert torch.equal(model.generate(half, 17, temperature=0.0), whole)


def test_left_padding_generates_what_no_padding_does_while_the_window_grows(model):
    prompt = draw(1, 6)
    padded = torch.cat((draw(1, 3), prompt), 1)
    pad_mask = torch.arange(9)[None] < 3
    a = model.generate(prompt, 20, num_latents=40, temperature=0.0)
    b = model.generate(padded, 20, num_latents=40, temperature=0.0, pad_mask=pad_mask)
    assert torch.equal(a, b[:, 3:])


def test_leaves_the_mode_alone_and_generates_in_eval_mode(model):
    prompt = draw(2, 30)
    try:
        model.train()
        a = model.generate(prompt, 5, temperature=0.0)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(a, model.generate(prompt, 5, temperature=0.0))
    assert not model.training
    assert not a.requires_grad


def test_eos_fills_the_rest(model):
    prompt = draw(3, 5)
    free = model.generate(prompt, 20, temperature=0.0)
    eos = int(free[0, 8])
    got = model.generate(prompt, 20, temperature=0.0, eos=eos)
    assert got.shape == free.shape
    for row, unstopped in zip(got[:, 5:], free[:, 5:], strict=True):
        hits = (unstopped == eos).nonzero()
        end = int(hits[0]) if len(hits) else 20
        assert torch.equal(row[:end], unstopped[:end])
        assert (row[end:] == eos).all()


def test_eos_stops_early(model):
    prompt = draw(1, 5)
    eos = int(model.generate(prompt, 1, temperature=0.0)[0, -1])
    calls = []
    hook = model.norm.register_forward_hook(lambda *args: calls.append(1))
    got = model.generate(prompt, 20, temperature=0.0, eos=eos)
    hook.remove()
    assert len(calls) == 1
    assert (got[:, 5:] == eos).all()


def test_no_new_tokens(model):
    assert torch.equal(model.generate(draw(2, 3), 0), draw(2, 3))


def test_int32_prompt_and_progress(model, capsys):
    prompt = draw(1, 3).int()
    got = model.generate(prompt, 4, progress=True, temperature=0.0)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), model.generate(prompt.long(), 4, temperature=0.0))
    assert "Generating" in capsys.readouterr().out


def test_prompts_of_any_lengths_in_one_batch(model):
    """While the window holds all of each prompt, every one goes on as it would alone."""
    prompts = [draw(9), (draw(1) + 3) % VOCAB, (draw(4) + 1) % VOCAB]
    tokens, pad_mask = pad_left(prompts, token=7)
    assert tokens.shape == pad_mask.shape == (3, 9)
    got = model.generate(tokens, 12, pad_mask=pad_mask, temperature=0.0, num_latents=30)
    for prompt, row in zip(prompts, got, strict=True):
        want = model.generate(prompt[None], 12, temperature=0.0, num_latents=30)
        assert torch.equal(row[9 - len(prompt) :], want[0])
    with pytest.raises(
        ValueError, match=r"prompts must be \(n,\) each with n at least 1, got \[\(3,\), \(0,\)\]"
    ):
        pad_left([draw(3), draw(0)])


def test_what_is_allowed_decides_what_is_drawn():
    """An untrained model writes the rest of a picture that decodes: each place its own channel's values."""
    images = Images(3, 4, 3, levels=6)
    model = build(vocab_size=images.vocab_size, max_seq_len=images.longest, position_shape=images.shape)
    allowed = images.allowed(images.longest)
    prompt = images.encode(torch.randint(6, images.shape, dtype=torch.uint8))[:5].expand(2, 5)
    rest = images.longest - 5
    got = model.generate(prompt, rest, allowed=lambda tokens: allowed[tokens.shape[1]])
    assert [images.decode(row).shape for row in got] == [(3, 4, 3)] * 2
    with pytest.raises(ValueError, match=r"token .* may not stand at place"):
        images.decode(model.generate(prompt, rest)[0])

    def first_is_seven(tokens):
        mask = torch.ones(2, images.vocab_size, dtype=torch.bool)
        mask[0] = torch.arange(images.vocab_size) == 7
        return mask

    got = model.generate(prompt, 4, temperature=0.0, allowed=first_is_seven)
    assert got[0, 5:].tolist() == [7] * 4
    assert torch.equal(got[1], model.generate(prompt, 4, temperature=0.0)[1])
    for wrong, message in (
        (torch.zeros(18, dtype=torch.bool), "allowed must leave every example a token"),
        (
            torch.ones(17, dtype=torch.bool),
            r"allowed must give bool \(18,\) or \(2, 18\), got torch.bool \(17,\)",
        ),
        (torch.ones(18), r"got torch.float32 \(18,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, 1, allowed=lambda tokens, wrong=wrong: wrong)


def test_positions_that_move_with_every_token_can_not_be_cached():
    model = build(position_origin="last")
    with pytest.raises(ValueError, match="no key can be cached: use_cache=False"):
        model.generate(draw(1, 5), 3)
    assert model.generate(draw(1, 5), 3, use_cache=False).shape == (1, 8)


# Sampling


def frequencies(draws=4000, **options):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(draws, 4)
    return sample(logits, generator=seeded(0), **options).bincount(minlength=4) / draws


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_sampling(options, want):
    got = frequencies(**options)
    assert torch.equal(got == 0, torch.tensor(want) == 0)
    assert (got - torch.tensor(want)).abs().max() < 0.03


def test_top_p_is_per_row_and_order_does_not_matter():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log().repeat(500, 1)
    drawn = sample(logits, top_p=0.65).view(500, 2)
    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert set(drawn[:, 1].tolist()) == {0}


@pytest.mark.parametrize(
    ("prompt", "new", "options", "error", "message"),
    [
        (draw(1, 0), 2, {}, ValueError, r"prompt must be \(B, n\) with n at least 1, got \(1, 0\)"),
        (draw(3), 2, {}, ValueError, r"prompt must be \(B, n\) with n at least 1, got \(3,\)"),
        (draw(1, 3).float(), 2, {}, TypeError, "prompt must be int64 or int32, got torch.float32"),
        (
            draw(1, 50),
            11,
            {},
            ValueError,
            "prompt of 50 and max_new_tokens 11 exceed the model's max_seq_len 60",
        ),
        (draw(1, 5), -1, {}, ValueError, "max_new_tokens must not be negative, got -1"),
        (draw(1, 5), 1, {"temperature": -1.0}, ValueError, "temperature must not be negative, got -1.0"),
        (
            draw(1, 5),
            1,
            {"temperature": float("nan")},
            ValueError,
            "temperature must not be negative, got nan",
        ),
        (draw(1, 5), 1, {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        (draw(1, 5), 1, {"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (
            draw(1, 5),
            1,
            {"num_latents": 0},
            ValueError,
            "num_latents must be from 1 to max_seq_len 60, got 0",
        ),
        (
            draw(1, 5),
            1,
            {"num_latents": 4, "stride": 5},
            ValueError,
            "stride must be from 1 to num_latents 4, got 5",
        ),
        (
            draw(1, 3),
            1,
            {"pad_mask": torch.tensor([[False, False, True]])},
            ValueError,
            "padded on the left only",
        ),
        (
            draw(1, 3),
            1,
            {"pad_mask": torch.tensor([[False, True, False]])},
            ValueError,
            "padded on the left only",
        ),
        (draw(1, 3), 1, {"pad_mask": torch.tensor([[True, True, True]])}, ValueError, "at least one token"),
        (draw(1, 3), 1, {"pad_mask": torch.zeros(1, 3)}, ValueError, r"pad_mask must be bool \(1, 3\)"),
    ],
)
def test_bad_calls(model, prompt, new, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompt, new, **options)
