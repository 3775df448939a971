"""A recurrence along a sequence in logarithmically many operations on whole tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Maps = tuple[Tensor, ...]


def scan(
    step: Callable[[Tensor, Maps], Tensor],
    join: Callable[[Maps, Maps], Maps],
    maps: Maps,
    before: Tensor,
) -> Tensor:
    """States each of which a map makes of the one before it: a parallel prefix (Blelloch 1990).

    Neighbouring maps are joined in pairs. The states that those lead to, half as many, are the ones
    at every second position, and a single step from each gives the rest.

    Args:
        step: makes states of the states before and their maps, any number at once.
        join: makes of maps, and those right after them, maps that do what both do in turn.
        maps: the tensors that describe a map at each position, ``[rows, length, ...]``.
        before: the state before the first position, ``[rows, ...]``.

    Returns:
        ``[rows, length, ...]``.
    """
    length = maps[0].shape[1]
    last = before[:, None]
    if length == 1:
        return step(last, maps)
    first, second = (tuple(part[:, place::2] for part in maps) for place in (0, 1))
    odd = scan(step, join, join(tuple(part[:, : length // 2] for part in first), second), before)
    states = odd.new_empty(len(odd), length, *odd.shape[2:])
    states[:, 1::2] = odd
    states[:, ::2] = step(torch.cat([last, odd], dim=1)[:, : (length + 1) // 2], first)
    return states
