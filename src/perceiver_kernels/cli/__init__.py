"""The `perceiver-kernels` command: doctor, verify, bench, tune, demo, inspect, gpu-check."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from rich.markup import escape

from perceiver_kernels import __version__
from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.report import CommandError, Result, claim, err, write_json

# Each is a module here, imported only when it is the one to run.
COMMANDS = {
    "doctor": "machine, instruction set, torch, and which backends are usable",
    "verify": "every usable backend against float64: error, budget, pass or fail",
    "bench": "microbenchmarks against eager, SDPA and FlexAttention",
    "tune": "find the fastest backend for your shapes, for backend=None to follow",
    "demo": "verify, bench, train on real text, swap into another model (6 minutes on 2 cores)",
    "inspect": "what the latents of your own model attend to, as a table and a picture",
    "gpu-check": (
        "everything a machine with a GPU can tell: tests, sanitizer, benchmarks against torch and flash-attn"
    ),
}
USAGE_ERROR, INTERRUPTED = 2, 130


def command(name: str) -> Any:
    """The module of a subcommand, with `add_arguments` and `run`."""
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def parser(wanted: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line, in which only the subcommands in `wanted` have their arguments."""
    top = argparse.ArgumentParser(prog="perceiver-kernels", description=__doc__)
    top.add_argument("--version", action="version", version=f"perceiver-kernels {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary)
        if name not in wanted:
            continue
        module = command(name)
        sub.description = module.__doc__
        sub.add_argument(
            "--json", type=Path, metavar="FILE", help="write everything measured, with machine and commit"
        )
        module.add_arguments(sub)
    return top


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A polite end, by `timeout` or a CI system, is Ctrl-C: what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():  # others can't handle signals
        yield
        return

    def terminated(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        ctrl_c = signal.getsignal(signal.SIGINT)  # a training's own lets the step end
        (ctrl_c if callable(ctrl_c) else signal.default_int_handler)(number, frame)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns 0, 1 (something failed), 2 (can't be done here) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser(argv[:1]).parse_args(argv)
    with sigterm_as_ctrl_c():
        return run(args, argv)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """The subcommand with its errors, interruptions and --json file."""
    result: Result = {}
    try:
        if args.json:
            claim("--json", args.json)
        result.update(provenance(argv))
        code: int = command(args.command).run(args, result)
    except CommandError as error:
        err.print(f"[red]perceiver-kernels {args.command}:[/] {escape(str(error))}", soft_wrap=True)
        return USAGE_ERROR
    except KeyboardInterrupt:
        result["interrupted"] = True
        kept = f"; what was measured is in {escape(str(args.json))}" if args.json else ""
        err.print(f"\n[yellow]interrupted[/]{kept}", soft_wrap=True)
        code = INTERRUPTED
    if args.json:
        write_json(args.json, result)
    return code
