"""Files of models: whole and right, or a clear error and no model."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from perceiver_kernels.models import PerceiverAR, PerceiverARConfig
from perceiver_kernels.models import checkpoint as files
from perceiver_kernels.models.checkpoint import DIGEST_KEY, METADATA_KEY

CONFIG = PerceiverARConfig(vocab_size=17, dim=16, depth=1, num_heads=2, max_seq_len=32, num_latents=4)


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    PerceiverAR(CONFIG).save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path, change_state=None, change_metadata=None):
    """The same file with other contents, as a careful program would write it."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(path)
    if change_state:
        change_state(state)
        metadata[DIGEST_KEY] = files.digest(state)
    if change_metadata:
        change_metadata(metadata)
    safetensors.torch.save_file(state, path, metadata=metadata)


def test_a_truncated_file_is_refused_wherever_it_ends(path):
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file: "):
            PerceiverAR.load(path)


def test_a_single_wrong_bit_is_found(path):
    whole = bytearray(path.read_bytes())
    whole[-1000] ^= 1  # one weight moves by its last bit
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its weights are not those"):
        PerceiverAR.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.weight"), "head.weight is missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "extra is unexpected"),
        (
            lambda state: state.update({"norm.weight": torch.zeros(3)}),
            r"norm.weight must be \(16,\), got \(3,\)",
        ),
        (
            lambda state: state.update({"norm.weight": torch.zeros(16, dtype=torch.int64)}),
            "norm.weight must be floating-point, got torch.int64",
        ),
        (lambda state: [state.pop(name) for name in list(state)[1:]], "is missing; .* and .* more"),
    ],
)
def test_weights_of_another_model_are_refused(path, change, message):
    rewrite(path, change_state=change)
    with pytest.raises(ValueError, match=f"model.safetensors holds weights of another model.*{message}"):
        PerceiverAR.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its configuration is no JSON"),
        ("[1]", r"a configuration that this version doesn't know: \[1\]"),
        (json.dumps({**dataclasses.asdict(CONFIG), "flux": 1}), r"doesn't know: \['flux'\]"),
        (json.dumps({**dataclasses.asdict(CONFIG), "num_heads": 5}), "not a multiple of num_heads 5"),
        (json.dumps({"dim": 16}), "can't be built: .*missing"),
    ],
)
def test_bad_configurations_are_refused(path, text, message):
    rewrite(path, change_metadata=lambda metadata: metadata.update({METADATA_KEY: text}))
    with pytest.raises(ValueError, match=f"model.safetensors .*{message}"):
        PerceiverAR.load(path)


def test_refuses_a_file_without_configuration(path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"holds no .* was not written by PerceiverAR.save"):
        PerceiverAR.load(path)
    with pytest.raises(FileNotFoundError):
        PerceiverAR.load(path.with_name("none"))


def test_files_of_older_versions_load(path):
    """They have no digest, and lack the options that came later: these have their defaults."""
    required = ("vocab_size", "dim", "depth", "num_heads", "max_seq_len", "num_latents")
    config = json.dumps({name: getattr(CONFIG, name) for name in required})

    def age(metadata):
        del metadata[DIGEST_KEY]
        metadata[METADATA_KEY] = config

    rewrite(path, change_metadata=age)
    assert PerceiverAR.load(path).config == CONFIG


def test_an_interrupted_save_leaves_the_file_before_it(path, monkeypatch):
    before = path.read_bytes()

    def fail(state, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        PerceiverAR(CONFIG).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
