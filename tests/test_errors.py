"""Bad calls: each is refused before any kernel runs, by name and in full words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import DEVICE, USABLE
from torch import Tensor

import perceiver_kernels as pk


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def huge(*shape: int) -> Tensor:
    return torch.zeros(1).expand(shape)


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


Q, K, V = "query", "key", "value"
FLOATS = "float32, bfloat16, float16, float64"
DENSE: list[tuple[dict[str, Any], type[Exception], str]] = [
    # types
    ({Q: None}, TypeError, "query must be a torch.Tensor, got NoneType"),
    ({Q: [[1.0]]}, TypeError, "query must be a torch.Tensor, got list"),
    ({K: 3}, TypeError, "key must be a torch.Tensor, got int"),
    ({V: "v"}, TypeError, "value must be a torch.Tensor, got str"),
    ({Q: t(2, 4, 3, 8).to_sparse()}, TypeError, "query must be a dense (strided) tensor, got sparse_coo"),
    ({K: torch.nested.nested_tensor([t(2, 5, 8)] * 2, layout=torch.jagged)}, TypeError,
     "key must be a dense (strided) tensor, got a nested tensor"),
    ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
    ({"is_causal": None}, TypeError, "is_causal must be a bool, got NoneType"),
    ({"return_lse": "yes"}, TypeError, "return_lse must be a bool, got str"),
    ({"scale": "1"}, TypeError, "scale must be a float, got str"),
    ({"scale": 10**400}, ValueError, "scale must be finite, got an int beyond every float"),
    ({"scale": 1e31}, ValueError, "scale must be at most 1e30 in magnitude, got 1e+31"),
    ({"softcap": 1e-40}, ValueError, "softcap must be between 1e-30 and 1e30, got 1e-40"),
    ({"scale": True}, TypeError, "scale must be a float, got bool"),
    ({"softcap": [30.0]}, TypeError, "softcap must be a float, got list"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a float, got NoneType"),
    ({"dropout_p": True}, TypeError, "dropout_p must be a float, got bool"),
    ({"dropout_seed": 1.5}, TypeError, "dropout_seed must be an int, got float"),
    ({"q_offset": 1.0}, TypeError, "q_offset must be an int, got float"),
    ({"q_offset": True}, TypeError, "q_offset must be an int, got bool"),
    ({"q_offset": [1, 2]}, TypeError, "q_offset must be an int, got list"),
    ({"key_mask": [[True] * 5] * 2}, TypeError, "key_mask must be a torch.Tensor, got list"),
    ({"backend": 3}, TypeError, "backend must be a str or None, got int"),
    # dtypes
    ({Q: t(2, 4, 3, 8, dtype=torch.int64)}, TypeError,
     f"query must have one of the dtypes {FLOATS}, got int64"),
    ({Q: t(2, 4, 3, 8, dtype=torch.complex64)}, TypeError,
     f"query must have one of the dtypes {FLOATS}, got complex64"),
    ({V: t(2, 2, 5, 6, dtype=torch.bool)}, TypeError,
     f"value must have one of the dtypes {FLOATS}, got bool"),
    ({K: t(2, 2, 5, 8, dtype=torch.bfloat16)}, TypeError, "key is bfloat16, but query is float32"),
    ({V: t(2, 2, 5, 6, dtype=torch.float64)}, TypeError, "value is float64, but query is float32"),
    ({"key_mask": t(2, 5)}, TypeError, "key_mask must be bool, got float32"),
    ({"key_mask": t(2, 5, dtype=torch.int64)}, TypeError, "key_mask must be bool, got int64"),
    ({"q_offset": t(2)}, TypeError, "q_offset must be an integer dtype, got float32"),
    # devices
    ({K: t(2, 2, 5, 8, device="meta")}, ValueError, f"key is on meta, but query is on {DEVICE}"),
    ({V: t(2, 2, 5, 6, device="meta")}, ValueError, f"value is on meta, but query is on {DEVICE}"),
    ({"key_mask": t(2, 5, dtype=torch.bool, device="meta")}, ValueError,
     f"key_mask is on meta, but query is on {DEVICE}"),
    ({"q_offset": t(2, dtype=torch.int64, device="meta")}, ValueError,
     f"q_offset is on meta, but query is on {DEVICE}"),
    # shapes
    ({Q: t(4, 3, 8)}, ValueError, "query must have shape (B, H, M, D), got (4, 3, 8)"),
    ({Q: t()}, ValueError, "query must have shape (B, H, M, D), got ()"),
    ({K: t(2, 2, 5, 8, 1)}, ValueError, "key must have shape (B, Hkv, N, D), got (2, 2, 5, 8, 1)"),
    ({V: t(5, 6)}, ValueError, "value must have shape (B, Hkv, N, Dv), got (5, 6)"),
    ({K: t(1, 2, 5, 8)}, ValueError, "key has batch size 1, but query has 2"),
    ({V: t(3, 2, 5, 6)}, ValueError, "value has batch size 3, but query has 2"),
    ({K: t(2, 2, 5, 7)}, ValueError, "key has head dim 7, but query has 8"),
    ({V: t(2, 2, 4, 6)}, ValueError, "value has 4 positions, but key has 5"),
    ({Q: t(2, 4, 3, 0), K: t(2, 2, 5, 0)}, ValueError,
     "query must have a head dim of at least 1, got shape (2, 4, 3, 0)"),
    ({V: t(2, 2, 5, 0)}, ValueError, "value must have a head dim of at least 1, got shape (2, 2, 5, 0)"),
    ({"key_mask": t(2, 4, dtype=torch.bool)}, ValueError, "key_mask must have shape (2, 5), got (2, 4)"),
    ({"key_mask": t(2, 1, 1, 5, dtype=torch.bool)}, ValueError,
     "key_mask must have shape (2, 5), got (2, 1, 1, 5)"),
    ({"q_offset": ints(1, 2, 3)}, ValueError, "q_offset must have shape (2,), got (3,)"),
    ({"q_offset": torch.tensor(1)}, ValueError, "q_offset must have shape (2,), got ()"),
    # heads
    ({Q: t(2, 32, 3, 8), K: t(2, 12, 5, 8), V: t(2, 12, 5, 6)}, ValueError,
     "key has 12 heads, which does not divide query's 32: expected (B, H, M, D) and (B, Hkv, N, D)"),
    ({K: t(2, 8, 5, 8), V: t(2, 8, 5, 6)}, ValueError,
     "key has 8 heads, which does not divide query's 4: expected (B, H, M, D) and (B, Hkv, N, D)"),
    ({V: t(2, 4, 5, 6)}, ValueError, "value has 4 heads, but key has 2"),
    ({Q: t(2, 0, 3, 8)}, ValueError, "query must have at least 1 head, got shape (2, 0, 3, 8)"),
    ({K: t(2, 0, 5, 8), V: t(2, 0, 5, 6)}, ValueError,
     "key must have at least 1 head, got shape (2, 0, 5, 8)"),
    # values
    ({"q_offset": 2**48 + 1}, ValueError, "q_offset must be between -2**48 and 2**48, got 281474976710657"),
    ({"q_offset": -(2**70)}, ValueError,
     "q_offset must be between -2**48 and 2**48, got -1180591620717411303424"),
    ({"q_offset": ints(0, 2**50)}, ValueError,
     "q_offset must be between -2**48 and 2**48, got 1125899906842624"),
    ({"q_offset": ints(-(2**63), 0)}, ValueError,
     "q_offset must be between -2**48 and 2**48, got -9223372036854775808"),
    ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
    ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
    ({"softcap": math.nan}, ValueError, "softcap must be finite, got nan"),
    ({"softcap": math.inf}, ValueError, "softcap must be finite, got inf"),
    ({"softcap": 0.0}, ValueError, "softcap must be greater than 0, or None for no cap, got 0.0"),
    ({"softcap": -30}, ValueError, "softcap must be greater than 0, or None for no cap, got -30.0"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p must be finite, got nan"),
    ({"dropout_p": 0.1, "dropout_seed": 2**63}, ValueError,
     "dropout_seed must be between -2**63 and 2**63 - 1, got 9223372036854775808"),
    # sizes
    ({Q: huge(1, 1, 2**33, 8), K: t(1, 1, 5, 8), V: t(1, 1, 5, 8)}, ValueError,
     "query must have no dimension beyond 2**32 - 1, got shape (1, 1, 8589934592, 8)"),
    ({Q: t(1, 1, 3, 8), K: huge(1, 1, 2**40, 8), V: huge(1, 1, 2**40, 8)}, ValueError,
     "key must have no dimension beyond 2**32 - 1, got shape (1, 1, 1099511627776, 8)"),
    ({Q: huge(2**20, 2**12, 2**28, 1), K: huge(2**20, 1, 1, 1), V: huge(2**20, 1, 1, 4)}, ValueError,
     "query (1048576, 4096, 268435456, 1) with value head dim 4 makes an output of 2**63 bytes or more"),
    # backends
    ({"backend": "tritton"}, ValueError,
     f"backend must be one of {', '.join(pk.available_backends())}, or None, got 'tritton'"),
    ({"backend": "sdpa", "softcap": 30.0, "dropout_p": 0.5}, ValueError,
     f"backend 'sdpa' cannot serve query (2, 4, 3, 8) float32 on {DEVICE}, "
     f"key (2, 2, 5, 8) float32 on {DEVICE}, value (2, 2, 5, 6) float32 on {DEVICE}\n"
     "  sdpa: softcap=30.0: torch's scaled_dot_product_attention has no soft cap\n"
     "  sdpa: dropout_p=0.5: torch's dropout draws other bits than the contract's Philox"),
    ({Q: t(2, 4, 3, 8, device="meta"), K: t(2, 2, 5, 8, device="meta"), V: t(2, 2, 5, 6, device="meta"),
      "backend": "reference"}, ValueError,
     "backend 'reference' cannot serve query (2, 4, 3, 8) float32 on meta, key (2, 2, 5, 8) float32 on meta, "
     "value (2, 2, 5, 6) float32 on meta\n  reference: the meta device holds no data"),
]  # fmt: skip

CU_Q, CU_K = "cu_seqlens_q", "cu_seqlens_k"
PACKED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({CU_Q: [0, 6]}, TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    ({CU_K: None}, TypeError, "cu_seqlens_k must be a torch.Tensor, got NoneType"),
    ({CU_Q: torch.tensor([0.0, 2, 6])}, TypeError, "cu_seqlens_q must be int32 or int64, got float32"),
    ({CU_K: ints(0, 4, 9, dtype=torch.int16)}, TypeError, "cu_seqlens_k must be int32 or int64, got int16"),
    ({CU_Q: ints(0, 2, 6).view(1, 3)}, ValueError, "cu_seqlens_q must have shape (B + 1,), got (1, 3)"),
    ({CU_K: ints()}, ValueError, "cu_seqlens_k must have shape (B + 1,), got (0,)"),
    ({CU_K: ints(0, 4, 9).to("meta")}, ValueError, f"cu_seqlens_k is on meta, but query is on {DEVICE}"),
    ({CU_K: ints(0, 9)}, ValueError, "cu_seqlens_q and cu_seqlens_k must have the same length, got 3 and 2"),
    ({CU_Q: ints(1, 2, 6)}, ValueError, "cu_seqlens_q must start at 0, got 1"),
    ({CU_K: ints(-1, 4, 9)}, ValueError, "cu_seqlens_k must start at 0, got -1"),
    ({CU_Q: ints(0, 7, 6)}, ValueError, "cu_seqlens_q must not decrease, got 7 then 6 at index 2"),
    ({CU_K: ints(0, -2, 9)}, ValueError, "cu_seqlens_k must not decrease, got 0 then -2 at index 1"),
    ({CU_Q: ints(0, 2, 5)}, ValueError, "cu_seqlens_q must end at query's 6 rows, got 5"),
    ({CU_Q: ints(0, 2, 7)}, ValueError, "cu_seqlens_q must end at query's 6 rows, got 7"),
    ({CU_K: ints(0, 4, 2**40)}, ValueError, "cu_seqlens_k must end at key's 9 rows, got 1099511627776"),
    ({Q: t(1, 4, 6, 8)}, ValueError, "query must have shape (Tq, H, D), got (1, 4, 6, 8)"),
    ({V: t(8, 2, 6)}, ValueError, "value has 8 positions, but key has 9"),
    ({K: t(9, 3, 8), V: t(9, 3, 6)}, ValueError,
     "key has 3 heads, which does not divide query's 4: expected (Tq, H, D) and (Tk, Hkv, D)"),
    ({"key_mask": t(2, 9, dtype=torch.bool)}, ValueError, "key_mask must have shape (9,), got (2, 9)"),
    ({"q_offset": ints(1, 2, 3)}, ValueError, "q_offset must have shape (2,), got (3,)"),
    ({"q_offset": ints(0, -(2**49))}, ValueError,
     "q_offset must be between -2**48 and 2**48, got -562949953421312"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), DENSE, ids=[m.splitlines()[0] for _, _, m in DENSE])
def test_dense_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {Q: t(2, 4, 3, 8), K: t(2, 2, 5, 8), V: t(2, 2, 5, 6)} | changes
    with pytest.raises(error) as caught:
        pk.perceiver_attention(**arguments)
    assert str(caught.value) == message
    assert type(caught.value) is error


@pytest.mark.parametrize(("changes", "error", "message"), PACKED, ids=[m for _, _, m in PACKED])
def test_packed_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    lengths = {CU_Q: ints(0, 2, 6), CU_K: ints(0, 4, 9)}
    arguments = {Q: t(6, 4, 8), K: t(9, 2, 8), V: t(9, 2, 6)} | lengths | changes
    with pytest.raises(error) as caught:
        pk.perceiver_attention_varlen(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs and lses must be equally many, at least 1, got 0 and 0"),
        ([t(1, 1, 2, 3)], [], ValueError, "outs and lses must be equally many, at least 1, got 1 and 0"),
        ([3.0], [t(1, 1, 2)], TypeError, "outs[0] must be a torch.Tensor, got float"),
        ([t(1, 1, 2, 3)], [ints(1)], TypeError,
         f"lses[0] must have one of the dtypes {FLOATS}, got int64"),
        ([t(1, 1, 2, 3)] * 2, [t(1, 1, 2), t(1, 1, 2).double()], TypeError,
         "lses[1] is float64, but lses[0] is float32"),
        ([t(1, 1, 2, 3).half()], [t(1, 1, 2).half()], TypeError,
         "lses must be float32 or float64, got float16"),
        ([t(1, 1, 2, 3)], [t(1, 1, 2, device="meta")], ValueError,
         f"lses[0] is on meta, but outs[0] is on {t(1).device}"),
        ([t(1, 1, 2, 3), t(1, 1, 2, 4)], [t(1, 1, 2)] * 2, ValueError,
         "outs[1] has shape (1, 1, 2, 4), but outs[0] has (1, 1, 2, 3)"),
        ([t(1, 1, 2, 3)], [t(1, 1, 3)], ValueError,
         "lses must have outs' shape without its last dimension, got (1, 1, 3) for (1, 1, 2, 3)"),
    ],
)  # fmt: skip
def test_merge_calls(outs: list[Any], lses: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        pk.merge_attention(outs, lses)
    assert str(caught.value) == message


def test_nothing_can_serve() -> None:
    query, key, value = (t(2, 2, 5, 8, device="meta") for _ in range(3))
    with pytest.raises(
        ValueError, match=r"^no backend can serve query \(2, 2, 5, 8\) float32 on meta"
    ) as caught:
        pk.perceiver_attention(query, key, value)
    reasons = str(caught.value).splitlines()[1:]
    assert [reason.split(":")[0].strip() for reason in reasons] == list(pk.available_backends("meta"))


@pytest.mark.skipif("cpu" not in USABLE, reason="needs the compiled kernels")
def test_default_passes_over_what_cannot_serve() -> None:
    query = t(1, 1, 2, 600)
    with pytest.raises(ValueError, match="  cpu: query has head dim 600; the kernels take up to 512"):
        pk.perceiver_attention(query, query, query, backend="cpu")
    assert pk.perceiver_attention(query, query, query).shape == query.shape
