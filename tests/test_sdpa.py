"""The path of the sdpa backend for devices other than the CPU, run on one: public function and own lse."""

from __future__ import annotations

import pytest
import torch
from conftest import BY_NAME, USABLE, answers

from perceiver_kernels.backends import sdpa
from perceiver_kernels.testing.budget import relative_error

NAMES = ("ragged", "square", "grouped_heads", "transposed_grouped", "more_queries_than_keys", "left_padding",
         "dead_example", "not_causal", "offset_per_example_masked", "narrow_values",
         "offset_static_cache")  # fmt: skip


@pytest.mark.skipif("sdpa" not in USABLE, reason="not under test")
@pytest.mark.parametrize("name", NAMES)
def test_path_without_fused_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_has_fused", lambda device: False)
    inputs, allowed = answers(BY_NAME[name], torch.float32)
    got = inputs.run("sdpa")
    for tensor, (want, limit) in allowed.items():
        assert relative_error(got[tensor], want) <= limit, tensor
