"""Context parallel against one process: 2, 3 and 4 gloo processes, each started once for all cases."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from bad_parallel_calls import BAD_CALLS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import perceiver_kernels as pk
from perceiver_kernels import collectives
from perceiver_kernels.rows import kept_indices
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import Inputs, make_inputs

pytestmark = [
    pytest.mark.cpu_only("gloo processes"),
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]

ROOT = Path(__file__).resolve().parent.parent
WORLDS = (2, 3, 4)
SPLITS = {  # lengths by number of ranks, as shares; 0 is a rank without keys
    "even": {2: (1, 1), 3: (1, 1, 1), 4: (1, 1, 1, 1)},
    "uneven": {2: (3, 1), 3: (1, 4, 2), 4: (5, 1, 1, 9)},
    "empty": {2: (0, 1), 3: (1, 0, 2), 4: (0, 1, 1, 0)},
}
CASES = (
    Case("plain"),
    Case("grouped", H=6, Hkv=2, D=40, Dv=24, strides="transposed"),
    Case("masked", key_mask="random", softcap=2.0, scale=0.3),
    Case("dead_example", key_mask="dead_example"),
    Case("offset_per_example", q_offset="per_example", key_mask="random", B=3),
    Case("offset_0", q_offset=0),  # the last ranks see nothing
    Case("not_causal", is_causal=False, M=5),
    Case("more_queries_than_keys", M=70, N=13),
    Case("decode", B=1, H=3, Hkv=1, M=1),
    Case("dropout", dropout_p=0.3, H=6, Hkv=3, D=32, Dv=32),
    Case("no_queries", M=0),
)


# What each process runs. Every function returns what the test then looks at, or raises.


def sliced(inputs: Inputs, lengths: list[int], rank: int) -> dict[str, Any]:
    """This rank's arguments."""
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    options = dict(inputs.kwargs)
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][:, own]
    return {"query": inputs.query, "key": inputs.key[:, :, own], "value": inputs.value[:, :, own], **options}


