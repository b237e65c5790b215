"""The one list of problems that every backend answers to, and the list that is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One problem, by its shape and options; :func:`perceiver_kernels.testing.inputs.make_inputs` fills it.

    ``lengths`` makes it a packed one: (M_b, N_b) of each sequence, in place of B, M and N.
    """

    name: str
    B: int = 2
    H: int = 4
    Hkv: int = 4
    M: int = 33
    N: int = 101
    D: int = 64
    Dv: int = 64
    is_causal: bool = True
    q_offset: int | Literal["per_example"] | None = None
    key_mask: Literal["random", "left_padding", "right_padding", "dead_example"] | None = None
    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    strides: Literal["contiguous", "transposed", "sliced", "expanded", "inner"] = "contiguous"
    lengths: tuple[tuple[int, int], ...] | None = None


_LENGTHS = ((5, 40), (33, 33), (0, 7), (1, 90), (17, 3), (4, 0), (64, 130))

CASES: tuple[Case, ...] = (
    # shapes
    Case("ragged"),
    Case("tiles", B=1, H=2, Hkv=2, M=192, N=640),
    Case("long", B=1, H=1, Hkv=1, M=70, N=5003),
    Case("decode", M=1, N=257),
    Case("decode_long", B=1, H=2, Hkv=1, M=1, N=4099),
    Case("short_queries", M=5, N=300),
    Case("square", M=65, N=65),
    Case("more_queries_than_keys", M=70, N=13),
    Case("one_key", M=6, N=1),
    Case("one_by_one", B=1, H=1, Hkv=1, M=1, N=1),
    Case("no_examples", B=0),
    Case("no_queries", M=0),
    Case("no_keys", N=0),
    Case("no_keys_not_causal", N=0, is_causal=False),
    # heads
    Case("grouped_heads", H=6, Hkv=2),
    Case("one_key_head", H=5, Hkv=1, M=9),
    Case("one_head", B=1, H=1, Hkv=1),
    # head dims
    Case("dim_1", D=1, Dv=1),
    Case("dim_7", D=7, Dv=7),
    Case("dim_96", D=96, Dv=96),
    Case("dim_128", D=128, Dv=128),
    Case("dim_256", D=256, Dv=256, H=2, Hkv=2),
    Case("dim_300", D=300, Dv=300, H=2, Hkv=2),
    Case("narrow_values", D=64, Dv=24),
    Case("wide_values", D=40, Dv=96),
    Case("odd_dims", D=33, Dv=17),
    # memory
    Case("transposed", strides="transposed"),
    Case("transposed_grouped", strides="transposed", H=6, Hkv=3),
    Case("sliced", strides="sliced"),
    Case("sliced_decode", strides="sliced", M=1, D=63, Dv=65),
    Case("expanded", strides="expanded"),
    Case("inner_stride", strides="inner"),
    # visibility
    Case("not_causal", is_causal=False),
    Case("not_causal_masked", is_causal=False, key_mask="random"),
    Case("masked", key_mask="random"),
    Case("left_padding", key_mask="left_padding"),
    Case("right_padding", key_mask="right_padding"),
    Case("dead_example", key_mask="dead_example"),
    Case("offset_0", q_offset=0),
    Case("offset_past_the_end", q_offset=10**6),
    Case("offset_negative", q_offset=-20),
    Case("offset_before_all", q_offset=-500),
    Case("offset_static_cache", q_offset=20, N=300),
    Case("offset_decode", q_offset=77, M=1, N=300),
    Case("offset_per_example", q_offset="per_example"),
    Case("offset_per_example_masked", q_offset="per_example", key_mask="random", B=3),
    # scores
    Case("scale", scale=0.31),
    Case("scale_negative", scale=-0.2),
    Case("softcap", softcap=3.0),
    Case("softcap_masked", softcap=1.5, scale=0.5, key_mask="random"),
    # dropout
    Case("dropout", dropout_p=0.1),
    Case("dropout_decode", dropout_p=0.5, M=1, N=300),
    Case("dropout_grouped", dropout_p=0.9, H=6, Hkv=2, D=32, Dv=48, key_mask="random"),
    # packed
    Case("packed", lengths=_LENGTHS),
    Case("packed_one", lengths=((33, 101),)),
    Case("packed_not_causal", lengths=_LENGTHS, is_causal=False, H=6, Hkv=2),
    Case("packed_strided", lengths=_LENGTHS, strides="transposed", D=40, Dv=24),
    Case("packed_offset", lengths=_LENGTHS, q_offset=3),
    Case("packed_offset_per_example", lengths=_LENGTHS, q_offset="per_example", key_mask="random"),
    # all at once
    Case("all_options", 3, 6, 2, 21, 77, 24, 40, True, "per_example", "random", 0.4, 2.0, 0.3, "transposed"),
    Case("all_options_packed", 0, 6, 3, 0, 0, 24, 40, True, "per_example", "random", 0.4, 2.0, 0.3,
         "sliced", _LENGTHS),
)  # fmt: skip

BENCH_CASES: tuple[Case, ...] = (
    Case("train", 1, 8, 8, 1024, 16384, 64, 64),
    Case("train_128", 1, 8, 8, 1024, 16384, 128, 128),
    Case("grouped", 1, 16, 4, 512, 16384, 128, 128),
    Case("decode", 1, 8, 8, 1, 131072, 64, 64),
    Case("long", 1, 8, 8, 256, 131072, 64, 64),
    Case("square", 1, 8, 8, 1024, 1024, 64, 64),
    Case("batch", 8, 8, 8, 256, 4096, 64, 64),
)

TORCH_SHORTFALLS: dict[str, str] = {
    "infinite_scores": "a score of +inf makes lse and the gradients NaN by the specification, not in torch",
    "bfloat16_gradients_of_long_inputs": "torch sums dq over key blocks in bfloat16: 14 % off at N = 262,144",
}
"""Where the ``sdpa`` backend, being torch's code, misses the contract: the tests expect exactly that."""
