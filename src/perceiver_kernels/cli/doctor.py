"""What this machine has, which backends run on it, why the others don't, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.util
import os
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import perceiver_kernels as pk
from perceiver_kernels._library import missing
from perceiver_kernels.cli import gpu, machine
from perceiver_kernels.cli.report import Result, out

OPTIONAL = {"matplotlib": "plots", "perceiver_ar_pytorch": "the swap-in part of the demo"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which device to look at; all of them by default."""
    parser.add_argument(
        "--device", choices=gpu.DEVICES, help="this kind alone; exit code 1 unless a backend can run there"
    )


def devices() -> list[str]:
    """Every kind of device that this torch can use here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def fact(value: Any) -> str:
    """A value of the machine's or the build's description, for people."""
    if isinstance(value, dict):
        value = [f"{name} {item}" for name, item in value.items()]
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value or "none")


def advice(build: dict[str, Any], backends: dict[str, dict[str, str | None]]) -> list[str]:
    """What the user could change to get more out of this machine."""
    found = []
    if not build:
        found.append(
            "The compiled library is missing, so CPU calls run on torch's SDPA. Install a C++17 compiler "
            "(Debian: apt install g++; macOS: xcode-select --install) and reinstall the package."
        )
    override = os.environ.get("PERCEIVER_KERNELS_ISA")
    if override:
        found.append(
            f"PERCEIVER_KERNELS_ISA={override} fixes the instruction set: unset it for the fastest one."
        )
    if torch.get_num_threads() < machine.cores():
        found.append(
            f"torch uses {torch.get_num_threads()} of {machine.cores()} cores: "
            "see OMP_NUM_THREADS or torch.set_num_threads."
        )
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        found.append(
            "triton is missing, needed for the GPU kernels: pip install 'perceiver-kernels[triton]'."
        )
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            found.append(f"{module} is missing, needed for {purpose}: pip install 'perceiver-kernels[demo]'.")
    if all(reason is not None for reasons in backends.values() for reason in reasons.values()):
        found.append("No backend can run here: reinstall torch 2.10 or newer.")
    return found


def run(args: argparse.Namespace, result: Result) -> int:
    """Print three tables and the advice. Returns 0 if any backend is usable, else 1."""
    why_not, build = missing, machine.build()
    asked = devices() if args.device is None else [gpu.checked_device(args.device)]
    backends = {device: pk.available_backends(device) for device in asked}
    result["library"] = {"loaded": why_not is None, "reason": why_not, "build": build}
    result["backends"], result["advice"] = backends, advice(build, backends)

    facts = Table(title="Machine", show_header=False, title_justify="left")
    for name, value in result["machine"].items():
        if name != "gpus" or len(value) > 1:  # a single one has a row of its own
            facts.add_row(name, escape(fact(value)))
    facts.add_row("package", f"perceiver_kernels {result['version']}, commit {result['commit'] or 'unknown'}")
    for name, value in build.items():
        facts.add_row(f"library: {name}", escape(fact(value)))
    if why_not is not None:
        facts.add_row("library", f"[yellow]not loaded:[/] {escape(why_not)}")
    out.print(facts)

    table = Table(title="Backends, in the order in which backend=None tries them", title_justify="left")
    for column in ("device", "backend", "usable", "why not, and what to do about it"):
        table.add_column(column, overflow="fold")
    for device, reasons in backends.items():
        for name, reason in reasons.items():
            table.add_row(
                device, name, "[green]yes[/]" if reason is None else "[yellow]no[/]", escape(reason or "")
            )
    out.print(table)
    for line in result["advice"]:
        out.print("- " + escape(line))
    if not result["advice"]:
        out.print("Nothing to improve.")
    return 0 if any(reason is None for reasons in backends.values() for reason in reasons.values()) else 1
