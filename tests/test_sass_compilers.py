"""The engine that prices kernels by their machine code, on what Triton and nvcc compile."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.sass import (  # noqa: E402
    LIMITS,
    disassemble,
    occupancy,
    parse_amdgcn,
    parse_ptxas,
    price,
    price_all,
    table,
    tools,
)
from benchmarks.sass.flow import TENSOR, graph, tensor_loops  # noqa: E402
from benchmarks.sass.listing import NO_BARRIER, Instruction  # noqa: E402
from benchmarks.sass.machines import MACHINES  # noqa: E402
from benchmarks.sass.price import price_loop  # noqa: E402

pytestmark = pytest.mark.cpu_only("compiled there")

A100 = MACHINES[80]
CUDA_ARCHES = (80, 86, 89, 90, 100, 120)
HIP_ARCHES = ("gfx942", "gfx950")

TRITON = importlib.util.find_spec("triton") is not None
NVCC = shutil.which("nvcc")
KERNEL = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(p_a, p_b, p_c, size, BLOCK: tl.constexpr):
    o_i, o_j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    b_c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        b_a = tl.load(p_a + o_i[:, None] * size + (start + o_j)[None, :])
        b_b = tl.load(p_b + (start + o_i)[:, None] * BLOCK + o_j[None, :])
        b_c = tl.dot(b_a, b_b, b_c)
    tl.store(p_c + o_i[:, None] * BLOCK + o_j[None, :], b_c)


aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
signature = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32", "size": "i32", "BLOCK": "constexpr"}
source = ASTSource(product, signature, {"BLOCK": 64}, aligned)
for arch in sys.argv[2:]:
    target = GPUTarget("cuda", int(arch), 32) if arch.isdecimal() else GPUTarget("hip", arch, 64)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    kind = "cubin" if arch.isdecimal() else "amdgcn"
    code = compiled.asm[kind]
    with open(f"{sys.argv[1]}/{arch}.{kind}", "wb") as file:
        file.write(code if isinstance(code, bytes) else code.encode())
    with open(f"{sys.argv[1]}/{arch}.shared", "w") as file:
        file.write(str(compiled.metadata.shared))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small product compiled by Triton for every architecture, in a process of its own."""
    if not TRITON:
        pytest.skip("triton isn't installed")
    folder = tmp_path_factory.mktemp("triton")
    (folder / "kernel.py").write_text(KERNEL)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(folder / "kernel.py"), str(folder), *map(str, CUDA_ARCHES), *HIP_ARCHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def need_tools() -> None:
    try:
        tools.find("cuobjdump")
    except tools.ToolMissing as error:
        pytest.skip(str(error))


def registers_read(instruction: Instruction) -> Iterator[int]:
    """Registers among an instruction's sources: all but the first operand, except in stores and tests."""
    operands = instruction.operands
    if instruction.base not in ("STG", "STS", "RED", "REDG", "BAR", "ISETP", "FSETP"):
        _, _, operands = operands.partition(",")
    for number in re.findall(r"(?<![U\w])R(\d+)", operands):
        yield int(number)


@pytest.mark.parametrize("arch", CUDA_ARCHES)
def test_control_words_protect_what_they_must(compiled: Path, need_tools: None, arch: int) -> None:
    """No instruction reads what a load or S2R writes before it has waited for the barrier."""
    (function,) = disassemble(compiled / f"{arch}.cubin")
    assert function.arch == arch
    straight = function.instructions[: graph(function.instructions).blocks[0][1]]
    pending: dict[int, int] = {}
    protected = 0
    for each in straight:
        protected += sum(barrier in each.waits for barrier in set(pending.values()))
        pending = {register: barrier for register, barrier in pending.items() if barrier not in each.waits}
        assert not [register for register in registers_read(each) if register in pending], str(each)
        target = re.match(r"R(\d+)", each.operands)
        if each.write_barrier != NO_BARRIER and target:
            pending[int(target[1])] = each.write_barrier
    assert protected >= 1
    assert any(each.stall > 1 for each in straight)


@pytest.mark.parametrize("arch", CUDA_ARCHES)
def test_triton_for_cuda(compiled: Path, need_tools: None, arch: int) -> None:
    shared = int((compiled / f"{arch}.shared").read_text())
    found = price((compiled / f"{arch}.cubin").read_bytes(), "product", shared=shared)
    limits = LIMITS[f"sm_{arch}"]
    assert (found.arch, found.threads, found.shared) == (arch, 128, shared)
    assert 32 <= found.registers <= limits.max_registers
    assert found.spill_instructions == found.stack == 0
    assert 1 <= found.ctas_per_sm <= limits.max_blocks
    assert found.warps_per_sm == 4 * found.ctas_per_sm
    main = max(found.loops, key=lambda each: each.tensor_instructions)
    # 64 x 64 x 64: of four warps each does 16 x 64 x 64, 32 products of 16 x 8 x 16.
    kind = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    (function,) = disassemble(compiled / f"{arch}.cubin")
    bases = {each.base for each in function.instructions} & TENSOR
    assert bases == {kind}
    if kind == "HMMA":
        assert main.tensor_instructions == 32
    if arch in MACHINES:
        assert main.pipes["tensor"] == pytest.approx({80: 256, 90: 128}[arch])
        assert main.simulated is not None
        assert main.bound is not None
        assert 0.05 < main.simulated <= 1.01 * main.bound <= 1.01
    else:
        assert (main.simulated, main.bound, main.limiter) == (None, None, None)
    json.dumps(found.as_json())
    assert f"sm_{arch}" in table([("product", found)])


