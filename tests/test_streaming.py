"""The streamed layer and model against the plain ones, for every kind of input; and their memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import perceiver_kernels as pk
from perceiver_kernels.layers import CrossAttention, SelfAttention
from perceiver_kernels.testing.budget import FACTOR, relative_error

DIM, BATCH, LATENTS, PREFIX, VOCAB = 24, 2, 7, 45, 11
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VARIANTS: list[dict[str, Any]] = [
    {"num_heads": 3},
    {"num_heads": 4, "num_kv_heads": 2, "bias": True, "rotary_layout": "interleaved"},
    {"num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "value_dim": 16, "rotary_fraction": 1.0},
    {"num_heads": 2, "rotary_fraction": 0.0, "softcap": 3.0, "scale": 0.7},
]
CHUNKS = [1, 5, 16, 45, 1000]


def layers(options: dict[str, Any], dtype: torch.dtype, chunk_size: int) -> tuple[CrossAttention, ...]:
    """The plain layer in float64 and in ``dtype``, and the streamed one, with the same weights."""
    torch.manual_seed(1)
    exact = CrossAttention(DIM, **options).double()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.to(dtype))
    plain, streamed = (
        CrossAttention(DIM, **options, streamed=s, chunk_size=chunk_size).to(dtype) for s in (False, True)
    )
    for layer in (plain, streamed):
        layer.load_state_dict(exact.state_dict())
    return exact, plain, streamed


def data(dtype: torch.dtype, prefix: int = PREFIX) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, prefix and the gradient that comes back."""
    shapes = (BATCH, LATENTS, DIM), (BATCH, prefix, DIM), (BATCH, LATENTS, DIM)
    latents, before, grad = (torch.randn(shape, generator=seeded(2)).to(dtype) for shape in shapes)
    return latents, before, grad


def run(
    layer: CrossAttention, latents: Tensor, prefix: Any, grad: Tensor, **kwargs: Any
) -> dict[str, Tensor]:
    """The update and the gradient of everything that requires one."""
    latents = latents.detach().requires_grad_()
    if isinstance(prefix, Tensor):
        prefix = prefix.detach().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(3)
    out = layer(latents, prefix, **kwargs)
    out.backward(grad.to(out.dtype))
    results = {name: parameter.grad for name, parameter in layer.named_parameters()}
    results |= {"out": out.detach(), "latents": latents.grad}
    return results | ({"prefix": prefix.grad} if isinstance(prefix, Tensor) else {})


def check(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every result within the budget that the plain layer of the same dtype earns."""
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        dtype = plain[name].dtype
        floor = 2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
        if dtype == torch.float64:
            floor = 1e-13
        assert got[name].dtype == dtype
        error, limit = relative_error(got[name], want), FACTOR * relative_error(plain[name], want) + floor
        assert error <= limit, f"{name}: error {error:.2e}, budget {limit:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_streamed_is_plain(options: dict[str, Any], chunk_size: int, dtype: torch.dtype) -> None:
    exact, plain, streamed = layers(options, dtype, chunk_size)
    latents, prefix, grad = data(dtype)
    mask = torch.rand(BATCH, PREFIX + LATENTS, generator=seeded(4)) < 0.6
    mask[1, : PREFIX + 3] = False  # latents that see nothing
    rotary = exact.rotary(torch.arange(PREFIX + LATENTS) * 3, torch.float64)
    narrow = tuple(t.to(torch.float64 if dtype == torch.float64 else torch.float32) for t in rotary)
    positions = torch.randint(0, 99, (BATCH, PREFIX + LATENTS), generator=seeded(5))
    for kwargs in ({}, {"key_mask": mask}, {"positions": positions}, {"rotary": narrow, "key_mask": mask}):
        want = run(exact, latents.double(), prefix.double(), grad.double(), **kwargs)
        check(*(run(layer, latents, prefix, grad, **kwargs) for layer in (streamed, plain)), want)


@pytest.mark.parametrize("kind", ["positions per example", "rotary per example", "plain"])
@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_prefix_dropout_keeps_the_same(chunk_size: int, kind: str) -> None:
    """Attention dropout too: the same seed of torch's drops the same keys and the same weights."""
    _, plain, streamed = layers(
        VARIANTS[1] | {"prefix_dropout": 0.6, "dropout": 0.3}, torch.float64, chunk_size
    )
    latents, prefix, grad = data(torch.float64)
    places = torch.stack((torch.arange(52), torch.arange(9, 61)))
    kwargs: dict[str, Any] = {"positions per example": {"positions": places}, "plain": {}}.get(
        kind, {"rotary": plain.rotary(places, torch.float64)}
    )
    kwargs["key_mask"] = torch.rand(BATCH, PREFIX + LATENTS, generator=seeded(4)) < 0.8
    want = run(plain, latents, prefix, grad, **kwargs)
    check(run(streamed, latents, prefix, grad, **kwargs), want, want)
    mapped = run(streamed, latents, prefix.cpu().numpy(), grad, **kwargs)
    check(mapped | {"prefix": want["prefix"]}, want, want)


def test_prefix_dropout_reads_and_projects_what_it_keeps_alone() -> None:
    _, _, streamed = layers({"num_heads": 3, "prefix_dropout": 0.8}, torch.float32, 4)
    rows, read = [], []
    streamed.k_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))

    def at(indices: Tensor) -> Tensor:
        read.append(indices)
        return torch.zeros(*indices.shape, DIM)

    source = pk.Recomputed(lambda begin, end: at(torch.arange(begin, end)), PREFIX, at=at)
    streamed(data(torch.float32)[0], source)
    assert sum(rows) == 9 + LATENTS
    assert sum(indices.shape[1] for indices in read) == 9


