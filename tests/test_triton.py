"""What is the Triton backend's own: refusals, the split rule, settings, tuning, compilation for any GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, USABLE

import perceiver_kernels as pk
from perceiver_kernels import cache, splits
from perceiver_kernels.backends import triton as backend
from perceiver_kernels.backends.triton.configs import Config, Device, head_parts
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs

triton = pytest.importorskip("triton", reason="triton is not installed")

from perceiver_kernels.backends.triton import launch, tuning  # noqa: E402
from perceiver_kernels.backends.triton.compile import compile_launch  # noqa: E402
from perceiver_kernels.spec import empty_gradients, empty_outputs  # noqa: E402
from perceiver_kernels.splits import VARIABLE as SPLITS  # noqa: E402

runs = pytest.mark.skipif("triton" not in USABLE, reason="needs a GPU, or TRITON_INTERPRET=1")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
CASE = Case("case", 1, 4, 2, 33, 300)


def launches(case: Case, dtype: torch.dtype, config: Config, device: Device) -> list[launch.Launch]:
    """Forward and backward of a case whose tensors hold nothing."""
    tensors = [
        torch.empty(case.B, heads, rows, dim, dtype=dtype, device="meta")
        for heads, rows, dim in (
            (case.H, case.M, case.D),
            (case.Hkv, case.N, case.D),
            (case.Hkv, case.N, case.Dv),
        )
    ]
    inputs = make_inputs(case, torch.float32, "cpu")
    problem = launch.make_problem(*tensors, inputs.spec())
    out, lse = empty_outputs(tensors[0], tensors[2])
    ahead = launch.forward_launches(problem, *tensors, out, lse, device, config)
    gradients = empty_gradients(*tensors)
    back = launch.backward_launches(problem, out, None, *tensors, out, lse, gradients, device, config)
    return [*ahead, *back]


def test_refusals_name_the_argument_and_what_came() -> None:
    query, key, value = (
        torch.zeros(1, 2, n, dim, dtype=torch.float64) for n, dim in ((3, 12), (9, 12), (9, 264))
    )
    reasons = backend.unsupported(query, key, value, make_inputs(CASE, torch.float32).spec(), False)
    assert reasons == [
        "query has head dim 12; the kernels take multiples of 8 up to 256",
        "value has head dim 264; the kernels take multiples of 8 up to 256",
        "query is float64; the kernels take float32, bfloat16 and float16",
    ]


@pytest.mark.skipif(DEVICE.type != "cpu" or INTERPRETED, reason="on a CPU without the interpreter")
def test_without_a_gpu_it_says_how_to_run_all_the_same() -> None:
    query = torch.zeros(1, 1, 3, 8)
    with pytest.raises(
        ValueError, match=r"triton: runs on cuda tensors; .* interpreter \(TRITON_INTERPRET=1\)"
    ):
        pk.perceiver_attention(query, query, query, backend="triton")


@pytest.mark.parametrize("dim", range(8, 257, 8))
@pytest.mark.parametrize("longest", [64, 256])
def test_head_parts(dim: int, longest: int) -> None:
    first, second = head_parts(dim, longest)
    assert first + second >= dim
    assert first >= 16
    assert first & (first - 1) == second & (second - 1) == 0
    assert second == 0 or first < dim
    assert first <= max(longest, 128)
    assert first + second < 2 * max(dim, 16)


@runs
@pytest.mark.parametrize("count", ["1", "2", "5", "100"])
def test_splits_set_by_the_user(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(CASE, torch.float32)
    want = inputs.run("reference")
    monkeypatch.setenv(SPLITS, count)
    got = inputs.run("triton")
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("count", ["-1", "two", "²"])
def test_a_bad_number_of_splits_is_an_error(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPLITS, count)
    with pytest.raises(ValueError, match=f"^{SPLITS} must be a number of splits, .* got '{count}'$"):
        launches(CASE, torch.float16, Config(64, 32, 4, 2), Device("sm_80", 108))


def test_fixed_splits_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "SLAB_BYTES", 1)  # nor on the room for slabs
    monkeypatch.setenv(SPLITS, "4")
    config, device = Config(64, 32, 4, 2), Device("sm_80", 108)
    one, many = (launches(Case("b", b, 4, 4, 33, 900), torch.float16, config, device) for b in (1, 64))
    for a, b in zip(one, many, strict=True):
        assert a.grid[1] == b.grid[1]
        for name in ("splits", "runs"):
            assert a.arguments.get(name) == b.arguments.get(name)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_a_gpu(arch: str) -> None:
    for one in launches(CASE, torch.float16, Config(32, 32, 4, 1), Device(arch, 100)):
        compiled = compile_launch(one, arch)
        assert compiled.metadata.shared <= 64 << 10
        assert ("cubin" if arch.startswith("sm") else "hsaco") in compiled.asm


@pytest.mark.parametrize(
    ("arch", "dim", "asked", "want"),
    [
        ("sm_80", 64, "high", "tf32"),
        ("sm_80", 64, "highest", "ieee"),
        ("sm_86", 256, "high", "ieee"),  # wouldn't fit
        ("gfx942", 64, "medium", "tf32"),
        ("gfx950", 64, "high", "ieee"),  # has none
    ],
)
def test_float32_products_are_fast_where_asked_and_able(arch: str, dim: int, asked: str, want: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        case = Case("c", 1, 1, 1, 33, 300, dim, dim)
        forward, *_, backward, _ = launches(case, torch.float32, Config(32, 32, 4, 1), Device(arch, 1))
    finally:
        torch.set_float32_matmul_precision(before)
    assert forward.constants["PRECISION"] == backward.constants["PRECISION"] == want


@runs
@pytest.mark.parametrize("where", ["query", "dout"])
def test_gradients_of_unseen_keys_are_zero_beside_nan(where: str) -> None:
    inputs = make_inputs(Case("c", 1, 1, 1, 20, 40, key_mask="random", q_offset=0), torch.float32)
    getattr(inputs, where)[0, 0, 5] = torch.nan
    got, want = inputs.run("triton"), inputs.run("reference")
    unseen = ~inputs.kwargs["key_mask"][0] | (torch.arange(40) > 19)
    assert (got["dk"][0, 0, unseen] == 0).all()
    assert (got["dv"][0, 0, unseen] == 0).all()
    assert torch.equal(got["out"].isnan(), want["out"].isnan())


@runs
def test_softcap_and_scale_at_their_limits() -> None:
    inputs = make_inputs(Case("c", 1, 1, 1, 20, 40, scale=1e20, softcap=1e-20), torch.float32)
    got, want = inputs.run("triton"), inputs.run("reference")
    for name in want:
        torch.testing.assert_close(got[name], want[name])


# Tuning. What it measures is made up here: the order of the candidates decides.


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    seen: list[Config] = []

    def measure(run: Any) -> float:
        config = run.args[0]
        seen.append(config)
        return float("inf") if config.num_stages > 2 else float(config.block_n)

    monkeypatch.setattr(tuning, "_time", measure)
    monkeypatch.setattr(tuning, "_measurable", lambda: True)
    monkeypatch.setattr(tuning, "_read", {})
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    return seen


def problem() -> launch.Problem:
    inputs = make_inputs(CASE, torch.float16, "cpu")
    return launch.make_problem(inputs.query, inputs.key, inputs.value, inputs.spec())


def test_tuning_takes_the_fastest_and_remembers_it(measured: list[Config], tmp_path: Path) -> None:
    default, device = Config(64, 64, 4, 2), Device("sm_80", 108)
    first = tuning.tuned("forward", problem(), device, default, lambda config: None)
    assert first == Config(64, 32, 4, 2)
    assert default in measured
    assert len(set(measured)) == len(measured) > 4
    count = len(measured)
    assert tuning.tuned("forward", problem(), device, default, lambda config: None) == first
    assert len(measured) == count
    tuning.tuned("backward", problem(), device, default, lambda config: None)
    assert len(measured) > count
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("content", ["{", '{"a": [Infinity, 1, 1, 1]}', '{"a": 3}', "[" * 10**5])
def test_a_broken_cache_is_measured_again(
    measured: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    default, device = Config(64, 64, 4, 2), Device("sm_80", 108)
    tuning.tuned("forward", problem(), device, default, lambda config: None)
    (file,) = tmp_path.glob("*.json")
    file.write_text(content)
    monkeypatch.setattr(tuning, "_read", {})  # another process
    with pytest.warns(UserWarning, match="can't be read"):
        assert tuning.tuned("forward", problem(), device, default, lambda config: None).block_n == 32
    assert json.loads(file.read_text())


def test_a_cached_configuration_that_is_no_candidate_is_measured_again(
    measured: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, device = Config(64, 64, 4, 2), Device("sm_80", 108)
    best = tuning.tuned("forward", problem(), device, default, lambda config: None)
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps({key: [-16, 32, 4, 1] for key in json.loads(file.read_text())}))
    monkeypatch.setattr(tuning, "_read", {})
    count = len(measured)
    assert tuning.tuned("forward", problem(), device, default, lambda config: None) == best
    assert len(measured) == 2 * count


def test_the_default_is_always_a_candidate(measured: list[Config]) -> None:
    default = Config(32, 256, 2, 1)
    tuning.tuned("forward", problem(), Device("sm_80", 108), default, lambda config: None)
    assert default in measured


def test_what_cannot_be_measured_takes_the_default(
    measured: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_measurable", lambda: False)
    default = Config(64, 64, 4, 2)
    assert tuning.tuned("forward", problem(), Device("sm_80", 108), default, lambda config: None) == default
    assert not measured


def test_an_unwritable_cache_is_a_warning(measured: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, "/proc/none")
    with pytest.warns(UserWarning, match="can't be remembered"):
        tuning.tuned("forward", problem(), Device("sm_80", 108), Config(64, 64, 4, 2), lambda config: None)


@runs
def test_tuned_calls_give_the_answer(measured: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.TUNE, "1")
    inputs = make_inputs(CASE, torch.float32)
    got, want = inputs.run("triton"), inputs.run("reference")
    assert measured
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_tuning_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.TUNE, "yes")
    with pytest.raises(ValueError, match=f"^{tuning.TUNE} must be 0 or 1, got 'yes'$"):
        tuning.enabled()
