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
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.command import open_experiment, parser, write_result
from lab.experiment import Experiment
from lab.rows import ROWS

from memdec.console import say
from memdec.errors import MemdecError


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    options = _options(arguments)
    experiment = open_experiment(options, options.seed)
    settings = experiment.settings
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
        write_result(options.result, result)
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


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--seed", type=int, default=0, help="of trainings and samples")
    made.add_argument("--row", action="append", default=[], help="run this one; repeatable")
    made.add_argument("--minutes", type=float, help="start no row that would end after so long")
    return made.parse_args(arguments)


if __name__ == "__main__":
    main()
