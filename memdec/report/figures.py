"""The report's pictures, as SVG that follows the page's text colour."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memdec.evaluation.options import JOINT_ADAPTIVE
from memdec.evaluation.outside import stream_name

# Mid-tones that can be told apart, by colour-blind readers too, on white and on near-black.
COLOURS = {"base": "#8a8f98", "joint": "#2f81d6", "kNN-LM": "#d9822b", "memory": "#9a6dd7"}
_OUTSIDE = ("#d9822b", "#9a6dd7", "#3fa45b", "#c2577a")
# matplotlib writes colours as numbers: this one is replaced by the page's own text colour.
_TEXT = "#010203"


def lmbda_curve(results: Mapping[str, Any]) -> str:
    """Perplexity against lmbda: the reported split as a line, validation dashed, the choice a dot."""
    curves = results["curves"]
    grid, split = curves["lmbda"], results["split"]
    perplexity = {row["name"]: row["perplexity"] for row in results["rows"]}
    base = perplexity["base"]
    figure, axes = _figure("lmbda (0 is the base alone)", "perplexity")
    drawn = []
    if base is not None:
        axes.axhline(base, color=COLOURS["base"], linewidth=1, linestyle=":", label="base")
        drawn.append(base)
    for name in ("joint", "kNN-LM"):
        if name not in curves:
            continue
        for which, style in {"validation": "--", split: "-"}.items():
            points = _perplexities(curves[name][which])
            drawn += [value for value in points if not math.isnan(value)]
            axes.plot(grid, points, style, color=COLOURS[name], label=f"{name}, {which}")
        if perplexity[name] is not None:
            chosen = results["lmbda"][name]
            axes.plot([chosen], [perplexity[name]], "o", color=COLOURS[name], markersize=7)
    # At lmbda 1 a kNN-LM may give a label no mass at all: the interesting part is near the base.
    if drawn:
        highest = 1.02 * max(drawn)
        axes.set_ylim(0.9 * min(drawn), highest if base is None else min(highest, 1.6 * base))
    return _svg(figure, axes, "lmbda")


def outside_curve(results: Mapping[str, Any]) -> str:
    """Perplexity of joint over that of base, against lmbda: of each text outside, and of the split.

    Dashed, at its own height: with a lmbda a token. The vertical line is the lmbda that was chosen.
    """
    curves, split = results["curves"], results["split"]
    rows = {row["name"]: row for row in results["rows"]}
    figure, axes = _figure("lmbda", "perplexity over that of base")
    colours = [COLOURS["joint"], *_OUTSIDE]
    highest = 1.0
    for colour, text in zip(itertools.cycle(colours), [split, *results["outside"]], strict=False):
        name = split if text == split else stream_name(text)
        points = _perplexities(curves["joint"][name])
        ratios = [point / points[0] for point in points]
        axes.plot(curves["lmbda"], ratios, color=colour, label=text)
        highest = max([highest, *(ratio for ratio in ratios if not math.isnan(ratio))])
        gated = rows.get(JOINT_ADAPTIVE)
        if gated is not None:
            found = gated if text == split else gated["outside"][text]
            ratio = _perplexities([found["nll"]])[0] / points[0]
            label = f"{text}, a lmbda a token"
            axes.axhline(ratio, color=colour, linewidth=1, linestyle="--", label=label)
    axes.axvline(results["lmbda"]["joint"], color=COLOURS["base"], linewidth=1, linestyle=":")
    axes.set_ylim(0, min(1.05 * highest, 3))
    return _svg(figure, axes, "outside")


def gains_by_frequency(results: Mapping[str, Any]) -> str:
    """Nats gained over the base, by how often the label occurs in the train tokens."""
    buckets = [bucket for bucket in results["frequency"] if bucket["positions"]]
    names = [name for name in ("joint", "kNN-LM") if name in buckets[0]["nll"]]
    figure, axes = _figure("occurrences of the token in the train split", "nats gained over base")
    width = 0.8 / len(names)
    for column, name in enumerate(names):
        left = [index + (column - (len(names) - 1) / 2) * width for index in range(len(buckets))]
        gains = [_gain(bucket["nll"], name) for bucket in buckets]
        axes.bar(left, gains, width * 0.92, color=COLOURS[name], label=name)
    axes.axhline(0, color=_TEXT, linewidth=0.8)
    labels = [f"{bucket['bucket']}\n({bucket['positions']:,})" for bucket in buckets]
    axes.set_xticks(range(len(buckets)), labels)
    return _svg(figure, axes, "frequency")


def training_curve(rows: Sequence[Mapping[str, float]]) -> str:
    """Validation while the memory was trained, against the epoch; the weights that were kept a dot."""
    figure, axes = _figure("epochs", "perplexity on validation")
    epochs = [row["epoch"] for row in rows]
    curves = {"memory": "nll", "joint": "joint_nll"}
    points = {name: _perplexities([row[key] for row in rows]) for name, key in curves.items()}
    for name, values in points.items():
        axes.plot(epochs, values, color=COLOURS[name], label=name, marker=".")
    best = min(rows, key=lambda row: row["score"])
    kept = math.exp(best["joint_nll"])
    axes.plot([best["epoch"]], [kept], "o", color=COLOURS["joint"], markersize=7)
    # An untrained memory is far above the rest: the interesting part is near joint.
    interesting = max(2 * max(points["joint"]), 1.2 * min(points["memory"]))
    axes.set_ylim(0.9 * kept, min(1.02 * max(map(max, points.values())), interesting))
    return _svg(figure, axes, "training")


def _figure(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across, color=_TEXT)
    axes.set_ylabel(up, color=_TEXT)
    axes.tick_params(colors=_TEXT)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=COLOURS["base"], alpha=0.25, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_TEXT)
    return figure, axes


def _svg(figure: Figure, axes: Axes, name: str) -> str:
    axes.legend(frameon=False, labelcolor=_TEXT)
    file = io.StringIO()
    # Text stays text; identifiers differ between the pictures of a page, not between runs.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawing = file.getvalue()
    return drawing[drawing.index("<svg") :].replace(_TEXT, "currentColor")


def _perplexities(nlls: Sequence[float | None]) -> list[float]:
    """NaN, which is not drawn, for what is infinite or nearly."""
    return [math.exp(nll) if nll is not None and nll < 700 else math.nan for nll in nlls]


def _gain(nll: Mapping[str, float | None], name: str) -> float:
    base, other = nll["base"], nll[name]
    return math.nan if base is None or other is None else base - other
