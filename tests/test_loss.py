"""The training objective against its formulas, and where random crops may end."""

import dataclasses

import pytest
import torch
from conftest import seeded
from torch.nn import functional as F

from perceiver_kernels.models import PerceiverAR, PerceiverARConfig
from perceiver_kernels.models.loss import next_token_loss, random_crop

CONFIG = PerceiverARConfig(vocab_size=11, dim=16, depth=1, num_heads=2, max_seq_len=24, num_latents=6)


def build(**changes):
    torch.manual_seed(0)
    return PerceiverAR(dataclasses.replace(CONFIG, **changes)).double()


def draw(*shape):
    return torch.randint(0, 11, shape, generator=seeded(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_formula(smoothing, z_loss):
    logits = torch.randn(2, 5, 11, generator=seeded(2), dtype=torch.float64)
    targets, counted = draw(2, 5), torch.rand(2, 5, generator=seeded(3)) < 0.6
    log_z = logits.exp().sum(-1).log()
    log_p = logits - log_z.unsqueeze(-1)
    wanted = torch.full((2, 5, 11), smoothing / 11, dtype=torch.float64)
    wanted.scatter_add_(2, targets.unsqueeze(-1), torch.full((2, 5, 1), 1 - smoothing, dtype=torch.float64))
    losses = -(wanted * log_p).sum(-1) + z_loss * log_z**2
    options = {"label_smoothing": smoothing, "z_loss": z_loss}
    torch.testing.assert_close(next_token_loss(logits, targets, **options), losses.mean())
    got = next_token_loss(logits, targets.int(), counted, **options)
    torch.testing.assert_close(got, losses[counted].mean())
    assert next_token_loss(logits, targets, counted & False, **options) == 0


def test_half_precision_is_summed_in_float32():
    logits = torch.randn(2, 500, 11, generator=seeded(2)).bfloat16()
    assert next_token_loss(logits, draw(2, 500)).dtype == torch.float32


def test_targets_are_the_tokens_one_further():
    model, tokens = build(label_smoothing=0.1, z_loss=0.01), draw(2, 25)
    logits = model(tokens[:, :-1])
    want = next_token_loss(logits, tokens[:, 19:], label_smoothing=0.1, z_loss=0.01)
    torch.testing.assert_close(model.loss(tokens), want)
    model.eval()
    want = F.cross_entropy(model(tokens[:, :-1], num_latents=3).flatten(0, 1), tokens[:, 22:].flatten())
    torch.testing.assert_close(model.loss(tokens, num_latents=3), want)


def test_padding_on_either_side_leaves_the_loss_of_the_unpadded():
    model, tokens = build().eval(), draw(2, 25)
    pad_mask = torch.zeros(2, 25, dtype=torch.bool)
    pad_mask[0, :21], pad_mask[1, 23:] = True, True
    losses = [model.loss(tokens[:1, 21:]) * 3, model.loss(tokens[1:, :23], num_latents=4) * 4]
    torch.testing.assert_close(model.loss(tokens, pad_mask=pad_mask), sum(losses) / 7)
    other = torch.where(pad_mask, (tokens + 1) % 11, tokens)
    assert torch.equal(model.loss(other, pad_mask=pad_mask), model.loss(tokens, pad_mask=pad_mask))


@pytest.mark.parametrize("padded", [False, True])
def test_a_crop_is_a_shorter_sequence(padded):
    """Each example's loss in a batch of crops is that of its crop alone."""
    model, tokens = build(random_crop=True), draw(3, 25)
    pad_mask = None
    if padded:
        pad_mask = torch.arange(25).expand(3, -1) < torch.tensor([[0], [8], [0]])
    torch.manual_seed(4)
    cut = torch.randint(19, (3,), device="cpu").tolist()
    assert len(set(cut)) == 3
    torch.manual_seed(4)
    got = model.loss(tokens, pad_mask=pad_mask)
    model.eval()
    losses, counts = [], []
    for b, row in enumerate(tokens):
        begin = 8 if padded and b == 1 else 0
        crop = row[None, begin : 25 - cut[b]]
        counts.append(min(6, crop.shape[1] - 1))
        losses.append(model.loss(crop) * counts[-1])
    torch.testing.assert_close(got, sum(losses) / sum(counts))


def test_crops_end_everywhere_and_keep_what_they_must():
    tokens = torch.arange(10).expand(200, -1)
    torch.manual_seed(0)
    cropped, padded = random_crop(tokens, None, 4)
    assert cropped.shape == (200, 10)
    assert set(cropped[:, -1].tolist()) == set(range(3, 10))
    assert (padded.sum(1) == 9 - cropped[:, -1]).all()
    one, no_padding = random_crop(tokens[:1], None, 4)
    assert no_padding is None
    assert torch.equal(one, tokens[:1, : one.shape[1]])
    whole, no_padding = random_crop(tokens, None, 12)
    assert torch.equal(whole, tokens)
    assert no_padding is None


def test_refuses_what_holds_no_target():
    with pytest.raises(
        ValueError, match=r"tokens must have from 2 to max_seq_len \+ 1 = 25 positions.*got 1"
    ):
        build().loss(draw(2, 1))
    with pytest.raises(ValueError, match=r"inputs and the last target, got 26"):
        build().loss(draw(2, 26))
