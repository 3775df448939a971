"""What cloze.py, bases.py, transfer.py and decoding.py share: their arguments, and their result.

Each takes the arguments of run.py, finds in `--work` what a run left there (and makes what it lacks),
and writes one part of a result, so that they may run in any order and one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from experiment import Experiment
from transformers import PreTrainedModel

from memdec.data.corpus import TokenStream
from memdec.errors import MemdecError
from memdec.evaluation.forward import label_scores

MEMORY = "8 layers, samples"
BATCH_BLOCKS = 8


def parser(description: str) -> argparse.ArgumentParser:
    """With the arguments that every part has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--base", required=True, help="as for run.py; so are the next four")
    made.add_argument("--tokens", type=Path, required=True)
    made.add_argument("--outside", action="append", default=[], metavar="NAME=DIR")
    made.add_argument("--work", type=Path, required=True)
    made.add_argument("--settings", type=Path, default=Path(__file__).with_name("settings.yaml"))
    made.add_argument("--memory", default=MEMORY, help="the row of the settings whose memory it is")
    made.add_argument("--result", type=Path, required=True, help="JSON to write the part to")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return made


def open_experiment(options: argparse.Namespace) -> Experiment:
    settings = yaml.safe_load(options.settings.read_text())
    outside = dict(text.split("=", 1) for text in options.outside)
    return Experiment(settings, options.base, options.tokens, outside, options.work, options.device)


def memory_setting(experiment: Experiment, name: str) -> Mapping[str, Any]:
    """The row of that name.

    Raises:
        MemdecError: the settings have none, or it is no memory's.
    """
    rows = {row["name"]: row for row in experiment.settings["rows"] if row["kind"] == "memory"}
    if name not in rows:
        raise MemdecError(f"--memory must be one of {', '.join(map(repr, rows))}, got {name!r}")
    return rows[name]


def documents(stream: TokenStream) -> list[np.ndarray]:
    """The tokens of each document of a split, without its separators."""
    ends = np.append(stream.documents[1:] - 1, len(stream) - 1)
    return [stream.read(*bounds) for bounds in zip(stream.documents, ends, strict=True)]


def held_out(
    experiment: Experiment,
    model: PreTrainedModel,
    stream: TokenStream,
    positions: int | None = None,
) -> np.ndarray:
    """Log p(label) of a model at the first positions of a split, all by default, in the settings' blocks."""
    return label_scores(
        model,
        stream,
        block_size=experiment.settings["block_size"],
        batch_blocks=BATCH_BLOCKS,
        vocab_size=stream.vocab_size,
        positions=positions,
    ).log_probs


def write_part(path: Path, name: str, experiment: Experiment, part: Mapping[str, Any]) -> None:
    """Puts a part into the result beside those that are there."""
    result = json.loads(path.read_text()) if path.exists() else {}
    result[name] = {"machine": experiment.machine(), **part}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)