def split(total: int, shares: tuple[int, ...]) -> list[int]:
    """``total`` in parts of about these shares."""
    ends = [total * sum(shares[:r]) // sum(shares) for r in range(len(shares) + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def run_sliced(inputs: Inputs, pieces: list[int], **more: Any) -> dict[str, Tensor]:
    """``out, lse, dq, dk, dv`` of the whole, from what the ranks found; each differentiates a share of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    arguments = sliced(inputs, pieces, rank) | more
    leaves = [arguments.pop(name).detach().requires_grad_() for name in ("query", "key", "value")]
    out, lse = pk.context_parallel_attention(*leaves, return_lse=True, **arguments)
    # The losses of the ranks differ, and so do their shares of the gradient; their sum counts.
    shares = [2.0 * (r + 1) / (world * (world + 1)) for r in range(world)]
    torch.autograd.backward((out, lse), (inputs.dout * shares[rank], inputs.dlse * shares[rank]))
    dq, dk, dv = (leaf.grad.double() for leaf in leaves)
    dist.all_reduce(dq)
    copies = [torch.empty_like(out) for _ in range(world)]
    dist.all_gather(copies, out.detach().contiguous())
    assert all(torch.equal(copy, copies[0]) for copy in copies), "the ranks hold different bits"
    whole = {}
    for name, part in (("dk", dk), ("dv", dv)):
        parts = [part.new_empty(*part.shape[:2], n, part.shape[3]) for n in pieces]
        for source, buffer in enumerate(parts):
            if source == rank:
                buffer.copy_(part)
            dist.broadcast(buffer, source)
        whole[name] = torch.cat(parts, 2)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, **whole}


def op_equals_one_process() -> list[str]:
    """Every case, in each dtype with another split, within the op's own budget; returns what wasn't."""
    world, wrong, kinds = dist.get_world_size(), [], tuple(SPLITS)
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        for i, case in enumerate(CASES):
            kind = kinds[(i + turn) % len(kinds)]
            inputs = make_inputs(case, dtype)
            want, plain = reference64(inputs), math_reference(inputs)
            got = run_sliced(inputs, split(case.N, SPLITS[kind][world]))
            for name in want:
                error = relative_error(got[name], want[name])
                if not error <= budget(plain[name], want[name], dtype):
                    wrong.append(f"{case.name} {kind} {dtype} {name}: {error:.2e}")
    return wrong


def every_backend_and_given_lengths() -> list[str]:
    """The other backends, and lengths that needn't be exchanged, give the same within float32's budget."""
    wrong = []
    for backend in (name for name, reason in pk.available_backends().items() if reason is None):
        case = Case("masked", key_mask="random", dropout_p=0.0 if backend == "sdpa" else 0.2, M=9, N=40)
        inputs = make_inputs(case, torch.float32)
        want, plain = reference64(inputs), math_reference(inputs)
        lengths = split(case.N, SPLITS["uneven"][dist.get_world_size()])
        got = run_sliced(inputs, lengths, backend=backend, lengths=lengths)
        wrong += [
            f"{backend} {name}"
            for name in want
            if not relative_error(got[name], want[name]) <= budget(plain[name], want[name], torch.float32)
        ]
    return wrong


def repeats_bits() -> bool:
    """The same bits in every run, without a gradient for lse, and under another number of threads."""
    inputs = make_inputs(Case("plain"), torch.bfloat16)
    lengths = split(101, SPLITS["uneven"][dist.get_world_size()])
    first = run_sliced(inputs, lengths)
    torch.set_num_threads(2)
    second = run_sliced(inputs, lengths)
    torch.set_num_threads(1)
    return all(torch.equal(first[name], second[name]) for name in first)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends, by collective: what leaves the rank, each byte once for each receiver."""
    sent = {"calls": 0, "bytes": 0}
    real_swap, real_gather = dist.all_to_all_single, collectives._all_gather

    def swap(output: Tensor, tensor: Tensor, group: Any) -> None:
        sent["calls"] += 1
        sent["bytes"] += tensor.numel() * tensor.element_size() * (group.size() - 1) // group.size()
        real_swap(output, tensor, group=group)

    def gather(output: Tensor, tensor: Tensor, group: Any) -> None:
        sent["calls"] += 1
        sent["bytes"] += tensor.numel() * tensor.element_size() * (group.size() - 1)
        real_gather(output, tensor, group=group)

    dist.all_to_all_single, collectives._all_gather = swap, gather
    try:
        yield sent
    finally:
        dist.all_to_all_single, collectives._all_gather = real_swap, real_gather


def bytes_sent() -> list[tuple[dict[str, int], dict[str, int]]]:
    """What forward and backward send at N = 8k and 128k, in bfloat16."""
    counts = []
    for total in (8192, 131072):
        lengths = split(total, (1,) * dist.get_world_size())
        q = torch.randn(1, 2, 33, 16, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(1, 1, lengths[dist.get_rank()], d, dtype=torch.bfloat16) for d in (16, 24))
        with counted() as forward:
            out = pk.context_parallel_attention(q, k, v)
        with counted() as backward:
            out.sum().backward()
        counts.append((forward, backward))
    return counts


def refusals() -> list[str]:
    """A bad call raises on every rank, not only where it is bad, and nobody waits; returns what didn't."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=20))
    wrong = []
    for bad in BAD_CALLS:
        for call, want in bad(dist.get_rank() == 1, group=group):
            said = "no error"
            try:
                call()
            except (TypeError, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            wrong += [] if said.startswith(want) else [f"{said}, not {want}"]
    return wrong


def what_may_differ() -> list[bool]:
    """The ways to walk one's part of the keys."""
    odd = dist.get_rank() == 1
    torch.manual_seed(2)
    latents, prefix = torch.randn(2, 4, 24), torch.randn(2, 9, 24)
    layer = pk.CrossAttention(24, 4, streamed=odd, chunk_size=4 + odd)
    copies = [torch.empty_like(latents) for _ in range(dist.get_world_size())]
    out = layer(latents, prefix.numpy() if odd else prefix, group=dist.group.WORLD)
    dist.all_gather(copies, out.detach())
    return [torch.equal(copies[0], copy) for copy in copies]


def drawn_seed() -> bool:
    """Without a seed all ranks take rank 0's draw, whatever their own generators say."""
    torch.manual_seed(100 + dist.get_rank())
    lengths = split(40, SPLITS["uneven"][dist.get_world_size()])
    q, v = torch.zeros(1, 1, 3, 8), torch.eye(40).view(1, 1, 40, 40)
    own = slice(sum(lengths[: dist.get_rank()]), sum(lengths[: dist.get_rank() + 1]))
    out = pk.context_parallel_attention(
        q, torch.zeros(1, 1, 40, 8)[:, :, own], v[:, :, own], dropout_p=0.5, is_causal=False
    )
    torch.manual_seed(100)
    want = pk.perceiver_attention(q, torch.zeros(1, 1, 40, 8), v, dropout_p=0.5, is_causal=False)
    return torch.allclose(out, want)


def off(got: Tensor, want: Tensor) -> bool:
    """Whether float64 results differ by more than rounding."""
    return not relative_error(got, want) < 1e-12


def averaged(module: nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients as DDP and FSDP average them."""
    world = dist.get_world_size()
    gradients = {name: parameter.grad / world for name, parameter in module.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    module.zero_grad()
    return gradients


def part(lengths: list[int]) -> slice:
    """This rank's."""
    rank = dist.get_rank()
    return slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))


