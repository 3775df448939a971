"""What the commands of this folder share: arguments, the experiment these name, and a result's file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lab.experiment import Experiment
from memdec.errors import MemdecError


def parser(description: str) -> argparse.ArgumentParser:
    """With the arguments that name an experiment, and `--result`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--base", required=True, help="model directory or .gguf file")
    made.add_argument("--tokens", type=Path, required=True, help="directory of memdec prepare")
    made.add_argument(
        "--outside",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="text outside the domain: the test split of a directory of memdec prepare; repeatable",
    )
    made.add_argument("--work", type=Path, required=True, help="stages and scores; some 20 GB")
    made.add_argument("--result", type=Path, required=True, help="JSON to write or to go on with")
    settings = Path(__file__).parents[1] / "settings.yaml"
    made.add_argument("--settings", type=Path, default=settings)
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return made


def part_parser(description: str) -> argparse.ArgumentParser:
    """Of cloze.py, bases.py, transfer.py and decoding.py, which may run in any order.

    Each finds in `--work` what run.py left there, makes what it lacks, and writes one part of a result.
    """
    made = parser(description)
    memory = "8 layers, samples"
    made.add_argument("--memory", default=memory, help="the row of the settings whose memory it is")
    return made


def open_experiment(options: argparse.Namespace, seed: int = 0) -> Experiment:
    """The experiment that the arguments of :func:`parser` name."""
    settings = yaml.safe_load(options.settings.read_text())
    outside = dict(text.split("=", 1) for text in options.outside)
    return Experiment(
        settings, options.base, options.tokens, outside, options.work, options.device, seed
    )


def memory_setting(experiment: Experiment, name: str) -> Mapping[str, Any]:
    """The row of the settings that `--memory` names.

    Raises:
        MemdecError: the settings have none, or it is no memory's.
    """
    rows = {row["name"]: row for row in experiment.settings["rows"] if row["kind"] == "memory"}
    if name not in rows:
        raise MemdecError(f"--memory must be one of {', '.join(map(repr, rows))}, got {name!r}")
    return rows[name]


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all: a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def write_part(path: Path, name: str, experiment: Experiment, part: Mapping[str, Any]) -> None:
    """Puts a part into the result beside those that are there."""
    result = json.loads(path.read_text()) if path.exists() else {}
    result[name] = {"machine": experiment.machine(), **part}
    write_result(path, result)
