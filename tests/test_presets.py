"""The paper's models: how many parameters they have, and that small ones of their kind work."""

import dataclasses

import pytest
import torch

from perceiver_kernels.data import Images, Notes
from perceiver_kernels.integrations.google_perceiver_ar import GooglePerceiverAR
from perceiver_kernels.models import PRESETS, PerceiverAR

PARAMETERS = {
    "copy": 88_643_584,
    "imagenet64": 768_477_184,
    "maestro": 164_429_824,
    "wikitext": 513_317_888,
    "pg19": 800_579_584,
    "books": 498_491_392,
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name):
    """As built, and as a sum: 12 dim^2 and the norms for each block, embeddings, positions, head."""
    config = PRESETS[name]
    got = count(on_meta(lambda: PerceiverAR(config)))
    assert got == PARAMETERS[name]
    blocks = (1 + config.depth) * (12 * 1024**2 + 4 * 1024) + 2 * 1024
    tables = config.vocab_size * (1 if config.tie_embeddings else 2)
    places = sum(config.index_shape) if config.positions == "learned" else 0
    assert got == blocks + 2 * 1024 + (tables + places) * 1024


def test_imagenet_is_the_size_that_the_paper_reports():
    """Google's layers, with their biases and their linear layer before the latents: 770.1M."""
    config = PRESETS["imagenet64"]
    model = on_meta(
        lambda: GooglePerceiverAR(
            config.vocab_size,
            config.dim,
            config.depth,
            cross_attend_widening_factor=4,
            transformer_widening_factor=4,
            absolute_positions=66 + 66 + 5,
        )
    )
    assert round(count(model) / 1e6, 1) == 770.1
    extra = (1 + config.depth) * (4 + 4 + 1) * 1024 + 1024 * 1025 + config.vocab_size
    assert count(model) - extra - (137 - sum(config.index_shape)) * 1024 == PARAMETERS["imagenet64"]


def test_sizes_fit_the_data():
    longest, vocabulary = Images(64, 64).longest, Notes().vocab_size
    assert PRESETS["imagenet64"].max_seq_len > longest
    assert PRESETS["maestro"].vocab_size == vocabulary
    assert (PRESETS["copy"].max_seq_len, PRESETS["copy"].num_latents) == (131_072, 1024)
    assert (PRESETS["maestro"].max_seq_len, PRESETS["maestro"].num_latents) == (4096, 2048)


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_one_trains_and_generates(name):
    torch.manual_seed(0)
    shape = (11, 2, 3) if PRESETS[name].position_shape else None
    config = dataclasses.replace(
        PRESETS[name],
        vocab_size=19,
        dim=32,
        num_heads=4,
        depth=1,
        max_seq_len=60,
        num_latents=8,
        position_shape=shape,
    )
    model = PerceiverAR(config)
    loss = model.loss(torch.randint(19, (2, 61)))
    loss.backward()
    assert abs(loss.item() - torch.tensor(19.0).log()) < 0.4
    prompt = torch.randint(19, (1, 20))
    outputs = [model.generate(prompt, 5, temperature=0.0, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*outputs)