def layer_equals_one_process() -> list[str]:
    """Outputs, and the averaged gradients of parameters and inputs, of two layers in a row."""
    torch.manual_seed(3)
    world, total, num_latents = dist.get_world_size(), 53, 7
    wrong = []
    for kind, shares in SPLITS.items():
        own = part(split(total - num_latents, shares[world]))
        for masked, streamed in ((False, False), (True, False), (True, True)):
            options = {"streamed": streamed, "chunk_size": 11}
            layers = nn.ModuleList(pk.CrossAttention(24, 4, 2, **options) for _ in range(2)).double()
            latents = torch.randn(2, num_latents, 24, dtype=torch.float64)
            prefix = torch.randn(2, total - num_latents, 24, dtype=torch.float64)
            mask = torch.rand(2, total) < 0.7 if masked else None

            def run(layers: Any, prefix: Tensor, latents: Tensor, **options: Any) -> tuple[Any, ...]:
                prefix, latents = prefix.clone().requires_grad_(), latents.clone().requires_grad_()
                x = latents
                for layer in layers:
                    x = x + layer(x, prefix, **options)
                x.square().sum().backward()
                return x.detach(), latents.grad, prefix.grad

            out, dlatents, dprefix = run(layers, prefix, latents, key_mask=mask)
            want = {name: parameter.grad for name, parameter in layers.named_parameters()}
            layers.zero_grad(set_to_none=True)
            if mask is not None:
                mask = torch.cat((mask[:, own], mask[:, total - num_latents :]), dim=1)
            mine = run(layers, prefix[:, own], latents, key_mask=mask, group=dist.group.WORLD)
            summed = mine[1] / world
            dist.all_reduce(summed)
            pairs = {"out": (mine[0], out), "latents": (summed, dlatents)}
            pairs["prefix"] = (mine[2] / world, dprefix[:, own])
            pairs |= {name: (gradient, want[name]) for name, gradient in averaged(layers).items()}
            wrong += [f"{kind} {masked} {streamed} {name}" for name, pair in pairs.items() if off(*pair)]
    return wrong


def prefix_dropout_keeps_a_share_of_each_slice() -> list[bool]:
    """The layer is the plain one over the keys that the ranks kept, and torch's generators stay in step."""
    return [flag for streamed in (False, True) for flag in _prefix_dropout(streamed)]


def _prefix_dropout(streamed: bool) -> list[bool]:
    torch.manual_seed(11)
    layer = pk.CrossAttention(24, 4, prefix_dropout=0.6, streamed=streamed, chunk_size=7).double()
    latents = torch.randn(2, 5, 24, dtype=torch.float64)
    prefix = torch.randn(2, 40, 24, dtype=torch.float64)
    lengths = split(40, SPLITS["uneven"][dist.get_world_size()])
    torch.manual_seed(12)
    got = layer(latents, prefix[:, part(lengths)], group=dist.group.WORLD)
    after = torch.rand(())

    torch.manual_seed(12)
    seed = int(torch.randint(2**62, ()))
    in_step = torch.equal(after, torch.rand(()))
    masks = []
    for rank, length in enumerate(lengths):
        torch.manual_seed(Random(f"{seed} prefix {rank}").getrandbits(62))
        kept = kept_indices(2, length, 0.6, torch.device("cpu"))
        masks.append(torch.zeros(2, length, dtype=torch.bool).scatter_(1, kept, True))
    mask = torch.cat((*masks, torch.ones(2, 5, dtype=torch.bool)), dim=1)
    return [in_step, not off(got, layer.eval()(latents, prefix, key_mask=mask))]


def small_model(**options: Any) -> pk.PerceiverAR:
    """In float64, the same on every rank."""
    torch.manual_seed(5)
    sizes = {"vocab_size": 17, "dim": 24, "depth": 2, "num_heads": 4, "num_kv_heads": 2}
    config = pk.PerceiverARConfig(**sizes, max_seq_len=64, num_latents=9, **options)
    return pk.PerceiverAR(config).double()


