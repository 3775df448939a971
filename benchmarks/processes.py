"""The teacher's stages in several processes, each with a GPU, against one process: bytes and rates.

    python benchmarks/processes.py --out two.json                # on a machine with two GPUs
    python benchmarks/processes.py --tiny --out two.json         # anywhere: does it run
    python benchmarks/table.py two.json

Each run is the command of the stage, alone or under ``accelerate launch``. Seconds are what its progress
says at the end: all shards made and written, without start and loading the model. The teacher has the
shape of SmolLM2-135M and random weights, the tokens are random.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine_info
from table import processes_table
from teacher import save_model, write_tokens

_UNITS = {"datastore": "tokens", "targets": "rows"}
_SAID = re.compile(
    r"^(?:keys of train|targets): [\d,]+ \w+ in (?:([\d.]+) s|(\d+):(\d+))$", re.MULTILINE
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a model and tokens that a CPU can do")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--positions", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.block_size = 1024
    if options.tiny:
        options.positions, options.block_size, options.k = 40_000, 64, 32
    with tempfile.TemporaryDirectory() as work:
        result = measure(options, Path(work))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(processes_table(result))
    if not all(row["same_bytes"] for row in result["processes"]):
        raise SystemExit("the bytes differ")


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    model = save_model(work / "model", tiny=options.tiny)
    tokens = write_tokens(work / "tokens", model, options.positions)
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    given: dict[str, dict[str, Any]] = {
        "datastore": {"model": model, "block-size": options.block_size, "batch-blocks": 16}
        | {"index": "Flat", "dtype": dtype},
        "targets": {"datastore": work / "datastore-1", "k": options.k, "temperature": 10.0},
    }
    rows = []
    for stage, more in given.items():
        outs = {count: work / f"{stage}-{count}" for count in (1, options.processes)}
        more = {**more, "tokens": tokens, "device": options.device}
        seconds = {count: run(count, stage, {**more, "out": out}) for count, out in outs.items()}
        row = {"stage": stage, "unit": _UNITS[stage], "count": options.positions}
        one, several = (contents(out) for out in outs.values())
        rows.append({**row, "seconds": seconds, "same_bytes": one == several})
        print(json.dumps(rows[-1]), flush=True)
    shape = "a tiny model" if options.tiny else "the shape of SmolLM2-135M"
    return {
        "machine_info": machine_info(),
        "setting": f"{shape}, random weights, {dtype}, {options.positions:,} random tokens, exact "
        f"search, k = {options.k}; {options.processes} processes, each "
        + ("with a GPU" if options.device == "cuda" else "with a thread"),
        "processes": rows,
    }


def run(count: int, stage: str, given: dict[str, Any]) -> float:
    """Runs the stage in `count` processes; the seconds that it took to make and to write all rows."""
    launch = ["memdec"]
    if count > 1:
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", f"{count}"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["-m", "memdec"]
    command = [sys.executable, "-m", *launch, stage]
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    # On a CPU another number of threads may round otherwise.
    threads = {} if given["device"] == "cuda" else {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **threads})
    print(done.stderr, file=sys.stderr, flush=True)
    done.check_returncode()
    (found,) = _SAID.findall(done.stderr)
    seconds, minutes, rest = (float(part or 0) for part in found)
    return seconds + 60 * minutes + rest


def contents(out: Path) -> str:
    """The manifest, which has the SHA-256 of each file as it was written."""
    return (out / "manifest.json").read_text()


if __name__ == "__main__":
    main()
