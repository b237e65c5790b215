"""What only the CPU kernels promise: every instruction set, bounded memory, 64-bit addresses, safe calls."""

import os
import subprocess
import sys

import pytest
import torch
from test_native import usable_sets

import perceiver_kernels as pk
from perceiver_kernels.rotary import LAYOUTS, apply_rotary
from perceiver_kernels.testing.budget import budget, math_reference, reference64, relative_error
from perceiver_kernels.testing.cases import CASES, Case
from perceiver_kernels.testing.inputs import make_inputs

pytestmark = pytest.mark.cpu_only("its kernels")
if pk.available_backends()["cpu"] is not None:
    pytest.skip("the package was installed without its compiled kernels", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_keeps_the_contract(dtype, monkeypatch):
    for case in CASES:
        inputs = make_inputs(case, dtype)
        want, plain = reference64(inputs), math_reference(inputs)
        for isa in usable_sets():
            monkeypatch.setenv("PERCEIVER_KERNELS_ISA", isa)
            for name, got in inputs.run("cpu").items():
                error, allowed = relative_error(got, want[name]), budget(plain[name], want[name], dtype)
                assert error <= allowed, (isa, case.name, name)


@pytest.mark.parametrize("backward", [False, True])
def test_extra_memory_does_not_grow_with_the_keys(backward):
    """2,048 queries by 65,536 keys would be 512 MiB of float32 scores; 64 MiB of workspace are allowed."""
    program = f"""
import resource, torch, perceiver_kernels as pk
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(2)
def run(n):
    q, k, v = (torch.randn(1, 1, rows, 64).requires_grad_({backward}) for rows in (2048, n, n))
    before = peak()
    out = pk.perceiver_attention(q, k, v, backend="cpu")
    if {backward}:
        out.sum().backward()
    return peak() - before - {backward} * 2 * k.numel() * 4
run(4096)
print(run(65536))
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert int(printed) < 64 * 2**20


def test_addresses_beyond_two_to_the_31_elements():
    """Rows of K and V 2^25 elements apart; the memory between them is never touched."""
    stride, keys, dim = 2**25, 70, 8
    storage = torch.empty(stride * keys, dtype=torch.bfloat16)
    torch.manual_seed(0)
    near = torch.randn(2, 1, 1, keys, dim, dtype=torch.bfloat16)
    far = storage.as_strided((2, 1, 1, keys, dim), (dim, 0, 0, stride, 1))
    for i in range(2):
        far[i].copy_(near[i])
    for queries in (1, 20):
        query = torch.randn(1, 1, queries, dim, dtype=torch.bfloat16)
        got = pk.perceiver_attention(query, far[0], far[1], backend="cpu")
        want = pk.perceiver_attention(query, near[0], near[1], backend="cpu")
        assert torch.equal(got, want)


def test_direct_calls_of_the_kernels_are_checked():
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    out, lse = torch.empty(1, 2, 3, 8), torch.empty(1, 2, 3)
    options = (None, None, None, None, None, 2, True, 1.0, 0.0, 0.0)
    call = torch.ops.perceiver_kernels.cpu_forward
    call(query, key, key, *options, out, lse)
    for bad in (
        (query, key, key[:, :, :4], *options, out, lse),
        (query, key[:, :1], key, *options, out, lse),
        (query, key, key, *options, out[:, :, :2], lse),
        (query, key, key, *options, out, lse.double()),
        (query, key, key.half(), *options, out, lse),
        (query, key, key, torch.zeros(3, dtype=torch.int64), *options[1:], out, lse),
        (query, key, key, None, torch.ones(1, 4, dtype=torch.bool), *options[2:], out, lse),
        (query.mT.contiguous().mT, key, key, *options, out, lse),
        (query[0], key, key, *options, out, lse),
        (query.int(), key.int(), key.int(), *options, out, lse),
        (query, key, key, *options[:9], 1.5, out, lse),
        (query[:, :0], key, key, *options, out[:, :0], lse[:, :0]),
        (query.movedim(0, 2), key.movedim(0, 2), key, *options, out, lse),
    ):
        with pytest.raises(RuntimeError, match="perceiver_kernels: "):
            call(*bad)
    rows, ends = torch.randn(5, 2, 8), torch.tensor([0, 5])
    for bad_ends in ([0, 10**6], [1, 5], [0, 4], [0, 7, 5]):
        wrong = torch.tensor(bad_ends)
        right = ends if len(bad_ends) == 2 else torch.tensor([0, 2, 5])
        for lengths in ((wrong, right), (right, wrong)):
            with pytest.raises(RuntimeError, match="cu_seqlens must start at 0"):
                call(
                    rows,
                    rows,
                    rows,
                    None,
                    None,
                    *lengths,
                    None,
                    *options[5:],
                    rows.clone(),
                    torch.empty(2, 5),
                )


@pytest.mark.skipif("amx" not in usable_sets(), reason="this processor has no AMX")
def test_tiles_are_left_as_torch_set_them_up():
    """torch's bfloat16 products use the same registers, in the same threads, and may count on their setup."""
    program = """
import os, torch, perceiver_kernels as pk
torch.set_num_threads(4)
torch.manual_seed(0)
a, b = torch.randn(2, 700, 700).bfloat16()
query, key = torch.randn(1, 4, 300, 64).bfloat16(), torch.randn(1, 4, 3000, 64).bfloat16()
product, out = a @ b, pk.perceiver_attention(query, key, key, backend="cpu")
def again():
    for _ in range(20):
        assert torch.equal(a @ b, product)
        assert torch.equal(pk.perceiver_attention(query, key, key, backend="cpu"), out)
again()
torch.set_num_threads(1)
child = os.fork()
again()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = {**os.environ, "PERCEIVER_KERNELS_ISA": "amx"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", usable_sets())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_in_one_pass_is_the_rotation(layout, isa, dtype, monkeypatch):
    """Against float64 and torch's operations: pairs beside and at the vector width, strided data, angles of
    one example and of each."""
    monkeypatch.setenv("PERCEIVER_KERNELS_ISA", isa)
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for pairs, others in ((1, 0), (3, 5), (8, 0), (16, 32), (17, 1), (40, 0)):
        dim = 2 * pairs + others
        whole = torch.randn(2, 3, 7, 2 * dim).to(dtype)
        strided = (whole[..., :dim], whole[:, :, ::2, dim:], whole[:1, :, :, ::2].expand(2, -1, -1, -1))
        for x in (view.transpose(1, 2) for view in strided):
            for shape in ((x.shape[1], pairs), (2, x.shape[1], pairs)):
                angles = torch.randn(shape, dtype=torch.float64)
                leaf, exact = x.detach().requires_grad_(), x.double().clone().requires_grad_()
                got = apply_rotary(leaf, angles.cos().to(wide), angles.sin().to(wide), layout=layout)
                assert "rotate" in type(got.grad_fn).__name__
                want = apply_rotary(exact, angles.cos(), angles.sin().requires_grad_(), layout=layout)
                grad = torch.randn(got.shape).to(dtype)
                got.backward(grad)
                want.backward(grad.double())
                for ours, theirs in ((got, want), (leaf.grad, exact.grad)):
                    torch.testing.assert_close(
                        ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(wide).eps
                    )


def test_direct_calls_of_the_rotation_are_checked():
    x, angles, out = torch.randn(2, 5, 3, 8), torch.randn(5, 4), torch.empty(2, 5, 3, 8)
    call = torch.ops.perceiver_kernels.cpu_rotate
    call(x, angles, angles, False, False, out)
    for bad in (
        (x[0], angles, angles, out),
        (x, angles, angles, out[:, :4]),
        (x, angles, angles, out.double()),
        (x, angles, angles, out.transpose(1, 2).contiguous().transpose(1, 2)),
        (x.mT.contiguous().mT, angles, angles, out),
        (x, angles.double(), angles, out),
        (x, angles, angles.T.contiguous().T, out),
        (x, angles, angles[:, :3].contiguous(), out),
        (x, angles[:4], angles[:4], out),
        (x, angles.expand(3, 5, 4).contiguous(), angles.expand(3, 5, 4).contiguous(), out),
        (x, torch.randn(5, 5), torch.randn(5, 5), out),
        (x, angles[0], angles[0], out),
        (x.int(), angles, angles, out.int()),
    ):
        with pytest.raises(RuntimeError, match="perceiver_kernels: "):
            call(*bad[:3], False, False, bad[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", usable_sets())
def test_dead_rows_pass_nothing_on(isa, dtype, monkeypatch):
    """Two rows see no key: neither they nor their gradients may touch anything, NaN and inf included."""
    monkeypatch.setenv("PERCEIVER_KERNELS_ISA", isa)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 8).to(dtype) for rows in (20, 18, 18))
    dout = torch.randn(1, 2, 20, 8).to(dtype)
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        leaves = [t.clone() for t in (query, key, value)]
        leaves[0][:, :, :2] = poison
        grad = dout.clone()
        grad[:, :, :2] = poison
        leaves = [t.requires_grad_() for t in leaves]
        out = pk.perceiver_attention(*leaves, backend="cpu")
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    assert (results[0][1][:, :, :2] == 0).all()
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("isa", usable_sets())
@pytest.mark.parametrize("queries", [1, 40])
def test_huge_logits_stay_a_weighted_mean(isa, queries, monkeypatch):
    monkeypatch.setenv("PERCEIVER_KERNELS_ISA", isa)
    torch.manual_seed(0)
    query = (3e9**0.5 * (1 + torch.rand(1, 1, queries, 1))).requires_grad_()
    key, value = query.detach()[:, :, :1].clone(), torch.ones(1, 1, 1, 1)
    out = pk.perceiver_attention(query, key, value, scale=1.0, is_causal=False, backend="cpu")
    assert (out == 1).all()
    out.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_accuracy_holds_at_large_logits(scale):
    """Logits of standard deviation 8 and 32: roundings that grow with the logit must not add up.

    At 32 the float32 lse between forward and backward is what limits dv, in the specification as well.
    """
    inputs = make_inputs(Case("large", B=1, H=1, Hkv=1, M=128, N=512, scale=scale), torch.float32)
    want, plain, specified = reference64(inputs), math_reference(inputs), inputs.run("reference")
    for name, got in inputs.run("cpu").items():
        allowed = budget(plain[name], want[name], torch.float32)
        if scale > 1:
            allowed = max(allowed, 1.05 * relative_error(specified[name], want[name]))
        assert relative_error(got, want[name]) <= allowed, name
