"""Time candidates for one attention problem fairly: checked first, then in interleaved rounds.

Rounds run A B C A B C ..., so that a drifting clock or a busy neighbour touches every candidate alike.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels._library import native
from perceiver_kernels.cli import gpu
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.machine import build
from perceiver_kernels.cli.memory import peak_growth
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs
from perceiver_kernels.testing.peers import PEERS, Attend, Unsupported

SHORTEST_SAMPLE = 5e-3  # seconds; a sample repeats its call until it lasts about that long
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
PASSES = ("fwd", "fwdbwd")
PROBE_BYTES = 256 << 20  # beyond any cache
ANOTHER_PROBLEM = 0.5  # a relative error beyond this is no rounding: another mask, say

Reference = dict[str, tuple[Tensor, float]]


@dataclass
class Candidate:
    """One way to compute the problem: `call()` returns out, and with the backward dq, dk and dv."""

    name: str
    call: Callable[[], tuple[Tensor, ...]]
    way: str = ""  # which of a peer's variants was fastest
    loops: int = 1  # calls per sample
    launch_s: float | None = None  # on a GPU: what one call takes the CPU
    samples: list[float] = field(default_factory=list)  # seconds per call, one entry per round
    clock: Callable[[Callable[[], Any], int], float] | None = None  # None: this module's


def runner(attend: Attend, inputs: Inputs, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs `attend` forward, or forward and backward from a given dout."""
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(inputs.query, inputs.key, inputs.value),)

        return forward
    leaves = tuple(x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value))

    def both() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.dout)

    return both


def ways(name: str, inputs: Inputs, backward: bool) -> dict[str, Attend]:
    """Every way in which backend or peer `name` can compute `inputs`. Unsupported, ValueError: it can't."""
    if name in PEERS:
        return PEERS[name](inputs.query, inputs.key, inputs.value, inputs.spec(), backward)
    return {"": lambda q, k, v: pk.perceiver_attention(q, k, v, **inputs.kwargs, backend=name)}


def clock(call: Callable[[], Any], loops: int = 1) -> float:
    """Seconds per call over `loops` calls in a row."""
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops


def prepare(
    name: str, inputs: Inputs, backward: bool, reference: Reference | None = None, device: str = "cpu"
) -> Candidate:
    """Warm `name` up, choose its fastest way and how many calls make a sample.

    A way that is far from `reference`, where given, computes something else and is passed over.
    """
    best: Candidate | None = None
    fastest = float("inf")
    errors = []
    measured = clock if device == "cpu" else gpu.clock
    for way, attend in ways(name, inputs, backward).items():
        candidate = Candidate(name, runner(attend, inputs, backward), way)
        try:
            with warnings.catch_warnings():  # torch explains at length why some way is not for this problem
                warnings.simplefilter("ignore")
                candidate.call()  # compiles, allocates and touches what only a first call has to
                took = min(measured(candidate.call), measured(candidate.call))
        except Exception as error:  # triton's errors share no base with torch's
            errors.append((str(error).splitlines() or [type(error).__name__])[0])
            continue
        if reference is not None and way:
            off = accuracy(candidate, inputs, reference)["error"]
            if not off <= ANOTHER_PROBLEM:
                errors.append(f"{way}: a relative error of {off:.2g} is no rounding")
                continue
        if took < fastest:
            candidate.loops = max(1, round(SHORTEST_SAMPLE / took))
            best, fastest = candidate, took
    if best is None:
        raise Unsupported("; ".join(dict.fromkeys(errors)))
    if device != "cpu":
        best.clock, best.launch_s = gpu.clock, gpu.launch_time(best.call)
    return best


def rounds(candidates: Sequence[Candidate], repeat: int, limit: float) -> Iterator[None]:
    """Sample each candidate once a round, for `repeat` rounds or `limit` seconds; yields after every one."""
    begin = time.perf_counter()
    for done in range(repeat):
        if done >= 3 and time.perf_counter() - begin > limit:
            return
        for candidate in candidates:
            measured = candidate.clock or clock
            candidate.samples.append(measured(candidate.call, candidate.loops))
            yield


def sample(inputs: Inputs) -> Inputs:
    """The first example's first key head with its query heads: a problem of its own, cheap in float64."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    kwargs = {
        name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.kwargs.items()
    }
    query, dout = (x[:1, :group] for x in (inputs.query, inputs.dout))
    key, value = inputs.key[:1, :1], inputs.value[:1, :1]
    return Inputs(query, key, value, dout, None, kwargs)  # peers have no lse, so none enters the gradients


def sample_reference(inputs: Inputs, backward: bool) -> Reference:
    """What a candidate's sample is compared with: for each tensor its float64 value and its error budget."""
    part = sample(inputs)
    want, plain = reference64(part), math_reference(part)
    names = ("out", "dq", "dk", "dv") if backward else ("out",)
    return {name: (want[name], budget(plain[name], want[name], inputs.query.dtype)) for name in names}


