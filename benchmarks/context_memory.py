"""What a long context costs: peak memory and time of one training step against N.

    python -m benchmarks.context_memory layer --json FILE --plot FILE.png   one cross-attention layer
    python -m benchmarks.context_memory model --json FILE       a whole PerceiverAR, optimiser included
    python -m benchmarks.context_memory time  --json FILE       streamed against plain, and the FLOPs

Every point of the first two has a process of its own, in which an allocation beyond ``--cap-gb`` fails; a way
that meets the cap is not asked for longer inputs. An interruption keeps what was measured.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import statistics
import sys
import time as clock
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perceiver_kernels as pk
from perceiver_kernels import layers
from perceiver_kernels.cli import charts
from perceiver_kernels.cli.fresh import in_fresh_process
from perceiver_kernels.cli.machine import caption, memory_bytes, provenance
from perceiver_kernels.cli.memory import peak_growth, status_bytes
from perceiver_kernels.cli.report import Result, out, progress, seconds, write_json

DIM, HEADS, LATENTS, DEPTH, VOCABULARY = 512, 8, 1024, 6, 256
LENGTHS = tuple(4096 * 4**i for i in range(5))
MODEL_LENGTHS = (131_072, 1_048_576)
WAYS = {  # and their colour in the chart
    "eager": "#b8b8b8",
    "sdpa": "#707070",
    "fused": "#67a9cf",
    "streamed": charts.OURS,
    "recomputed": "#d6604d",
    "streamed, inputs not counted": "#053061",
}
LABELS = {
    "eager": "matmul, softmax, matmul",
    "sdpa": "torch SDPA, bool mask",
    "fused": "perceiver_attention",
    "streamed": "streamed",
    "recomputed": "streamed, embeddings recomputed",
    "streamed, inputs not counted": "streamed, beyond its inputs",
}
Row = dict[str, Any]


def _mask(query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)


def eager(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The layer's attention as written by hand in most models."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return scores.masked_fill(~_mask(query, key), -torch.inf).softmax(-1) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The layer's attention by torch's own op, with the mask that its shape needs."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_mask(query, key))


def layer_step(way: str, positions: int) -> Callable[[], None]:
    """From tokens to the gradients of layer and embedding table; the last way has its inputs before."""
    torch.manual_seed(0)
    streamed = way not in ("eager", "sdpa", "fused")
    layers.perceiver_attention = {"eager": eager, "sdpa": sdpa}.get(way, pk.perceiver_attention)
    table = nn.Parameter(torch.randn(VOCABULARY, DIM))
    layer = pk.CrossAttention(DIM, HEADS, streamed=streamed)
    tokens = torch.randint(0, VOCABULARY, (1, positions))
    last, before = tokens[:, positions - LATENTS :], tokens[:, : positions - LATENTS]
    given = F.embedding(before, table).detach() if way.endswith("not counted") else None

    def prefix() -> Any:
        if given is not None:
            return given
        if way == "recomputed":
            return pk.Recomputed(lambda a, b: F.embedding(before[:, a:b], table), before.shape[1], [table])
        return F.embedding(before, table)

    def step() -> None:
        layer(F.embedding(last, table), prefix()).square().mean().backward()

    return step


def model_step(way: str, positions: int) -> Callable[[], None]:
    """One step of training a PerceiverAR: forward, backward, AdamW."""
    torch.manual_seed(0)
    model = pk.PerceiverAR(
        pk.PerceiverARConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            max_seq_len=positions,
            num_latents=LATENTS,
            streamed=way == "streamed",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, VOCABULARY, (1, positions + 1))

    def step() -> None:
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[0, -LATENTS:]).backward()
        optimizer.step()

    return step


STEPS = {"layer": layer_step, "model": model_step}


def measure(argument: dict[str, Any]) -> Row:
    """Peak memory and seconds of one step in a fresh process; `argument`: study, way, N, threads, cap."""
    torch.set_num_threads(argument["threads"])
    build = STEPS[argument["study"]]
    build(argument["way"], 2 * LATENTS)()  # code and small buffers
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (argument["cap_bytes"], hard))
    row: Row = {"way": argument["way"], "N": argument["N"]}
    try:
        step = build(argument["way"], argument["N"])
        begin = clock.perf_counter()
        row["growth_bytes"] = peak_growth(step)
        row["seconds"] = clock.perf_counter() - begin
        row["process_bytes"] = status_bytes("VmHWM")  # everything: interpreter, torch, weights, step
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error) and not isinstance(error, MemoryError):
            raise
        row["over_cap"] = True
    return row


def points(args: argparse.Namespace) -> Iterator[Callable[[list[Row]], Row | None]]:
    """Shorter inputs first, so that a way ends where it meets the cap."""

    def point(way: str, n: int, rows: list[Row]) -> Row | None:
        if any(row["way"] == way and row.get("over_cap") for row in rows):
            return None
        argument = {"study": args.study, "way": way, "N": n, "threads": torch.get_num_threads()}
        # By its importable name: this module itself runs as __main__.
        run = import_module("benchmarks.context_memory").measure
        row: Row = in_fresh_process(run, argument | {"cap_bytes": int(args.cap_gb * 2**30)})
        if args.memory_only:
            row.pop("seconds", None)
        return row

    for n in args.lengths or (LENGTHS if args.study == "layer" else MODEL_LENGTHS):
        for way in args.ways or MEMORY_WAYS[args.study]:
            yield partial(point, way, n)


def alternations(args: argparse.Namespace) -> Iterator[Callable[[list[Row]], Row]]:
    """Plain and streamed layer in turns, within one process."""

    def point(n: int, rows: list[Row]) -> Row:
        steps = {way: layer_step(way, n) for way in ("fused", "streamed")}
        samples: dict[str, list[float]] = {way: [] for way in steps}
        for repeat in range(args.repeat + 1):
            for way, step in steps.items():
                begin = clock.perf_counter()
                step()
                if repeat:  # the first is the warm-up
                    samples[way].append(clock.perf_counter() - begin)
        ratios = [s / p for p, s in zip(samples["fused"], samples["streamed"], strict=True)]
        return {"N": n, **samples, "ratio": statistics.median(ratios), "predicted": predicted_ratio(n)}

    for n in args.lengths or LENGTHS[1:4]:
        yield partial(point, n)


def predicted_ratio(n: int) -> float:
    """FLOPs of the streamed layer over the plain one's: the keys' and values' projections once more."""
    pairs = LATENTS * (n - LATENTS) + LATENTS * (LATENTS + 1) // 2
    attention = 14 * DIM * pairs  # 4 forward, 10 backward
    keys_and_values, rest = 2 * 2 * DIM * DIM * n, 3 * 2 * 2 * DIM * DIM * LATENTS
    plain = attention + 3 * keys_and_values + rest
    return (plain + keys_and_values) / plain


