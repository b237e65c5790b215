"""Prices compiled GPU kernels from their machine code, without a GPU (`python -m benchmarks.sass --help`)."""

from .listing import disassemble
from .price import LoopReport, Report, price, price_all
from .resources import LIMITS, Limits, Occupancy, Resources, occupancy, parse_amdgcn, parse_ptxas
from .table import table

__all__ = [
    "LIMITS",
    "Limits",
    "LoopReport",
    "Occupancy",
    "Report",
    "Resources",
    "disassemble",
    "occupancy",
    "parse_amdgcn",
    "parse_ptxas",
    "price",
    "price_all",
    "table",
]
