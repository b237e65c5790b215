"""`perceiver-kernels tune` measures, remembers, and backend=None follows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import perceiver_kernels as pk
from perceiver_kernels import cache, dispatch, tuned
from perceiver_kernels.cli import main
from perceiver_kernels.spec import make_spec, needs_gradient
from perceiver_kernels.streaming import KeyStream, Rows, stream_call

OPTIONS = dict.fromkeys(("q_offset", "key_mask", "scale", "softcap", "dropout_seed"))
SHAPE = ["--queries", "20", "--keys", "300", "--heads", "4", "--dim", "32", "--seconds", "0", "--repeat", "2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    monkeypatch.setattr(tuned, "CHOICES", {})


def tensors(
    queries: int = 20, keys: int = 300, dtype: torch.dtype = torch.float32, dim: int = 32
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 4, rows, dim).to(dtype) for rows in (queries, keys, keys))


def chosen(*inputs: torch.Tensor, softcap: float | None = None) -> str:
    options = OPTIONS | {"softcap": softcap}
    spec = make_spec(*inputs, is_causal=True, dropout_p=0.0, **options)
    return dispatch.choose(None, *inputs, spec, needs_gradient(inputs))


def remember(backend: str, *inputs: torch.Tensor, backward: bool = False) -> None:
    tuned.remember(tuned.processor(DEVICE), [tuned.kind(*inputs, backward, backend)])


def test_the_command_remembers_what_was_fastest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", *SHAPE, "--dtype", "float32", "--device", DEVICE.type, "--json", str(tmp_path / "t")]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "t").read_text())
    found = {each["pass"]: each["backend"] for each in result["choices"]}
    assert re.search(rf"fwd: {found['fwd']} \S+ \S+ \(backend \w+: \S+ \S+", capfd.readouterr().out)
    assert set(found) == {"fwd", "fwdbwd"}
    for direction, backend in found.items():
        times = {
            row["candidate"]: row["median_s"]
            for row in result["rows"]
            if row["pass"] == direction and "median_s" in row
        }
        assert len(times) >= 2
        assert backend == min(times, key=lambda name: times[name])
    assert tuned.load() == tuned.CHOICES
    assert chosen(*tensors()) == found["fwd"]
    assert chosen(*(tensor.requires_grad_() for tensor in tensors())) == found["fwdbwd"]


def test_a_choice_holds_for_calls_of_its_kind() -> None:
    default = chosen(*tensors())
    assert default != "sdpa"
    remember("sdpa", *tensors())
    assert chosen(*tensors()) == "sdpa"
    assert chosen(*tensors(queries=32, keys=512)) == "sdpa"  # between the same powers of two
    for other in (
        tensors(queries=33),
        tensors(keys=256),
        tensors(dtype=torch.bfloat16),
        tensors(dim=64),
        tuple(tensor.requires_grad_() for tensor in tensors()),
    ):
        assert chosen(*other) == default
    with torch.no_grad():
        assert chosen(*(tensor.requires_grad_() for tensor in tensors())) == "sdpa"


@pytest.mark.parametrize("trained", [False, True])
def test_a_stream_has_a_backward_where_its_weights_have(trained: bool) -> None:
    query, key, value = tensors()
    remember("sdpa", query, key, value)
    weight = torch.ones((), requires_grad=trained)
    stream = KeyStream(
        [Rows(key[0])], lambda x, begin, end: (x * weight, x * weight), [weight], dim=key.shape[-1]
    )
    options = OPTIONS | {"kv_heads": 4, "value_dim": 32, "dropout_p": 0.0, "backend": None}
    assert (stream_call(query, stream, **options)[1] == "sdpa") == (not trained)


def test_a_backend_that_was_fastest_may_still_refuse_a_call() -> None:
    remember("sdpa", *tensors())
    assert chosen(*tensors(), softcap=3.0) != "sdpa"


def test_a_named_backend_and_other_processors_are_left_alone() -> None:
    tuned.remember("another machine", [tuned.kind(*tensors(), False, "reference")])
    assert chosen(*tensors()) != "reference"
    remember("reference", *tensors())
    query, key, value = tensors()
    named = pk.perceiver_attention(query, key, value, backend="sdpa")
    assert torch.equal(named, pk.perceiver_attention(query, key, value, backend="sdpa"))


def test_a_new_choice_replaces_the_old_one() -> None:
    remember("sdpa", *tensors())
    remember("sdpa", *tensors(dim=64))
    remember("reference", *tensors(queries=25))
    assert chosen(*tensors()) == "reference"
    assert chosen(*tensors(dim=64)) == "sdpa"
    assert len(tuned.CHOICES[tuned.processor(DEVICE)]) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_follows(dynamic: bool) -> None:
    torch.compiler.reset()
    remember("sdpa", *tensors(queries=20, keys=300))
    used = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        used.extend(node.args[-1] for node in graph.graph.nodes if "attention_forward" in str(node.target))
        return graph

    compiled = torch.compile(pk.perceiver_attention, backend=note, fullgraph=True, dynamic=dynamic)
    compiled(*tensors())
    assert used == ["sdpa"]
    compiled(*tensors(keys=200))
    assert used[-1] != "sdpa"


@pytest.mark.parametrize("content", ["{", "[]", '{"cpu": [{"backend": "sdpa"}]}', '{"cpu": 3}'])
def test_a_broken_file_is_told_and_ignored(content: str) -> None:
    remember("sdpa", *tensors())
    cache.path(tuned.FILE).write_text(content)
    with pytest.warns(UserWarning, match="can't be read .*; backends are chosen in the default order"):
        assert tuned.load() == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [("queries", "4"), ("keys", 300.0), ("backward", 0), ("backend", ["sdpa"]), ("dim", None)],
)
def test_a_field_of_another_type_breaks_a_file(field: str, value: object) -> None:
    remember("sdpa", *tensors())
    file = cache.path(tuned.FILE)
    content = json.loads(file.read_text())
    content[tuned.processor(DEVICE)][0][field] = value
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=re.escape(f"({field} is {value!r}, not ")):
        assert tuned.load() == {}


def test_another_process_reads_it(tmp_path: Path) -> None:
    remember("sdpa", *tensors())
    program = "from perceiver_kernels import tuned; print([c[0].backend for c in tuned.CHOICES.values()])"
    environment = os.environ | {cache.FOLDER: str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['sdpa']", done.stderr


def test_two_runs_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run begins where the first has read the file and not yet written it."""
    store, second = cache.store, threading.Thread(target=remember, args=("sdpa", *tensors(dim=64)))

    def interrupted(name: str, content: object) -> None:
        monkeypatch.setattr(cache, "store", store)
        second.start()
        second.join(timeout=0.5)
        store(name, content)

    monkeypatch.setattr(cache, "store", interrupted)
    remember("sdpa", *tensors())
    second.join()
    assert {choice.dim for choices in tuned.load().values() for choice in choices} == {32, 64}


@pytest.mark.parametrize(("folder", "reason"), [("/proc/none", "No such file"), ("", "no home directory")])
def test_a_folder_that_cannot_be_written(
    folder: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(cache.FOLDER, folder)
    assert main(["tune", *SHAPE, "--dtype", "float32", "--pass", "fwd", "--device", DEVICE.type]) == 2
    told = capsys.readouterr().err
    assert "the choices can't be remembered" in told
    assert reason in " ".join(told.split())
