"""What ``memdec eval`` prints: the tables of its results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from memdec.data.artefact import TIMING, Artefact


def print_tables(artefact: Artefact) -> None:
    """The tables on standard output: what each row reaches, and what it does beside that."""
    results = json.loads(artefact.file("eval.json").read_text())
    seconds = json.loads(artefact.file(TIMING).read_text())
    table = _table(
        f"{results['positions']:,} held-out tokens ({results['split']})",
        f"95 %: bootstrap over {results['resampled']}; gain: nats a token below base",
    )
    for header in ("perplexity", "95 %", "gain", "lmbda", "weights", "MB", "s"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in results["rows"]:
        table.add_row(
            row["name"],
            _number(row["perplexity"]),
            " - ".join(map(_number, row["interval"])),
            _number(row["gain"], 3),
            "" if row["lmbda"] is None else f"{row['lmbda']:.2f}",
            f"{row['parameters'] / 1e6:,.2f} M",
            f"{row['bytes'] / 1e6:,.1f}",
            f"{seconds[row['name']]:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(_side_effects(results))


def _side_effects(results: Mapping[str, Any]) -> Table:
    """Rare tokens, function words, and perplexity outside the domain."""
    caption = "rarest tenth: median p / p of base; function words: mean change of log p"
    table = _table("Beside that", f"{caption}; then perplexity" if results["outside"] else caption)
    for header in ("rarest tenth", "function words", *results["outside"]):
        table.add_column(header, justify="right")
    for row in results["rows"]:
        words = row["function_words"]
        table.add_row(
            row["name"],
            _number(row["tail_gain"]),
            "" if words is None else _number(words),
            *(_number(found["perplexity"]) for found in row["outside"].values()),
        )
    return table


def _table(title: str, caption: str) -> Table:
    table = Table(
        title=title,
        caption=caption,
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # the usual two would cut the names off at 80 columns
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", overflow="fold")
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "inf" if value is None else f"{value:.{digits}f}"
