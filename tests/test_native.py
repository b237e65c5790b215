"""Single steps of the C++ kernels, on every instruction set that this processor runs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver_kernels import _library
from perceiver_kernels.reference import philox

pytestmark = pytest.mark.cpu_only("single steps of its kernels")
native = _library.native
if native is None:
    pytest.skip("the package was installed without its compiled kernels", allow_module_level=True)


def usable_sets():
    names = []
    before = os.environ.get("PERCEIVER_KERNELS_ISA")
    for name in native.build_info()["compiled"]:
        os.environ["PERCEIVER_KERNELS_ISA"] = name
        try:
            native.build_info()
            names.append(name)
        except ValueError:
            pass
    if before is None:
        os.environ.pop("PERCEIVER_KERNELS_ISA")
    else:
        os.environ["PERCEIVER_KERNELS_ISA"] = before
    return names


@pytest.fixture(params=usable_sets())
def isa(request, monkeypatch):
    monkeypatch.setenv("PERCEIVER_KERNELS_ISA", request.param)
    assert native.build_info()["isa"] == request.param
    return request.param


def relative(got, want):
    return np.max(np.abs(got.astype(np.float64) - want) / np.maximum(np.abs(want), np.finfo(np.float64).tiny))


def test_build_info_names_sets_and_version(monkeypatch):
    monkeypatch.delenv("PERCEIVER_KERNELS_ISA", raising=False)
    info = native.build_info()
    assert info["version"] == "0.1.0"
    assert "baseline" in info["compiled"]
    sets = usable_sets()
    if "avx512_bf16" in sets and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        sets.remove("avx512_bf16")  # where it doesn't pay
    assert info["isa"] == sets[-1]


def test_an_unknown_set_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("PERCEIVER_KERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match=r'PERCEIVER_KERNELS_ISA is "sse9"; .* runs .* with: .*baseline'):
        native.build_info()


@pytest.mark.parametrize(
    ("function", "dtype", "low", "bound"),
    [("exp2", np.float32, -125.99, 2.5e-7), ("exp2_double", np.float64, -1021.9, 1e-15)],
)
def test_exp2_is_accurate(isa, function, dtype, low, bound):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(low, 0, 4999), rng.uniform(-1, 1, 5000), [0.0, -0.5, 0.5, -1]]).astype(
        dtype
    )
    assert relative(getattr(native, function)(x), np.exp2(x.astype(np.float64))) < bound


@pytest.mark.parametrize("function", ["exp2", "exp2_double"])
def test_exp2_of_masked_and_broken_scores(isa, function):
    x = np.array([-np.inf, -1e30, -1100.0, np.nan, 0.0])
    y = getattr(native, function)(x)
    np.testing.assert_array_equal(y, [0.0, 0.0, 0.0, np.nan, 1.0])  # a masked key weighs nothing, exactly


@pytest.mark.parametrize(
    ("function", "dtype", "bound"), [("tanh", np.float32, 1e-6), ("tanh_double", np.float64, 2e-15)]
)
def test_tanh_keeps_relative_accuracy_near_zero(isa, function, dtype, bound):
    magnitudes = np.logspace(-7, 2.5, 4001)
    x = np.concatenate([magnitudes, -magnitudes, [np.inf, -np.inf]]).astype(dtype)
    assert relative(getattr(native, function)(x), np.tanh(x.astype(np.float64))) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [
        *[(1, 1, 1), (6, 64, 64), (7, 65, 3), (11, 15, 33), (64, 130, 129), (5, 48, 256)],
        *[(32, 64, 66), (33, 48, 64), (40, 32, 130), (17, 33, 32)],  # tiles of 16, whole and not
    ],
)
def test_packing_and_tiles_multiply(isa, dtype, rows, columns, depth):
    torch.manual_seed(rows)
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    bits = torch.float32 if dtype == torch.float32 else torch.int16
    got = torch.from_numpy(native.matmul(str(dtype)[6:], a.view(bits).numpy(), b.view(bits).numpy()))
    want = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    assert ((got - want).abs() <= scale * 1e-6).all()


def test_packing_converts_special_half_precision_values(isa):
    values = torch.tensor([0.0, -0.0, 5.96e-8, -6.1e-5, 65504.0, torch.inf, -torch.inf, torch.nan])
    for dtype in (torch.float16, torch.bfloat16):
        a = values.to(dtype).unsqueeze(1)
        one = torch.ones(1, 1, dtype=dtype)
        got = native.matmul(str(dtype)[6:], a.view(torch.int16).numpy(), one.view(torch.int16).numpy())
        np.testing.assert_array_equal(got[:, 0], a[:, 0].float().numpy())


def test_matmul_hook_refuses_what_does_not_fit():
    a = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="a and b must be contiguous matrices"):
        native.matmul("float32", a, a)
    with pytest.raises(ValueError, match=r'dtype must be float32, .* got "int8"'):
        native.matmul("int8", a, a.T)


@pytest.mark.parametrize(
    ("counter", "key", "word"),
    [  # the published known answers of Random123
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_philox_known_answers(counter, key, word):
    seed = key[0] | key[1] << 32
    assert native.philox(seed, *counter) == word
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    assert int(philox(tuple(torch.tensor(c) for c in counter), signed)) == word


def test_dropout_threshold():
    assert native.dropout_threshold(0.5) == 2**31
    assert native.dropout_threshold(0.0) == 0
    assert native.dropout_threshold(1 - 2**-40) == 2**32 - 1


def test_visible_keys_is_the_rule():
    for offset in (-7, -1, 0, 3, 100, 2**48, -(2**48)):
        for i in (0, 1, 6):
            assert native.visible_keys(offset, i, 9) == sum(j <= offset + i for j in range(9))


SHAPES = [
    {"heads": 8, "kv_heads": 8, "queries": 1024, "keys": 16384, "dim": 64, "value_dim": 64},
    {"heads": 1, "kv_heads": 1, "queries": 256, "keys": 131072, "dim": 64, "value_dim": 64},
    {"heads": 8, "kv_heads": 2, "queries": 1, "keys": 131072, "dim": 128, "value_dim": 128},
    {"heads": 4, "kv_heads": 2, "queries": 3000, "keys": 3000, "dim": 512, "value_dim": 512},
    {"heads": 2, "kv_heads": 1, "queries": 5, "keys": 1, "dim": 7, "value_dim": 9},
    {"heads": 1, "kv_heads": 1, "queries": 3, "keys": 0, "dim": 8, "value_dim": 8},
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plan_covers_every_row_and_key_once(shape, backward):
    blocks = native.plan(batch=1, q_offset=shape["keys"] - shape["queries"], backward=backward, **shape)
    rows = shape["queries"] * shape["heads"] // shape["kv_heads"]
    covered = sorted((kv_head, first, first + count) for _, kv_head, first, count, *_ in blocks)
    for kv_head in range(shape["kv_heads"]):
        runs = [run[1:] for run in covered if run[0] == kv_head]
        assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])]
        assert runs[-1][1] == rows
    for _, _, first, count, keys, keys_per_split, splits in blocks:
        assert splits >= 1
        assert splits * keys_per_split >= keys
        assert (splits - 1) * keys_per_split < max(keys, 1)  # no split is empty
        last_query = (first + count - 1) // (shape["heads"] // shape["kv_heads"])
        seen = native.visible_keys(shape["keys"] - shape["queries"], last_query, shape["keys"])
        assert keys == (shape["keys"] if backward else seen)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plan_of_an_example_does_not_depend_on_the_batch(shape, backward):
    alone = native.plan(batch=1, q_offset=0, backward=backward, **shape)
    many = native.plan(batch=5, q_offset=0, backward=backward, **shape)
    assert [block[1:] for block in many if block[0] == 3] == [block[1:] for block in alone]


def test_one_head_is_split_over_keys():
    for queries in (1, 256):
        (block,) = native.plan(1, 1, 1, queries, 131072, 64, 64, 131072 - queries, False)
        assert block[-1] >= 16


def test_probes_measure_something_plausible():
    for dtype in ("float32", "bfloat16"):
        assert native.fma_peak(dtype, 1) > 0.5
    assert native.read_bandwidth(1, 1 << 24) > 0.1
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        native.fma_peak("float32", 0)
    with pytest.raises(ValueError, match="bytes must be at least 1 MiB, got 12"):
        native.read_bandwidth(1, 12)
