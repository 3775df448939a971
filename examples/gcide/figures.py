"""Draws the pictures of docs/gcide.md from results of run.py.

    cd examples/gcide/results
    python ../figures.py h100.json h200.json h100-seed-0.json h100-more-samples.json ../../../docs

Rows and training are those of the first result. What a row costs is drawn of all: where several have a
row, the first one's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table import kept_bytes

# Mid-tones that can be told apart, by colour-blind readers too, on white and on near-black.
COLOURS = ("#2f81d6", "#d9822b", "#9a6dd7", "#3fa45b", "#c2577a", "#8f8a2c", "#25a3a3", "#a9745a")
GREY = "#8a8f98"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "gcide", "text.color": GREY, "font.size": 10}
STYLE |= {"axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY}


def rows(result: Mapping[str, Any], axes: Axes) -> None:
    """Perplexity on test, each row beside the base, at both kinds of lmbda; or in its place."""
    base, *shown = result["rows"]
    names = [row["name"] for row in shown]
    for how, label, colour, shift in (
        ("alone", "in place of the base", COLOURS[2], 0),
        ("joint", "one lmbda", COLOURS[0], -0.15),
        ("gated", "a lmbda a token", COLOURS[1], 0.15),
    ):
        has = [how in row["perplexity"] and (how != "alone" or _only_alone(row)) for row in shown]
        places = [place + shift for place, there in enumerate(has) if there]
        if not places:
            continue
        found = [
            row["perplexity"][how]["test"] for row, there in zip(shown, has, strict=True) if there
        ]
        low, high = zip(*(one["interval"] for one in found), strict=True)
        axes.hlines(places, low, high, color=colour, linewidth=2)
        middle = [one["perplexity"] for one in found]
        axes.plot(middle, places, "o", color=colour, label=label)
    axes.invert_yaxis()
    axes.set_yticks(range(len(names)), names)
    alone = base["perplexity"]["alone"]["test"]["perplexity"]
    axes.set_xlabel(f"perplexity, 95 % interval (the base alone: {alone:.1f})")


def _only_alone(row: Mapping[str, Any]) -> bool:
    return set(row["perplexity"]) == {"alone"}


def training(result: Mapping[str, Any], axes: Axes) -> None:
    """Perplexity on validation, memory and base together, while memories of 8 layers learn."""
    shown = [row for row in result["rows"] if row["setting"].get("layers") == 8]
    step_tokens = result["settings"]["block_size"] * result["settings"]["train"]["batch_blocks"]
    for row, colour in zip(shown, COLOURS, strict=False):
        curve = row["curve"][1:]  # the start, layers cut out of the teacher, is far off
        across = [point["step"] * step_tokens / 1e6 for point in curve]
        up = [math.exp(point["joint_nll"]) for point in curve]
        axes.plot(across, up, "o-", color=colour, markersize=3, label=row["name"])
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("perplexity of base and memory")


def cost(results: Sequence[Mapping[str, Any]], axes: Axes) -> None:
    """What is kept for a row beside the base, or in its place, against its perplexity on test.

    Of models of one size the best is named.
    """
    shown = {row["name"]: row for result in reversed(results) for row in result["rows"]}
    kept = {name: kept_bytes(row) / 1e6 for name, row in shown.items() if kept_bytes(row)}
    named: dict[Any, str] = {}
    for name in sorted(kept, key=lambda one: (_best(shown[one]), len(one))):
        model = shown[name]["setting"]["kind"] in ("memory", "adapted")
        named.setdefault(kept[name] if model else name, name)
    points = {name: (kept[name], _best(shown[name])) for name in kept}
    axes.plot(*zip(*points.values(), strict=True), "o", color=COLOURS[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    base = next(row for row in shown.values() if row["setting"]["kind"] == "base")
    axes.axhline(_best(base), color=GREY, linewidth=1)
    least, most = min(kept.values()), max(kept.values())
    axes.annotate("base", (least, _best(base)), (0, 3), textcoords="offset points")
    ticks = [8, 10, 12, 15, 20, 25]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
    axes.minorticks_off()
    axes.set_xlim(least / 1.5, most * 6)
    for name in named.values():
        x, y = points[name]
        beside = [
            other > x
            for other, height in points.values()
            if other != x and 1 / 4 < other / x < 4 and abs(math.log(height / y)) < 0.05
        ]
        where: dict[str, Any] = {"xytext": (6, -3)}
        if any(beside):  # something stands to the right
            where = {"xytext": (-6, -3), "ha": "right"}
            if not all(beside):
                where = {"xytext": (0, -14), "ha": "center"}
        axes.annotate(name, (x, y), textcoords="offset points", size=8, **where)
    axes.set_xlabel("MB kept, in 16 bits")
    axes.set_ylabel("perplexity")


def _best(row: Mapping[str, Any]) -> float:
    """With a lmbda a token where there is one."""
    perplexity = row["perplexity"]
    return float(perplexity["gated" if "gated" in perplexity else "alone"]["test"]["perplexity"])


def draw(paths: Sequence[Path], folder: Path) -> None:
    results = [json.loads(path.read_text()) for path in paths]
    size_of_rows = 1.2 + 0.33 * len(results[0]["rows"])
    for name, fill, shown, size in (
        ("rows", rows, results[0], (7.2, size_of_rows)),
        ("training", training, results[0], (7.2, 3.6)),
        ("cost", cost, results, (7.2, 4.8)),
    ):
        with rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=GREY, alpha=0.25)
            fill(shown, axes)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
            target = folder / f"gcide-{name}.svg"
            figure.savefig(target, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    *found, out = map(Path, sys.argv[1:])
    draw(found, out)
