"""report.html: the table, the pictures and the passage, without any external resource."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.data.artefact import TIMING, Artefact
from memdec.report.figures import gains_by_frequency, lmbda_curve, outside_curve, training_curve
from memdec.report.passage import PASSAGE_NOTE, coloured_passage
from memdec.report.shell import write_page
from memdec.report.tables import main_table, number, side_effects, stage_seconds


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt: in the held-out document, by the base alone, and by joint."""

    prompt: str
    original: str
    base: str
    joint: str


def write_report(
    evaluation: Path,
    path: Path,
    continuations: Sequence[Continuation] = (),
    title: str = "memdec",
    build: Path | None = None,
) -> None:
    """Writes the page at `path` from the files of the stage eval in `evaluation`.

    `build` is the directory of the build: the curve of its stage train is drawn too, and the table
    has the seconds that its stages took.

    Raises:
        MemdecError: `evaluation` is not a finished directory of the stage eval, or `build` has none
            of the stage train.
    """
    artefact = Artefact.open(evaluation, "eval")
    results = json.loads(artefact.file("eval.json").read_text())
    passage = json.loads(artefact.file("passage.json").read_text())
    seconds = json.loads(artefact.file(TIMING).read_text())
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_summary(results)}</p>",
        main_table(results, seconds, stage_seconds(build) if build else {}).html(),
        "<h2>What it does beside that</h2>",
        side_effects(results).html(),
        "<h2>How much memory to mix in</h2>",
        lmbda_curve(results),
        outside_curve(results) if results["outside"] else "",
        _training(build),
        "<h2>Where it helps</h2>",
        f"<p>{_FREQUENCY}</p>",
        gains_by_frequency(results),
        "<h2>A held-out passage</h2>",
        PASSAGE_NOTE,
        coloured_passage(passage),
        _continuations(continuations),
        "<h2>Parameters of the evaluation</h2>",
        _parameters(artefact.manifest["params"]),
    ]
    write_page(path, title, sections)


_FREQUENCY = (
    "Held-out tokens grouped by how often the same token occurs in the train split (below each "
    "group, in brackets, the held-out tokens it holds); higher is better."
)


def _summary(results: Mapping[str, Any]) -> str:
    rows = {row["name"]: row for row in results["rows"]}
    base, joint = (number(rows[name]["perplexity"], 2) for name in ("base", "joint"))
    return (
        f"Perplexity on the same {results['positions']:,} held-out tokens: "
        f"<b>{joint}</b> with the memory, {base} without it."
    )


def _training(build: Path | None) -> str:
    if build is None:
        return ""
    rows = json.loads(Artefact.open(build / "train", "train").file("curve.json").read_text())
    return f"<h2>How the memory learned</h2>\n{training_curve(rows)}"


def _continuations(continuations: Sequence[Continuation]) -> str:
    if not continuations:
        return ""
    lines = ["<h2>Prompts with and without the memory</h2><dl>"]
    for item in continuations:
        lines.append(f"<dt>{html.escape(item.prompt)}</dt>")
        for name in ("base", "joint", "original"):
            text = html.escape(getattr(item, name))
            lines.append(f'<dd><span class="soft">{name}: </span>{text}</dd>')
    return "\n".join(lines) + "</dl>"


def _parameters(params: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in params.items()
    )
    return "<table>" + "".join(rows) + "</table>"
