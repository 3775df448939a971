"""Draws the pictures of docs/gcide.md from a result of run.py.

python examples/gcide/figures.py examples/gcide/results/h100.json docs
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def draw(path: Path, folder: Path) -> None:
    result = json.loads(path.read_text())
    size_of_rows = 1.2 + 0.33 * len(result["rows"])
    for name, fill, size in (
        ("rows", rows, (7.2, size_of_rows)),
        ("training", training, (7.2, 3.6)),
    ):
        with rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=GREY, alpha=0.25)
            fill(result, axes)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
            target = folder / f"gcide-{name}.svg"
            figure.savefig(target, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
