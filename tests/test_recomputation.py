"""What the streamed backward computes again: gradients go where the plain layer's go, or it is an error."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import seeded
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import perceiver_kernels as pk
from perceiver_kernels.layers import CrossAttention

DIM, BATCH, LATENTS, PREFIX = 16, 2, 3, 10
LENGTH = LATENTS + PREFIX


def layers(**options: Any) -> tuple[CrossAttention, CrossAttention]:
    """Plain and streamed with the same weights."""
    torch.manual_seed(0)
    plain, streamed = (
        CrossAttention(DIM, 2, streamed=s, chunk_size=4, **options).double() for s in (False, True)
    )
    streamed.load_state_dict(plain.state_dict())
    return plain, streamed


def inputs() -> tuple[Tensor, Tensor]:
    """Latents and prefix."""
    latents, prefix = (torch.randn(BATCH, n, DIM, generator=seeded(1)) for n in (LATENTS, PREFIX))
    return latents.double(), prefix.double()


def models(**changes: Any) -> tuple[pk.PerceiverAR, pk.PerceiverAR]:
    """Plain and streamed with the same weights; the embedding has more rows than a chunk has tokens."""
    torch.manual_seed(0)
    config = pk.PerceiverARConfig(
        vocab_size=17, dim=16, depth=1, num_heads=2, max_seq_len=64, num_latents=4, positions="learned"
    )
    config = dataclasses.replace(config, **changes)
    plain = pk.PerceiverAR(config).double()
    streamed = pk.PerceiverAR(dataclasses.replace(config, streamed=True, chunk_size=5)).double()
    streamed.load_state_dict(plain.state_dict())
    return plain, streamed


def tokens() -> Tensor:
    """(2, 23), of which every one stands at many places."""
    return torch.randint(0, 17, (2, 23), generator=seeded(2))


def same(plain: list[Any], streamed: list[Any]) -> None:
    """The gradients of both, some of which are no zeros."""
    assert any(gradient.any() for gradient in plain)
    torch.testing.assert_close(streamed, plain, rtol=1e-9, atol=1e-12)


def gradients(module: nn.Module, *arguments: Any) -> list[Any]:
    """Of all parameters."""
    module.zero_grad()
    module(*arguments).square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("name", ["k_proj.weight", "kv_norm.bias", "q_proj.weight"])
@pytest.mark.parametrize("hook", [lambda g: 2 * g, lambda g: g.clamp(-1e-2, 1e-2)], ids=["double", "clamp"])
def test_tensor_hooks_see_the_sum_once(name: str, hook: Callable[[Tensor], Tensor]) -> None:
    pair = layers()
    for layer in pair:
        layer.get_parameter(name).register_hook(hook)
    same(*(gradients(layer, *inputs()) for layer in pair))


def test_tensor_hooks_of_the_models_embeddings() -> None:
    pair = models(tie_embeddings=True)
    for model in pair:
        for table in (model.token_embedding, model.position_embedding):
            table.weight.register_hook(lambda g: g.clamp(-1, 1))
    same(*(gradients(model, tokens()) for model in pair))


@pytest.mark.parametrize("build", [layers, models])
def test_functional_call(build: Callable[[], Any]) -> None:
    """Other weights than the module's, leaves or not, and one that keeps its gradient."""
    results = []
    for module in build():
        arguments = inputs() if isinstance(module, CrossAttention) else (tokens(),)
        leaves = {name: p.detach() + 0.1 for name, p in module.named_parameters()}
        made = {name: 2 * leaf.requires_grad_() for name, leaf in leaves.items()}
        for tensor in made.values():
            tensor.retain_grad()
        functional_call(module, made, arguments).square().sum().backward()
        results.append([t.grad for t in (*leaves.values(), *made.values())])
    same(*results)


def test_another_mode_before_the_backward() -> None:
    """The embeddings' dropout is that of the forward."""
    results = []
    for stay in (True, False):
        _, model = models(dropout=0.5)
        torch.manual_seed(3)
        loss = model(tokens()).square().sum()
        model.train(stay)
        loss.backward()
        assert all(module.training == stay for module in model.modules())
        results.append([parameter.grad for parameter in model.parameters()])
    same(*results)


