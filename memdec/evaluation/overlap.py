"""A text longer than a block, scored in blocks that overlap, so that no token lacks a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from memdec.data.corpus import TokenStream


def score_overlapping(
    tokens: np.ndarray,
    block_size: int,
    stride: int,
    score: Callable[[TokenStream, int], np.ndarray],
) -> np.ndarray:
    """What `score` finds at each of the ``len(tokens) - 1`` positions.

    Args:
        tokens: int32, of one text.
        score: gets a block as a stream, and its size; gives one row a position of it.
    """
    parts = []
    for start, first, stop in overlapping_blocks(len(tokens) - 1, block_size, stride):
        stream = TokenStream((tokens[start : stop + 1],), np.array([1]))
        parts.append(score(stream, stop - start)[first - start :])
    return np.concatenate(parts)


def overlapping_blocks(
    positions: int, block_size: int, stride: int
) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop) of each block: [start, stop) is read, [first, stop) counts.

    A block starts `stride` after the one before it, at most `block_size`, and each position counts
    in the first block that reaches it.
    """
    first = 0
    for start in range(0, positions, stride):
        stop = min(start + block_size, positions)
        yield start, first, stop
        if stop == positions:
            return
        first = stop