def model_equals_one_process() -> list[str]:
    """Logits and averaged gradients, with latents that lie on several ranks, padding, learned positions."""
    world, wrong = dist.get_world_size(), []
    options = {"positions": "learned", "position_origin": "last", "tie_embeddings": True}
    options |= {"cross_after": (1,), "latents_per_position": 2}
    plain = small_model(activation_checkpointing=True, **options)
    tokens, labels = torch.randint(17, (2, 61)), torch.randint(17, (2, 9))
    several = {2: (9, 1), 3: (50, 2, 2), 4: (9, 1, 0, 1)}
    for kind, shares in {**SPLITS, "latents on several ranks": several}.items():
        own = part(split(61, shares[world]))
        model = plain
        if kind == "uneven":
            model = small_model(streamed=True, chunk_size=8, **options)
        for padding in (None, 13, 55):  # of the first example, on the left
            pad = None if padding is None else torch.arange(61).expand(2, 61) < torch.tensor([[padding], [0]])
            logits = model(tokens, pad_mask=pad)
            F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            want = {name: parameter.grad for name, parameter in model.named_parameters()}
            model.zero_grad(set_to_none=True)
            pad = None if pad is None else pad[:, own]
            mine = model(tokens[:, own], pad_mask=pad, group=dist.group.WORLD)
            F.cross_entropy(mine.flatten(0, 1), labels.flatten()).backward()
            pairs = {"logits": (mine, logits)}
            pairs |= {name: (gradient, want[name]) for name, gradient in averaged(model).items()}
            wrong += [f"{kind} {padding} {name}" for name, pair in pairs.items() if off(*pair)]
    return wrong


def model_draws_dropout_alike() -> list[bool]:
    """With every kind of dropout all ranks hold the same logits; another step, or layer, drops others."""
    return [flag for streamed in (False, True) for flag in _model_dropout(streamed)]


def _model_dropout(streamed: bool) -> list[bool]:
    world = dist.get_world_size()
    options = {"dropout": 0.2, "attention_dropout": 0.2, "prefix_dropout": 0.5, "chunk_size": 8}
    model = small_model(streamed=streamed, cross_after=(0,), latent_dropout=0.3, **options)
    tokens = torch.randint(17, (2, 60))[:, part(split(60, SPLITS["uneven"][world]))]
    torch.manual_seed(dist.get_rank())  # no matter
    kept: list[Tensor] = []
    for block in (model.cross, model.later_crosses[0]):
        block.attention.kv_norm.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    logits = [model(tokens, group=dist.group.WORLD).detach() for _ in range(2)]
    copies = [torch.empty_like(logits[0]) for _ in range(world)]
    dist.all_gather(copies, logits[0])
    alike, anew = all(torch.equal(copy, copies[0]) for copy in copies), not torch.equal(*logits)
    few = kept[0].shape[1] < 20  # hardly any prefix lies here
    return [alike, anew, streamed or few or not torch.equal(kept[0], kept[1])]


def parallel_training_equals_one_process() -> list[str]:
    """DDP and FSDP over data x context, 2 x 2: the gradients of one process with the whole batch."""
    if dist.get_world_size() != 4:
        return []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    data, context = mesh.get_coordinate()
    model = small_model(cross_after=(0,))
    tokens, labels = torch.randint(17, (2, 50)), torch.randint(17, (2, 9))
    F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    own = slice(0, 20) if context == 0 else slice(20, 50)
    wrong = []
    for name, streamed in itertools.product(("DDP", "FSDP", "FSDP by block"), (False, True)):
        model = small_model(cross_after=(0,), streamed=streamed, chunk_size=8)
        if name == "FSDP by block":  # blocks that are resharded after their forward, then the rest
            for block in (model.cross, *model.later_crosses, *model.blocks):
                fully_shard(block, mesh=mesh)
        parallel = DistributedDataParallel(model) if name == "DDP" else fully_shard(model, mesh=mesh)
        logits = parallel(tokens[data : data + 1, own], group=mesh["context"])
        F.cross_entropy(logits.flatten(0, 1), labels[data]).backward()
        for key, parameter in model.named_parameters():
            gradient = parameter.grad if name == "DDP" else parameter.grad.full_tensor()
            wrong += [f"{name} {streamed} {key}"] if off(gradient, want[key]) else []
    return wrong


