"""A second opinion on races: SentryWard, a static verifier of PTX, over the launches of small calls.

    PYTHONPATH=tests python -m ptx.second_opinion --json FILE --markdown FILE    (20 minutes)

Needs nvcc, and the command `sentryward` of any environment (pip install sentryward==0.1.1), named by
$SENTRYWARD where it isn't on PATH. The verifier takes a launch's sizes as they are, each pointer as an object
of its own, and considers every schedule. What makes up for what it doesn't compute is in :func:`prepared`. So
that its silence means something, --mutants deletes each barrier and each wait of two kernels in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.backends import cuda
from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.report import err, progress, write_json
from perceiver_kernels.testing.cases import Case
from perceiver_kernels.testing.inputs import make_inputs

from .recorder import Recorder, recorded

CASES = (
    Case("D 64", 1, 1, 1, 20, 150),
    Case("D 128", 1, 1, 1, 20, 150, 128, 128),
    Case("D 256", 1, 1, 1, 20, 150, 256, 256),
    Case("D 64, decode", 1, 4, 1, 1, 300),
    Case("D 64, key mask", 1, 1, 1, 20, 150, key_mask="random"),
)
BROKEN = Case("one split", 1, 1, 1, 20, 460)  # its loops without masks run several times
PROCESSORS = 2
SECONDS = 600  # for each launch

Row = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One launch as the verifier wants it."""

    case: str
    kernel: str
    ptx: str
    config: dict[str, Any]


