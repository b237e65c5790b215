"""Run one function in a fresh Python process, where nothing has touched its memory or its caches yet.

The function takes and returns plain JSON values and is named by module and name, so that
`in_fresh_process(function, argument)` is `function(argument)` elsewhere.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

Json = Any


def in_fresh_process(function: Callable[[Json], Json], argument: Json) -> Json:
    """`function(argument)`, computed by a new interpreter.

    RuntimeError: the last line of its error, or the signal that ended it.
    """
    command = [sys.executable, "-m", __name__, function.__module__, function.__name__]
    done = subprocess.run(command, input=json.dumps(argument), capture_output=True, text=True)
    if done.returncode < 0:
        raise RuntimeError(f"process ended by {signal.Signals(-done.returncode).name}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"process ended with code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name = sys.argv[1:]
    print(json.dumps(getattr(import_module(module), name)(json.load(sys.stdin))))
