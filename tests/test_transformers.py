"""The op inside the real ``transformers``: logits, gradients and tokens as with ``eager``."""

import copy
from unittest import mock

import pytest
import torch
from conftest import seeded
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is a development dependency")

from transformers import masking_utils  # noqa: E402

from perceiver_kernels.integrations import transformers as integration  # noqa: E402

integration.register()
VOCABULARY, LENGTH = 61, 23
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128,
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
GEMMA2 = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3, "sliding_window": 128}
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}  # attention sinks
MODELS = {
    "llama": ("Llama", SIZES),
    "gpt2": ("GPT2", GPT2),
    "gemma2": ("Gemma2", SIZES | GEMMA2),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "gpt_oss": ("GptOss", SIZES | GPT_OSS),
}
LEFT = torch.tensor([[0] * 9 + [1] * 14, [1] * 23, [0] * 3 + [1] * 20])
PADDINGS = {"none": None, "left": LEFT, "right": LEFT.flip(1), "full": torch.ones_like(LEFT)}


def build(name, **options):
    """A small model of fixed random weights, large enough for attention to matter, and its twin with ours."""
    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    torch.manual_seed(0)
    model = getattr(transformers, family + ("LMHeadModel" if name == "gpt2" else "ForCausalLM"))(
        config
    ).eval()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the other ones take no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return under("eager", model), under("perceiver_kernels", model)


def under(implementation, model):
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


def tokens(batch=3, length=LENGTH):
    return torch.randint(2, VOCABULARY, (batch, length), generator=seeded(3))


def run(model, x, keep, **options):
    """Logits and every gradient, of what is no padding."""
    model.zero_grad()
    logits = model(x, **options).logits
    weights = torch.randn(logits.shape, generator=seeded(2)).to(logits) * keep.unsqueeze(-1)
    (logits * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()[keep.bool()], **grads}


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def softmax(x, dim=-1, dtype=None):
    """transformers asks for float32, which its float64 masks overflow: a row that sees no key is NaN."""
    return torch.softmax(x, dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)


def check(eager, ours, x, keep, **options):
    """As far from eager in float64 as eager in float32 is, to within the contract's budget."""
    with mock.patch("torch.nn.functional.softmax", softmax):
        want = run(copy.deepcopy(eager).double(), x, keep, **options)
    single, got = run(eager, x, keep, **options), run(ours, x, keep, **options)
    assert want.keys() == got.keys()
    for name in want:
        if want[name].norm() > 1e-9:  # the gradient of a bias of all keys is 0 but for rounding
            budget = 1.5 * error(single[name], want[name]) + 2e-6
            assert error(got[name], want[name]) <= budget, name


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient(name, padding):
    mask = PADDINGS[padding]
    keep = torch.ones_like(LEFT) if mask is None else mask
    check(*build(name), tokens(), keep, attention_mask=mask)


