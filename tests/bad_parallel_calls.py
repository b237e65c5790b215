"""Context parallel calls in which rank 1 is the odd one: each raises on every rank, and nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import perceiver_kernels as pk

Calls = list[tuple[Callable[[], Any], str]]


def differ(name: str, first: Any, other: Any) -> str:
    """What every rank says where rank 1 alone has another argument."""
    return (
        f"ValueError: {name} must be the same on every rank, got {first!r} on rank 0 and {other!r} on rank 1"
    )


def refused(error: str) -> str:
    """What this rank says where rank 1's argument is this error."""
    return (
        error if dist.get_rank() == 1 else f"ValueError: rank 1 of the group refused its arguments: {error}"
    )


def bad_ops(odd: bool, **options: Any) -> Calls:
    """Calls of the op in which one rank is the odd one, and what this rank says."""
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    rank, world = dist.get_rank(), dist.get_world_size()

    def op(query: Any = q, key: Any = k, value: Any = v, **more: Any) -> Callable[[], Any]:
        return lambda: pk.context_parallel_attention(query, key, value, **(options | more))

    def given(lengths: Any) -> Callable[[], Any]:
        return op(lengths=lengths)

    def one_other(name: str, usual: Any, other: Any) -> tuple[Callable[[], Any], str]:
        return op(**{name: other if odd else usual}), differ(name, usual, other)

    far = torch.tensor([3])
    return [
        (op(key=k[:, :1] if odd else k), refused("ValueError: value has 2 heads, but key has 1")),
        (op(query="query" if odd else q), refused("TypeError: query must be a torch.Tensor, got str")),
        (op(return_lse="yes" if odd else False), refused("TypeError: return_lse must be a bool, got str")),
        (op(return_lse=None if odd else True), refused("TypeError: return_lse must be a bool, got NoneType")),
        (op(query=q[:, :, odd:]), differ("query's shape", (1, 2, 3, 8), (1, 2, 2, 8))),
        (op(*(t.double() for t in (q, k, v))) if odd else op(),
         differ("query's dtype", torch.float32, torch.float64)),
        (op(key=k[:, odd:], value=v[:, odd:]), differ("key's number of heads", 2, 1)),
        (op(value=v[..., odd:]), differ("value's head dim", 8, 7)),
        one_other("is_causal", True, False),
        one_other("q_offset", None, 3),
        (op(q_offset=far + odd), differ("q_offset", [3], [4])),
        one_other("scale", 0.5, 1.5),
        one_other("softcap", None, 2.0),
        one_other("dropout_p", 0.1, 0.2),
        one_other("dropout_seed", None, 7),
        one_other("return_lse", False, True),
        one_other("backend", None, "reference"),
        (op(query=q.clone().requires_grad_(not odd)), differ("whether a gradient is needed", True, False)),
        (given([9] * (world - 1)),
         f"ValueError: lengths must be one for each of the group's {world} ranks, got {world - 1}"),
        (given([8] * world), f"ValueError: lengths[{rank}] is 8, but this rank's key has 9 positions"),
        (given(9), "TypeError: lengths must be a sequence of ints, got int"),
        (given([9.0] * world), "TypeError: lengths[0] must be an int, got float"),
        (given("9" * world), "TypeError: lengths[0] must be an int, got str"),
        (given([9, -9]), "ValueError: lengths[1] must be at least 0, got -9"),
        (op(lengths=[9] * world, dropout_p=0.1), "ValueError: dropout_seed must be given where lengths are"),
        (op(group="ranks"),
         "TypeError: group must be a ProcessGroup that this rank is in, a DeviceMesh or None, got str"),
    ]  # fmt: skip


