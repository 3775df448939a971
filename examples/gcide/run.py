"""Memories of a real domain beside their rivals: kNN-LM, and fine-tuning the base itself.

    memdec prepare --tokenizer SmolLM2.gguf --corpus gcide.txt --documents line \\
        --max-tokens 2207700 --test-fraction 0.045 --validation-fraction 0.045 --out gcide
    memdec prepare --tokenizer SmolLM2.gguf --corpus glosses.txt --documents line \\
        --test-fraction 0.25 --out wordnet
    python examples/gcide/run.py --base SmolLM2.gguf --tokens gcide --outside WordNet=wordnet \\
        --work work --result result.json --minutes 9
    python examples/gcide/run.py ... --seed 1 --result result-1.json
    python examples/gcide/table.py result.json result-1.json

Rows come in the order of settings.yaml; each is written to the result when it is done, and a run that
starts again with the same arguments goes on after it. Every choice is made on validation; the table
reports test, and text outside the domain at the same settings. Seeds other than 0 have a teacher of
their own and run the rows marked `repeat`; they may run at the same time in the same folder of work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from experiment import Experiment
from rows import ROWS

from memdec.console import say
from memdec.errors import MemdecError


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    options = _options(arguments)
    settings = yaml.safe_load(options.settings.read_text())
    outside = dict(text.split("=", 1) for text in options.outside)
    experiment = Experiment(
        settings,
        options.base,
        options.tokens,
        outside,
        options.work,
        options.device,
        options.seed,
    )
    result = _open_result(options.result, experiment)
    done = {row["name"]: row for row in result["rows"]}
    failed = []
    for setting in settings["rows"]:
        name = setting["name"]
        if options.row and name not in options.row:
            continue
        if options.seed and not setting.get("repeat", False):
            continue
        if name in done and done[name]["setting"] == setting:
            say(f"{name}: already done")
            continue
        before = time.monotonic() - start
        if options.minutes is not None and before + setting["seconds"] > 60 * options.minutes:
            say(f"{name}: left out, {setting['seconds']} s more would pass the limit")
            continue
        try:
            row = ROWS[setting["kind"]](experiment, setting)
        except Exception:  # must not cost the rows after it their time
            traceback.print_exc()
            failed.append(name)
            continue
        total = time.monotonic() - start
        seconds = total - before
        done[name] = {"name": name, "setting": setting, "seconds": seconds, **row}
        known = [one["name"] for one in settings["rows"]]
        result["rows"] = [done[one] for one in known if one in done]
        _write(options.result, result)
        say(f"{name}: {seconds:.0f} s, {total:.0f} s in all")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _open_result(path: Path, experiment: Experiment) -> dict[str, Any]:
    """The rows of an earlier run of the same request, or none."""
    facts = experiment.facts()
    if not path.exists():
        return {"machine": experiment.machine(), **facts, "rows": []}
    result = json.loads(path.read_text())
    for name, value in facts.items():
        if result.get(name) != value:
            raise MemdecError(f"{path} is of another run: its {name} differ; give another --result")
    return result


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="model directory or .gguf file")
    parser.add_argument("--tokens", type=Path, required=True, help="directory of memdec prepare")
    parser.add_argument(
        "--outside",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="text outside the domain: the test split of a directory of memdec prepare; repeatable",
    )
    parser.add_argument("--work", type=Path, required=True, help="stages and scores; some 20 GB")
    parser.add_argument("--result", type=Path, required=True, help="JSON to write or to go on with")
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_name("settings.yaml"))
    parser.add_argument("--seed", type=int, default=0, help="of trainings and samples")
    parser.add_argument("--row", action="append", default=[], help="run this one; repeatable")
    parser.add_argument("--minutes", type=float, help="start no row that would end after so long")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