class Configurations(Recorder):
    """Writes launches down instead of running them."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.found: list[Launch] = []

    def execute(
        self, name: str, ptx: str, grid: tuple[int, int], threads: int, words: list[bytes], shared: int
    ) -> None:
        ptx = prepared(ptx)
        pointers = {8 * i for i, word in enumerate(words) if int.from_bytes(word, "little") in self._tensors}
        numbers = scalars(ptx, b"".join(words), pointers)
        parameter = f"{name}_param_0"
        config = {
            "schema": "spverify.kernel-input/v1",
            "entry": name,
            "launch": {"grid_dim": [*grid, 1], "block_dim": [threads, 1, 1], "dynamic_shared_bytes": shared},
            "declarations": [
                {"parameter": parameter, "offset": offset, "type": "pointer", "space": "global",
                 "object": f"at_{offset}"}
                for offset in sorted(pointers)
            ],
            "arguments": [
                {"parameter": parameter, "offset": offset, "type": kind, "value": value}
                for offset, (kind, value) in sorted(numbers.items())
            ],
        }  # fmt: skip
        self.found.append(Launch(self.case, name, ptx, config))


def prepared(ptx: str) -> str:
    """The same kernel in words that the verifier computes with.

    Parameters are loaded by name instead of by registers that hold their addresses; bit fields are inserted
    by ands and shifts. Asynchronous copies read all of their 16 bytes: how many it are depends on votes, and
    they write 16 anyway. An addition to memory is a load, an addition and a store: without races between
    those, no number has two threads that add to it.
    """
    places: dict[str, tuple[str, int]] = {}  # register: parameter, offset
    for target, parameter in re.findall(r"mov\.[bu]64 +\t?(%rd\d+), (\w+_param_\d+);", ptx):
        places[target] = (parameter, 0)
    for target, source, offset in re.findall(r"add\.s64 +\t?(%rd\d+), (%rd\d+), (-?\d+);", ptx):
        if source in places:
            places[target] = (places[source][0], places[source][1] + int(offset))

    def by_name(match: re.Match[str]) -> str:
        parameter, start = places[match[2]]
        return f"{match[1]}[{parameter}+{start + int(match[3] or 0)}]"

    def inserted(match: re.Match[str]) -> str:
        bits, target, field, into = match.group(1, 2, 3, 4)
        at, mask, moved = int(match[5]), (1 << int(match[6])) - 1, f"%moved{bits}"
        others = ~(mask << at)  # as a signed number
        return (
            f"and.b{bits} {moved}, {field}, {mask}; shl.b{bits} {moved}, {moved}, {at}; "
            f"and.b{bits} %other{bits}, {into}, {others}; or.b{bits} {target}, {moved}, %other{bits};"
        )

    ptx = re.sub(r"(ld\.param\.[^\[]*)\[(%rd\d+)(?:\+(-?\d+))?\]", by_name, ptx)
    ptx = re.sub(r"bfi\.b(32|64)\s+(%\w+), (%\w+), (%\w+), (\d+), (\d+);", inserted, ptx)
    ptx = re.sub(
        r"red\.global\.add\.f32 (\[[^\]]+\]), (%f\d+);",
        r"ld.global.f32 %there, \1; add.f32 %there, %there, \2; st.global.f32 \1, %there;",
        ptx,
    )
    registers = "".join(f"\t.reg .b{bits} %moved{bits}, %other{bits};\n" for bits in (32, 64))
    registers += "\t.reg .f32 %there;\n"
    ptx = re.sub(r"\n\{\n", f"\n{{\n{registers}", ptx, count=1)
    return re.sub(r"(cp\.async\.\S+ \[%r\d+\], \[%rd\d+\], 16), %r\d+;", r"\1, 16;", ptx)


def scalars(ptx: str, memory: bytes, pointers: set[int]) -> dict[int, tuple[str, int | float]]:
    """What a kernel loads of its struct, by offset, but for the pointers."""
    codes = {"u8": "B", "u16": "H", "u32": "I", "s32": "i", "u64": "Q", "s64": "q", "f32": "f"}
    found = {}
    load = r"ld\.param\.(?:v([24])\.)?([busf]\d+)\s[^\[]*\[\w+_param_0(?:\+(\d+))?\]"
    for vector, kind, at in re.findall(load, ptx):
        kind = kind.replace("b", "u")
        for i in range(int(vector or 1)):
            offset = int(at or 0) + i * int(kind[1:]) // 8
            if offset not in pointers:
                found[offset] = (kind, struct.unpack_from("<" + codes[kind], memory, offset)[0])
    return found


def launches(case: Case, processors: int = PROCESSORS) -> list[Launch]:
    """Of a call's forward and backward, in bfloat16."""
    inputs = make_inputs(case, torch.bfloat16)
    tensors, spec = (inputs.query, inputs.key, inputs.value), inputs.spec()
    recorder = Configurations(case.name)
    with recorded(processors, recorder=recorder):
        out, lse = cuda.forward(*tensors, spec)
        cuda.backward(inputs.dout, inputs.dlse, *tensors, out, lse, spec)
    return recorder.found


def short(kernel: str) -> str:
    """attention_forward, of a mangled name."""
    return next(name for name in ("attention_forward", "attention_backward", "combine_splits", "pack_rows",
                                  "reduce_slabs") if name in kernel)  # fmt: skip


