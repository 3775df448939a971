"""report.html: the table, the pictures and the passage, without any external resource."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.data.artefact import TIMING, Artefact
from memdec.report.figures import gains_by_frequency, lmbda_curve, training_curve
from memdec.report.passage import coloured_passage, legend

_STYLE = """
:root { color-scheme: light dark; --line: #8a8f9855; --soft: #8a8f98; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       background: #fff; color: #1c1f24; }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e3e6ea; } }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; font-size: .85rem; }
tr.joint td { font-weight: 600; }
svg { width: 100%; height: auto; }
.passage { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.75 ui-monospace, monospace;
           border: 1px solid var(--line); border-radius: 6px; padding: .8rem; }
.passage span { border-radius: 3px; }
.key { padding: .1rem .5rem; margin-right: .3rem; border-radius: 3px; font-size: .85rem;
       border: 1px solid var(--line); }
.soft { color: var(--soft); }
dt, dd { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, monospace; }
dt { font-weight: 600; margin-top: 1.2rem; }
dd { margin: .4rem 0 .4rem 1.2rem; padding-left: .8rem; border-left: 2px solid var(--line); }
"""


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
        f"<p>{_PASSAGE} {legend()}</p>",
        coloured_passage(passage),
        _continuations(continuations),
        "<h2>Parameters of the evaluation</h2>",
        _parameters(artefact.manifest["params"]),
    ]
    page = (
        "<!doctype html>\n<html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


_FREQUENCY = (
    "Held-out tokens grouped by how often the same token occurs in the train split (below each "
    "group, in brackets, the held-out tokens it holds); higher is better."
)
_PASSAGE = (
    "Each token is coloured by what the memory added: the log-probability under joint less that "
    "under base. Hover over a token for its probabilities."
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
