"""A text token by token, with the probability that each row of a table gives each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NAMES = ("base", "memory", "joint", "kNN-LM")

_GROUP, _CONTEXT = 64, 16


def make_passage(tokens: list[str], log_probs: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """What a coloured passage shows: ``tokens``, and their probabilities in each of :data:`NAMES`.

    Args:
        tokens: of :func:`pieces`.
        log_probs: [tokens] each, by name; other names are left out.
    """
    passage: dict[str, list[Any]] = {"tokens": tokens}
    for name in NAMES:
        if name in log_probs:
            chances = np.exp(log_probs[name].astype(np.float64)).tolist()
            passage[name] = [float(f"{chance:.8g}") for chance in chances]
    return passage


def pieces(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What each token adds to the text; a character cut into several tokens comes with the last."""
    found: list[str] = []
    for group in range(0, len(tokens), _GROUP):
        # Some tokens before, since the text of a token may depend on where it stands.
        first = max(group - _CONTEXT, 0)
        before = _decode(tokenizer, tokens[first:group])
        for stop in range(group + 1, min(group + _GROUP, len(tokens)) + 1):
            text = _decode(tokenizer, tokens[first:stop])
            found.append(text[len(before) :])
            before = text
    return found


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
