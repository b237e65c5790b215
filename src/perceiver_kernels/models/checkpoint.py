"""Models in files: weights, configuration and a digest, in one safetensors file.

A file is read whole and right, or not at all: what is truncated, altered or of another model is a ValueError
that names the file and the fault, before any model exists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from perceiver_kernels.models.config import PerceiverARConfig

METADATA_KEY = "perceiver_kernels.PerceiverARConfig"
DIGEST_KEY = "perceiver_kernels.sha256"
Path = str | os.PathLike[str]


def write_model(path: Path, state: Mapping[str, Tensor], config: PerceiverARConfig) -> None:
    """Write a model's weights and configuration; an interrupted write leaves what stood there before."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {
        "format": "pt",
        METADATA_KEY: json.dumps(dataclasses.asdict(config)),
        DIGEST_KEY: digest(state),
    }
    part = f"{os.fspath(path)}.part"
    try:
        safetensors.torch.save_file(dict(state), part, metadata=metadata)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def read_model(path: Path) -> tuple[PerceiverARConfig, dict[str, Tensor]]:
    """What :func:`write_model` wrote, on the CPU.

    Raises:
        ValueError: for a file that is no whole safetensors file, that holds no configuration or one that
            this version doesn't know, or whose weights are not those that were written.
    """
    name = os.fspath(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name} is no whole safetensors file: {error}") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{name} holds no {METADATA_KEY}: it was not written by PerceiverAR.save")
    config = _config(name, metadata[METADATA_KEY])
    if DIGEST_KEY in metadata and metadata[DIGEST_KEY] != digest(state):  # older files have none
        raise ValueError(f"{name} is damaged: its weights are not those that were saved")
    return config, state


def check_state(name: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not exactly the model's, naming a few of them.

    Raises:
        ValueError: for missing or unexpected names, other shapes or weights that are not floating-point.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    faults = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    faults += [f"{key} is unexpected" for key in sorted(found.keys() - wanted.keys())]
    for key in sorted(wanted.keys() & found.keys()):
        if wanted[key] != found[key]:
            faults.append(f"{key} must be {wanted[key]}, got {found[key]}")
        elif not state[key].is_floating_point():
            faults.append(f"{key} must be floating-point, got {state[key].dtype}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{name} holds weights of another model than its configuration: {'; '.join(faults[:5])}{more}"
        )


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _config(name: str, text: str) -> PerceiverARConfig:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: its configuration is no JSON: {error}") from error
    known = {field.name for field in dataclasses.fields(PerceiverARConfig)}
    if not isinstance(values, dict) or values.keys() - known:
        unknown = sorted(values.keys() - known) if isinstance(values, dict) else values
        raise ValueError(f"{name} has a configuration that this version doesn't know: {unknown}")
    try:
        return PerceiverARConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} has a configuration that can't be built: {error}") from error
