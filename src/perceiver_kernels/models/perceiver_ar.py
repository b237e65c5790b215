"""Perceiver AR (Hawthorne et al. 2022, arXiv 2202.07765): long context, short latents.

The last M positions of the input are the latents. A causal cross-attention reads all N inputs into them,
then ``depth`` causal self-attention layers work on the M latents alone: context costs N M, depth costs M^2.
Further cross-attentions may follow layers of choice, and several latents may stand at each position.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perceiver_kernels.checks import check_device, check_ids, check_int, check_tensor
from perceiver_kernels.generation import generate
from perceiver_kernels.kv_cache import KVCache
from perceiver_kernels.layers import CrossAttention, FeedForward, SelfAttention
from perceiver_kernels.models.checkpoint import check_state, read_model, write_model
from perceiver_kernels.models.config import PerceiverARConfig
from perceiver_kernels.models.loss import next_token_loss, random_crop
from perceiver_kernels.models.positions import fourier, initial_table, sinusoids, table_rows
from perceiver_kernels.recomputation import Snapshot
from perceiver_kernels.rotary import positions_from_padding, right_aligned_positions
from perceiver_kernels.scoring import score
from perceiver_kernels.streaming import Recomputed, Source

if TYPE_CHECKING:  # a torch without torch.distributed has no such modules
    from perceiver_kernels.collectives import Group
    from perceiver_kernels.distributed import Slices


class Block(nn.Module):
    """One attention and one feed-forward update of the latents."""

    def __init__(self, attention: CrossAttention, feed_forward: FeedForward, dropout: float) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.dropout = attention, feed_forward, nn.Dropout(dropout)

    def forward(self, latents: Tensor, inputs: Tensor | Source, **options: Any) -> Tensor:
        """(B, M, dim), (B, n, dim) to (B, M, dim); options as in :meth:`CrossAttention.attend`."""
        latents = latents + self.dropout(self.attention.attend(latents, inputs, **options))
        latents = latents + self.dropout(self.feed_forward(latents))
        return latents


class _LookUp(Snapshot):
    """An embedding as it is now, for one chunk after the other."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(table)
        if table.max_norm is not None or table.scale_grad_by_freq:
            raise NotImplementedError("streamed: max_norm and scale_grad_by_freq are not supported")
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        hooked = any(getattr(table, kind) for kind in kinds)
        self.plain = type(table) is nn.Embedding and table.padding_idx is None and not hooked
        self.rows = table.num_embeddings

    def __call__(self, indices: Tensor) -> Any:
        """A long table's gradient is sparse, or every chunk would make one of the table's size."""
        if self.plain and self.rows > indices.numel():
            return F.embedding(indices, self.tensors[0], sparse=True)
        return super().__call__(indices)


