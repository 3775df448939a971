"""What ``memdec inspect`` shows: a table on the terminal, and a page with the coloured text."""

from __future__ import annotations

import html
import math
from pathlib import Path

from memdec.evaluation.inspection import Inspection
from memdec.evaluation.passage import make_passage
from memdec.report.passage import LESS, MORE, PASSAGE_NOTE, coloured_passage, percent, shade
from memdec.report.shell import write_page

_TITLE = "What the memory changes, token by token"


def print_inspection(inspection: Inspection, top: int | None) -> None:
    """The table on standard output: all tokens, or those of the `top` largest gains and losses."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in _columns(inspection):
        if name == "token":
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for index in inspection.listed(top):
        cells = list(map(Text, _cells(inspection, index)))
        gain = inspection.gains[index]
        if abs(gain) >= 0.005:
            cells[-1].stylize("rgb({},{},{})".format(*(MORE if gain > 0 else LESS)))
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    console.print(_summary(inspection), soft_wrap=True, markup=False)


def write_inspection(inspection: Inspection, path: Path, top: int | None) -> None:
    """Writes the page: the whole text coloured, then the table of :func:`print_inspection`."""
    head = "".join(f"<th{_side(name)}>{name}</th>" for name in _columns(inspection))
    rows = []
    for index in inspection.listed(top):
        shades = {"change": f" {shade(inspection.gains[index])}"}
        cells = zip(_columns(inspection), _cells(inspection, index), strict=True)
        row = (f"<td{shades.get(n, _side(n))}>{html.escape(cell)}</td>" for n, cell in cells)
        rows.append(f"<tr>{''.join(row)}</tr>")
    sections = [
        f"<h1>{_TITLE}</h1>",
        f"<p>{html.escape(_summary(inspection))}</p>",
        PASSAGE_NOTE,
        coloured_passage(make_passage(inspection.tokens, inspection.log_probs)),
        f"<h2>{'Every token' if top is None else 'Largest gains and losses'}</h2>",
        f"<table><tr>{head}</tr>",
        *rows,
        "</table>",
        '<p class="soft">Probabilities of the token that stands in the text; change: of its '
        "log-probability, joint less base, in nats.</p>",
    ]
    write_page(path, _TITLE, sections)


def _columns(inspection: Inspection) -> list[str]:
    weight = ["lmbda"] if inspection.adaptive else []
    return ["#", "token", *inspection.log_probs, *weight, "change"]


def _cells(inspection: Inspection, index: int) -> list[str]:
    chances = [percent(math.exp(row[index])) for row in inspection.log_probs.values()]
    weight = [f"{inspection.lmbda[index]:.2f}"] if inspection.adaptive else []
    change = f"{inspection.gains[index]:+.2f}"
    return [str(index), _visible(inspection.tokens[index]), *chances, *weight, change]


def _side(column: str) -> str:
    return ' class="left"' if column == "token" else ""


def _summary(inspection: Inspection) -> str:
    values = ", ".join(f"{name} {value:.2f}" for name, value in inspection.perplexity.items())
    kind = "mean lmbda" if inspection.adaptive else "lmbda"
    count = len(inspection.tokens)
    what = "this token" if count == 1 else f"these {count:,} tokens"
    return f"Perplexity of {what}: {values}; {kind} {inspection.lmbda.mean():.2f}."


def _visible(token: str) -> str:
    """White space and control characters as signs: a text may hold what a terminal obeys.

    A token that is but a part of a character is three dots.
    """
    signs = {" ": "␣", "\n": "↵"}
    shown = (
        signs.get(letter)
        or (letter if letter.isprintable() else letter.encode("unicode_escape").decode())
        for letter in token
    )
    return "".join(shown) or "…"
