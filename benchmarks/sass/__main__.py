"""Command line: price the kernels in cubins and libraries.

python -m benchmarks.sass build/kernels.cubin --function forward --threads 128 --shared 65536
python -m benchmarks.sass library.so --arch 90 --json
"""

from __future__ import annotations

import argparse
import json
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
        if path.suffix in (".s", ".amdgcn"):
            for name, resources in parse_amdgcn(path.read_text()).items():
                print(
                    json.dumps({"function": name} | vars(resources))
                    if arguments.json
                    else f"{name}: {resources}"
                )
            continue
        reports = price_all(
            path,
            arguments.function,
            arguments.threads,
            arguments.shared,
            arguments.arch,
            not arguments.no_simulation,
        )
        if arguments.json:
            for report in reports:
                print(json.dumps({"file": str(path)} | report.as_json()))
        elif arguments.details:
            print("\n".join(details(report) for report in reports))
        else:
            print(table((report.function, report) for report in reports))


if __name__ == "__main__":
    main()
