"""Keeps what a build found: one JSON for the repository, and the picture of its training.

    python examples/collect.py out/ examples/wordnet/results/NAME.json --picture docs/NAME.svg

Run it on the machine that built: the result names its device and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import memdec
from memdec.build import STAGES
from memdec.report.figures import training_curve


def collect(build: Path) -> dict[str, Any]:
    """The evaluation, the curve of the training and the seconds of the stages of a finished build."""

    def read(name: str) -> Any:
        return json.loads((build / name).read_text())

    on_gpu = torch.cuda.is_available()
    stages = [stage for stage in STAGES if (build / stage).is_dir()]
    return {
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "memdec": memdec.__version__,
        },
        "stage_seconds": {stage: read(f"{stage}/timing.json")["seconds"] for stage in stages},
        "curve": read("train/curve.json"),
        "eval": read("eval/eval.json"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    result = collect(arguments.build)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.picture:
        # On a page of its own there is no text colour to follow: a grey that reads on both grounds.
        drawing = training_curve(result["curve"]).replace("currentColor", "#767c85")
        arguments.picture.write_text(drawing)