def opinion(launch: Launch, ptx: str, taken: bool) -> Row:
    """The verifier's result; a branch that it can't decide, since it depends on data, goes the one way."""
    decisions: list[Row] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kernel, config = Path(folder) / "kernel.ptx", Path(folder) / "input.json"
        kernel.write_text(ptx)
        while True:
            config.write_text(json.dumps(launch.config | {"branch_decisions": decisions}))
            command = [command_line(), str(kernel), "--input", str(config), "--timeout", str(SECONDS)]
            done = subprocess.run(command, capture_output=True, text=True)
            answer = json.loads(done.stdout)
            known = {each["line"] for each in decisions}
            lines = {
                each["details"]["location"]["line"]
                for each in answer["diagnostics"]
                if each["code"] == "control_predicate_not_static"
            } - known
            if not lines:
                break
            decisions += [{"line": line, "taken": taken} for line in sorted(lines)]
    return {
        "case": launch.case, "kernel": short(launch.kernel), "entry": launch.kernel,
        "result": answer["result"], "checks": answer["checks"], "branches": len(decisions), "taken": taken,
        "diagnostics": [f"{each['code']}: {each.get('message', '')}" for each in answer["diagnostics"]][:3],
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def command_line() -> str:
    """The verifier. SystemExit where there is none."""
    found = os.environ.get("SENTRYWARD") or shutil.which("sentryward")
    if found is None:
        raise SystemExit("sentryward is not on PATH; pip install sentryward==0.1.1, or set $SENTRYWARD")
    return found


def opinions(launch: Launch) -> Iterator[Row]:
    """Branches on data are taken, then they aren't."""
    row = opinion(launch, launch.ptx, True)
    yield row
    if row["branches"]:
        yield opinion(launch, launch.ptx, False)


def without_one(ptx: str) -> Iterator[tuple[str, str]]:
    """The kernel less one barrier, or one wait for copies; and which."""
    lines = ptx.split("\n")
    for i, line in enumerate(lines):
        if re.match(r"\s*(bar\.sync|barrier\.sync|cp\.async\.wait_group)", line):
            yield f"line {i + 1}: {line.strip()}", "\n".join([*lines[:i], "", *lines[i + 1 :]])


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown lines."""
    yield "| case | kernel | branches on data | synchronization | memory | result |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        ways = f"{row['branches']}, {'taken' if row['taken'] else 'not taken'}" if row["branches"] else "none"
        checks = row["checks"]
        why = f": {row['diagnostics'][0]}" if row["diagnostics"] else ""
        yield (
            f"| {row['case']} | {row['kernel']} | {ways} | {checks['synchronization']} | {checks['memory']} "
            f"| {row['result']}{why} |"
        )


def main() -> int:
    """Entry point; the exit code: 1 where a race is found."""
    parser = argparse.ArgumentParser(prog="python -m ptx.second_opinion", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--mutants", action="store_true", help="also delete each barrier and wait of D 64's")
    options = parser.parse_args()
    command_line()
    rows: list[Row] = []
    mutants: list[Row] = []
    origin = {key: value for key, value in provenance().items() if key != "machine"}
    command = shlex.join(["python", "-m", "ptx.second_opinion", *sys.argv[1:]])
    result = {**origin, "command": command, "sentryward": "0.1.1", "rows": rows, "mutants": mutants}
    try:
        with progress() as bar:
            todo = [launch for case in CASES for launch in launches(case)]
            task = bar.add_task("sentryward", total=len(todo))
            for launch in todo:
                bar.update(task, description=f"{launch.case} {short(launch.kernel)}")
                rows += opinions(launch)
                bar.advance(task)
            broken = [each for each in launches(BROKEN, 1) if short(each.kernel).startswith("attention")]
            for launch in broken if options.mutants else ():
                rows += opinions(launch)
                for which, ptx in without_one(launch.ptx):
                    bar.update(task, description=f"{short(launch.kernel)} without {which}")
                    mutants.append(opinion(launch, ptx, True) | {"without": which})
    except KeyboardInterrupt:
        err.print("interrupted; what was found is kept")
    lines = list(table(rows))
    if mutants:
        caught = sum(row["result"] != "race_free" for row in mutants)
        lines += [
            "",
            f"Without one of their barriers or waits: {caught} of {len(mutants)} are refused.",
        ]
        lines += [f"- kept: {row['kernel']} without {row['without']}" for row in mutants
                  if row["result"] == "race_free"]  # fmt: skip
    print("\n".join(lines))
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        head = f"# SentryWard 0.1.1 over the CUDA kernels\n\ncommit {(result['commit'] or '?')[:12]}, "
        head += f"{result['date'][:10]}, `{command}`: sm_80, bfloat16, small calls.\n\n"
        options.markdown.write_text(head + "\n".join(lines) + "\n")
    return int(any(row["result"] in ("potential_race", "not_wellsynced") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