def report_memory(result: Result, plot: Path | None) -> None:
    """One line for each point, and the log-log chart."""
    rows = result["rows"]
    for row in rows:
        name = LABELS.get(row["way"], row["way"])
        if row.get("over_cap"):
            out.print(f"N={row['N']:>9,}  {name}: more than {result['cap_gb']:g} GiB")
        else:
            out.print(
                f"N={row['N']:>9,}  {name}: {row['growth_bytes'] / 2**20:,.0f} MiB beyond what was there, "
                f"{row['process_bytes'] / 2**20:,.0f} MiB in all"
                + (f", {seconds(row['seconds'])}" if "seconds" in row else "")
            )
    if plot and rows:
        timed = [row for row in rows if "seconds" in row]
        figure, (memory, *took) = charts.canvas(2 if timed else 1, 1, (11 if timed else 6.5, 4.2))
        for way, color in WAYS.items():
            line = [row for row in rows if row["way"] == way and not row.get("over_cap")]
            if not line:
                continue
            at = [row["N"] for row in line]
            style = "o:" if way.endswith("not counted") else "o-"
            memory.plot(
                at, [row["growth_bytes"] / 2**20 for row in line], style, color=color, label=LABELS[way]
            )
            for axis in took:
                axis.plot(at, [row["seconds"] for row in line], style, color=color)
        titles = (
            f"peak memory of a training step, MiB (dim {DIM}, {LATENTS} latents, float32)",
            "its seconds",
        )
        for axis, title in zip((memory, *took), titles, strict=False):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            ticks = sorted({row["N"] for row in rows})
            axis.set_xticks(ticks, [f"{n:,}" for n in ticks], size=8)
            axis.set_title(title, size=9, loc="left")
            axis.set_xlabel("N, positions of context", size=8)
        handles, names = memory.get_legend_handles_labels()
        (took or [memory])[0].legend(handles, names, frameon=False, fontsize=8)  # where there is room
        charts.save(figure, plot, caption(result))


def report_time(result: Result, plot: Path | None) -> None:
    """Measured against predicted."""
    for row in result["rows"]:
        medians = {way: statistics.median(row[way]) for way in ("fused", "streamed")}
        out.print(
            f"N={row['N']:>9,}  plain {seconds(medians['fused'])}, streamed {seconds(medians['streamed'])}: "
            f"{row['ratio']:.3f}x, {row['predicted']:.3f}x by FLOPs"
        )


MEMORY_WAYS: dict[str, tuple[str, ...]] = {
    "layer": tuple(WAYS),
    "model": ("plain", "streamed"),
    "time": (),
}
STUDIES = {
    "layer": (points, report_memory),
    "model": (points, report_memory),
    "time": (alternations, report_time),
}


def main() -> None:
    """Run one study; write and print what was measured, however far it gets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="positions (default: the study's)"
    )
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="of layer or model (default: all)")
    cap = 0.8 * memory_bytes() / 2**30
    parser.add_argument(
        "--cap-gb", type=float, default=cap, help="GiB a process may allocate (default 80 %%)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="samples of the time study (default 5)")
    parser.add_argument("--memory-only", action="store_true", help="leave out times (a busy machine)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    for way in args.ways or ():
        if way not in MEMORY_WAYS[args.study]:
            parser.error(
                f"--ways of {args.study}: {', '.join(MEMORY_WAYS[args.study]) or 'none'}; got {way!r}"
            )
    jobs, report = STUDIES[args.study]
    command = shlex.join(["python", "-m", "benchmarks.context_memory", *sys.argv[1:]])
    result: Result = {**provenance(), "command": command, "cap_gb": round(args.cap_gb, 1), "rows": []}
    if args.plot:
        charts.canvas(1, 1, (1, 1))  # a missing matplotlib should show before minutes of measuring
    todo = list(jobs(args))
    try:
        with progress() as bar:
            task = bar.add_task(args.study, total=len(todo))
            for job in todo:
                row = job(result["rows"])
                result["rows"] += [] if row is None else [row]
                bar.advance(task)
    except KeyboardInterrupt:
        result["interrupted"] = True
    finally:
        report(result, args.plot)
        if args.json:
            write_json(args.json, result)


if __name__ == "__main__":
    main()