def bad_layers(odd: bool, **options: Any) -> Calls:
    """Calls of the layer."""
    x, prefix = torch.randn(2, 4, 24), torch.randn(2, 9, 24)
    mask, places = torch.ones(2, 13, dtype=torch.bool), torch.arange(13)

    def layer(latents: Any = x, prefix: Any = prefix, made: Any = None, **more: Any) -> Callable[[], Any]:
        made = {"num_heads": 4} | (made or {})
        return lambda: pk.CrossAttention(24, **made)(latents, prefix, **options, **more)

    def one_other(name: str, usual: Any, other: Any) -> tuple[Callable[[], Any], str]:
        return layer(made={name: other if odd else usual}), differ(name, usual, other)

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=odd):
            return layer()()

    lookup = pk.Recomputed(lambda begin, end: prefix[:, begin:end], 9)
    return [
        (layer(latents=[1.0] if odd else x), refused("TypeError: latents must be a torch.Tensor, got list")),
        (layer(latents=x[0] if odd else x), refused("ValueError: latents must be (B, M, 24), got (4, 24)")),
        (layer(latents=x.double() if odd else x, prefix=None),
         differ("latents' dtype", torch.float32, torch.float64)),
        (layer(latents=x[:, odd:]), differ("latents' shape", (2, 4, 24), (2, 3, 24))),
        (layer(prefix="prefix" if odd else prefix),
         refused("TypeError: prefix must be a torch.Tensor where the layer is not streamed, got str")),
        (layer(prefix=prefix[..., odd:]),
         refused("ValueError: prefix must be (2, N - M, 24), got (2, 9, 23)")),
        (layer(prefix=prefix.double() if odd else prefix),
         refused("TypeError: prefix is float64, but latents is float32")),
        (layer(prefix=lookup if odd else prefix, made={"streamed": True, "prefix_dropout": 0.5}),
         refused("ValueError: prefix dropout over Recomputed inputs needs them as a function")),
        (layer(key_mask=mask[:, odd:]), refused("ValueError: key_mask must be (2, 13), prefix and latents")),
        (layer(key_mask=mask.long() if odd else mask),
         refused("TypeError: key_mask must be bool, got int64")),
        (layer(positions=places[odd:]), refused("ValueError: rotary positions must be (13,) or (2, 13)")),
        (layer(rotary=torch.ones(2, 13, 2) if odd else None),
         refused("TypeError: rotary must be cos and sin, a pair of tensors, got Tensor")),
        one_other("num_heads", 4, 2),
        one_other("num_kv_heads", 4, 2),
        one_other("scale", None, 0.5),
        one_other("softcap", None, 2.0),
        one_other("dropout", 0.1, 0.2),
        one_other("prefix_dropout", 0.0, 0.5),
        one_other("backend", None, "reference"),
        (autocast, differ("the parameters' dtypes", ["torch.float32"], ["torch.bfloat16"])),
        (lambda: pk.CrossAttention(24, 4).train(odd)(x, prefix, **options), differ("training", False, True)),
        (lambda: pk.CrossAttention(24, 4).requires_grad_(odd)(x, prefix, **options),
         differ("how many parameters need a gradient", 0, 8)),
        (lambda: pk.context_parallel_attention(x[None], x[None], x[None], **options) if odd else layer()(),
         differ("the call", "CrossAttention", "context_parallel_attention")),
    ]  # fmt: skip


def bad_models(odd: bool, **options: Any) -> Calls:
    """Calls of the model."""
    tokens, pad = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.bool)

    def model(
        tokens: Any = tokens, num_latents: Any = 3, pad_mask: Any = None, **made: Any
    ) -> Callable[[], Any]:
        sizes = {"vocab_size": 17, "dim": 24, "depth": 1, "num_heads": 4, "max_seq_len": 64, "num_latents": 9}
        config = pk.PerceiverARConfig(**(sizes | made))
        return lambda: pk.PerceiverAR(config)(tokens, num_latents, pad_mask, **options)

    return [
        (model("text" if odd else tokens), refused("TypeError: tokens must be a torch.Tensor, got str")),
        (model(tokens.float() if odd else tokens),
         refused("TypeError: tokens must be int64 or int32, got torch.float32")),
        (model(tokens.int() if odd else tokens), differ("tokens' dtype", torch.int64, torch.int32)),
        (model(tokens[odd:]), differ("tokens' batch size", 2, 1)),
        (model(num_latents="3" if odd else 3), refused("TypeError: num_latents must be an int, got str")),
        (model(num_latents=3.5 if odd else 3), refused("TypeError: num_latents must be an int, got float")),
        (model(num_latents=None if odd else 3), differ("num_latents", 3, None)),
        (model(pad_mask=pad[:, odd:]),
         refused("ValueError: pad_mask must be (2, 8) like tokens, got (2, 7)")),
        (model(pad_mask="mask" if odd else pad),
         refused("TypeError: pad_mask must be a torch.Tensor, got str")),
        (model(pad_mask=pad if odd else None), differ("whether pad_mask is given", False, True)),
        (model(prefix_dropout=0.5 * odd), differ("config.prefix_dropout", 0.0, 0.5)),
        (model(activation_checkpointing=odd), differ("config.activation_checkpointing", False, True)),
    ]  # fmt: skip


BAD_CALLS = (bad_ops, bad_layers, bad_models)
