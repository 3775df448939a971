"""Keeps what a build found as one JSON for the repository.

    python examples/collect.py out/ examples/wordnet/results/NAME.json

Run it on the machine that built: the result names its device and versions. table.py prints its tables,
pictures.py draws it.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from memdec.build import STAGES


def collect(build: Path) -> dict[str, Any]:
    """The evaluation, the curve of the training and the seconds of the stages of a finished build."""

    def read(name: str) -> Any:
        return json.loads((build / name).read_text())

    on_gpu = torch.cuda.is_available()
    stages = [stage for stage in STAGES if (build / stage).is_dir()]
    return {
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else _processor(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "stage_seconds": {stage: read(f"{stage}/timing.json")["seconds"] for stage in stages},
        "row_seconds": read("eval/timing.json"),
        "curve": read("train/curve.json"),
        "eval": read("eval/eval.json"),
        "passage": read("eval/passage.json"),
    }


def _processor() -> str:
    """The CPU's name, where Linux tells it, and how many threads torch uses of it."""
    name, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return f"{name}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    result = collect(arguments.build)
    arguments.result.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
