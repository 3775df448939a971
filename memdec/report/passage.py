"""A passage with each token coloured by what the memory added."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from memdec.evaluation.passage import NAMES

_FULL_COLOUR = 3.0  # nats at which the colour is strongest
_UNDERLINED = -0.1  # nats from which on a loss is underlined: colour is not the only sign
# Bluish green and vermilion of Okabe and Ito, which colour-blind readers tell apart.
MORE, LESS = (0, 158, 115), (213, 94, 0)


def coloured_passage(passage: Mapping[str, Any]) -> str:
    """HTML of what :func:`memdec.evaluation.passage.make_passage` made.

    Green: joint gives the token more probability than base does; red and underlined: less. Hovering
    over a token shows its probabilities.
    """
    names = [name for name in NAMES if name in passage]
    spans = []
    for index, (token, gain) in enumerate(zip(passage["tokens"], gains(passage), strict=True)):
        chances = {name: passage[name][index] for name in names}
        note = "\n".join(f"{name} {percent(chance)}" for name, chance in chances.items())
        text = html.escape(token).replace("\n", "↵\n")
        spans.append(f'<span {shade(gain)} title="{html.escape(note)}">{text}</span>')
    return f'<p class="passage">{"".join(spans)}</p>'


def gains(passage: Mapping[str, Any]) -> list[float]:
    """By token, in nats: the log-probability under joint less that under base."""
    both = zip(passage["joint"], passage["base"], strict=True)
    return [_log(joint) - _log(base) for joint, base in both]


def tint(gain: float) -> tuple[tuple[int, int, int], float]:
    """Red, green and blue of a gain in nats, and its opacity."""
    return MORE if gain > 0 else LESS, 0.65 * min(abs(gain) / _FULL_COLOUR, 1.0)


def shade(gain: float, name: str = "") -> str:
    """HTML attributes of an element that shows a gain in nats; `name` is a further class."""
    (red, green, blue), opacity = tint(gain)
    names = f"{name} less" if gain <= _UNDERLINED else name
    class_ = f'class="{names.strip()}" ' if names else ""
    return f'{class_}style="background:rgba({red},{green},{blue},{opacity:.2f})"'


def percent(chance: float) -> str:
    """Three digits."""
    return f"{100 * chance:.3g} %"


def _key(nats: int) -> str:
    return f"<span {shade(nats, 'key')}>{f'{nats:+d} nats' if nats else 'as base'}</span>"


def _log(chance: float) -> float:
    return math.log(max(chance, 1e-30))


PASSAGE_NOTE = (
    "<p>Each token is coloured by what the memory added: the log-probability under joint less that "
    "under base. Hover over a token for its probabilities. "
    + "".join(_key(nats) for nats in (-3, -1, 0, 1, 3))
    + "</p>"
)
