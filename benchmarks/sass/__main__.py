"""Command line: price the kernels in cubins and libraries.

python -m benchmarks.sass build/kernels.cubin --function forward --threads 128 --shared 65536
python -m benchmarks.sass library.so --arch 90 --json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from .price import price_all
from .resources import parse_amdgcn
from .table import details, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, help="cubin, library with CUDA code, or amdgcn text (.s)"
    )
    parser.add_argument("--function", help="regular expression; all functions without it")
    parser.add_argument("--arch", type=int, help="only this architecture: 80, 90, ...")
    parser.add_argument("--threads", type=int, help="threads per block; launch bounds without it")
    parser.add_argument("--shared", type=int, default=0, help="dynamic shared bytes per block")
    parser.add_argument("--no-simulation", action="store_true", help="only count")
    parser.add_argument("--details", action="store_true", help="instruction mix and pipes of each loop")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    for path in arguments.files:
        try:
            print("\n".join(_lines(path, arguments)))
        except (OSError, ValueError, RuntimeError) as error:
            parser.exit(1, f"{path}: {error}\n")


def _lines(path: Path, arguments: argparse.Namespace) -> list[str]:
    if path.suffix in (".s", ".amdgcn"):
        found = parse_amdgcn(path.read_text()).items()
        if arguments.json:
            return [json.dumps({"function": name} | asdict(resources)) for name, resources in found]
        return [f"{name}: {resources}" for name, resources in found]
    reports = price_all(
        path,
        arguments.function,
        arguments.threads,
        arguments.shared,
        arguments.arch,
        not arguments.no_simulation,
    )
    if arguments.json:
        return [json.dumps({"file": str(path)} | report.as_json()) for report in reports]
    if arguments.details:
        return [details(report) for report in reports]
    return [table((report.function, report) for report in reports)]


if __name__ == "__main__":
    main()
