"""Neighbours in the query's own context, left out: the same text elsewhere in the corpus.

Such a neighbour is the passage of the query once more: a licence that heads many files, a paragraph
that is quoted. It lies at a distance near 0 and takes nearly all the weight, so the target says by
heart what followed in the copy and nothing of what follows in contexts that are alike. And a
held-out text with copies in the train split makes temperature and lmbda fit the copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from memdec.data.corpus import TokenCorpus
    from memdec.data.datastore import Datastore

_MORE = 16  # neighbours that are looked for beside k and a quarter of it
_MOST = 16  # times k: a row with more copies than that has fewer neighbours


def contexts_of(length: int, corpus: TokenCorpus) -> Contexts | None:
    """What leaves out neighbours with the same last `length` tokens; None for a length of 0."""
    stream = corpus.split("train")
    return Contexts(stream.read(0, stream.positions), length) if length else None


def first_search(k: int) -> int:
    """How many neighbours are looked for at first, to have `k` that are no copies."""
    return k + k // 4 + _MORE


@dataclass(frozen=True)
class Contexts:
    """Searches for neighbours whose last `length` tokens are not the query's own.

    Args:
        tokens: the inputs of the train positions, int32 [size].
        length: at least 1.
    """

    tokens: np.ndarray
    length: int

    def windows(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The last `length` of `tokens` at each position, int32 [n, length].

        Before the first token there is -1, which is no token's equal.
        """
        places = positions[:, None] - np.arange(self.length - 1, -1, -1)
        return np.where(places < 0, np.int32(-1), tokens[places.clip(min=0)])

    def search(
        self,
        store: Datastore,
        queries: np.ndarray,
        windows: np.ndarray,
        k: int,
        exclude: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Datastore.search`, without copies of the queries' `windows` [n, length]."""
        distances = np.full((len(queries), k), np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        rows = np.arange(len(queries))
        most = min(_MOST * k + _MORE, store.size)
        wanted = first_search(k)
        while len(rows):
            wanted = min(wanted, most)
            left_out = None if exclude is None else exclude[rows]
            near, found = store.search(queries[rows], wanted, left_out)
            kept = (found >= 0) & ~self._same(windows[rows], found)
            order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
            real = np.take_along_axis(kept, order, 1)
            width = order.shape[1]
            distances[rows, :width] = np.where(real, np.take_along_axis(near, order, 1), np.inf)
            ids[rows, :width] = np.where(real, np.take_along_axis(found, order, 1), -1)
            if wanted == most:
                break
            # Where the search itself came to its end, a wider one finds no more.
            rows = rows[(kept.sum(axis=1) < k) & (found[:, -1] >= 0)]
            wanted *= 2
        return distances, ids

    def _same(self, windows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Where a neighbour's window is its row's, [n, k]; compares tokens from the last one on."""
        same = np.zeros(ids.shape, bool)
        rows, columns = np.nonzero(ids >= 0)
        places = ids[rows, columns]
        for back in range(self.length):
            equal = (places >= back) & (self.tokens[places - back] == windows[rows, -1 - back])
            rows, columns, places = rows[equal], columns[equal], places[equal]
        same[rows, columns] = True
        return same
