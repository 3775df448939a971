"""The tables of report.html: what each row reaches and costs, and what it does beside that."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdec.data.artefact import TIMING
from memdec.evaluation.options import JOINT_ADAPTIVE

_NARROW = 7  # columns that fit a page in its own type size
# Of a row of a build: the stages that train its model, and those that these need.
_BEFORE = ("adapt", "datastore", "targets")
_STAGES_OF: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adapted": (("adapt",), ()),
    "fine-tuned": (("control",), ()),
    "kNN-LM": ((), ("adapt", "datastore")),
    **dict.fromkeys(("memory", "joint", JOINT_ADAPTIVE), (("train",), _BEFORE)),
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of each row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def html(self) -> str:
        """The table and its note; the row joint stands out."""
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        wide = ' class="wide"' if len(self.head) > _NARROW else ""
        lines = [f"<table{wide}><tr>{cells}</tr>"]
        for row in self.rows:
            kind = ' class="joint"' if row[0] == "joint" else ""
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            lines.append(f"<tr{kind}>{cells}</tr>")
        return "\n".join(lines) + f'</table><p class="soft">{html.escape(self.note)}</p>'


def main_table(
    results: Mapping[str, Any], scoring: Mapping[str, float], stages: Mapping[str, float]
) -> Table:
    """What each row reaches and what it costs.

    Args:
        results: of the stage eval.
        scoring: seconds that scoring took, by row.
        stages: seconds of a build's stages, as far as there is a build (:func:`stage_seconds`).
    """
    head = ["", "perplexity", "95 % interval", "gain, nats", "lmbda", "parameters", "MB"]
    head += ["datastore / weights", "training, s", "stages before, s", "scoring, s"]
    rows = []
    for row in results["rows"]:
        name = row["name"]
        low, high = row["interval"]
        own, before = _STAGES_OF.get(name, ((), ()))
        rows.append(
            (
                name,
                number(row["perplexity"], 2),
                f"{number(low, 2)} to {number(high, 2)}",
                number(row["gain"], 3),
                "" if row["lmbda"] is None else f"{row['lmbda']:.2f}",
                f"{row['parameters'] / 1e6:,.2f} M",
                f"{row['bytes'] / 1e6:,.1f}",
                _times_smaller(results, name),
                _total(stages, own),
                _total(stages, before),
                f"{scoring[name]:.1f}" if name in scoring else "",
            )
        )
    note = (
        f"Intervals: bootstrap over {results['resampled']}. Gain: nats a token below the base. "
        "MB: what must be kept, a datastore included. Datastore / weights: its bytes on disk over "
        "those of the trained model in 16 bits. Training: of the row's own model; before: the "
        "stages that it needs; of a stage that was stopped, what ran last. Scoring: the held-out "
        "tokens. Adapted is the teacher, the base or another model fine-tuned on the domain (DAPT)."
    )
    return Table(head, rows, note)


def stage_seconds(build: Path) -> dict[str, float]:
    """Seconds of those stages of a build whose time the table tells."""
    files = {stage: build / stage / TIMING for stage in (*_BEFORE, "train", "control")}
    return {
        stage: json.loads(file.read_text())["seconds"]
        for stage, file in files.items()
        if file.is_file()
    }


def _total(seconds: Mapping[str, float], stages: Sequence[str]) -> str:
    found = [seconds[stage] for stage in stages if stage in seconds]
    return f"{sum(found):,.1f}" if found else ""


def _times_smaller(results: Mapping[str, Any], name: str) -> str:
    """Bytes of the datastore over those of the model that the row's training made."""
    trained = "memory" if name in ("joint", JOINT_ADAPTIVE) else name
    if results["datastore_bytes"] is None or trained in ("base", "kNN-LM"):
        return ""
    parameters = {row["name"]: row["parameters"] for row in results["rows"]}[trained]
    return f"{results['datastore_bytes'] / (2 * parameters):.2f}"


def side_effects(results: Mapping[str, Any]) -> Table:
    """What each row does to rare tokens, to function words and outside the domain."""
    base = results["rows"][0]
    head = ["", "rarest tenth, times", "function words, nats"]
    for text, facts in results["outside"].items():
        head.append(f"{text}: perplexity ({facts['positions']:,} tokens)")
    rows = []
    for row in results["rows"]:
        gain, words = number(row["tail_gain"], 2), row["function_words"]
        cells = [row["name"], gain, "" if words is None else f"{words:.2f}"]
        for text, found in row["outside"].items():
            change = _change(found["perplexity"], base["outside"][text]["perplexity"])
            cells.append(number(found["perplexity"], 2) + ("" if row is base else change))
        rows.append(cells)
    note = (
        "Rarest tenth: of the held-out tokens, those that are rarest in the train split; the median "
        "of their probability over that under base. Function words (articles, prepositions, pronouns "
        "and so on): the mean change of their log-probability, in nats."
    )
    if results["outside"]:
        note += (
            " Perplexity outside the domain: with the lmbda and the gate that were chosen inside it; "
            "in brackets the change from base."
        )
    return Table(head, rows, note)


def _change(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f" ({100 * (value / base - 1):+.1f} %)"


def number(value: float | None, digits: int) -> str:
    """None stands for an infinite value: a token that got no probability at all."""
    return "∞" if value is None else f"{value:,.{digits}f}"