EQUAL = (
    op_equals_one_process, every_backend_and_given_lengths, layer_equals_one_process,
    model_equals_one_process, parallel_training_equals_one_process,
)  # fmt: skip
ALIKE = (
    repeats_bits,
    drawn_seed,
    prefix_dropout_keeps_a_share_of_each_slice,
    model_draws_dropout_alike,
    what_may_differ,
)
JOBS = (*EQUAL, *ALIKE, bytes_sent, refusals)


# Starting processes.


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def _join(rank: int, world: int, port: int, seconds: float) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds))


def _process(rank: int, world: int, port: int, jobs: tuple[Callable[[], Any], ...], folder: str) -> None:
    _join(rank, world, port, 120)
    results = {}
    for job in jobs:
        try:
            results[job.__name__] = job()
        except Exception:
            results[job.__name__] = traceback.format_exc()
            break  # the others wait in vain: their own errors follow
    torch.save(results, Path(folder) / f"{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What every job returned on every rank of so many; the processes run once."""
    done: dict[int, list[dict[str, Any]]] = {}

    def of(world: int) -> list[dict[str, Any]]:
        if world not in done:
            folder = tmp_path_factory.mktemp(f"world{world}")
            mp.spawn(_process, (world, _free_port(), JOBS, str(folder)), nprocs=world)
            done[world] = [
                torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)
            ]
        return done[world]

    return of


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("job", [job.__name__ for job in EQUAL])
def test_equals_one_process(results: Any, world: int, job: str) -> None:
    assert [result[job] for result in results(world)] == [[]] * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("job", [job.__name__ for job in ALIKE])
def test_all_ranks_alike(results: Any, world: int, job: str) -> None:
    for result in results(world):
        flags = result[job] if isinstance(result[job], list) else [result[job]]
        assert flags
        assert all(flag is True for flag in flags)


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_sent_follow_the_formula_whatever_n_is(results: Any, world: int) -> None:
    plan = runpy.run_path(str(ROOT / "benchmarks" / "context_parallel.py"))["sent_bytes"]
    forward, backward = plan(world, 2 * 33, 24, 2)
    compared = (world - 1) * 4 * 8
    want = ({"calls": 3, "bytes": forward + compared}, {"calls": 2, "bytes": backward})
    for result in results(world):
        assert result["bytes_sent"] == [want, want]


@pytest.mark.parametrize("world", WORLDS)
def test_bad_calls_raise_on_every_rank(results: Any, world: int) -> None:
    assert [result["refusals"] for result in results(world)] == [[]] * world


def test_without_a_process_group() -> None:
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"group: torch\.distributed is not initialised"):
        pk.context_parallel_attention(q, q, q)


def _victim_or_survivor(rank: int, port: int, folder: str) -> None:
    """Rank 2 first stalls, then dies between forward and backward; the others write down what they got."""
    _join(rank, 3, port, 60)
    impatient = dist.new_group(timeout=datetime.timedelta(seconds=2))
    q, k, v = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    said = []

    def survive(action: Callable[[], Any]) -> None:
        start = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            action()
        said.append((str(caught.value), time.monotonic() - start))

    if rank == 2:
        time.sleep(5)
    else:
        survive(lambda: pk.context_parallel_attention(q, k, v, lengths=[9, 9, 9], group=impatient))
    out = pk.context_parallel_attention(q, k, v)  # another group: not broken
    if rank == 2:
        os._exit(3)
    survive(lambda: out.sum().backward())
    torch.save(said, Path(folder) / f"{rank}.pt")
    os._exit(0)  # not by way of a broken group


def test_a_stalled_and_a_dead_rank_are_clear_errors(tmp_path: Path) -> None:
    context, port = mp.get_context("spawn"), _free_port()
    ranks = [context.Process(target=_victim_or_survivor, args=(r, port, str(tmp_path))) for r in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 3]
    for rank in range(2):
        (stalled, waited), (died, seconds) = torch.load(tmp_path / f"{rank}.pt")
        assert stalled.startswith(
            f"context parallel: merging the ranks' partial results failed on rank {rank} of 3"
        )
        assert 1 < waited < 10
        assert died.startswith(f"context parallel: summing over the ranks failed on rank {rank} of 3")
        assert seconds < 30  # half the group's timeout
        assert "another rank has died" in died
        assert "Cause: " in died


def test_the_example_learns_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = ["examples/context_parallel.py", "README.md", "--positions", "1024", "--latents", "64"]
    done = subprocess.run(
        [*command, *example, "--steps", "4"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bits = [float(line.split()[2]) for line in done.stdout.splitlines()]
    assert len(bits) == 4
    assert bits[-1] < bits[0] < 9
