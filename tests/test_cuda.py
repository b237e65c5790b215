"""What is the cuda backend's own: refusals, plans, order. tests/ptx executes it."""

from __future__ import annotations

import re

import pytest
import torch

import perceiver_kernels as pk
from perceiver_kernels import _library, dispatch
from perceiver_kernels.backends import cuda
from perceiver_kernels.spec import make_spec
from perceiver_kernels.streaming import KeyStream, Rows, stream_call

A100 = cuda.Device(108, 166912, 167936)
H100 = cuda.Device(132, 232448, 233472, 90)
RTX_4090 = cuda.Device(128, 101376, 102400, 89)
OPTIONS = dict.fromkeys(("q_offset", "key_mask", "scale", "softcap", "dropout_seed"))


def refusals(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[str]:
    query, key, value = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    spec = make_spec(query, key, value, is_causal=True, dropout_p=0.0, **OPTIONS)
    return cuda.unsupported(query, key, value, spec, needs_gradient=False)


def test_refusals_say_what_is_served() -> None:
    small, wide = (1, 4, 8, 64), (1, 4, 8, 264)
    assert refusals(small, small, small) == []
    assert refusals(small, small, (1, 4, 8, 20)) == [
        "value has head dim 20; the kernels take multiples of 8 up to 256"
    ]
    assert len(refusals(wide, wide, wide)) == 2
    for dtype in (torch.float32, torch.float64):
        (reason,) = refusals(small, small, small, dtype=dtype)
        assert f"query is {str(dtype)[6:]}; the kernels take bfloat16 and float16" in reason
    long = (1, 1, 2**31 - 4, 64)
    assert "31 bits" in refusals((1, 8, 1, 64), long, long)[0]
    tiles_reach_beyond = (1, 1, 2**31 - 2**24, 64)
    assert "31 bits" in refusals((1, 8, 1, 64), tiles_reach_beyond, tiles_reach_beyond)[0]


def test_a_call_on_the_cpu_is_refused_by_name() -> None:
    query = torch.zeros(1, 1, 2, 64)
    with pytest.raises(ValueError, match=r"cuda: runs on cuda tensors, not on cpu"):
        pk.perceiver_attention(query.cpu(), query.cpu(), query.cpu(), backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert cuda.unavailable(torch.device("cuda")) == "torch finds no CUDA device"


@pytest.mark.parametrize(
    ("capability", "first"),
    [
        ((8, 0), "cuda"),
        ((8, 6), "cuda"),
        ((8, 9), "cuda"),
        ((9, 0), "cuda"),
        ((10, 0), "triton"),
        ((12, 0), "cuda"),
    ],
)
def test_order_by_architecture(
    capability: tuple[int, int], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    names = dispatch.order(torch.device("cuda"))
    assert sorted(names) == sorted(dispatch.BACKENDS)
    assert next(name for name in names if name in ("cuda", "triton")) == first
    assert dispatch.order(torch.device("cpu")) == list(dispatch.BACKENDS)


needs_kernels = pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing))


def problem(queries: int, heads: int, keys: int, dim: int = 64, group: int = 1) -> cuda.Problem:
    return cuda.Problem(torch.bfloat16, 1, heads * group, heads, queries, keys, dim, dim, False)


@needs_kernels
def test_the_library_loads_without_a_gpu() -> None:
    archs = torch.ops.perceiver_kernels.cuda_archs().split()
    assert archs
    assert all(re.fullmatch(r"\d+a?(-real|-virtual)?", arch) for arch in archs)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="perceiver_kernels: "):
            torch.ops.perceiver_kernels.cuda_device(0)


@needs_kernels
@pytest.mark.parametrize("device", [A100, H100, RTX_4090], ids=["A100", "H100", "RTX 4090"])
@pytest.mark.parametrize("dim", [8, 32, 64, 72, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("queries", [1, 16, 17, 1024])
def test_plans_fit_the_device(queries: int, dim: int, device: cuda.Device) -> None:
    tile, splits = cuda.plan_forward(problem(queries, 8, 65536, dim), device)
    assert tile.shared_bytes <= device.shared_per_block
    assert (tile.block_m == 16) == (queries <= 16)
    assert tile.threads % 32 == 0
    blocks = -(-queries // tile.block_m) * 8 * splits
    assert blocks >= 0.9 * device.processors * tile.per_processor(device)


@needs_kernels
def test_splits_follow_the_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.plan_forward(problem(1024, 64, 65536), A100)[1] == 5  # 12 waves, the last one full
    assert cuda.plan_forward(problem(1024, 8, 16384), A100)[1] == 3
    assert cuda.plan_forward(problem(1, 8, 131072), A100)[1] == 27
    assert cuda.plan_forward(problem(1, 8, 131072, group=8), A100)[1] == 27  # one load of each key
    assert cuda.plan_forward(problem(20, 8, 0), A100)[1] == 1
    monkeypatch.setenv("PERCEIVER_KERNELS_SPLITS", "5")
    assert {cuda.plan_forward(problem(1024, heads, 16384), A100)[1] for heads in (1, 8, 64)} == {5}


@needs_kernels
def test_decode_asks_for_its_tile_once() -> None:
    cuda.forward_tile.cache_clear()
    for keys in range(1000, 1010):
        cuda.plan_forward(problem(1, 8, keys), A100)
    assert cuda.forward_tile.cache_info().misses == 1


@needs_kernels
def test_gradients_beyond_the_shared_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tensor needs them."""
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "_device", lambda device: RTX_4090)
    query, key = (torch.zeros(1, 1, rows, 128, dtype=torch.bfloat16) for rows in (4, 64))
    trained = torch.zeros(1, 1, 8, 128, dtype=torch.bfloat16, requires_grad=True)
    for keys, values in (([trained, key], [trained.detach(), key]), ([key, key[:, :, :8]], [key, trained])):
        with pytest.raises(ValueError, match=r"cuda: .* shared memory"):
            pk.perceiver_attention(query, keys, values, backend="cuda")
    stream = KeyStream(
        [Rows(key[:, 0])], lambda x, begin, end: (x[:, None], x[:, None]), [trained], dim=key.shape[-1]
    )
    options = {"kv_heads": 1, "value_dim": 128, "backend": "cuda", "dropout_p": 0.0}
    options |= dict.fromkeys(("key_mask", "scale", "softcap"))
    with pytest.raises(ValueError, match=r"cuda: .* shared memory"):
        stream_call(query, stream, **options)
    with torch.no_grad():
        assert stream_call(query, stream, **options)[1] == "cuda"


def test_only_rows_that_begin_elsewhere_are_copied() -> None:
    aligned = torch.zeros(2, 3, 10, 64, dtype=torch.bfloat16)
    for same in (
        aligned,
        aligned.transpose(1, 2),
        aligned[:, :, 1:],
        aligned[..., 8:40],
        aligned[:1, :1, :1].expand(4, 3, 10, 64),
        aligned[:, :, :0],
    ):
        assert cuda._aligned(same) is same
    for other in (aligned[..., 1:33], aligned.transpose(2, 3), aligned.flatten()[4:68].view(1, 1, 1, 64)):
        copy = cuda._aligned(other)
        assert copy is not other
        assert copy.is_contiguous()
        torch.testing.assert_close(copy, other)
