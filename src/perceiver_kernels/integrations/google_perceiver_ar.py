"""Google's own Perceiver AR (google-research/perceiver-ar, JAX and Haiku): its parameters, over the op.

    from perceiver_kernels.integrations.google_perceiver_ar import from_haiku
    model = from_haiku(params, num_cross_attend_heads=1, num_transformer_heads=8, max_wavelength=8192)
    logits = model(tokens, num_latents=1024)

``params`` is the flat tree that Haiku makes: ``{"perceiver_ar/~/cross_attention/attention/linear": {"w": (in,
out), "b": (out,)}, ...}``, of numpy arrays or anything that numpy reads. Where that model differs from
:class:`perceiver_kernels.PerceiverAR`: positions count back from the last input, which is 0; the wavelengths
of the rotary embedding are spaced evenly, in the logarithm, from 1 to ``max_wavelength``, both ends included;
latents go through a linear layer first; every linear layer has a bias; queries and keys have a norm each.
Not converted, and refused by name: several latents for a position, further cross-attentions, learned or MLP
initial queries, latents of another width than inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_kernels.layers import CrossAttention, FeedForward, SelfAttention
from perceiver_kernels.models.perceiver_ar import Block

ROOT = "perceiver_ar"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sq_relu": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # jax's default
    "silu": F.silu,
}


class Activation(nn.Module):
    """One of ``ACTIVATIONS`` by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in ACTIVATIONS:
            raise ValueError(f"activation_name must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """(...) to (...)."""
        return ACTIVATIONS[self.name](x)


class GooglePerceiverAR(nn.Module):
    """The architecture; :func:`from_haiku` says what the options mean."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_cross_attend_heads: int = 1,
        num_transformer_heads: int = 8,
        cross_attend_widening_factor: int = 1,
        transformer_widening_factor: int = 1,
        max_wavelength: float = 8192,
        fraction_to_rotate: float = 0.25,
        fraction_heads_to_rotate: float = 1.0,
        use_negative_rotary_positions: bool = False,
        activation_name: str = "sq_relu",
        absolute_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.sign = -1 if use_negative_rotary_positions else 1
        rotary: dict[str, Any] = {
            "bias": True,
            "rotary_layout": "interleaved",
            "rotary_fraction": fraction_to_rotate if absolute_positions is None else 0.0,
            "rotary_heads": fraction_heads_to_rotate,
            "rotary_base": max_wavelength,
            "rotary_endpoint": True,
        }

        def block(attention: CrossAttention, widening: int) -> Block:
            feed_forward = FeedForward(dim, mult=widening, bias=True)
            feed_forward[2] = Activation(activation_name)
            return Block(attention, feed_forward, 0.0)

        self.embed = nn.Embedding(vocab_size, dim)
        self.position_embed = None if absolute_positions is None else nn.Embedding(absolute_positions, dim)
        self.latents = nn.Linear(dim, dim)
        self.cross = block(
            CrossAttention(dim, num_cross_attend_heads, **rotary), cross_attend_widening_factor
        )
        self.blocks = nn.ModuleList(
            block(SelfAttention(dim, num_transformer_heads, **rotary), transformer_widening_factor)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens: Tensor, num_latents: int, pad_mask: Tensor | None = None) -> Tensor:
        """Logits of the token that follows each of the last positions.

        Args:
            tokens: (B, N) int64 or int32.
            num_latents: M, from 1 to N.
            pad_mask: bool (B, N), True = padding, on the left. (Google pads on the right; as positions count
                from the last token, moving the padding changes nothing else.)

        Returns:
            (B, M, vocab_size).
        """
        total = tokens.shape[1]
        if not 1 <= num_latents <= total:
            raise ValueError(
                f"num_latents must be from 1 to the input's {total} positions, got {num_latents}"
            )
        if pad_mask is not None and bool(pad_mask[:, -1].any()):
            raise ValueError("pad_mask must leave every example's last position: pad on the left")
        positions = torch.arange(total - 1, -1, -1, device=tokens.device)
        x = self.embed(tokens)
        if self.position_embed is not None:
            x = x + self.position_embed(positions)
        seen = None if pad_mask is None else ~pad_mask
        z = self.latents(x[:, total - num_latents :])
        turns = self.sign * positions
        z = self.cross(z, x, positions=turns, key_mask=seen)
        seen = None if seen is None else seen[:, total - num_latents :]
        for layer in self.blocks:
            z = layer(z, z, positions=turns[total - num_latents :], key_mask=seen)
        logits: Tensor = self.head(self.norm(z))
        return logits


def from_haiku(params: Mapping[str, Mapping[str, Any]], **options: Any) -> GooglePerceiverAR:
    """A model with these parameters, in float32.

    Sizes and the kind of positions are read off the tree. What it doesn't say are options, named and preset
    as in Google's configuration: ``num_cross_attend_heads``, ``num_transformer_heads``, ``max_wavelength``,
    ``fraction_to_rotate``, ``fraction_heads_to_rotate``, ``use_negative_rotary_positions``,
    ``activation_name``.

    Raises:
        ValueError: for a tree of another architecture, naming the modules or the parameter.
    """
    tree = {
        path.removeprefix(f"{ROOT}/"): {name: np.asarray(leaf) for name, leaf in leaves.items()}
        for path, leaves in params.items()
    }
    depth = sum(path.startswith("~/self_attention") and path.endswith("/dense/linear") for path in tree)
    absolute = "~/embed_1" in tree
    modules = _modules(depth, absolute)
    missing, unexpected = set(modules.values()) - set(tree), set(tree) - set(modules.values())
    if missing or unexpected:
        raise ValueError(
            f"this is no Perceiver AR that can be converted: missing {sorted(missing)}, "
            f"unexpected {sorted(unexpected)}"
        )
    vocab_size, dim = tree["~/embed"]["embeddings"].shape
    width = tree["~/linear"]["w"].shape[1]
    if width != dim:
        raise ValueError(f"latents have {width} channels and inputs {dim}: these must be equal")
    if depth:
        options["transformer_widening_factor"] = tree["~/self_attention/dense/linear"]["w"].shape[1] // dim
    model = GooglePerceiverAR(
        vocab_size,
        dim,
        depth,
        cross_attend_widening_factor=tree["~/cross_attention/dense/linear"]["w"].shape[1] // dim,
        absolute_positions=tree["~/embed_1"]["embeddings"].shape[0] if absolute else None,
        **options,
    )
    state = {name: tensor for ours, theirs in modules.items() for name, tensor in _leaves(ours, tree[theirs])}
    for name, parameter in model.state_dict().items():
        if name not in state or state[name].shape != parameter.shape:
            got = tuple(state[name].shape) if name in state else None
            raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {got}")
    model.load_state_dict(state)
    return model


def _modules(depth: int, absolute: bool) -> dict[str, str]:
    """Our modules' names and Haiku's: "~" is the constructor, and repeated classes are numbered in order."""
    names = {"embed": "~/embed", "latents": "~/linear", "norm": "layer_norm", "head": "~/logits"}
    if absolute:
        names["position_embed"] = "~/embed_1"
    layers = {"cross": "~/cross_attention"}
    layers |= {f"blocks.{i}": "~/self_attention" + (f"_{i}" if i else "") for i in range(depth)}
    for ours, theirs in layers.items():
        norms = ["attention.norm", "attention.kv_norm", "feed_forward.0"]
        if ours != "cross":
            norms.remove("attention.kv_norm")
        projections = [f"attention.{name}_proj" for name in ("q", "k", "v", "out")]
        for inner, group in (
            ("layer_norm", norms),
            ("attention/linear", projections),
            ("dense/linear", ["feed_forward.1", "feed_forward.4"]),
        ):
            for i, name in enumerate(group):
                names[f"{ours}.{name}"] = f"{theirs}/{inner}" + (f"_{i}" if i else "")
    return names


def _leaves(module: str, leaves: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Haiku's linear weights are (in, out), torch's (out, in)."""
    ours = {"w": "weight", "b": "bias", "scale": "weight", "offset": "bias", "embeddings": "weight"}
    return [
        (f"{module}.{ours[name]}", torch.tensor(leaf.T if name == "w" else leaf, dtype=torch.float32))
        for name, leaf in leaves.items()
    ]
