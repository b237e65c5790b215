"""The `perceiver-kernels` command: doctor, verify, bench, tune, demo, inspect, gpu-check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perceiver_kernels import __version__
from perceiver_kernels.cli import bench, demo, doctor, gpu_check, inspect, tune, verify
from perceiver_kernels.cli.machine import provenance
from perceiver_kernels.cli.report import CommandError, Result, claim, err, write_json

COMMANDS: dict[str, Any] = {
    "doctor": doctor,
    "verify": verify,
    "bench": bench,
    "tune": tune,
    "demo": demo,
    "inspect": inspect,
    "gpu-check": gpu_check,
}
USAGE_ERROR, INTERRUPTED = 2, 130


def parser() -> argparse.ArgumentParser:
    """The whole command line; each subcommand's module adds its own arguments."""
    top = argparse.ArgumentParser(prog="perceiver-kernels", description=__doc__)
    top.add_argument("--version", action="version", version=f"perceiver-kernels {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        sub.add_argument(
            "--json", type=Path, metavar="FILE", help="write everything measured, with machine and commit"
        )
        module.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns 0, 1 (something failed), 2 (can't be done here) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    result: Result = {}
    try:
        if args.json:
            claim("--json", args.json)
        result.update(provenance(argv))
        code: int = COMMANDS[args.command].run(args, result)
    except CommandError as error:
        err.print(f"[red]perceiver-kernels {args.command}:[/] {error}", soft_wrap=True)
        return USAGE_ERROR
    except KeyboardInterrupt:
        result["interrupted"] = True
        err.print(
            "\n[yellow]interrupted[/]" + (f"; what was measured is in {args.json}" if args.json else "")
        )
        code = INTERRUPTED
    if args.json:
        write_json(args.json, result)
    return code