def accuracy(candidate: Candidate, inputs: Inputs, reference: Reference) -> dict[str, Any]:
    """The tensor of the candidate's sample that is closest to its budget, or furthest over it."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    heads = {"out": group, "dq": group, "dk": 1, "dv": 1}
    rows = []
    for (name, (want, allowed)), got in zip(reference.items(), candidate.call(), strict=True):
        rows.append((relative_error(got[:1, : heads[name]], want), allowed, name))
    error, allowed, name = max(rows, key=lambda row: row[0] / row[1] if row[0] == row[0] else float("inf"))
    return {"error": error, "budget": allowed, "worst_tensor": name, "within_budget": error <= allowed}


def visible_pairs(inputs: Inputs) -> int:
    """(query, key) pairs that the visibility rule leaves, over all examples and query heads."""
    spec, (batch, heads, queries, _), keys = inputs.spec(), inputs.query.shape, inputs.key.shape[2]
    last = torch.full((batch, queries), keys, device="cpu")  # each query sees keys [0, last)
    if spec.is_causal:
        offset = torch.tensor([spec.q_offset] * batch) if spec.q_offsets is None else spec.q_offsets
        last = (offset.cpu().unsqueeze(1) + torch.arange(queries, device="cpu") + 1).clamp(0, keys)
    if spec.key_mask is None:
        return heads * int(last.sum())
    seen = torch.nn.functional.pad(spec.key_mask.cpu().cumsum(1), (1, 0))
    return heads * int(seen.gather(1, last).sum())


def operations(inputs: Inputs, backward: bool) -> int:
    """Operations of the unavoidable matmuls: 4 D for a visible pair, 3.5 times that with the backward."""
    d, dv = inputs.query.shape[-1], inputs.value.shape[-1]
    per_pair = 2 * (d + dv) + (2 * (3 * d + 2 * dv) if backward else 0)
    return per_pair * visible_pairs(inputs)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in seconds."""
    low, median, high = statistics.quantiles([*samples] * 2, n=4, method="inclusive")  # needs two at least
    return {"median_s": median, "q1_s": low, "q3_s": high, "min_s": min(samples)}


def fma_peak(dtype: str, device: str = "cpu") -> list[float]:
    """GFLOP/s of a loop of multiply-adds alone, with torch's number of threads; none without the library.

    On a GPU that of a large matrix product by torch.
    """
    if device != "cpu":
        return [gpu.matmul_rate(DTYPES[dtype])]
    if native is None or not build():
        return []
    return [float(native.fma_peak(dtype, torch.get_num_threads()))]


def read_bandwidth(device: str = "cpu") -> list[float]:
    """GB/s of a loop that reads memory alone, with torch's number of threads; none without the library."""
    if device != "cpu":
        return [gpu.read_bandwidth()]
    if native is None or not build():
        return []
    return [float(native.read_bandwidth(torch.get_num_threads(), PROBE_BYTES))]


def weigh(
    case: Case, dtype: str, backward: bool, name: str, way: str = "", device: str = "cpu"
) -> int | None:
    """Peak extra memory of one call in bytes; None where it can't be told.

    Measured in a fresh process, but for a GPU: torch keeps its own account of that memory.
    """
    argument = {
        "case": asdict(case),
        "dtype": dtype,
        "backward": backward,
        "name": name,
        "way": way,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device != "cpu":
        return peak_memory(argument)
    peak: int | None = in_fresh_process(peak_memory, argument)
    return peak


def peak_memory(argument: dict[str, Any]) -> int | None:
    """What :func:`weigh` runs in the fresh process; a peer's mask is included."""
    torch.set_num_threads(argument["threads"])
    dtype, backward, name, way = (argument[key] for key in ("dtype", "backward", "name", "way"))
    device = argument["device"]
    growth = peak_growth if device == "cpu" else gpu.peak_growth
    case = Case(**argument["case"])

    def once(inputs: Inputs) -> tuple[Tensor, ...]:
        return runner(ways(name, inputs, backward)[way], inputs, backward)()

    inputs = make_inputs(case, DTYPES[dtype], device, 0)
    if way == "compiled":  # the compiler's own memory is not the attention's: count a later call
        call = runner(ways(name, inputs, backward)[way], inputs, backward)
        call()
        return growth(call)
    small = Case(**{**asdict(case), "B": 1, "M": min(case.M, 64), "N": min(case.N, 64)})
    once(make_inputs(small, DTYPES[dtype], device, 0))
    return growth(lambda: once(inputs))
