"""What models say of each token of the held-out texts, kept from run to run, and perplexity."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.blended import Ensemble
from lab.experiment import Experiment, file_name
from lab.texts import Text
from memdec.evaluation.bootstrap import interval, resampled_means, resampling_units
from memdec.evaluation.forward import LabelScores, label_scores
from memdec.modeling.loading import load_model, model_fingerprint

SAMPLES = 1000  # of the bootstrap


def perplexity(log_probs: np.ndarray, text: Text, block_size: int) -> dict[str, Any]:
    """nll, perplexity and its 95 % bootstrap interval; None where a probability is 0."""
    nll = -float(log_probs.mean(dtype=np.float64))
    if not math.isfinite(nll):
        return {"nll": None, "perplexity": None, "interval": None}
    _, units = resampling_units(text.positions, text.stream.documents, block_size)
    means = resampled_means(log_probs[:, None].astype(np.float64), units, SAMPLES, seed=0)
    low, high = interval(-means[:, 0])
    return {"nll": nll, "perplexity": math.exp(nll), "interval": [math.exp(low), math.exp(high)]}


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


def score(experiment: Experiment, name: str, *models: str) -> dict[str, LabelScores]:
    """The answers of a model, or of several models' mean, to every text, made once.

    `name` is the file's.
    """
    work = experiment.shared if models == (experiment.base,) else experiment.work
    file = ScoreFile(work / "scores" / f"{file_name(name)}.npz")
    fingerprint = " ".join(model_fingerprint(model) for model in models)
    found = file.read(fingerprint, experiment.texts)
    if found is None:
        if len(models) == 1:
            loaded = load_model(*models, device=experiment.device)
        else:
            loaded = Ensemble.load(models, device=experiment.device)
        found = {
            name: label_scores(
                loaded,
                text.stream,
                positions=text.positions,
                with_confidence=True,
                **experiment.how,
            )
            for name, text in experiment.texts.items()
        }
        file.write(fingerprint, found)
    return found
