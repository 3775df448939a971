"""A build beside its plan: what ``memdec plan`` says of each stage, and what the stage then took.

    python benchmarks/whole.py --recipe examples/gcide/whole.yaml --base SmolLM2 \\
        --corpus gcide.txt --out out --result whole.json
    python benchmarks/table.py whole.json

The plan is made before anything is there. The result is written after each stage; a run that was cut
off goes on where it was, and the seconds of its stages add up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_busy import GpuBusy
from machine import machine_info
from table import whole_table

from memdec.build import OWN as OF_A_BUILD
from memdec.build import BuildConfig, plan, refuse_strangers
from memdec.console import say
from memdec.plan import make_plan, misfits

_SECONDS_BETWEEN_NOTES = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--base", required=True, help="model directory or .gguf file")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the build writes")
    parser.add_argument("--result", type=Path, required=True, help="JSON to write or to go on with")
    parser.add_argument("--set", action="append", default=[], help="as of memdec build; repeatable")
    options = parser.parse_args()
    config = BuildConfig(
        recipe=options.recipe, base=options.base, corpus=options.corpus, set=tuple(options.set)
    )
    result = measure(config, options.out, options.result)
    print(whole_table(result))


def measure(config: BuildConfig, out: Path, path: Path) -> dict[str, Any]:
    """Plans, then runs each stage under a meter; the result is at `path` at every moment."""
    recipe = config.to_recipe()
    if path.exists():
        result = json.loads(path.read_text())
    else:
        made = make_plan(config, out)
        result = {
            "machine_info": machine_info(),
            "setting": {name: _without_paths(stage) for name, stage in recipe.stages.items()},
            "plan": {
                "corpus": dataclasses.asdict(made.corpus),
                "machine": dataclasses.asdict(made.machine),
                "needs": [dataclasses.asdict(need) for need in made.needs],
                "misfits": list(misfits(made.needs, made.machine)),
            },
            "whole": [],
        }
        write(path, result)
    refuse_strangers(out, OF_A_BUILD)
    rows = {row["stage"]: row for row in result["whole"]}
    for step in plan(recipe, out):
        row = rows.setdefault(step.name, {"stage": step.name, "finished": False})
        if not row["finished"]:
            result["whole"] = list(rows.values())
            with metered(row, lambda: write(path, result)):
                step.run(step.config, out / step.name)
            row |= {"finished": True, "disk": bytes_in(out / step.name)}
            say(f"{step.name}: {row['seconds']:.0f} s")
    result |= outcome(out)
    write(path, result)
    return result


@contextlib.contextmanager
def metered(row: dict[str, Any], note: Any) -> Iterator[None]:
    """Adds to the row of a stage what it takes; noted while it runs, so a killed one counts."""
    earlier = {
        "starts": 0,
        "seconds": 0.0,
        "memory": 0,
        "gpu_memory": 0,
        "busy_seconds": 0.0,
        **row,
    }
    over = threading.Event()
    gpu = GpuBusy()
    begin = time.perf_counter()
    most = 0

    def update() -> None:
        nonlocal most
        now = time.perf_counter()
        most = max(most, own_memory())
        busy = gpu.share(begin, now)
        row.update(
            starts=earlier["starts"] + 1,
            seconds=earlier["seconds"] + now - begin,
            memory=max(earlier["memory"], most),
            gpu_memory=max(earlier["gpu_memory"], gpu.peak_bytes(begin, now) or 0),
            busy_seconds=earlier["busy_seconds"] + (busy or 0.0) * (now - begin),
        )
        note()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_NOTES):
            update()

    watching = threading.Thread(target=watch)
    with gpu.watch():
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()
            update()
    gc.collect()
    if torch.cuda.is_available():  # the next stage starts with what the plan takes for free
        torch.cuda.empty_cache()


def own_memory() -> int:
    """Bytes of this process that are no file's: what is mapped can be read again."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0]) * 1024


def outcome(out: Path) -> dict[str, Any]:
    """How base, memory and their rivals score, and the bytes of the datastore."""
    evaluated = json.loads((out / "eval" / "eval.json").read_text())
    kept = ("name", "perplexity", "interval", "lmbda", "parameters", "bytes")
    kept += ("tail_gain", "function_words")
    found = {
        "positions": evaluated["positions"],
        "rows": [{name: row[name] for name in kept} for row in evaluated["rows"]],
    }
    sizes = {}
    if (out / "datastore").exists():
        sizes["keys"] = bytes_in(out / "datastore" / "keys")
        sizes["index"] = bytes_in(out / "datastore", ".faiss")
    return {"eval": found, "sizes": sizes}


def bytes_in(folder: Path, ending: str = "") -> int:
    return sum(p.stat().st_size for p in folder.rglob(f"*{ending}") if p.is_file())


def _without_paths(stage: dict[str, Any] | None) -> dict[str, Any] | None:
    return stage and {name: value for name, value in stage.items() if name != "corpus"}


def write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