@pytest.mark.parametrize("way", ["dynamic", "static", "chunked", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens(name, way):
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "chunked": {"prefill_chunk_size": 5},
        "sampled": {"do_sample": True, "num_beams": 2},
    }[way]
    options = {"max_new_tokens": 9, "do_sample": False, "disable_compile": True, **options}
    found = []
    for model in build(name):
        torch.manual_seed(1)
        found.append(model.generate(tokens(), attention_mask=LEFT, **options))
    assert torch.equal(*found)
    assert found[0].shape == (3, LENGTH + 9)


def test_assisted_decoding_gives_the_models_own_tokens():
    eager, ours = build("llama")
    helper = build("llama", num_hidden_layers=1)[1]
    x = tokens(1)
    want = eager.generate(x, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(x, max_new_tokens=12, do_sample=False, assistant_model=helper), want)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks_is_the_whole_at_once(cache, padding):
    eager, ours = build("llama")
    x, mask = tokens(), PADDINGS[padding]
    keep = torch.ones_like(LEFT) if mask is None else mask
    store = (
        transformers.DynamicCache(config=ours.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=ours.config, max_cache_len=40)
    )
    found = []
    with torch.no_grad():
        for begin, end in ((0, 7), (7, 8), (8, 20), (20, LENGTH)):
            seen = None if mask is None else mask[:, :end]
            ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
            chunk = x[:, begin:end]
            found.append(ours(chunk, attention_mask=seen, position_ids=ids, past_key_values=store).logits)
        ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        want = eager(x, attention_mask=mask, position_ids=ids).logits
    torch.testing.assert_close(torch.cat(found, 1)[keep.bool()], want[keep.bool()], rtol=2e-5, atol=2e-5)


def test_packed_documents_do_not_see_one_another():
    eager, ours = build("llama")
    lengths = ((5, 1, 17), (23,), (11, 12))
    ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    check(eager, ours, tokens(), torch.ones_like(LEFT), position_ids=ids, use_cache=False)
    packed = ours(tokens(), position_ids=ids, use_cache=False).logits
    torch.testing.assert_close(packed[:1, 6:], ours(tokens()[:1, 6:]).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_an_encoder_sees_both_ways(padding):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 6}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()
    mask = PADDINGS[padding]
    keep = torch.ones_like(LEFT) if mask is None else mask
    check(under("eager", model), under("perceiver_kernels", model), tokens(), keep, attention_mask=mask)


def test_attention_dropout_in_training():
    _, ours = build("llama", attention_dropout=0.3)
    x = tokens()
    torch.testing.assert_close(ours(x).logits, build("llama")[1](x).logits)  # none in eval
    ours.train()
    torch.manual_seed(5)
    first = ours(x).logits
    assert not torch.allclose(first, ours(x).logits)
    torch.manual_seed(5)
    assert torch.equal(first, ours(x).logits)
    q, k = torch.randn(1, 2, 64, 8, generator=seeded(1)), torch.randn(1, 2, 300, 8, generator=seeded(2))
    out, _ = integration.attention(torch.nn.Identity(), q, k, torch.ones_like(k), None, dropout=0.3)
    assert abs(out.mean().item() - 1.0) < 0.02  # kept weights are scaled up


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_of_size_m_by_n():
    eager, ours = build("llama")
    x, mask = tokens(1, 512), torch.ones(1, 512, dtype=torch.long)
    mask[:, :5] = 0
    sizes = []
    for model in (eager, ours):
        with Largest() as largest, torch.no_grad():
            model(x, attention_mask=mask, logits_to_keep=1)
        sizes.append(largest.numel)
    assert sizes[0] >= 6 * 512 * 512
    assert sizes[1] < 512 * 512 / 4


@pytest.mark.parametrize("mask", [None, LEFT])
def test_compiles_into_one_graph(mask):
    _, ours = build("llama")
    x = tokens()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(LEFT) if mask is None else mask
    torch.testing.assert_close(compiled(x, attention_mask=mask).logits, ours(x, attention_mask=mask).logits)


def test_a_sliding_window_is_refused_where_it_hides_something_and_served_where_not():
    eager, ours = build("gemma2", sliding_window=16)
    x = tokens()
    with pytest.raises(
        ValueError, match="perceiver_kernels can't serve a sliding window of 16 with 23 queries"
    ):
        ours(x)
    torch.testing.assert_close(ours(x[:, :16]).logits, eager(x[:, :16]).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 20, "do_sample": False, "disable_compile": True}  # token by token beyond 16
    for cache in (None, "static"):
        for mask in (torch.ones(3, 10, dtype=torch.long), LEFT[:, 6:16]):
            sequences = [
                m.generate(x[:, :10], attention_mask=mask, cache_implementation=cache, **options)
                for m in (eager, ours)
            ]
            assert torch.equal(*sequences)


def test_chunked_attention_and_patterns_of_the_users_are_refused():
    causal = {"batch_size": 1, "q_length": 4, "kv_length": 9, "q_offset": 5}
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    with pytest.raises(
        ValueError, match="can't serve the mask pattern chunked_overlay with 4 queries and 9 keys"
    ):
        integration.attention_mask(**causal, mask_function=chunked)
    either = masking_utils.or_masks(masking_utils.causal_mask_function, chunked)
    with pytest.raises(ValueError, match="can't serve the mask pattern or_masks"):
        integration.attention_mask(**causal, mask_function=either)
    row = integration.attention_mask(1, 1, 9, 8, mask_function=chunked)
    assert row.flatten().tolist() == [False] * 8 + [True]
    with pytest.raises(ValueError, match="makes no M x N mask, which this model works on"):
        integration.attention_mask(**causal, allow_is_causal_skip=False)


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool), torch.zeros(3, 1, 1, LENGTH)]
)
def test_a_mask_of_m_by_n_is_refused(mask):
    with pytest.raises(ValueError, match=r"takes no mask of M x N, which attention_mask \(3, 1, \d+, 23\) "):
        build("llama")[1](tokens(), attention_mask=mask)


@pytest.mark.parametrize("family", ["Bloom", "GPTNeo"])
def test_a_model_with_an_attention_of_its_own_is_refused(family):
    """transformers would make such a model, and hand the mask to code that takes it for something else."""
    config = getattr(transformers, family + "Config")()
    config._attn_implementation = integration.NAME
    x = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match=f"can't serve {family}Model: its attention doesn't go through"):
        masking_utils.create_causal_mask(config, x, attention_mask=None, cache=None)


def test_what_the_op_does_not_do_is_refused_by_name():
    _, ours = build("llama")
    with pytest.raises(ValueError, match="output_attentions"):
        ours(tokens(), output_attentions=True)
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="perceiver_kernels takes no position_bias"):
        integration.attention(torch.nn.Identity(), q, q, q, None, position_bias=torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("q_offset", "queries", "kv_offset", "slots"),
    [
        (0, 23, 0, 23),
        (8, 15, 0, 23),
        (8, 15, 0, 40),
        (torch.tensor(8), 15, 0, 40),
        (22, 1, 0, 23),
        (20, 3, 5, 18),
    ],
    ids=["whole", "chunk", "static", "static_tensor", "step", "sliding"],
)
def test_the_mask_says_who_sees_what(q_offset, queries, kv_offset, slots, padding):
    """Against transformers' own boolean mask."""
    mask = PADDINGS[padding]
    options = {"batch_size": 3, "q_length": queries, "kv_length": slots, "q_offset": q_offset}
    options |= {"kv_offset": kv_offset, "attention_mask": None if mask is None else mask.bool()}
    want = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
    first = integration.attention_mask(**options)
    if first is None:  # from the bottom right
        first = torch.arange(slots) - (slots - queries)
    else:
        assert first.dtype == torch.int64
        assert first.shape in ((3, 1, 1, slots), (1, 1, 1, 1))
        first = first if first.shape[-1] > 1 else first + torch.arange(slots)
    assert torch.equal((first <= torch.arange(queries).unsqueeze(-1)).expand(want.shape), want)
