"""Keeps what a run that takes long has measured so far, so that the same command goes on where it was interrupted."""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from .records import environment, write_lines

# Nats a token of places, by arm, float32 `[B]`.
Losses = dict[str, torch.Tensor]
Part = TypeVar("Part")


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """Return what a command measures depends on, of its options: all but how and where records are written."""
    return {name: str(value) for name, value in vars(options).items() if name not in ("json", "output", "batch")}


def _listed(losses: Losses) -> dict[str, list[float]]:
    return {arm: values.tolist() for arm, values in losses.items()}


class Unfinished:
    """Losses of a run, by stage and batch, in a file beside its output until the run is over.

    Args:
        output: File of the run's records, or None: then nothing is saved.
        settings: What the losses depend on, beside the commit.
        batch: Places of a batch.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The file is of other settings, or of another commit.
    """

    def __init__(self, output: str | None, settings: dict[str, str], *, batch: int, progress: bool):
        self._path = None if output is None else Path(f"{output}.unfinished")
        self._batch, self._progress = batch, progress
        # Matrix products of another shape may round otherwise, so that the size of a batch counts, too.
        self._head = {"commit": environment()["commit"], "batch": str(batch), **settings}
        self._saved: list[dict] = []
        if self._path is not None and self._path.exists():
            head, *self._saved = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
            others = [name for name, value in self._head.items() if head.get(name) != value]
            if others:
                raise ValueError(
                    f"{self._path} is of an interrupted run with another {', '.join(others)}: run the same command at "
                    "the same commit to go on, or remove the file"
                )

    def losses(self, stage: str, count: int, measure: Callable[[slice], Losses]) -> Losses:
        """Measure places batch by batch, but those that are saved.

        Args:
            stage: Name of this part of the run.
            count: Number of places.
            measure: Measures those in a slice.

        Returns:
            Their losses by arm, `[count]` each.
        """
        batches = []
        for start in tqdm(range(0, count, self._batch), disable=not self._progress, desc=f"Reading {stage}"):
            batches.append(
                self.once(stage, start, lambda some=slice(start, start + self._batch): _listed(measure(some)))
            )
        return {arm: torch.tensor([loss for losses in batches for loss in losses[arm]]) for arm in batches[0]}

    def each(self, stage: str, parts: Sequence[Part], measure: Callable[[Part], Any], doing: str) -> list[Any]:
        """Measure the parts of a stage one by one, but those that are saved.

        Args:
            stage: Name of the stage.
            parts: What is measured.
            measure: Returns what was measured of a part, values for JSON.
            doing: What the progress bar says.
        """
        shown = tqdm(parts, disable=not self._progress, desc=doing)
        return [self.once(stage, index, functools.partial(measure, part)) for index, part in enumerate(shown)]

    def once(self, stage: str, start: int, measure: Callable[[], Any]) -> Any:
        """Measure one part of a stage, unless it is saved.

        Args:
            stage: Name of the stage.
            start: Number that tells the part from the others.
            measure: Returns what was measured, values for JSON.
        """
        found = next((one for one in self._saved if (one["stage"], one["start"]) == (stage, start)), None)
        if found is None:
            found = {"stage": stage, "start": start, "losses": measure()}
            self._saved.append(found)
            if self._path is not None:
                write_lines(self._path, [self._head, *self._saved])
        return found["losses"]

    def remove(self) -> None:
        """Remove the file: the run is over."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
