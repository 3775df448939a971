"""A held-out passage with each token coloured by what the memory added."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

_FULL_COLOUR = 3.0  # nats at which the colour is strongest
_SHOWN = ("base", "memory", "joint", "kNN-LM")


def coloured_passage(passage: Mapping[str, Any]) -> str:
    """HTML of the passage; hovering over a token shows its probabilities.

    Green: joint gives the token more probability than base does; red: less.
    """
    names = [name for name in _SHOWN if name in passage]
    spans = []
    for index, token in enumerate(passage["tokens"]):
        chances = {name: passage[name][index] for name in names}
        gain = _log(chances["joint"]) - _log(chances["base"])
        note = "\n".join(f"{name} {_percent(chance)}" for name, chance in chances.items())
        spans.append(
            f'<span style="background:{_colour(gain)}" title="{html.escape(note)}">'
            f"{_visible(token)}</span>"
        )
    return f'<p class="passage">{"".join(spans)}</p>'


def legend() -> str:
    """The scale of the colours."""
    steps = (-3, -1, 0, 1, 3)
    return "".join(
        f'<span class="key" style="background:{_colour(step)}">{step:+d} nats</span>'
        if step
        else f'<span class="key" style="background:{_colour(step)}">as base</span>'
        for step in steps
    )


def _colour(gain: float) -> str:
    strength = min(abs(gain) / _FULL_COLOUR, 1.0)
    red_green_blue = "38,166,91" if gain > 0 else "214,69,65"
    return f"rgba({red_green_blue},{0.75 * strength:.2f})"


def _visible(token: str) -> str:
    return html.escape(token).replace("\n", "↵\n")


def _log(chance: float) -> float:
    return math.log(max(chance, 1e-30))


def _percent(chance: float) -> str:
    return f"{100 * chance:.3g} %"
