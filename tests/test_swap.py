"""The op inside the real ``perceiver-ar-pytorch``: same logits and gradients on the same weights."""

import copy

import pytest
import torch
from conftest import seeded

package = pytest.importorskip(
    "perceiver_ar_pytorch", reason="perceiver-ar-pytorch is a development dependency"
)

from perceiver_ar_pytorch.perceiver_ar_pytorch import CausalAttention, CausalPrefixAttention  # noqa: E402

from perceiver_kernels.integrations.perceiver_ar_pytorch import swap, unswap  # noqa: E402
from perceiver_kernels.models import PerceiverAR, PerceiverARConfig  # noqa: E402

PREFIX = 37


def build(**options):
    torch.manual_seed(0)
    options = {"dim": 48, "heads": 3, "dim_head": 64, "depth": 2, "ff_mult": 2, **options}
    model = package.PerceiverAR(num_tokens=29, max_seq_len=96, cross_attn_seq_len=PREFIX, **options)
    with torch.no_grad():  # fresh norms are all alike: one in another's place would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model, tokens, prefix_mask=None, seed=1):
    """Logits and every gradient, the dropout draws fixed by the seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    logits = model(tokens, prefix_mask=prefix_mask)
    weights = torch.randn(logits.shape, generator=seeded(2)).to(logits)
    (logits * weights).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def check(model, tokens, prefix_mask=None):
    """float64: equal. float32: as far from float64 as the original, to within the contract's budget."""
    original, swapped = copy.deepcopy(model), swap(copy.deepcopy(model))
    want = run(original.double(), tokens, prefix_mask)
    got = run(swapped.double(), tokens, prefix_mask)
    assert want.keys() == got.keys()
    assert max(error(got[name], want[name]) for name in want) < 1e-12

    # Both start from the same float32 weights; float64 copies of those are the yardstick.
    single = run(copy.deepcopy(model), tokens, prefix_mask)
    ours = run(swap(copy.deepcopy(model)), tokens, prefix_mask)
    for name in want:
        budget = 1.5 * error(single[name], want[name]) + 1e-6
        assert error(ours[name], want[name]) <= budget, name


