"""The held-out texts, and what models say of each of their tokens, kept from run to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memdec.data.corpus import TokenStream
from memdec.evaluation.forward import LabelScores


@dataclass(frozen=True)
class Text:
    """A held-out text: `positions` of a stream from its start."""

    stream: TokenStream
    positions: int

    @property
    def labels(self) -> np.ndarray:
        return self.stream.read(1, self.positions + 1)

    def head(self, positions: int) -> Text:
        return Text(self.stream, min(positions, self.positions))


class ScoreFile:
    """The scores of one model on every text, kept for the next run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, fingerprint: str, texts: Mapping[str, Text]) -> dict[str, LabelScores] | None:
        """Scores by text, None unless they are of this very model and of so much of these texts."""
        if not self.path.is_file():
            return None
        with np.load(self.path) as arrays:
            if str(arrays["model"]) != fingerprint:
                return None
            found = {
                name: LabelScores(arrays[f"{name}/log_probs"], arrays[f"{name}/confidence"])
                for name in texts
                if f"{name}/log_probs" in arrays
            }
        sizes = {name: len(one.log_probs) for name, one in found.items()}
        return found if sizes == {name: one.positions for name, one in texts.items()} else None

    def write(self, fingerprint: str, scores: Mapping[str, LabelScores]) -> None:
        arrays = {
            f"{name}/{field}": array
            for name, one in scores.items()
            for field, array in vars(one).items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.npz")  # seeds share the base's
        np.savez(temporary, model=np.array(fingerprint), **arrays)
        temporary.replace(self.path)
