"""Rotary embedding against complex numbers in float64, and what it promises to keep."""

import math

import pytest
import torch
from conftest import DEVICE

from perceiver_kernels.rotary import (
    LAYOUTS,
    apply_rotary,
    positions_from_padding,
    right_aligned_positions,
    rotary_cos_sin,
)


def as_complex(x, pairs, layout):
    """The rotated channels of x (..., D) as (..., pairs) complex numbers."""
    if layout == "half":
        return torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs])
    return torch.complex(x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("dim", [0, 2, 6, 10])
def test_is_a_complex_rotation(layout, per_example, dim):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2, 10, dtype=torch.float64)
    positions = torch.randint(0, 1000, (3, 5) if per_example else (5,))
    cos, sin = rotary_cos_sin(positions, dim, base=500.0, dtype=torch.float64)
    got = apply_rotary(x, cos, sin, layout=layout)

    frequencies = torch.tensor([500.0 ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angles = positions.double()[..., None, None] * frequencies
    want = as_complex(x, dim // 2, layout) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(as_complex(got, dim // 2, layout), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(got[..., dim:], x[..., dim:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_depend_on_the_distance_alone(layout):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(p, r):
        turned = [
            apply_rotary(x, *rotary_cos_sin(torch.tensor([at]), 8, dtype=torch.float64), layout=layout)
            for x, at in ((q, p), (k, r))
        ]
        return (turned[0] * turned[1]).sum()

    assert abs(product(7, 3) - product(1007, 1003)) < 1e-10
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_angles_stay_float32_for_bfloat16_data_and_under_autocast():
    positions = torch.arange(999, 1003)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        cos, sin = rotary_cos_sin(positions, 8)
        assert cos.dtype == sin.dtype == torch.float32
        x = torch.ones(1, 4, 1, 8, dtype=torch.bfloat16)
        got = apply_rotary(x, cos, sin)
    assert got.dtype == torch.bfloat16
    want = apply_rotary(x.double(), *rotary_cos_sin(positions, 8, dtype=torch.float64))
    # One rounding to bfloat16; positions in bfloat16 would be off by up to 4 radians here.
    assert (got.double() - want).abs().max() < 2**-8


@pytest.mark.parametrize("position", [2**20, 10**9])
def test_angles_of_distant_positions(position):
    cos, sin = rotary_cos_sin(torch.tensor([position]), 16)
    for i in range(8):
        angle = position * 10_000.0 ** (-i / 8)
        assert abs(cos[0, i] - math.cos(angle)) < 1e-6
        assert abs(sin[0, i] - math.sin(angle)) < 1e-6


@pytest.mark.parametrize(("endpoint", "longest"), [(False, 1000.0 ** (3 / 4)), (True, 1000.0)])
def test_longest_wavelength(endpoint, longest):
    """2 pi times ``longest``: after half of it the slowest pair points the other way."""
    half = torch.tensor([math.pi * longest], dtype=torch.float64)
    cos, _ = rotary_cos_sin(half, 8, base=1000.0, endpoint=endpoint, dtype=torch.float64)
    assert (cos[0, -1] + 1).abs() < 1e-12


def test_a_single_pair_turns_by_its_position_with_and_without_the_endpoint():
    for endpoint in (False, True):
        cos, _ = rotary_cos_sin(torch.tensor([2]), 2, endpoint=endpoint)
        assert abs(cos.item() - math.cos(2)) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *t: apply_rotary(*t, layout=layout), (x, cos, sin))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_data_alone_to_second_order(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, cos, sin, layout=layout) ** 2, (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_no_copy_of_the_data_for_the_backward(layout):
    saved = []
    x = torch.randn(2, 50, 4, 16, requires_grad=True)
    cos, sin = rotary_cos_sin(torch.arange(50), 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        apply_rotary(x * 1, cos, sin, layout=layout)
    assert max(saved) <= cos.numel()


def test_reads_strided_views():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8)
    cos, sin = rotary_cos_sin(torch.arange(5), 4)
    view = x.transpose(1, 2)
    assert torch.equal(apply_rotary(view, cos, sin), apply_rotary(view.contiguous(), cos, sin))
    assert apply_rotary(x[:0].mT.contiguous().mT.transpose(1, 2), cos, sin).shape == (0, 5, 3, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_a_graph_break(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)

    def rotate(x):
        return apply_rotary(x, *rotary_cos_sin(torch.arange(5, device=x.device), 4), layout=layout)

    torch.testing.assert_close(torch.compile(rotate, fullgraph=True, backend="aot_eager")(x), rotate(x))


def test_under_function_transforms():
    torch.manual_seed(0)
    x, tangent = torch.randn(2, 4, 1, 5, 3, 8)
    cos, sin = rotary_cos_sin(torch.arange(5), 4)
    mapped = torch.func.vmap(lambda x: apply_rotary(x, cos, sin))(x)
    torch.testing.assert_close(mapped[2], apply_rotary(x[2], cos, sin))
    _, turned = torch.func.jvp(lambda x: apply_rotary(x, cos, sin), (x[0],), (tangent[0],))
    torch.testing.assert_close(turned, apply_rotary(tangent[0], cos, sin))
    with torch.autograd.forward_ad.dual_level():
        dual = apply_rotary(torch.autograd.forward_ad.make_dual(x[0], tangent[0]), cos, sin)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, turned)


def test_positions():
    assert right_aligned_positions(3, 10).tolist() == [7, 8, 9]
    assert right_aligned_positions(0, 4).tolist() == []
    pads = torch.tensor([[True, True, False, False], [False, False, False, True], [True, False, True, False]])
    assert positions_from_padding(pads).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary_cos_sin(torch.arange(3), 5), "dim must be even and not negative, got 5"),
        (lambda: right_aligned_positions(5, 4), "length 5 and total 4"),
        (
            lambda: rotate((2, 5, 3, 8), (5, 5)),
            "5 pairs of channels, which is more than the head dim 8 holds",
        ),
        (lambda: rotate((2, 5, 3, 8), (4, 2)), r"cos must be \(5, R\) or \(2, 5, R\)"),
        (lambda: rotate((2, 5, 3, 8), (3, 5, 2)), r"got \(3, 5, 2\)"),
        (
            lambda: rotate((2, 5, 3, 8), (5, 2), layout="neox"),
            "layout must be one of half, interleaved, got 'neox'",
        ),
        (
            lambda: apply_rotary(torch.zeros(2, 5, 3, 8), torch.zeros(5, 2), torch.zeros(5, 3)),
            r"cos and sin must have one shape, got \(5, 2\) and \(5, 3\)",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def rotate(shape, angles, **options):
    return apply_rotary(torch.zeros(shape), torch.zeros(angles), torch.zeros(angles), **options)
