"""Training that survives: checkpoints whole or not at all, damaged ones refused, Ctrl-C between steps."""

from __future__ import annotations

import os
import signal
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from perceiver_kernels.cli.report import CommandError

PARTS = ("recipe", "model", "optimizer", "draw")  # saved each in its own way
SAVE_SECONDS = 180.0  # between checkpoints
Training = TypeVar("Training", bound="Resumable")
Point = TypeVar("Point")


class Resumable:
    """Everything that the next step of a training depends on, so that it can be saved and taken up.

    A subclass is made from its recipe alone. What it has beside the four attributes is saved as it is:
    numbers, strings, and lists and dicts of them.

    Attributes:
        recipe: a frozen dataclass; a checkpoint of another recipe is refused.
        model, optimizer: trained in place.
        draw: where all random numbers come from.
    """

    recipe: Any
    model: Any
    optimizer: torch.optim.Optimizer
    draw: torch.Generator

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    def save(self, path: Path) -> None:
        """Write everything into one file, whole or not at all."""
        state = {name: value for name, value in vars(self).items() if name not in PARTS}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        state |= {"recipe": asdict(self.recipe), "draw": self.draw.get_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    @classmethod
    def load(cls: type[Training], path: Path, recipe: Any) -> Training:
        """Take up what :meth:`save` wrote. CommandError: a damaged file, or one of another recipe."""
        try:
            with zipfile.ZipFile(path) as file:  # torch itself looks at no checksum
                if file.testzip() is not None:
                    raise ValueError("its checksum is wrong")
            state = torch.load(path, weights_only=True)
            if state["recipe"] != asdict(recipe):
                raise CommandError(f"{path} was made by another recipe; remove it or give another --output")
            training = cls(recipe)
            training.draw.set_state(state["draw"])
            for name in ("model", "optimizer"):
                getattr(training, name).load_state_dict(state[name])
            vars(training).update({name: state[name] for name in vars(training) if name not in PARTS})
        except CommandError:
            raise
        except Exception as error:  # torch names no common base for what a damaged file can raise
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise CommandError(f"{path} is no checkpoint of this training: {problem}") from error
        return training

    @classmethod
    def load_or_begin(cls: type[Training], path: Path, recipe: Any) -> Training:
        """What ``path`` holds, or a new training where there is no such file."""
        return cls.load(path, recipe) if path.exists() else cls(recipe)


def checkpointed(
    training: Resumable, points: Iterator[Point], path: Path, save_seconds: float = SAVE_SECONDS
) -> Iterator[Point]:
    """The points of a training's steps as they come, saved into ``path`` now and then and at the end.

    Ctrl-C lets the step in progress end, saves, and raises KeyboardInterrupt then: a step is never halved.
    Pressed again, it ends all at once; what was saved last is what there is.
    """
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    saved = time.monotonic()
    try:
        for point in points:
            yield point
            if pressed:
                break
            if time.monotonic() - saved > save_seconds:
                training.save(path)
                saved = time.monotonic()
        training.save(path)
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