@pytest.mark.parametrize("arch", HIP_ARCHES)
def test_triton_for_hip(compiled: Path, arch: str) -> None:
    found = parse_amdgcn((compiled / f"{arch}.amdgcn").read_text())["product"]
    assert 16 <= found.registers <= LIMITS[arch].max_registers
    assert found.scalar_registers > 0
    assert found.spills == found.stack == 0
    assert found.threads == 256
    shared = int((compiled / f"{arch}.shared").read_text())
    assert occupancy(LIMITS[arch], found.registers, found.shared + shared, 256).blocks >= 1


def test_warps_of_a_block_are_simulated_together(compiled: Path, need_tools: None) -> None:
    cubin = compiled / "80.cubin"
    found = price(cubin, threads=256)
    (function,) = disassemble(cubin)
    main, warps = tensor_loops(function.instructions)[0], found.warps_per_sm // 4
    assert found.loops[0].cycles == price_loop(main, A100, warps, 2).cycles
    assert found.loops[0].cycles != price_loop(main, A100, warps, 1).cycles


def test_command_line(compiled: Path, need_tools: None) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "benchmarks.sass", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    cubin, amdgcn = str(compiled / "80.cubin"), str(compiled / "gfx942.amdgcn")
    priced = json.loads(run(cubin, "--json", "--shared", "16384"))
    assert priced["function"] == "product"
    assert priced["loops"][0]["simulated"] == price(cubin, shared=16384).loops[0].simulated
    assert run(cubin).count("| product | sm_80 | 128 |") == 1
    assert "simulated -" in run(cubin, "--details", "--no-simulation")
    assert json.loads(run(amdgcn, "--json"))["registers"] > 0


def test_what_cannot_be_priced(compiled: Path, need_tools: None, tmp_path: Path) -> None:
    cubin = compiled / "80.cubin"
    with pytest.raises(ValueError, match="one function wanted, found none"):
        price(cubin, "no such function")
    with pytest.raises(ValueError, match="one function wanted, found none"):
        price(cubin, arch=90)
    (tmp_path / "text").write_text("not a cubin")
    with pytest.raises((RuntimeError, ValueError), match="text"):
        price(tmp_path / "text")
    too_much = price(cubin, shared=200 << 10)
    assert (too_much.ctas_per_sm, too_much.occupancy_limiter, too_much.simulated) == (0, "shared", None)


CUDA_SOURCE = """
__global__ void __launch_bounds__(64, BLOCKS) live(float *data) {
    float values[64];
    #pragma unroll
    for (int i = 0; i < 64; i++) values[i] = data[threadIdx.x + 64 * i];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; i++) data[threadIdx.x + 64 * i] = values[i] * values[(i + 1) % 64];
}
__global__ void plain(float *data) {
    __shared__ float tile[512];
    tile[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = tile[threadIdx.x ^ 1];
}
"""


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, str]]:
    """Compiles ``CUDA_SOURCE`` with these options: the cubin, and what ptxas says."""
    if NVCC is None:
        pytest.skip("nvcc isn't on PATH")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "kernels.cu").write_text(CUDA_SOURCE)

    def compile_with(*options: str) -> tuple[Path, str]:
        output = folder / f"{abs(hash(options))}.cubin"
        command = [
            str(NVCC),
            "-cubin",
            "-Xptxas",
            "-v",
            *options,
            "-o",
            str(output),
            str(folder / "kernels.cu"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return output, done.stdout + done.stderr

    return compile_with


@pytest.mark.parametrize("arch", [80, 90])
def test_spills_show(nvcc: Callable[..., tuple[Path, str]], need_tools: None, arch: int) -> None:
    roomy, quiet = nvcc(f"-arch=sm_{arch}", "-DBLOCKS=1")
    tight, complaint = nvcc(f"-arch=sm_{arch}", "-DBLOCKS=32")
    before, after = price(roomy, "live"), price(tight, "live")
    assert before.spill_instructions == 0
    assert min(after.resources.spill_loads, after.resources.spill_stores) > 10
    assert after.stack > 0
    assert after.registers == 32
    assert after.threads == 64
    # ptxas counts in bytes what we count in instructions, of four bytes and more.
    reports = {name: parse_ptxas(text) for name, text in (("roomy", quiet), ("tight", complaint))}
    said = {
        key: next(each for name, each in found.items() if "live" in name) for key, found in reports.items()
    }
    assert said["roomy"].spills == 0
    assert said["tight"].spilled_bytes >= 4 * after.spill_instructions
    assert said["tight"].registers == after.registers


@pytest.mark.parametrize("arch", [80, 90])
def test_shared_memory_is_the_kernels_own(
    nvcc: Callable[..., tuple[Path, str]], need_tools: None, arch: int
) -> None:
    cubin, _ = nvcc(f"-arch=sm_{arch}", "-DBLOCKS=1")
    assert price(cubin, "plain", threads=512).shared == 2048
    assert price(cubin, "plain", threads=512, shared=1000).shared == 3048
    assert price(cubin, "live").shared == 0
    with pytest.raises(ValueError, match="has no launch bounds"):
        price(cubin, "plain")
    with pytest.raises(ValueError, match=r"one function wanted, found .*sm_"):
        price(cubin, threads=64)
    assert len(price_all(cubin, threads=64)) == 2
