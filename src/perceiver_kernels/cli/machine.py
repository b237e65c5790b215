"""Where a result comes from: the machine, the commit, the command and the date in every result file."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels import __version__
from perceiver_kernels._library import cuda_missing, missing, native
from perceiver_kernels.cli import gpu
from perceiver_kernels.tuned import cpu_model

PACKAGE = Path(__file__).resolve().parent.parent


def cores() -> int:
    """Cores this process may run on, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def commit() -> str | None:
    """The git commit of this source tree ("+changes" if files differ from it), None for an installed copy."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", __file__
        )  # an installed copy can lie inside somebody else's repository
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def build() -> dict[str, Any]:
    """What the compiled libraries were built for, and which instruction set this machine uses; {} without."""
    if missing is not None or native is None:
        return {}
    archs = torch.ops.perceiver_kernels.cuda_archs().split() if cuda_missing is None else []
    return {**native.build_info(), "cuda_archs": archs}


def machine() -> dict[str, Any]:
    """Facts about the machine and its software that a timing depends on."""
    return {
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "cores": cores(),
        "memory_gb": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": gpu.triton_version(),
        "threads": torch.get_num_threads(),
        "isa": build().get("isa"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu": gpu.facts(),
    }


def provenance(arguments: list[str] | None = None) -> dict[str, Any]:
    """What every result file says about its origin; `arguments` as given to main, None for this process's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return {
        "version": __version__,
        "commit": commit(),
        "command": shlex.join(["perceiver-kernels", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def caption(result: dict[str, Any]) -> str:
    """Machine and commit in one line, for the foot of a chart."""
    where, what = result["machine"], (result["commit"] or result["version"])[:12]
    if result.get("device", "cpu") != "cpu":
        card = where["gpu"]
        return (
            f"{card['name']}, {card['sms']} SMs, driver {card['driver']}, torch {where['torch']}, "
            f"triton {where['triton']}, {what}"
        )
    isa = where["isa"] or "no compiled library"
    return f"{where['cpu']}, {where['threads']} threads, {isa}, torch {where['torch']}, {what}"
