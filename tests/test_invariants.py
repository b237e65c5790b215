"""The same bits whatever runs beside; NaN and infinity go where the mathematics sends them, nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import BY_NAME, DEVICE, OURS, USABLE, refusal, usual

from perceiver_kernels.testing.cases import TORCH_SHORTFALLS, Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

SPLIT = [
    Case("one_head", 1, 1, 1, 70, 3000, 64, 64),
    Case("one_head_decode", 1, 1, 1, 1, 20000, 64, 64),
    Case("grouped_decode", 1, 4, 1, 1, 9000, 128, 128),
    Case("short_queries", 1, 2, 1, 5, 4000, 40, 24),
    Case("several_heads", 2, 3, 3, 130, 500, 64, 64, key_mask="random", softcap=5.0),
    Case("dropout", 1, 2, 1, 33, 700, 32, 32, dropout_p=0.2, q_offset=400),
    Case("packed", 1, 2, 1, 0, 0, 64, 64, lengths=((5, 900), (70, 70), (1, 1500))),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case.name)
def test_one_thread_or_two(backend: str, dtype: torch.dtype, case: Case) -> None:
    if backend == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter has one thread, and is slow")
    if refusal(backend, case, dtype):
        pytest.skip(f"{backend} refuses it, as it should")
    inputs = make_inputs(case, dtype)
    results = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        results.append(inputs.run(backend))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(
    "name", ["ragged", "decode", "grouped_heads", "dropout", "offset_per_example", "left_padding"]
)
def test_an_example_does_not_know_of_the_others(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCEIVER_KERNELS_SPLITS", "3")  # else its split fills the device
    inputs = make_inputs(BY_NAME[name], usual(backend))

    def first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1].clone()

    options = {n: first(x) if isinstance(x, torch.Tensor) else x for n, x in inputs.kwargs.items()}
    alone = Inputs(
        *map(first, (inputs.query, inputs.key, inputs.value, inputs.dout, inputs.dlse)), options
    ).run(backend)
    together = inputs.run(backend)
    assert all(torch.equal(together[n][:1], alone[n]) for n in alone)


POISONED = ("offset_static_cache", "offset_decode", "left_padding", "right_padding", "dead_example", "masked",
            "offset_before_all", "offset_per_example_masked", "packed_offset_per_example",
            "packed_offset")  # fmt: skip


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", POISONED)
def test_keys_that_nobody_sees_may_hold_anything(backend: str, filler: float, name: str) -> None:
    clean = make_inputs(BY_NAME[name], usual(backend))
    dirty = make_inputs(BY_NAME[name], usual(backend))
    want = clean.run(backend)
    unseen = unseen_keys(clean)
    assert unseen.any()
    for tensor in (dirty.key, dirty.value):
        tensor[unseen] = filler
    got = dirty.run(backend)
    for tensor in want:
        assert torch.equal(got[tensor], want[tensor]), tensor
    assert (got["dk"][unseen] == 0).all()
    assert (got["dv"][unseen] == 0).all()


def unseen_keys(inputs: Inputs) -> torch.Tensor:
    """Which key rows no query sees, as an index into key: worked out from the rule, one key at a time."""
    spec = inputs.spec()
    shape = inputs.key.shape[:2] if spec.is_packed else inputs.key.shape[:3]
    unseen = torch.zeros(shape, dtype=torch.bool)
    if spec.is_packed:
        q_ends, k_ends = spec.cu_seqlens_q.tolist(), spec.cu_seqlens_k.tolist()
    else:
        q_ends, k_ends = [0, inputs.query.shape[2]] * 2, [0, inputs.key.shape[2]] * 2
    for b in range(len(q_ends) - 1 if spec.is_packed else inputs.query.shape[0]):
        at = b if spec.is_packed else 0
        queries, keys = q_ends[at + 1] - q_ends[at], k_ends[at + 1] - k_ends[at]
        offset = spec.q_offset if spec.q_offsets is None else int(spec.q_offsets[b])
        for j in range(keys):
            hidden = queries == 0 or (spec.is_causal and j > offset + queries - 1)
            if spec.key_mask is not None:
                hidden |= not (spec.key_mask[k_ends[at] + j] if spec.is_packed else spec.key_mask[b, j])
            if hidden:
                unseen[(k_ends[at] + j,) if spec.is_packed else (b, slice(None), j)] = True
    return unseen


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "dout"])
def test_what_is_seen_goes_where_the_reference_sends_it(backend: str, poison: float, where: str) -> None:
    if backend == "sdpa" and DEVICE.type != "cpu":
        pytest.skip("which of torch's kernels runs, and what it makes of infinities, differs between devices")
    inputs = make_inputs(Case("not_causal", 2, 4, 2, 9, 70, 16, 16, is_causal=False), usual(backend))
    getattr(inputs, where)[1, 1, 3, 2] = poison
    got, want = inputs.run(backend), inputs.run("reference")
    assert not all(x.isfinite().all() for x in want.values())
    if (backend, where) == ("sdpa", "key") and "infinite_scores" in TORCH_SHORTFALLS and poison == poison:
        assert not torch.equal(got["lse"].isnan(), want["lse"].isnan())
        got = {"out": got["out"]}
    for name in got:
        close = (
            {"rtol": 1e-3, "atol": 1e-4}
            if got["out"].dtype == torch.float32
            else {"rtol": 0.05, "atol": 0.05}
        )
        torch.testing.assert_close(got[name], want[name], **close, equal_nan=True)
