"""Draws what collect.py kept of a build: the pictures of its report.html, each a file of its own.

python examples/pictures.py examples/wordnet/results/two-cores.json docs/tutorial
"""

from __future__ import annotations

import html
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdec.report.figures import gains_by_frequency, lmbda_curve, outside_curve, training_curve
from memdec.report.passage import gains, tint

# On a page of its own there is no text colour to follow: a grey that reads on both grounds.
GREY = "#767c85"
COLUMNS, TOKENS = 92, 150
ADVANCE, LINE = 8.0, 22  # pixels


def draw(result: Mapping[str, Any], prefix: str) -> None:
    found = result["eval"]
    drawings = {
        "training": training_curve(result["curve"]),
        "lmbda": lmbda_curve(found),
        "frequency": gains_by_frequency(found),
        "passage": passage(result["passage"]),
    }
    if found["outside"]:
        drawings["outside"] = outside_curve(found)
    for name, drawing in drawings.items():
        Path(f"{prefix}-{name}.svg").write_text(drawing.replace("currentColor", GREY))


def passage(passage: Mapping[str, Any]) -> str:
    """The head of the held-out passage, each token on the colour of what the memory added."""
    parts, row, column = [], 0, 0
    tokens = zip(passage["tokens"], gains(passage), strict=True)
    for token, gain in itertools.islice(tokens, TOKENS):
        shown = token.replace("\n", "") or "\N{RETURN SYMBOL}"
        if column + len(shown) > COLUMNS:
            row, column = row + 1, 0
        rgb, opacity = tint(gain)
        colour = ",".join(map(str, rgb))
        left, top = ADVANCE * column, LINE * row
        width = ADVANCE * len(shown)
        parts.append(
            f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{LINE - 2}" rx="3" '
            f'fill="rgb({colour})" fill-opacity="{opacity:.2f}"/>'
            f'<text x="{left:g}" y="{top + 15}" textLength="{width:g}" xml:space="preserve">'
            f"{html.escape(shown)}</text>"
        )
        column += len(shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {ADVANCE * COLUMNS:g} '
        f'{LINE * (row + 1)}" font-family="monospace" font-size="13" fill="currentColor">'
        + "\n".join(parts)
        + "</svg>\n"
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
