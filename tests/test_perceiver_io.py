"""The op inside the real ``perceiver-io`` and Hugging Face's Perceiver: same outputs and gradients."""

import copy
import sys
import types

import pytest
import torch
from conftest import seeded

pytest.importorskip("perceiver", reason="perceiver-io is a development dependency")
transformers = pytest.importorskip("transformers", reason="transformers is a development dependency")

if "fairscale" not in sys.modules:  # of which perceiver-io takes this one function, for checkpointing
    stub = types.ModuleType("fairscale.nn")
    stub.checkpoint_wrapper = lambda module, **options: module
    sys.modules |= {"fairscale": types.ModuleType("fairscale"), "fairscale.nn": stub}

from perceiver.model.core import modules  # noqa: E402
from perceiver.model.core.config import CausalSequenceModelConfig  # noqa: E402
from transformers.models.perceiver.modeling_perceiver import PerceiverSelfAttention  # noqa: E402

from perceiver_kernels.integrations import perceiver_io, transformers_perceiver  # noqa: E402

LENGTH, PREFIX = 40, 24


def perturbed(model):
    with torch.no_grad():  # fresh biases and norms are all alike: one in another's place would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def run(model, call):
    """The output of ``call`` and every gradient."""
    model.zero_grad()
    torch.manual_seed(1)
    out = call(model)
    (out * torch.randn(out.shape, generator=seeded(2)).to(out)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def check(model, call, swap):
    """float64: equal."""
    model = model.double()
    want = run(model, call)
    got = run(swap(copy.deepcopy(model)), call)
    assert want.keys() == got.keys()
    for name in want:
        if want[name].norm() > 1e-9:  # the gradient of a bias of all keys is 0 but for rounding
            assert error(got[name], want[name]) < 1e-11, name


def causal(**options):
    torch.manual_seed(0)
    config = CausalSequenceModelConfig(
        vocab_size=31, max_seq_len=LENGTH, max_latents=LENGTH - PREFIX, num_channels=48, num_heads=4,
        num_self_attention_layers=2, num_self_attention_rotary_layers=2, **options,
    )  # fmt: skip
    return perturbed(modules.CausalSequenceModel(config))


def tokens():
    return torch.randint(0, 31, (3, LENGTH), generator=seeded(3))


@pytest.mark.parametrize("padding", [None, (0, 5, 20), (0, 5, 30)], ids=["none", "prefix", "latents"])
@pytest.mark.parametrize("absolute", [True, False])
def test_perceiver_ar_of_perceiver_io(absolute, padding):
    """The last padding leaves latents that see no key: theirs take the mean of all values, and so do ours."""
    mask = None if padding is None else torch.arange(LENGTH) < torch.tensor(padding).unsqueeze(1)
    check(
        causal(abs_pos_emb=absolute),
        lambda model: model(tokens(), prefix_len=PREFIX, pad_mask=mask).logits,
        perceiver_io.swap,
    )


def test_prefix_dropout_of_perceiver_io_draws_the_same_positions():
    model = causal(cross_attention_dropout=0.5).train()
    check(model, lambda m: m(tokens(), prefix_len=PREFIX).logits, perceiver_io.swap)


def test_attention_dropout_of_perceiver_io_is_applied_in_training_only():
    model = perceiver_io.swap(causal(post_attention_dropout=0.3))
    assert torch.equal(*(model(tokens(), prefix_len=PREFIX).logits for _ in range(2)))
    model.train()
    assert not torch.equal(*(model(tokens(), prefix_len=PREFIX).logits for _ in range(2)))


@torch.no_grad()
def test_cached_steps_of_perceiver_io():
    model = causal().double()
    found = []
    for m in (model, perceiver_io.swap(copy.deepcopy(model))):
        first = m(tokens()[:, :-3], prefix_len=PREFIX, kv_cache=[])
        steps, cache = [first.logits], first.kv_cache
        for i in range(LENGTH - 3, LENGTH):
            out = m(tokens()[:, i : i + 1], prefix_len=PREFIX, kv_cache=cache)
            steps, cache = [*steps, out.logits], out.kv_cache
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_of_perceiver_io_from_one_latent_array(padded):
    torch.manual_seed(0)
    layer = perturbed(modules.CrossAttention(4, 48, 32, num_qk_channels=24, num_v_channels=40))
    latents, inputs = torch.randn(1, 7, 48).double(), torch.randn(3, 19, 32).double()
    mask = torch.rand(3, 19, generator=seeded(4)) < 0.4 if padded else None
    check(layer, lambda m: m(latents, inputs, pad_mask=mask).last_hidden_state, perceiver_io.swap)


def test_swaps_of_perceiver_io_come_off_again():
    model = causal()
    names = list(model.state_dict())
    assert perceiver_io.swap(model) is model
    assert list(model.state_dict()) == names
    assert not any(type(m) is modules.MultiHeadAttention for m in model.modules())
    perceiver_io.unswap(model)
    assert not any(type(m) is perceiver_io.FusedMultiHeadAttention for m in model.modules())
    with pytest.raises(ValueError, match="Linear holds none of MultiHeadAttention: nothing to swap"):
        perceiver_io.swap(torch.nn.Linear(2, 2))


def hugging_face():
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(
        vocab_size=31, max_position_embeddings=LENGTH, d_model=32, d_latents=48, num_latents=7,
        qk_channels=24, v_channels=48, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )  # fmt: skip
    return perturbed(transformers.PerceiverForMaskedLM(config))


@pytest.mark.parametrize("padded", [False, True])
def test_perceiver_of_hugging_face(padded):
    mask = torch.rand(3, LENGTH, generator=seeded(4)) < 0.6 if padded else None
    mask = None if mask is None else mask.long()
    check(hugging_face(), lambda m: m(tokens(), attention_mask=mask).logits, transformers_perceiver.swap)


def test_swaps_of_hugging_faces_perceiver_come_off_again_and_have_no_weights():
    model = hugging_face()
    names = list(model.state_dict())
    assert list(transformers_perceiver.swap(model).state_dict()) == names
    assert not any(type(m) is PerceiverSelfAttention for m in model.modules())
    with pytest.raises(ValueError, match="output_attentions needs the original attention"):
        model(tokens(), output_attentions=True)
    assert transformers_perceiver.unswap(model)(tokens(), output_attentions=True).attentions is not None