@pytest.mark.parametrize("length", [PREFIX + 1, PREFIX + 2, 61, 96])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_every_gradient(length, masked):
    tokens = torch.randint(0, 29, (3, length), generator=seeded(3))
    mask = None
    if masked:
        mask = torch.rand(3, PREFIX, generator=seeded(4)) < 0.6
        mask[1] = False  # an empty prefix
    check(build(), tokens, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attn_dropout_draws_what_the_original_draws(masked):
    model = build(cross_attn_dropout=0.4, perceive_depth=2).train()
    tokens = torch.randint(0, 29, (3, 70), generator=seeded(3))
    mask = torch.rand(3, PREFIX, generator=seeded(4)) < 0.6 if masked else None
    check(model, tokens, mask)
    swapped = swap(model)
    torch.manual_seed(1)
    first = swapped(tokens)
    torch.manual_seed(2)
    assert not torch.equal(first, swapped(tokens))
    swapped.eval()
    assert torch.equal(swapped(tokens), swapped(tokens))


def test_prefix_mask_hides_what_it_masks():
    model = swap(build())
    tokens = torch.randint(0, 29, (2, 60))
    mask = torch.ones(2, PREFIX, dtype=torch.bool)
    mask[:, :5] = False
    other = tokens.clone()
    other[:, :5] = (tokens[:, :5] + 1) % 29
    assert torch.equal(model(tokens, prefix_mask=mask), model(other, prefix_mask=mask))
    assert not torch.equal(model(tokens), model(other))


def test_attention_dropout_is_applied_in_training_only():
    model = swap(build(dropout=0.3))
    tokens = torch.randint(0, 29, (2, 60))
    cross = model.perceive_layers[0][0]
    x, context = torch.randn(2, 4, 48), torch.randn(2, 9, 48)
    assert not torch.equal(cross(x, context), cross(x, context))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_keeps_the_module_and_its_state():
    model = build()
    names, swapped = list(model.state_dict()), swap(model)
    assert swapped is model
    assert list(swapped.state_dict()) == names
    assert isinstance(model.layers[0][0], CausalAttention)
    assert type(model.layers[0][0]) is not CausalAttention
    assert type(copy.deepcopy(model).perceive_layers[0][0]) is type(model.perceive_layers[0][0])
    unswap(model)
    assert type(model.layers[0][0]) is CausalAttention
    assert type(model.perceive_layers[0][0]) is CausalPrefixAttention


def test_refuses_a_model_without_its_attention():
    with pytest.raises(ValueError, match="Linear holds none of CausalAttention, CausalPrefixAttention"):
        swap(torch.nn.Linear(2, 2))


def test_leaves_a_users_own_subclass_alone():
    class Mine(CausalAttention):
        pass

    mine = Mine(dim=8, heads=1)
    with pytest.raises(ValueError, match="nothing to swap"):
        swap(mine)


def test_saves_no_tensor_of_size_m_by_n_and_a_fraction_of_the_memory():
    """What autograd keeps of one cross-attention: linear in N, and under a quarter of the original's."""
    latents, prefix = 256, 768
    options = {"dim": 32, "heads": 4, "dim_head": 16}

    def kept(module):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, context = (torch.randn(1, n, 32, requires_grad=True) for n in (latents, prefix))
        angles = torch.randn(latents + prefix, 8)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(x * 1, context * 1, rotary_pos_emb=angles)
        assert out.shape == (1, latents, 32)
        return sum(storages.values()), max(storages.values())

    module = CausalPrefixAttention(**options)
    original, _ = kept(module)
    ours, largest = kept(swap(module))
    assert largest < 4 * latents * (latents + prefix)
    assert ours < original / 4


def renamed(theirs):
    """Their tensors by name, weights or gradients, under the names of our PerceiverAR."""
    names = {"token_emb": "token_embedding", "pos_emb": "position_embedding", "to_logits": "head"}
    parts = {"norm": "norm", "context_norm": "kv_norm", "to_q": "q_proj", "to_out": "out_proj"}
    splits = {"to_kv": ("k_proj", "v_proj"), "to_qkv": ("q_proj", "k_proj", "v_proj")}
    ours = {}
    for name, tensor in theirs.items():
        *path, last = name.split(".")
        if path[0] in names:
            ours[f"{names[path[0]]}.{last}"] = tensor
            continue
        block = "cross" if path[0] == "perceive_layers" else f"blocks.{path[1]}"
        if path[2] == "1":
            ours[f"{block}.feed_forward.{path[3]}.{last}"] = tensor
        elif path[3] in splits:
            chunks = tensor.chunk(len(splits[path[3]]))
            for part, chunk in zip(splits[path[3]], chunks, strict=True):
                ours[f"{block}.attention.{part}.{last}"] = chunk
        else:
            ours[f"{block}.attention.{parts[path[3]]}.{last}"] = tensor
    return ours


@pytest.mark.parametrize(("streamed", "masked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_our_own_model_on_converted_weights(streamed, masked, dropout):
    """Logits and every gradient, where the two architectures meet.

    Theirs has no last norm, and a bias after the cross-attention. Its keys have a norm in the prefix and
    another in the latents; ours have one, so that a key stays what it is when a latent becomes prefix: the
    two meet where theirs are alike, and then ours gets the sum of their gradients.
    """
    theirs = build(cross_attn_dropout=dropout).double()
    frequencies = 10_000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    theirs.rotary_pos_emb.inv_freq = frequencies  # theirs were rounded to float32
    cross = theirs.perceive_layers[0][0]
    cross.context_norm.load_state_dict(cross.norm.state_dict())
    sizes = {"vocab_size": 29, "dim": 48, "depth": 2, "num_heads": 3, "head_dim": 64, "ff_mult": 2}
    config = PerceiverARConfig(
        **sizes,
        max_seq_len=96,
        num_latents=96 - PREFIX,
        positions="learned",
        rotary_fraction=0.5,
        prefix_dropout=dropout,
        streamed=streamed,
        chunk_size=7,
    )
    ours = PerceiverAR(config).double()
    ours.norm = torch.nn.Identity()
    ours.cross.attention.out_proj = torch.nn.Linear(192, 48, dtype=torch.float64)
    ours.load_state_dict(renamed(dict(theirs.named_parameters())))

    tokens = torch.randint(0, 29, (3, 61), generator=seeded(3))
    mask = torch.rand(3, PREFIX, generator=seeded(4)) < 0.6 if masked else None
    want = run(theirs, tokens, mask)
    wanted_logits, want = want.pop("logits"), renamed(want)

    def call(tokens, prefix_mask):
        if prefix_mask is None:
            return ours(tokens, num_latents=61 - PREFIX)
        # Their masks may have holes and leave positions as they are, which is more than padding.
        places = torch.arange(61)
        inputs = ours.embed(tokens, places)
        key_mask = torch.cat((prefix_mask, torch.ones(3, 61 - PREFIX, dtype=torch.bool)), dim=1)
        return ours.logits(ours.read(inputs[:, PREFIX:], inputs, places, key_mask))

    call.zero_grad, call.named_parameters = ours.zero_grad, ours.named_parameters
    got = run(call, tokens, mask)
    assert error(got.pop("logits"), wanted_logits) < 1e-12
    for tensors in (got, want):
        for x in ("weight", "bias"):
            norm = tensors.pop(f"cross.attention.kv_norm.{x}")
            tensors[f"cross.attention.norm.{x}"] = tensors[f"cross.attention.norm.{x}"] + norm
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert error(got[name], gradient) < 1e-12, name