@pytest.mark.parametrize("grad", [False, True])
def test_threads_share_a_module(grad: bool) -> None:
    """What each of them calls with is gone afterwards."""
    _, layer = layers()
    before, want = list(layer.parameters()), layer(*inputs()).detach()
    layer.k_proj.register_forward_hook(lambda module, args, out: time.sleep(0.001))

    def step() -> Tensor:
        with torch.set_grad_enabled(grad):
            out = layer(*inputs())
            if grad:
                torch.autograd.grad(out.sum(), before)
        return out.detach()

    with ThreadPoolExecutor(4) as pool:
        outs = [future.result() for future in [pool.submit(step) for _ in range(8)]]
    assert all(torch.equal(out, want) for out in outs)
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize(
    "way", [parametrizations.weight_norm, pytest.param(nn.utils.weight_norm, id="old weight_norm")]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_reparametrised_weights(way: Callable[[nn.Module], Any]) -> None:
    pair = layers()
    for layer in pair:
        way(layer.k_proj)
    for _ in range(2):
        same(*(gradients(layer, *inputs()) for layer in pair))


def test_what_would_lose_the_weights_gradient() -> None:
    _, layer = layers()
    parametrizations.weight_norm(layer.v_proj)
    with (
        parametrize.cached(),
        pytest.raises(NotImplementedError, match=r"streamed attention: parametrize.cached\(\)"),
    ):
        layer(*inputs())
    del layer.k_proj.weight
    layer.k_proj.weight = 2 * torch.ones(DIM, DIM, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"norm or projections depend on a tensor \(16, 16\)"):
        layer(*inputs()).sum().backward()


@pytest.mark.parametrize("name", ["positions", "rotary"])
def test_positions_get_no_gradient(name: str) -> None:
    _, layer = layers()
    places = torch.arange(float(LENGTH)).requires_grad_()
    kwargs: Any = {"positions": places, "rotary": layer.rotary(places, torch.float64)}
    with pytest.raises(ValueError, match="positions and rotary must not require a gradient"):
        layer(*inputs(), **{name: kwargs[name]})
    with torch.no_grad():
        layer(*inputs(), **{name: kwargs[name]})


@pytest.mark.parametrize("name", ["positions", "rotary", "key_mask", "tokens"])
def test_what_changed_before_the_backward(name: str) -> None:
    places = torch.arange(float(LENGTH))
    mask, ids = torch.ones(BATCH, LENGTH, dtype=torch.bool), tokens()
    _, layer = layers()
    cos, sin = layer.rotary(places, torch.float64)
    if name == "tokens":
        _, model = models()
        model.token_embedding.requires_grad_(False)  # the plain lookup of the latents is not to notice
        out = model(ids)
    else:
        given: Any = {"positions": places, "rotary": (cos, sin), "key_mask": mask}[name]
        out = layer(*inputs(), **{name: given})
    {"positions": places, "rotary": sin, "key_mask": mask, "tokens": ids}[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Noted(nn.Embedding):
    """Another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _subclass(model: Any) -> None:
    weight = model.token_embedding.weight
    model.token_embedding = Noted(17, 16, dtype=weight.dtype)
    model.token_embedding.weight = weight


def _pad(model: Any) -> None:
    model.token_embedding.padding_idx = 3


def _hook(model: Any) -> None:
    model.token_embedding.register_forward_hook(lambda module, args, out: 3 * out)


def _norm(model: Any) -> None:
    parametrizations.weight_norm(model.token_embedding)


@pytest.mark.parametrize("change", [_subclass, _pad, _hook, _norm])
def test_an_embedding_that_is_no_plain_one(change: Callable[[Any], None]) -> None:
    pair = models()
    for model in pair:
        change(model)
    same(*(gradients(model, tokens()) for model in pair))


@pytest.mark.parametrize(("name", "value"), [("max_norm", 0.5), ("scale_grad_by_freq", True)])
def test_embeddings_that_depend_on_all_their_tokens(name: str, value: Any) -> None:
    _, model = models()
    setattr(model.token_embedding, name, value)
    with pytest.raises(NotImplementedError, match="max_norm and scale_grad_by_freq are not"):
        model(tokens())


TABLE = torch.randn(11, DIM, dtype=torch.float64, generator=seeded(3)).requires_grad_()


def rows(x: Tensor, begin: int, end: int) -> Tensor:
    """(B, n, dim) of one row."""
    return x.expand(BATCH, end - begin, DIM)


def test_computed_inputs_that_depend_on_what_nobody_declared() -> None:
    """In one chunk alone; as a leaf itself; a neighbour of what is declared; where all else is constant."""
    message = r"compute depends on a tensor \(.*\) that requires a gradient: it must be among the parameters"
    first, second = TABLE.unbind(0)[:2]
    cases: list[tuple[Any, list[Tensor]]] = [
        (lambda begin, end: rows(TABLE[0] if begin else TABLE[0].detach(), begin, end), []),
        (lambda begin, end: torch.zeros(BATCH, end - begin, DIM, requires_grad=True), []),
        (lambda begin, end: rows(first + second, begin, end), [first]),
    ]
    for compute, parameters in cases:
        with pytest.raises(ValueError, match=message):
            layers()[1](inputs()[0], pk.Recomputed(compute, PREFIX, parameters)).sum().backward()
        constant = layers()[1].requires_grad_(False)
        if not parameters:
            with pytest.raises(ValueError, match=message):
                constant(inputs()[0], pk.Recomputed(compute, PREFIX))
        with torch.no_grad():
            constant(inputs()[0], pk.Recomputed(compute, PREFIX, parameters))


def test_parameters_that_would_count_twice() -> None:
    _, layer = layers()
    made = 2 * TABLE
    source = pk.Recomputed(lambda begin, end: rows(made[0], begin, end), PREFIX, [made, TABLE])
    with pytest.raises(ValueError, match="one of Recomputed's parameters was computed from another one"):
        layer(inputs()[0], source).sum().backward()
    once, twice = (
        pk.Recomputed(lambda begin, end: rows(TABLE[0], begin, end), PREFIX, [TABLE] * n) for n in (1, 2)
    )
    a, b = (torch.autograd.grad(layer(inputs()[0], s).square().sum(), TABLE) for s in (once, twice))
    torch.testing.assert_close(a, b)


def test_hooks_on_computed_inputs() -> None:
    """Refused, as each chunk would run them; a view of the parameter is the way out."""
    plain, layer = layers()
    table = TABLE.detach().requires_grad_()
    table.register_hook(lambda gradient: 2 * gradient)
    made = 1 * TABLE
    made.retain_grad()
    for parameter in (table, made):
        source = pk.Recomputed(lambda begin, end, t=parameter: rows(t[0], begin, end), PREFIX, [parameter])
        with pytest.raises(NotImplementedError, match=r"\(11, 16\) of Recomputed has hooks or retains"):
            layer(inputs()[0], source).sum().backward()
    view = table.view_as(table)
    prefixes = rows(table[0], 0, PREFIX), pk.Recomputed(lambda a, b: rows(view[0], a, b), PREFIX, [view])
    outs = (one(inputs()[0], prefix) for one, prefix in zip((plain, layer), prefixes, strict=True))
    same(*([torch.autograd.grad(out.square().sum(), table)[0]] for out in outs))


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda n: torch.zeros(BATCH, n + 1, DIM), ValueError, r"(2, 4, 16) at 0 to 4, got (2, 5, 16)"),
        (lambda n: torch.zeros(1, n, DIM), ValueError, r"(2, 4, 16) at 0 to 4, got (1, 4, 16)"),
        (lambda n: torch.zeros(BATCH, n, 1), ValueError, r"(2, 4, 16) at 0 to 4, got (2, 4, 1)"),
        (lambda n: torch.zeros(BATCH, 2, DIM), ValueError, r"(2, 4, 16) at 0 to 4, got (2, 2, 16)"),
        (lambda n: None, TypeError, "a torch.Tensor, got NoneType"),
        (lambda n: torch.zeros(BATCH, n, DIM).numpy(), TypeError, "a torch.Tensor, got ndarray"),
        (lambda n: torch.zeros(BATCH, n, DIM) * 1j, TypeError, "real numbers, got complex64"),
    ],
)
def test_computed_inputs_of_another_shape(give: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"compute(begin, end) must give {message}")):
        layers()[1](inputs()[0], pk.Recomputed(lambda begin, end: give(end - begin), PREFIX))
    source = pk.Recomputed(F.relu, PREFIX, at=lambda indices: give(indices.shape[1]))
    with pytest.raises(error, match=r"^at\(indices\) must give "):
        layers(prefix_dropout=0.3)[1](inputs()[0], source)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 9), TypeError, "compute must be callable, got NoneType"),
        ((F.relu, 9.0), TypeError, "length must be an int, got float"),
        ((F.relu, True), TypeError, "length must be an int, got bool"),
        ((F.relu, -1), ValueError, "length must be at least 0, got -1"),
        ((F.relu, 9, TABLE), TypeError, "parameters must be an iterable of tensors, got Tensor"),
        ((F.relu, 9, None), TypeError, "parameters must be an iterable of tensors, got NoneType"),
        ((F.relu, 9, [TABLE, 3]), TypeError, r"parameters\[1\] must be a torch.Tensor, got int"),
    ],
)
def test_bad_recomputed(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.Recomputed(*arguments)
    with pytest.raises(TypeError, match="at must be callable, got int"):
        pk.Recomputed(F.relu, 9, at=3)


def test_nothing_at_all() -> None:
    """No latents, no examples: as the plain layer."""
    latents, prefix = inputs()
    for layer in (*layers(), *layers(prefix_dropout=0.5)):
        assert layer(latents[:, :0], prefix).shape == (BATCH, 0, DIM)
        assert layer(latents[:0], prefix[:0]).shape == (0, LATENTS, DIM)
    assert layer(latents[:0], prefix[:0].numpy()).shape == (0, LATENTS, DIM)


def test_transforms_that_are_not_supported() -> None:
    _, layer = layers()
    latents, prefix = inputs()
    calls: list[Any] = [
        torch.func.grad(lambda x: layer(x, prefix).sum()),
        torch.func.vmap(lambda x: layer(x[None], prefix[:1])),
    ]
    for call in calls:
        with pytest.raises(
            NotImplementedError, match=r"streamed attention: torch\.func's transforms are not"
        ):
            call(latents)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="streamed attention: forward-mode differentiation is not"),
    ):
        layer(torch.autograd.forward_ad.make_dual(latents, latents), prefix)
