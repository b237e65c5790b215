"""Steps of a long check: each a command in a process of its own, with a log, a time limit and an outcome."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perceiver_kernels.cli.report import progress

GRACE = 30.0  # seconds in which an interrupted command may write what it has


@dataclass(frozen=True)
class Step:
    """A command to run. One that can't run here has a reason, `missing`, instead."""

    name: str
    command: list[str] = field(default_factory=list)
    report: Path | None = None  # the file that the command writes
    limit: float = 3600.0  # seconds
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


def run_step(step: Step, log: Path) -> dict[str, Any]:
    """Run one step. Returns its name, command, status, seconds, exit code and log.

    The status is passed, failed, timed out or missing. Ctrl-C is passed on to the command, which gets the
    time to write its report; the KeyboardInterrupt then carries the outcome, its status interrupted.
    """
    if step.missing is not None:
        return {"name": step.name, "status": "missing", "reason": step.missing}
    outcome: dict[str, Any] = {"name": step.name, "command": shlex.join(step.command), "log": log.name}
    if step.report is not None:
        step.report.unlink(missing_ok=True)  # an earlier run's must not pass for this one's
    begin = time.monotonic()
    try:
        outcome["code"] = execute(step, log)
    except KeyboardInterrupt as interruption:
        outcome |= {"status": "interrupted", "seconds": round(time.monotonic() - begin, 1)}
        raise KeyboardInterrupt(outcome) from interruption
    outcome["seconds"] = round(time.monotonic() - begin, 1)
    if outcome["code"] is None:
        outcome |= {"status": "timed out", "reason": f"stopped after {step.limit:.0f} s"}
    elif outcome["code"] != 0:
        outcome |= {"status": "failed", "reason": f"exit code {outcome['code']}: {last_line(log)}"}
    else:
        outcome["status"] = "passed"
    return outcome


def execute(step: Step, log: Path) -> int | None:
    """The exit code of a step's command, None if it ran into its limit; all that it prints goes to `log`."""
    with log.open("w") as printed, progress() as bar:
        task = bar.add_task(step.name, total=None)
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
            start_new_session=os.name == "posix",
        )
        deadline = time.monotonic() + step.limit
        try:
            while process.poll() is None and time.monotonic() < deadline:
                bar.update(task, description=f"{step.name}: {last_line(log)[-80:]}".replace("[", r"\["))
                time.sleep(0.2)
        except KeyboardInterrupt:
            stop(process)
            raise
        if process.poll() is None:
            stop(process)
            return None
        return process.returncode


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and its children, and kill them if they don't end soon."""
    for sent, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        if os.name == "posix":
            os.killpg(process.pid, sent)
        else:
            process.terminate()
        try:
            process.wait(wait)
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    """The last line with something on it, of at most the last 4 KiB."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