class PerceiverAR(nn.Module):
    """A Perceiver AR over tokens. See :class:`PerceiverARConfig` and :meth:`forward`."""

    def __init__(self, config: PerceiverARConfig) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rotary_fraction": config.rotary_fraction,
            "rotary_heads": config.rotary_heads,
            "rotary_layout": config.rotary_layout,
            "rotary_base": config.rotary_base,
            "rotary_endpoint": config.rotary_endpoint,
            "dropout": config.attention_dropout,
        }

        def block(attention: CrossAttention) -> Block:
            return Block(
                attention,
                FeedForward(
                    config.dim, mult=config.ff_mult, activation=config.activation, dropout=config.dropout
                ),
                config.dropout,
            )

        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(sum(config.index_shape), config.dim) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        several = config.latents_per_position > 1
        self.latent_embedding = nn.Embedding(config.latents_per_position, config.dim) if several else None

        def cross() -> Block:
            return block(
                CrossAttention(
                    config.dim,
                    config.num_heads,
                    prefix_dropout=config.prefix_dropout,
                    streamed=config.streamed,
                    chunk_size=config.chunk_size,
                    **options,
                )
            )

        self.cross = cross()
        self.blocks = nn.ModuleList(
            block(SelfAttention(config.dim, config.num_heads, **options)) for _ in range(config.depth)
        )
        self.later_crosses = nn.ModuleList(cross() for _ in config.cross_after)
        self.norm = nn.LayerNorm(config.dim)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights.

        Unit-variance embeddings (next to the sinusoids' 1/2), projections of unit gain, updates scaled down
        by the number of them so that the residual stream keeps its size, and nearly uniform predictions.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        blocks = (self.cross, *self.blocks, *self.later_crosses)
        for block in blocks:
            for output in (block.attention.out_proj, block.feed_forward[-1]):
                output.weight.div_(math.sqrt(2 * len(blocks)))
        nn.init.normal_(self.token_embedding.weight)
        if self.latent_embedding is not None:
            nn.init.normal_(self.latent_embedding.weight, std=0.1)
        # Small logits. A tied output would first of all predict the input token again: the latents still
        # hold its embedding.
        if self.head is None:
            nn.init.constant_(self.norm.weight, 0.1)
        else:
            self.head.weight.mul_(0.0 if self.config.zero_head else 0.1)
        if self.position_embedding is not None:
            config = self.config
            table = initial_table(config.index_shape, config.dim, base=config.position_base)
            self.position_embedding.weight.copy_(table)

    def forward(
        self,
        tokens: Tensor,
        num_latents: int | None = None,
        pad_mask: Tensor | None = None,
        *,
        group: Group = None,
    ) -> Tensor:
        """Logits of the token that follows each of the last positions.

        The cross-attention gives each latent position its vector whatever the other latents are; only the
        self-attention layers see how many there are. So with ``depth=0`` the logits of a position do not
        depend on ``num_latents``, and otherwise they do: more latents is more compute and more context for
        the deep layers, without retraining.

        Args:
            tokens: (B, N) int64 or int32, N from 1 to ``max_seq_len``.
            num_latents: M, from 1 to N. None: the configured number, or N where the input is shorter.
            pad_mask: bool (B, N), True = padding. Padding is never attended to, and positions count real
                tokens only, so a left-padded example gives the logits of the unpadded one (up to its own
                number of tokens). The latents are always the last M *columns*: with padding on the right, an
                example's last columns are padding, whose logits mean nothing (leave them out of the loss),
                and its real logits are those of its real columns among the last M. Pad on the left where
                every example's last tokens matter.
            group: context parallel over these ranks (:mod:`perceiver_kernels.distributed`): ``tokens`` and
                ``pad_mask`` are then this rank's slice of the N positions, in the order of the ranks and of
                any length, none included. Every rank gets the last M tokens, computes all layers of the
                latents, and returns the same logits; the keys alone are shared out. Average the gradients
                over the group as DDP and FSDP do. In training all ranks draw the same dropout for the latents
                (from rank 0's torch generator) and each its own for its slice.

        Returns:
            (B, M, vocab_size).
        """
        if group is None:
            total, slices = self._check_call(tokens, num_latents, pad_mask), None
        else:
            slices = self._share(tokens, num_latents, pad_mask, group)
            total = slices.total
        if not 1 <= total <= self.config.max_seq_len:
            raise ValueError(
                f"tokens must have from 1 to max_seq_len {self.config.max_seq_len} positions, got {total}"
            )
        if num_latents is None:
            num_latents = min(self.config.num_latents, total)
        if not 1 <= num_latents <= total:
            raise ValueError(
                f"num_latents must be from 1 to the {total} positions of the input, got {num_latents}"
            )
        if slices is not None:
            return self._forward_slice(tokens, num_latents, pad_mask, slices)
        positions = right_aligned_positions(total, total, device=tokens.device)
        key_mask = None
        if pad_mask is not None:
            positions, key_mask = positions_from_padding(pad_mask), ~pad_mask
        prefix, places = total - num_latents, self._places(positions)
        inputs: Tensor | Source
        if self.config.streamed:
            own = self.embed(tokens[:, prefix:], places[..., prefix:])
            inputs = self.embed_in_chunks(tokens[:, :prefix], places[..., :prefix])
        else:
            inputs = self.embed(tokens, places)
            own = inputs[:, prefix:]
        return self.logits(self.read(own, inputs, positions, key_mask))

    def loss(self, tokens: Tensor, num_latents: int | None = None, pad_mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy, in nats, of the token after each of the last M.

        In training with the configured ``label_smoothing``, ``z_loss`` and ``random_crop``; in eval mode the
        plain one. (A wrapper such as DDP sees calls of itself only: give its logits to
        :func:`perceiver_kernels.models.loss.next_token_loss`.)

        Args:
            tokens: (B, N + 1), inputs and, one further, targets.
            num_latents: M, as in :meth:`forward`.
            pad_mask: bool (B, N + 1), True = padding, on either side. Only tokens that follow a token count.

        Returns:
            A scalar.
        """
        self.check_tokens(tokens, pad_mask)
        config, length = self.config, tokens.shape[1] - 1
        if not 1 <= length <= config.max_seq_len:
            raise ValueError(
                f"tokens must have from 2 to max_seq_len + 1 = {config.max_seq_len + 1} positions, "
                f"inputs and the last target, got {length + 1}"
            )
        num_latents = min(config.num_latents, length) if num_latents is None else num_latents
        if self.training and config.random_crop:
            tokens, pad_mask = random_crop(tokens, pad_mask, num_latents + 1)
        counted = None
        if pad_mask is not None:
            counted = ~(pad_mask[:, 1:] | pad_mask[:, :-1])[:, -num_latents:]
        logits = self(tokens[:, :-1], num_latents, None if pad_mask is None else pad_mask[:, :-1])
        extras = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss} if self.training else {}
        return next_token_loss(logits, tokens[:, -num_latents:], counted, **extras)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, n) at absolute positions (n,) or (B, n) to (B, n, dim)."""
        return self._embed(tokens, positions, self.token_embedding, self.position_embedding, self.dropout)

    def embed_in_chunks(self, tokens: Tensor, positions: Tensor) -> Recomputed:
        """What :meth:`embed` gives, each chunk when it is wanted: a prefix for streamed layers."""
        table, dropout = _LookUp(self.token_embedding), Snapshot(self.dropout)
        position_table = None if self.position_embedding is None else _LookUp(self.position_embedding)

        def embed(tokens: Tensor, positions: Tensor) -> Tensor:
            return self._embed(tokens, positions, table, position_table, dropout)

        return Recomputed(
            lambda begin, end: embed(tokens[:, begin:end], positions[..., begin:end]),
            tokens.shape[1],
            [*table.tensors, *(position_table.tensors if position_table else []), tokens, positions],
            at=lambda kept: embed(tokens.gather(1, kept), positions.expand_as(tokens).gather(1, kept)),
        )

    def _embed(
        self,
        tokens: Tensor,
        positions: Tensor,
        table: Callable[[Tensor], Tensor],
        position_table: Callable[[Tensor], Tensor] | None,
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        x = table(tokens)
        shape, dim = self.config.index_shape, self.config.dim
        if position_table is not None:
            for rows in table_rows(positions, shape):
                x = x + position_table(rows)
        elif self.config.positions == "sinusoidal":
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            base = self.config.position_base
            x = x + sinusoids(positions, shape, dim, base=base, dtype=wide).to(x.dtype)
        elif self.config.positions == "fourier":
            x = x + fourier(positions, shape, dim).to(x.dtype)
        return dropout(x)

    def _places(self, positions: Tensor) -> Tensor:
        """Absolute positions of inputs at positions (n,) or (B, n), of which the last is the last of all."""
        return positions if self.config.position_origin == "first" else positions[..., -1:] - positions

    def read(
        self,
        own: Tensor,
        inputs: Tensor | Source,
        positions: Tensor,
        key_mask: Tensor | None = None,
        caches: Sequence[KVCache | None] | None = None,
        slices: Slices | None = None,
    ) -> Tensor:
        """All layers up to the last norm: inputs (B, n, dim) into the latents of the last M positions.

        Args:
            own: (B, M, dim), the embedded inputs at these positions, from which the latents start.
            inputs: all of them, own included, or a source of what stands before own.
            positions: (L,) or (B, L), L = max(M, n), right-aligned with the inputs like ``key_mask`` (B, N).
            caches: one :class:`KVCache` (or None) for each cross-attention, then for each layer:
                generation's way in.
            slices: that of :meth:`CrossAttention.attend`.

        Returns:
            (B, M * latents_per_position, dim).
        """
        several, num_positions = self.config.latents_per_position, own.shape[1]
        crosses = (self.cross, *self.later_crosses)
        if caches is None:
            caches = [None] * (len(crosses) + len(self.blocks))

        def cross(index: int, latents: Tensor) -> Tensor:
            return self._run(
                crosses[index],
                latents,
                inputs,
                own=own,
                per_position=several,
                positions=positions,
                key_mask=key_mask,
                cache=caches[index],
                slices=None if slices is None else slices.of_layer(index),
            )

        latents = own
        if self.latent_embedding is not None:
            latents = own.repeat_interleave(several, 1) + self.latent_embedding.weight.repeat(
                num_positions, 1
            )
        latents = cross(0, latents)
        rotary = self.cross.attention.rotary(
            positions[..., positions.shape[-1] - num_positions :].repeat_interleave(several, -1), own.dtype
        )
        kept = None
        if self.training and self.config.latent_dropout > 0.0:
            kept = torch.rand(latents.shape[:2], device=latents.device) >= self.config.latent_dropout
        for i, block in enumerate(self.blocks):
            cache = caches[len(crosses) + i]
            seen = None
            if key_mask is not None:
                stored = 0 if cache is None else cache.length // several
                seen = key_mask[:, key_mask.shape[1] - stored - num_positions :].repeat_interleave(several, 1)
            if kept is not None:
                seen = kept if seen is None else seen & kept
            latents = self._run(block, latents, latents, rotary=rotary, key_mask=seen, cache=cache)
            if i in self.config.cross_after:
                latents = cross(1 + self.config.cross_after.index(i), latents)
        return latents

    def _run(self, block: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        """A block's latents; where configured, what it computes on the way is computed again later."""
        if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, **options)  # type: ignore[no-any-return]
        latents: Tensor = block(*inputs, **options)
        return latents

    def logits(self, latents: Tensor) -> Tensor:
        """Latents (B, M * latents_per_position, dim) to logits (B, M, vocab_size)."""
        latents = self.norm(latents)
        if self.config.latents_per_position > 1:
            latents = torch.unflatten(latents, 1, (-1, self.config.latents_per_position)).mean(2)
        if self.head is not None:
            return F.linear(latents, self.head.weight)
        # The embedding has unit variance; a projection of unit gain has 1 / dim.
        return F.linear(latents * self.config.dim**-0.5, self.token_embedding.weight)

    def generate(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Prompt (B, n) to (B, n + max_new_tokens): :func:`perceiver_kernels.generation.generate`."""
        return generate(self, prompt, max_new_tokens, **options)

    def score(self, tokens: Tensor, stride: int | None = None, **options: Any) -> Tensor:
        """Log-probabilities of tokens (B, N) but the first: :func:`perceiver_kernels.scoring.score`."""
        return score(self, tokens, stride, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration and a digest into one safetensors file, all of it or nothing."""
        write_model(path, self.state_dict(), self.config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> PerceiverAR:
        """Read a model that :meth:`save` wrote, in the dtype that it was saved in.

        Raises:
            ValueError: for a file that is truncated, damaged, or not one of :meth:`save`'s; see
                :mod:`perceiver_kernels.models.checkpoint`. There is never a half-loaded model.
        """
        config, state = read_model(path)
        with torch.device("meta"):
            model = cls(config)
        check_state(os.fspath(path), model, state)
        model.load_state_dict({name: t.to(device) for name, t in state.items()}, assign=True)
        return model

    def _share(
        self, tokens: Tensor, num_latents: int | None, pad_mask: Tensor | None, group: Group
    ) -> Slices:
        from perceiver_kernels.distributed import Slices

        def describe() -> tuple[int, dict[str, Any]]:
            length = self._check_call(tokens, num_latents, pad_mask)
            facts = {
                "tokens' batch size": tokens.shape[0],
                "tokens' dtype": tokens.dtype,
                "num_latents": None if num_latents is None else int(num_latents),
                "whether pad_mask is given": pad_mask is not None,
            }
            config = dataclasses.asdict(self.config)
            for name in ("streamed", "chunk_size"):  # each may have a way of its own to walk its slice
                del config[name]
            return length, facts | {f"config.{name}": value for name, value in config.items()}

        slices: Slices = Slices.share(group, self, tokens, describe)
        return slices

    def _forward_slice(
        self, tokens: Tensor, num_latents: int, pad_mask: Tensor | None, slices: Slices
    ) -> Tensor:
        """:meth:`forward` of the rank that holds this slice of the tokens."""
        prefix, device = slices.first(slices.total - num_latents), tokens.device
        own = prefix.lengths[prefix.rank]
        if pad_mask is None:
            (last,) = slices.last(num_latents, tokens)
            positions, key_mask = prefix.positions(num_latents, device), None
        else:
            last, last_padded = slices.last(num_latents, tokens, pad_mask.long())
            key_mask = ~torch.cat((pad_mask[:, :own], last_padded.bool()), dim=1)
            before, all_before = prefix.counted(key_mask[:, :own].sum(1, keepdim=True))
            counts = key_mask[:, :own].cumsum(1) + before, key_mask[:, own:].cumsum(1) + all_before
            positions = (torch.cat(counts, dim=1) - 1).clamp(min=0)
        inputs: Tensor | Source
        places = self._places(positions)
        if self.config.streamed:
            inputs = self.embed_in_chunks(tokens[:, :own], places[..., :own])
        else:
            with prefix.randomness("embeddings", device):
                inputs = self.embed(tokens[:, :own], places[..., :own])
        with prefix.randomness("latents", device, shared=True):
            latents = self.embed(last, places[..., own:])
            inputs = torch.cat((inputs, latents), dim=1) if isinstance(inputs, Tensor) else inputs
            return self.logits(self.read(latents, inputs, positions, key_mask, slices=prefix))

    def _check_call(self, tokens: Tensor, num_latents: int | None, pad_mask: Tensor | None) -> int:
        """Refuse what no input length makes right; returns this one's."""
        self.check_tokens(tokens, pad_mask)
        if num_latents is not None:
            check_int("num_latents", num_latents)
        return tokens.shape[1]

    def check_tokens(self, tokens: Tensor, pad_mask: Tensor | None) -> None:
        """Refuse what is not a batch of tokens."""
        check_tensor("tokens", tokens)
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (B, N), got {tuple(tokens.shape)}")
        check_ids("tokens", tokens, self.config.vocab_size)
        if pad_mask is not None:
            check_tensor("pad_mask", pad_mask)
            if pad_mask.dtype != torch.bool:
                raise TypeError(f"pad_mask must be bool, got {pad_mask.dtype}")
            if pad_mask.shape != tokens.shape:
                raise ValueError(
                    f"pad_mask must be {tuple(tokens.shape)} like tokens, got {tuple(pad_mask.shape)}"
                )
            check_device("pad_mask", pad_mask, "tokens", tokens)