def recomputed(table: Tensor, tokens: Tensor, p: float = 0.0) -> pk.Recomputed:
    """Embedded tokens, with dropout."""

    def embed(ids: Tensor) -> Tensor:
        return F.dropout(F.embedding(ids, table, sparse=True), p)

    return pk.Recomputed(
        lambda begin, end: embed(tokens[:, begin:end]),
        tokens.shape[1],
        [table],
        at=lambda indices: embed(tokens.gather(1, indices)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [5, 1000])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_recomputed_inputs_reach_the_embedding_table(
    chunk_size: int, dtype: torch.dtype, share: float
) -> None:
    exact, plain, streamed = layers({"num_heads": 3, "prefix_dropout": share}, dtype, chunk_size)
    latents, _, grad = data(dtype)
    tokens = torch.randint(0, VOCAB, (BATCH, PREFIX), generator=seeded(6))
    table = torch.randn(VOCAB, DIM, generator=seeded(7)).to(dtype)

    def step(layer: CrossAttention, of: torch.dtype) -> dict[str, Tensor]:
        leaf = table.detach().to(of).requires_grad_()
        prefix = recomputed(leaf, tokens) if layer.streamed else leaf[tokens]
        torch.manual_seed(3)
        layer.zero_grad()
        out = layer(latents.to(of), prefix)
        out.backward(grad.to(of))
        return {"out": out.detach(), "table": leaf.grad, "weight": layer.k_proj.weight.grad}

    check(step(streamed, dtype), step(plain, dtype), step(exact, torch.float64))


def test_recomputed_inputs_draw_the_same_again() -> None:
    """The embeddings' dropout: the gradient of what is linear in the table, times the table, is the value."""
    _, _, streamed = layers({"num_heads": 3}, torch.float64, 4)
    streamed.kv_norm = nn.Identity()
    nn.init.zeros_(streamed.k_proj.weight)  # weights of attention that don't depend on the table
    table = torch.randn(VOCAB, DIM, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, VOCAB, (BATCH, PREFIX), generator=seeded(6))
    latents = torch.zeros(BATCH, LATENTS, DIM, dtype=torch.float64)
    out = streamed(latents, recomputed(table, tokens, 0.5))
    before = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(out, table, out.detach())
    torch.testing.assert_close((gradient * table).sum(), out.square().sum())
    assert torch.equal(before, torch.get_rng_state())  # and backward leaves the generator alone


@pytest.mark.parametrize("kind", ["memmap", "from_file", "half", "cpu"])
@pytest.mark.parametrize("chunk_size", [16, 1000])
def test_inputs_that_lie_elsewhere(kind: str, chunk_size: int, tmp_path: Any) -> None:
    """A file, another dtype, another device; a tensor's gradient stays where it is, in its dtype."""
    _, plain, streamed = layers({"num_heads": 3}, torch.float32, chunk_size)
    latents, prefix, grad = data(torch.float32)
    if kind == "half":
        prefix = prefix.half().float()
    want = run(plain, latents, prefix, grad)
    path = str(tmp_path / "prefix")
    prefix.cpu().numpy().tofile(path)
    given: Any = {
        "memmap": lambda: np.memmap(path, np.float32, "r", shape=tuple(prefix.shape)),
        "from_file": lambda: torch.from_file(path, size=prefix.numel(), device="cpu").view(prefix.shape),
        "half": prefix.half,
        "cpu": prefix.cpu,
    }[kind]()
    got = run(streamed, latents, given, grad)
    if kind == "memmap":
        del want["prefix"]
    else:
        assert got["prefix"].dtype == given.dtype
        assert got["prefix"].device == given.device
        got["prefix"] = got["prefix"].to(DEVICE)
    for name, tensor in want.items():
        assert relative_error(got[name], tensor) < (1e-3 if name == "prefix" and kind == "half" else 2e-6), (
            name
        )


@pytest.mark.parametrize("prefix", [None, 0, 1])
def test_short_prefixes_and_one_tensor_in_both_places(prefix: int | None) -> None:
    _, plain, streamed = layers({"num_heads": 3}, torch.float64, 5)
    latents, before, grad = data(torch.float64, prefix or 0)
    arguments = (latents, None if prefix is None else before, grad)
    want = run(plain, *arguments)
    check(run(streamed, *arguments), want, want)
    x = latents.requires_grad_()
    a, b = (torch.autograd.grad(layer(x, x), x, grad)[0] for layer in (plain, streamed))
    torch.testing.assert_close(a, b)


def test_only_what_requires_grad_gets_one() -> None:
    _, plain, streamed = layers({"num_heads": 3}, torch.float64, 10)
    latents, prefix, grad = data(torch.float64)
    for layer in (plain, streamed):
        layer.k_proj.requires_grad_(False)
        layer.kv_norm.requires_grad_(False)
        layer(latents, prefix).backward(grad)
    for (name, a), b in zip(plain.named_parameters(), streamed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == name.startswith(("k_proj", "kv_norm"))
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    for layer in (plain, streamed):
        layer.requires_grad_(False)
    x = prefix.requires_grad_()
    a, b = (torch.autograd.grad(layer(latents, x), x, grad)[0] for layer in (plain, streamed))
    torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(plain(latents, prefix), streamed(latents, prefix))


def test_self_attention_streams_its_latents() -> None:
    torch.manual_seed(0)
    plain, streamed = (SelfAttention(DIM, 3, streamed=s, chunk_size=3).double() for s in (False, True))
    streamed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 10, DIM, dtype=torch.float64)
    torch.testing.assert_close(plain(x), streamed(x))


def test_sums_over_many_chunks_are_float32() -> None:
    options, shape = {"num_heads": 3}, (1, 1500, DIM)
    exact, plain, streamed = layers(options, torch.bfloat16, 2)
    prefix = torch.randn(shape, generator=seeded(8)).bfloat16() + 1  # chunks' gradients that add up
    latents, _, grad = (t[:1] for t in data(torch.bfloat16))
    want = run(exact, latents.double(), prefix.double(), grad.double())
    check(run(streamed, latents, prefix, grad), run(plain, latents, prefix, grad), want)


def test_same_bits_every_time() -> None:
    _, _, streamed = layers({"num_heads": 3}, torch.float32, 8)
    a, b = (run(streamed, *data(torch.float32)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_autocast() -> None:
    """In both passes, and its cache of cast weights stays as it was."""
    _, plain, streamed = layers({"num_heads": 3}, torch.float32, 8)
    latents, prefix, grad = data(torch.float32)
    results = []
    for layer in (plain, streamed):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            out = layer(latents, prefix)
            cached = layer.k_proj(latents)
        layer.zero_grad()
        (out.float() * grad).sum().backward(retain_graph=True)
        results.append({"out": out.detach().float(), **{n: p.grad for n, p in layer.named_parameters()}})
        assert torch.autograd.grad(cached.sum(), layer.k_proj.weight)[0].any()
    exact = run(layers({"num_heads": 3}, torch.float32, 8)[0], *(t.double() for t in (latents, prefix, grad)))
    for name, want in results[0].items():
        limit = FACTOR * relative_error(want, exact[name]) + 2e-3
        assert relative_error(results[1][name], exact[name]) <= limit, name


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_compile(reentrant: bool) -> None:
    _, _, streamed = layers({"num_heads": 3, "prefix_dropout": 0.3, "dropout": 0.2}, torch.float64, 8)
    latents, prefix, grad = data(torch.float64)
    want = run(streamed, latents, prefix, grad)
    ways = [lambda *x: checkpoint(streamed, *x, use_reentrant=reentrant)]
    if not reentrant:  # compiles with a graph break
        ways.append(torch.compile(streamed, backend="aot_eager"))
    for way in ways:
        leaves = latents.detach().requires_grad_(), prefix.detach().requires_grad_()
        streamed.zero_grad()
        torch.manual_seed(3)
        out = way(*leaves)
        out.backward(grad)
        got = {name: parameter.grad for name, parameter in streamed.named_parameters()}
        got |= {"out": out.detach(), "latents": leaves[0].grad, "prefix": leaves[1].grad}
        check(got, want, want)


def test_double_backward_says_so() -> None:
    _, _, streamed = layers({"num_heads": 3}, torch.float32, 8)
    latents, prefix, _ = data(torch.float32)
    out = streamed(latents, prefix.requires_grad_())
    with pytest.raises(NotImplementedError, match=r"^streamed attention: double backward is not supported$"):
        torch.autograd.grad(out.sum(), prefix, create_graph=True)


def test_an_input_that_changed_before_the_backward() -> None:
    _, _, streamed = layers({"num_heads": 3}, torch.float32, 8)
    latents, prefix, grad = data(torch.float32)
    out = streamed(latents, prefix)
    prefix.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


def test_a_leaf_that_nobody_declared() -> None:
    _, _, streamed = layers({"num_heads": 3}, torch.float32, 8)
    table = torch.randn(VOCAB, DIM, requires_grad=True)
    source = pk.Recomputed(lambda begin, end: 2 * table[:1].expand(BATCH, end - begin, DIM), PREFIX)
    with pytest.raises(ValueError, match=r"compute depends on a tensor \(11, 24\) that requires a gradient"):
        streamed(data(torch.float32)[0], source).sum().backward()
    made = table.detach().requires_grad_() * 2  # no leaf, but declared: its history is not walked
    source = pk.Recomputed(lambda begin, end: made[:1].expand(BATCH, end - begin, DIM), PREFIX, [made])
    assert torch.autograd.grad(streamed(data(torch.float32)[0], source).sum(), made)[0].any()


@pytest.mark.parametrize(
    ("streamed", "prefix", "error", "message"),
    [
        (False, np.zeros((2, 9, 24)), TypeError,
         "prefix must be a torch.Tensor where the layer is not streamed, got ndarray"),
        (True, [1.0], TypeError, "prefix must be a tensor, a numpy array or Recomputed, got list"),
        (True, np.zeros((2, 9, 3)), ValueError, r"prefix must be \(2, N - M, 24\), got \(2, 9, 3\)"),
        (True, np.zeros((2, 9, 24), ">f4"), TypeError,
         r"prefix must be of a dtype that torch has, too, got dtype\('>f4'\)"),
        (True, np.zeros((2, 9, 24), object), TypeError,
         r"prefix must be of a dtype that torch has, too, got dtype\('O'\)"),
        (True, np.zeros((2, 9, 24), np.complex64), TypeError, "prefix must hold real numbers, got complex64"),
        (True, torch.zeros(2, 9, 24) * 1j, TypeError, "prefix must hold real numbers, got complex64"),
        (True, torch.zeros(9, 24), ValueError, r"prefix must be \(2, N - M, 24\), got \(9, 24\)"),
        (True, np.zeros((2, 9, 24), dtype=str), TypeError,
         r"prefix must be of a dtype that torch has, too, got dtype\('<U1'\)"),
        (True, pk.Recomputed(lambda a, b: torch.zeros(2, b - a, 24), 9), ValueError,
         "prefix dropout over Recomputed inputs needs them as a function of indices: at="),
    ],
)  # fmt: skip
def test_bad_prefixes(streamed: bool, prefix: Any, error: type[Exception], message: str) -> None:
    layer = CrossAttention(DIM, 3, streamed=streamed, prefix_dropout=0.5)
    with pytest.raises(error, match=message):
        layer(torch.zeros(2, 4, DIM), prefix)


def test_bad_chunk_size() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        CrossAttention(DIM, 3, chunk_size=0)


# The model

CONFIG = pk.PerceiverARConfig(
    vocab_size=17, dim=32, depth=1, num_heads=4, max_seq_len=64, num_latents=8, rotary_fraction=0.5
)
MODELS: list[dict[str, Any]] = [
    {},
    {"positions": "learned", "prefix_dropout": 0.5, "num_kv_heads": 2},
    {"positions": "none", "tie_embeddings": True, "attention_dropout": 0.3},
    {"positions": "learned", "position_shape": (4, 8, 2), "position_origin": "last", "prefix_dropout": 0.4},
    {"cross_after": (0, 1), "depth": 2, "prefix_dropout": 0.4, "latent_dropout": 0.3},
    {"latents_per_position": 2, "cross_after": (0,), "num_kv_heads": 2, "attention_dropout": 0.3},
]


def models(changes: dict[str, Any], chunk_size: int) -> tuple[pk.PerceiverAR, pk.PerceiverAR]:
    """Plain and streamed with the same weights, in training."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, **changes)
    plain = pk.PerceiverAR(config).double()
    streamed = pk.PerceiverAR(dataclasses.replace(config, streamed=True, chunk_size=chunk_size)).double()
    streamed.load_state_dict(plain.state_dict())
    return plain, streamed


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk_size", [5, 100])
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_streamed_model_is_the_plain_one(changes: dict[str, Any], chunk_size: int, padded: bool) -> None:
    pair = models(changes, chunk_size)
    tokens = torch.randint(0, 17, (2, 40), generator=seeded(1))
    pad_mask = torch.zeros(2, 40, dtype=torch.bool)
    pad_mask[1, :9] = True
    results = []
    for model in pair:
        torch.manual_seed(3)
        logits = model(tokens, pad_mask=pad_mask if padded else None)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, -8:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([logits.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_streamed_model_embeds_a_chunk_at_a_time() -> None:
    _, streamed = models({}, 5)
    lengths = []
    streamed.dropout.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    streamed(torch.zeros(1, 40, dtype=torch.int64)).sum().backward()
    assert lengths == [8, *[5] * 6, 2, *[5] * 6, 2]


class Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation makes, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point() and not x.is_sparse:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.cpu_only("elsewhere the backward runs in a thread of its own, unseen")
@pytest.mark.parametrize("changes", [{}, {"prefix_dropout": 0.4}, {"num_kv_heads": 2}], ids=str)
def test_no_tensor_of_the_streamed_model_grows_with_the_input(changes: dict[str, Any]) -> None:
    changes = changes | {"max_seq_len": 2048}
    sizes = {}
    for n in (512, 2048):
        for name, model in zip(("plain", "streamed"), models(changes, 32), strict=True):
            tokens = torch.randint(0, 17, (1, n), generator=seeded(1))
            with Largest() as largest:
                model(tokens).square().sum().backward()
            sizes[name, n] = largest.numel
    assert sizes["plain", 2048] >= 2048 * 32 * (1 - changes.get("prefix_dropout", 0))
    # What does grow is one number for each position, in the draw of prefix dropout.
    assert sizes["streamed", 2048] == max(sizes["streamed", 512], 2048 if "prefix_dropout" in changes else 0)
    assert sizes["streamed", 2048] < 2048 * 4


def test_streamed_model_draws_its_dropout_again() -> None:
    """A small step against the gradient moves the loss by its square, if both passes drop the same."""
    _, streamed = models({"dropout": 0.3}, 5)
    tokens = torch.randint(0, 17, (2, 40), generator=seeded(1))

    def loss() -> Tensor:
        torch.manual_seed(3)
        return F.cross_entropy(streamed(tokens).flatten(0, 1), tokens[:, -8:].flatten())

    table = streamed.token_embedding.weight
    before = loss()
    (gradient,) = torch.autograd.grad(before, table)
    step = 1e-6 / gradient.norm().item()
    with torch.no_grad():
        table -= step * gradient
    torch.testing.assert_close((before - loss()) / step, gradient.square().sum(), rtol=1e-4, atol=0)


def test_streamed_model_generates_saves_and_loads(tmp_path: Any) -> None:
    plain, streamed = models({}, 5)
    prompt = torch.randint(0, 17, (2, 20), generator=seeded(1))
    want = plain.generate(prompt, 6, temperature=0.0)
    for use_cache in (True, False):
        assert torch.equal(streamed.generate(prompt, 6, temperature=0.0, use_cache=use_cache), want)
    streamed.save(tmp_path / "model.safetensors")
    assert pk.PerceiverAR.load(tmp_path / "model.safetensors").config == streamed.config
