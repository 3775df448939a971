"""What cloze.py, bases.py, transfer.py and decoding.py share: their arguments, and their result.

Each takes the arguments of run.py, finds in `--work` what a run left there (and makes what it lacks),
and writes one part of a result, so that they may run in any order and one at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from command import parser, write_result
from experiment import Experiment
from transformers import PreTrainedModel

from memdec.data.corpus import TokenStream
from memdec.errors import MemdecError
from memdec.evaluation.forward import label_scores

MEMORY = "8 layers, samples"


def part_parser(description: str) -> argparse.ArgumentParser:
    """With the arguments that every part has."""
    made = parser(description)
    made.add_argument("--memory", default=MEMORY, help="the row of the settings whose memory it is")
    return made


def memory_setting(experiment: Experiment, name: str) -> Mapping[str, Any]:
    """The row of that name.

    Raises:
        MemdecError: the settings have none, or it is no memory's.
    """
    rows = {row["name"]: row for row in experiment.settings["rows"] if row["kind"] == "memory"}
    if name not in rows:
        raise MemdecError(f"--memory must be one of {', '.join(map(repr, rows))}, got {name!r}")
    return rows[name]


def held_out(
    experiment: Experiment,
    model: PreTrainedModel,
    stream: TokenStream,
    positions: int | None = None,
) -> np.ndarray:
    """Log p(label) of a model at the first positions of a split, all by default, in the settings' blocks."""
    how = {**experiment.how, "vocab_size": stream.vocab_size}  # perhaps of another tokenizer
    return label_scores(model, stream, positions=positions, **how).log_probs


def write_part(path: Path, name: str, experiment: Experiment, part: Mapping[str, Any]) -> None:
    """Puts a part into the result beside those that are there."""
    result = json.loads(path.read_text()) if path.exists() else {}
    result[name] = {"machine": experiment.machine(), **part}
    write_result(path, result)
