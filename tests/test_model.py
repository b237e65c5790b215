"""PerceiverAR: what moves its logits and what must not, initialisation, saving, bad input."""

import dataclasses

import pytest
import torch
from conftest import DEVICE, seeded

import perceiver_kernels as pk
from perceiver_kernels.models import PerceiverAR, PerceiverARConfig

CONFIG = PerceiverARConfig(
    vocab_size=17, dim=32, depth=2, num_heads=4, max_seq_len=64, num_latents=8, ff_mult=2
)
VARIANTS = [
    {},
    {"num_kv_heads": 2, "positions": "learned", "tie_embeddings": True},
    {"positions": "none", "rotary_layout": "interleaved", "rotary_fraction": 1.0, "head_dim": 6},
    {"depth": 0, "rotary_fraction": 0.0, "position_base": 100.0},
    {"rotary_heads": 0.5, "rotary_endpoint": True, "rotary_base": 64.0},
    {"positions": "fourier", "rotary_fraction": 0.0, "activation": "squared_relu"},
    {"cross_after": (0, 1), "depth": 3, "activation": "geglu"},
    {"latents_per_position": 3, "num_kv_heads": 2, "cross_after": (0,), "rotary_heads": 0.5},
    {"positions": "learned", "position_shape": (4, 8, 2), "position_origin": "last"},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Hundreds of tiny steps: waiting for a second thread would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(**changes):
    torch.manual_seed(0)
    return PerceiverAR(dataclasses.replace(CONFIG, **changes)).double().eval()


def draw(*shape):
    return torch.randint(0, CONFIG.vocab_size, shape, generator=seeded(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("length", "num_latents"), [(1, None), (3, None), (8, 1), (40, None), (40, 40), (64, 3)]
)
def test_shapes(changes, length, num_latents):
    logits = build(**changes)(draw(2, length), num_latents=num_latents)
    assert logits.shape == (2, min(8, length) if num_latents is None else num_latents, CONFIG.vocab_size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_future_moves_nothing_bit_by_bit(changes):
    model, tokens = build(**changes).float(), draw(2, 30)
    before = model(tokens)
    for column in (0, 21, 22, 25, 29):
        other = tokens.clone()
        other[:, column] = (other[:, column] + 1) % CONFIG.vocab_size
        after = model(other)
        first = max(column - 22, 0)  # latents stand at columns 22 to 29
        assert torch.equal(before[:, :first], after[:, :first])
        assert (before[:, first:] != after[:, first:]).any(-1).any(-1).all()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("pads", [1, 13, 24, 28])
def test_left_padding_is_no_padding(changes, pads):
    """24 pads leave 6 real tokens for 8 latents: padding inside the latents' window too."""
    model, tokens = build(**changes), draw(2, 30)
    pad_mask = torch.zeros(2, 30, dtype=torch.bool)
    pad_mask[1, :pads] = True
    got = model(tokens, pad_mask=pad_mask)
    real = min(8, 30 - pads)
    close(got[1, -real:], model(tokens[1:, pads:], num_latents=real)[0])
    close(got[0], model(tokens[:1])[0])
    assert got.isfinite().all()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_padding_future_and_other_examples_move_nothing_bit_by_bit(changes, side, streamed):
    """All at once: pads take other tokens, so does all that follows a column, so does the other example."""
    model, tokens = build(streamed=streamed, chunk_size=7, **changes).float(), draw(2, 30)
    pad_mask = torch.zeros(2, 30, dtype=torch.bool)
    if side != "right":
        pad_mask[0, :25] = True
        pad_mask[1, :3] = True
    if side != "left":
        pad_mask[1, 27:] = True
    before = model(tokens, pad_mask=pad_mask)
    for example in (0, 1):
        for column in (24, 26, 29):  # latents stand at columns 22 to 29
            changed = pad_mask | (torch.arange(30) > column)
            changed[1 - example] = True
            after = model(torch.where(changed, (tokens + 5) % CONFIG.vocab_size, tokens), pad_mask=pad_mask)
            kept = ~changed[example, 22:]
            assert kept.any() or (example, column) == (0, 24)
            assert torch.equal(before[example, kept], after[example, kept])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_gradient_bit_by_bit(side):
    model, tokens = build().float(), draw(2, 30)
    pad_mask = torch.zeros(2, 30, dtype=torch.bool)
    pad_mask[:, 27:] = side == "right"
    pad_mask[:, :12] = side == "left"
    other, results = torch.where(pad_mask, (tokens + 5) % CONFIG.vocab_size, tokens), []
    for x in (tokens, other):
        logits = model(x, pad_mask=pad_mask)[~pad_mask[:, 22:]]
        results.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_right_padding_keeps_the_logits_of_real_columns():
    model, tokens = build(), draw(1, 30)
    pad_mask = torch.zeros(1, 30, dtype=torch.bool)
    pad_mask[0, 27:] = True
    close(model(tokens, pad_mask=pad_mask)[:, :5], model(tokens[:, :27], num_latents=5))


def test_padded_gradients_are_the_unpadded_ones():
    model, tokens = build(), draw(1, 20)

    def grads(tokens, **options):
        model.zero_grad()
        model(tokens, **options)[:, -5:].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    pad_mask = torch.arange(20)[None] < 9
    want, got = grads(tokens[:, 9:]), grads(tokens, pad_mask=pad_mask)
    for name in want:
        close(got[name], want[name])


def test_number_of_latents_changes_only_what_the_deep_layers_see():
    tokens = draw(2, 40)
    shallow = build(depth=0)
    close(shallow(tokens, num_latents=5), shallow(tokens, num_latents=40)[:, -5:])
    deep = build()
    few, many = deep(tokens, num_latents=5), deep(tokens, num_latents=12)
    assert (few - many[:, -5:]).abs().max() > 1e-4
    # All positions latent is a plain causal transformer: its logits are those of every shorter input.
    close(deep(tokens[:, :11], num_latents=11), deep(tokens, num_latents=40)[:, :11])


def test_a_later_cross_attention_reads_the_prefix_after_its_layer():
    """With the first reading's update silenced, the prefix comes in through the later one alone."""
    model, tokens = build(cross_after=(1,)), draw(1, 30)
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        model.cross.attention.out_proj.weight.zero_()
    assert not torch.equal(model(tokens), model(other))
    with torch.no_grad():
        model.later_crosses[0].attention.out_proj.weight.zero_()
    assert torch.equal(model(tokens), model(other))


def test_several_latents_for_a_position_by_hand():
    """One query for each of them over the keys up to their position; then causal among all latents."""
    model, tokens = build(latents_per_position=2, depth=1, num_kv_heads=2, cross_after=(0,)), draw(1, 12)
    with torch.no_grad():
        model.latent_embedding.weight.normal_()
    x = model.embed(tokens, torch.arange(12))
    z = torch.stack([x[0, 7 + i // 2] + model.latent_embedding.weight[i % 2] for i in range(10)])

    def attend(attention, z, at, row, keys, places):
        """One query over keys at their places: the layer itself, asked for its last row."""
        rotary = attention.rotary(torch.cat((places, at[None])), torch.float64)
        q = attention._heads(attention.q_proj(attention.norm(z[row][None, None])), 4, rotary)
        rotary = tuple(t[:-1] for t in rotary)
        context = (attention.kv_norm or attention.norm)(keys[None])
        k = attention._heads(attention.k_proj(context), 2, rotary)
        v = attention._heads(attention.v_proj(context), 2, None)
        out = pk.perceiver_attention(q, k, v)
        return attention.out_proj(out.transpose(1, 2).flatten(2))[0, 0]

    def block(block, z, step):
        z = z + torch.stack([step(block.attention, z, i) for i in range(10)])
        return z + block.feed_forward(z)

    place = 7 + torch.arange(10) // 2

    def cross(attention, z, i):
        until = int(place[i]) + 1
        return attend(attention, z, place[i], i, x[0, :until], torch.arange(until))

    z = block(model.cross, z, cross)
    z = block(model.blocks[0], z, lambda a, z, i: attend(a, z, place[i], i, z[: i + 1], place[: i + 1]))
    z = block(model.later_crosses[0], z, cross)
    want = model.head(model.norm(z).view(5, 2, -1).mean(1))
    close(model(tokens, num_latents=5)[0], want)


def test_positions_matter_where_there_are_any():
    tokens = torch.full((1, 20), 3)
    for changes, flat in (({"rotary_fraction": 0.0, "positions": "none"}, True), ({}, False)):
        logits = build(**changes)(tokens)
        assert (logits.std(dim=1).max() < 1e-9) == flat


@pytest.mark.parametrize("base", [None, 100.0])
@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_absolute_positions_are_the_sinusoids(base, kind):
    """Of float32 accuracy also in bfloat16, where the positions themselves would be wrong from 257 on."""
    model, positions = (
        build(positions=kind, position_base=base, max_seq_len=5000),
        torch.tensor([0, 1, 63, 4999]),
    )
    tokens = draw(1, 4)
    wavelengths = torch.tensor([float(base or 5000.0) ** (-i / 16) for i in range(16)], dtype=torch.float64)
    angles = positions.double()[:, None] * wavelengths
    want = torch.cat((angles.sin(), angles.cos()), 1)
    got = model.embed(tokens, positions) - model.token_embedding(tokens)
    assert (got - want).abs().max() < (1e-12 if kind == "sinusoidal" else 1e-3)  # the table is float32
    half = model.bfloat16().embed(tokens, positions)
    assert half.dtype == torch.bfloat16
    assert (half.double() - model.token_embedding(tokens).double() - want).abs().max() < 0.03


def test_every_place_of_an_array_has_its_own_vector_and_shares_with_its_neighbours():
    """On an axis at a time: places that differ on one axis differ in that axis' channels alone."""
    for kind in ("sinusoidal", "fourier", "learned"):
        model = build(positions=kind, position_shape=(4, 8, 2), dim=36, num_heads=4)
        vectors = model.embed(torch.zeros(1, 64, dtype=torch.int64), torch.arange(64))[0]
        assert torch.pdist(vectors).min() > 1e-2
        of_place = vectors.view(4, 8, 2, 36)
        row = of_place[1, 2, 0] != of_place[3, 2, 0]
        column = of_place[1, 2, 0] != of_place[1, 5, 0]
        assert row.any()
        assert not (row & column).any()


def test_learned_positions_begin_as_the_sinusoids_on_every_axis():
    tokens, places = draw(1, 64), torch.arange(64)
    options = {"position_shape": (4, 8, 2), "position_base": 30.0}
    learned, fixed = (build(positions=kind, **options) for kind in ("learned", "sinusoidal"))
    assert learned.position_embedding.weight.shape == (14, 32)
    got, want = (model.embed(tokens, places) - model.token_embedding(tokens) for model in (learned, fixed))
    assert (got - want).abs().max() < 1e-6


def test_positions_that_count_back_from_the_last_token():
    """Reading more before it leaves an input as it is, and the first of all is the furthest."""
    model, tokens = build(positions="learned", position_origin="last", rotary_fraction=0.0), draw(1, 20)
    seen = []
    model.position_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    model(tokens, pad_mask=torch.tensor([[True] * 3 + [False] * 15 + [True] * 2]))
    assert seen == [[[14, 14, 14, *range(14, -1, -1), 0, 0]]]
    with torch.no_grad():  # a window that slides along a text sees the same positions everywhere
        model.position_embedding.weight[20:] = torch.nan
    assert model(tokens).isfinite().all()


def test_prefix_dropout_in_training():
    model, tokens = build(prefix_dropout=0.5).train(), draw(2, 40)
    rows = []
    model.cross.attention.k_proj.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert rows == [24, 24, 40, 40]


def test_a_dropped_latent_speaks_for_itself_alone():
    model, tokens = build(latent_dropout=0.5).train(), draw(2, 30)
    masks = []
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, options: masks.append(options["key_mask"]), with_kwargs=True
        )
        for block in model.blocks
    ]
    inputs = model.embed(tokens, torch.arange(30))

    def read(own):
        torch.manual_seed(2)
        return model.read(own, inputs, torch.arange(30))

    before = read(inputs[:, 22:])
    assert torch.equal(masks[0], masks[1])
    assert 0 < masks[0].sum() < 16
    (dropped, *_), (kept, *_) = (~masks[0][0]).nonzero().flatten(), masks[0][0].nonzero().flatten()
    for latent, reach in ((dropped, [dropped]), (kept, range(int(kept), 8))):
        own = inputs[:, 22:].clone()
        own[0, latent] += torch.randn(32, dtype=torch.float64)
        moved = (read(own)[0] != before[0]).any(-1)
        assert moved.nonzero().flatten().tolist() == [int(i) for i in reach]
    for hook in hooks:
        hook.remove()
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_zero_head():
    model = build(zero_head=True)
    assert (model(draw(2, 20)) == 0).all()
    torch.nn.functional.cross_entropy(model(draw(2, 20)).flatten(0, 1), draw(16)).backward()
    assert model.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_initialisation(changes):
    torch.manual_seed(0)
    model = PerceiverAR(dataclasses.replace(CONFIG, **changes, dim=128)).eval()
    tokens = draw(4, 64)
    loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, -7:].flatten())
    uniform = torch.tensor(float(CONFIG.vocab_size)).log()
    assert (loss / uniform - 1).abs() < 0.2
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_learns():
    torch.manual_seed(0)
    model = PerceiverAR(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        tokens = (torch.arange(33) + torch.randint(0, 17, (8, 1))) % 17
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, -8:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # from 2.8


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, changes, dtype):
    model, path = build(**changes).to(dtype), tmp_path / "model.safetensors"
    model.save(path)
    loaded = PerceiverAR.load(path, device=DEVICE)
    assert loaded.config == model.config
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    assert all(p.requires_grad and p.device == DEVICE for p in loaded.parameters())
    tokens = draw(1, 20)
    assert torch.equal(model(tokens), loaded.eval()(tokens))


@pytest.mark.parametrize(
    "changes", [{}, {"cross_after": (0,), "latents_per_position": 2, "position_shape": (8, 8)}], ids=str
)
def test_compiles_without_a_graph_break(changes):
    model, tokens = build(**changes).float(), draw(2, 40)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(tokens), model(tokens)
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_activation_checkpointing_keeps_less_and_changes_nothing(streamed):
    tokens, kept, results = draw(2, 40), [], []
    for on in (False, True):
        model = build(
            activation_checkpointing=on,
            streamed=streamed,
            chunk_size=7,
            cross_after=(0,),
            dropout=0.2,
            attention_dropout=0.2,
            prefix_dropout=0.3,
        ).train()
        saved = []
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            logits = model(tokens)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
        kept.append(sum(saved))
    for got, want in zip(*results, strict=True):
        close(got, want)
    assert kept[1] < kept[0] / 3


def test_the_default_model_keeps_the_names_of_its_weights():
    """Files of older versions load: what an option adds is there only where it is chosen."""
    attention = [f"attention.{x}.weight" for x in ("norm", "q_proj", "k_proj", "v_proj", "out_proj")]
    attention += ["attention.norm.bias"]
    feed_forward = [f"feed_forward.{x}" for x in ("0.weight", "0.bias", "1.weight", "4.weight")]
    names = {"token_embedding.weight", "norm.weight", "norm.bias", "head.weight"}
    names |= {f"{block}.{x}" for block in ("cross", "blocks.0", "blocks.1") for x in attention + feed_forward}
    names |= {f"cross.attention.kv_norm.{x}" for x in ("weight", "bias")}
    assert set(PerceiverAR(CONFIG).state_dict()) == names
    learned = PerceiverAR(dataclasses.replace(CONFIG, positions="learned", tie_embeddings=True)).state_dict()
    assert set(learned) == names - {"head.weight"} | {"position_embedding.weight"}
    assert learned["position_embedding.weight"].shape == (64, 32)


def test_the_package_offers_it():
    assert pk.PerceiverAR is PerceiverAR
    assert pk.PerceiverARConfig is PerceiverARConfig


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ({"dim": 33}, ValueError, "dim 33 is not a multiple of num_heads 4: give head_dim"),
        ({"dim": 33, "head_dim": 8}, ValueError, "dim must be even for sinusoidal positions, got 33"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
        ({"depth": True}, TypeError, "depth must be an int, got bool"),
        ({"streamed": "no"}, TypeError, "streamed must be a bool, got str"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be a bool, got int"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads is 3, which does not divide num_heads 4"),
        ({"num_latents": 65}, ValueError, "num_latents is 65, more than max_seq_len 64"),
        (
            {"positions": "alibi"},
            ValueError,
            "positions must be one of sinusoidal, fourier, learned, none, got 'alibi'",
        ),
        ({"latents_per_position": 0}, ValueError, "latents_per_position must be at least 1, got 0"),
        ({"cross_after": 1}, TypeError, "cross_after must be a tuple of ints, got 1"),
        ({"cross_after": None}, TypeError, "cross_after must be a tuple of ints, got None"),
        ({"position_shape": 64}, TypeError, "position_shape must be a tuple of ints, got 64"),
        ({"cross_after": (2,)}, ValueError, r"some of the 2 layers, from 0 on and in order, got \(2,\)"),
        ({"cross_after": (1, 0)}, ValueError, r"some of the 2 layers, from 0 on and in order, got \(1, 0\)"),
        ({"cross_after": (1, 1)}, ValueError, r"some of the 2 layers, from 0 on and in order, got \(1, 1\)"),
        ({"position_origin": "end"}, ValueError, "position_origin must be one of first, last, got 'end'"),
        (
            {"position_shape": (8, 7)},
            ValueError,
            r"position_shape \(8, 7\) has 56 places, less than max_seq_len 64",
        ),
        ({"position_shape": (64, 0)}, ValueError, r"position_shape must be positive ints, got \(64, 0\)"),
        (
            {"position_shape": (8, 8), "positions": "none"},
            ValueError,
            "position_shape needs absolute positions, got positions='none'",
        ),
        (
            {"position_origin": "last", "positions": "none"},
            ValueError,
            "position_origin needs absolute positions, got positions='none'",
        ),
        (
            {"position_shape": (2,) * 11, "positions": "fourier"},
            ValueError,
            "dim must be at least 3 for each of the 11 axes of fourier positions, got 32",
        ),
        ({"rotary_layout": "neox"}, ValueError, "rotary_layout must be one of half, interleaved, got 'neox'"),
        ({"rotary_fraction": -0.5}, ValueError, r"rotary_fraction must be in \[0, 1\], got -0.5"),
        ({"rotary_heads": 2}, ValueError, r"rotary_heads must be in \[0, 1\], got 2"),
        (
            {"activation": "relu"},
            ValueError,
            "activation must be one of gelu, squared_relu, geglu, got 'relu'",
        ),
        (
            {"zero_head": True, "tie_embeddings": True},
            ValueError,
            "zero_head needs an output projection of its own, got tie_embeddings=True",
        ),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"z_loss": -1e-4}, ValueError, "z_loss must be finite and not negative, got -0.0001"),
        ({"latent_dropout": -0.1}, ValueError, r"latent_dropout must be in \[0, 1\), got -0.1"),
        ({"prefix_dropout": 1.0}, ValueError, r"prefix_dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"attention_dropout": -1}, ValueError, r"attention_dropout must be in \[0, 1\), got -1"),
        ({"ff_mult": 0}, ValueError, "ff_mult must be positive and finite, got 0"),
        ({"rotary_base": float("inf")}, ValueError, "rotary_base must be positive and finite, got inf"),
        ({"position_base": -2.0}, ValueError, "position_base must be positive and finite, got -2.0"),
    ],
)
def test_bad_configuration(changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, dtype=torch.int64),), ValueError, r"tokens must be \(B, N\), got \(4,\)"),
        ((torch.zeros(1, 4),), TypeError, "tokens must be int64 or int32, got torch.float32$"),
        (
            (torch.zeros(1, 4, dtype=torch.uint8),),
            TypeError,
            r"tokens must be int64 or int32, got torch.uint8: pass tokens.long\(\)",
        ),
        ((draw(1, 65),), ValueError, "tokens must have from 1 to max_seq_len 64 positions, got 65"),
        ((draw(1, 0),), ValueError, "tokens must have from 1 to max_seq_len 64 positions, got 0"),
        ((draw(1, 5), 6), ValueError, "num_latents must be from 1 to the 5 positions of the input, got 6"),
        ((draw(1, 5), 0), ValueError, "num_latents must be from 1 to the 5 positions of the input, got 0"),
        (
            (draw(1, 5), 2, torch.zeros(1, 4, dtype=torch.bool)),
            ValueError,
            r"pad_mask must be \(1, 5\) like tokens",
        ),
        ((draw(1, 5), 2, torch.zeros(1, 5)), TypeError, "pad_mask must be bool, got torch.float32"),
        (([[1, 2]],), TypeError, "tokens must be a torch.Tensor, got list"),
        ((draw(1, 5), 2, [False] * 5), TypeError, "pad_mask must be a torch.Tensor, got list"),
        ((draw(1, 5), "2"), TypeError, "num_latents must be an int, got str"),
    ],
)
def test_bad_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        build()(*arguments)


@pytest.mark.cpu_only("reading tokens of a GPU would wait for it")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("wrong", [-1, CONFIG.vocab_size])
def test_ids_outside_the_vocabulary_are_named(wrong, streamed):
    tokens = draw(1, 5)
    tokens[0, 2] = wrong
    size = CONFIG.vocab_size
    with pytest.raises(ValueError, match=rf"from 0 to {size - 1} \(vocab_size {size}\), got {wrong}"):
        build(streamed=streamed)(tokens)
    with pytest.raises(ValueError, match=f"prompt must be .* got {wrong}"):
        build(streamed=streamed).generate(tokens, 1)
