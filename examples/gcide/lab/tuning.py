"""The base fine-tuned by cross-entropy: the adapted teacher, and what rows tune otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.experiment import Experiment
from memdec.training.adapt import AdaptConfig, adapt


def adapted(experiment: Experiment) -> str:
    """The adapted teacher, which is also what plain fine-tuning gives: a model directory."""
    return tuned(experiment, experiment.work / "adapt")


def tuned(experiment: Experiment, out: Path, **changes: Any) -> str:
    """A model directory; `changes` are to the settings' options for the teacher."""

    def run() -> str:
        adapt(tuning_config(experiment, **changes), out)
        return str(out / "model")

    return experiment.once(out, run)


def tuning_config(experiment: Experiment, **changes: Any) -> AdaptConfig:
    options = {
        "model": experiment.base,
        "tokens": experiment.tokens,
        "block_size": experiment.settings["block_size"],
        "device": experiment.device,
        "seed": experiment.seed,
    }
    return AdaptConfig(**{**options, **experiment.settings["adapt"], **changes})


def model_named(experiment: Experiment, name: str) -> str:
    """A model as settings name it: the ``base``, or the ``adapted`` teacher."""
    return {"base": lambda: experiment.base, "adapted": lambda: adapted(experiment)}[name]()
