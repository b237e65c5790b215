"""Every saved run names its machine, commit, command and date, as the command line's JSON does."""

from __future__ import annotations

from typing import Any

import pytest

from perceiver_kernels.cli.machine import provenance


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Add our provenance to what --benchmark-json writes."""
    output_json["provenance"] = provenance() | {
        "command": "python -m pytest " + " ".join(config.invocation_params.args)
    }
