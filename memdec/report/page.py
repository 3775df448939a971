"""report.html: the table, the pictures and the passage, without any external resource."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.data.artefact import TIMING, Artefact
from memdec.report.figures import gains_by_frequency, lmbda_curve, training_curve
from memdec.report.passage import PASSAGE_NOTE, coloured_passage
from memdec.report.shell import write_page


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
    training: Path | None = None,
) -> None:
    """Writes the page at `path` from the files of the stage eval in `evaluation`.

    `training` is the directory of the stage train, whose curve is drawn too.

    Raises:
        MemdecError: `evaluation` is not a finished directory of the stage eval.
    """
    artefact = Artefact.open(evaluation, "eval")
    results = json.loads(artefact.file("eval.json").read_text())
    passage = json.loads(artefact.file("passage.json").read_text())
    seconds = json.loads(artefact.file(TIMING).read_text())
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_summary(results)}</p>",
        _table(results, seconds),
        "<h2>How much memory to mix in</h2>",
        lmbda_curve(results),
        _training(training),
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
    base, joint = (_number(rows[name]["perplexity"], 2) for name in ("base", "joint"))
    return (
        f"Perplexity on the same {results['positions']:,} held-out tokens: "
        f"<b>{joint}</b> with the memory, {base} without it."
    )


def _table(results: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    head = ("", "perplexity", "95 % interval", "gain, nats", "lmbda", "parameters", "MB", "seconds")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for row in results["rows"]:
        name = row["name"]
        low, high = row["interval"]
        cells = (
            html.escape(name),
            _number(row["perplexity"], 2),
            f"{_number(low, 2)} to {_number(high, 2)}",
            _number(row["gain"], 3),
            "" if row["lmbda"] is None else f"{row['lmbda']:.2f}",
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{seconds[name]:.1f}" if name in seconds else "",
        )
        kind = ' class="joint"' if name == "joint" else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    note = (
        f"Intervals: bootstrap over {results['resampled']}. Gain: nats a token below the base. "
        "MB: what must be kept, a datastore included. Seconds: for scoring the held-out tokens."
    )
    return "\n".join(lines) + f'</table><p class="soft">{note}</p>'


def _number(value: float | None, digits: int) -> str:
    """None stands for an infinite value: a token that got no probability at all."""
    return "∞" if value is None else f"{value:,.{digits}f}"


def _training(training: Path | None) -> str:
    if training is None:
        return ""
    rows = json.loads(Artefact.open(training, "train").file("curve.json").read_text())
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
