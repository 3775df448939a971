"""Where target rows come from: neighbours, the teacher's own distribution, or both.

A source gives the rows of consecutive train positions. What is written, and who reads it, does not
depend on which source it was. Rows of a file have a module of their own (:mod:`memdec.data.file_sources`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from memdec.config import require
from memdec.data.contexts import Contexts
from memdec.data.corpus import TokenStream, block_batches
from memdec.data.datastore import Datastore
from memdec.data.exact import WRONG_QUERY, Found
from memdec.data.in_flight import InFlight, in_order, to_device
from memdec.data.neighbours import Neighbours
from memdec.ops import SparseTargets, knn_scatter

_ROWS_A_SEARCH = 1024


class Source(Protocol):
    """What the stage ``targets`` asks of a source."""

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets | Neighbours]:
        """Rows of train positions [start, stop), in order and in parts, on the CPU."""
        ...


@dataclass(frozen=True)
class KnnSource:
    """What followed the k nearest keys, each weighing ``exp(-squared distance / temperature)``."""

    store: Datastore
    k: int
    temperature: float
    max_entries: int | None
    contexts: Contexts | None = None  # what leaves copies of a position's text out, if anything

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets]:
        starts = range(start, stop, _ROWS_A_SEARCH)
        return in_order(self._rows(first, min(first + _ROWS_A_SEARCH, stop)) for first in starts)

    def _rows(self, start: int, stop: int) -> InFlight[SparseTargets]:
        found = self.find(start, stop)
        tokens = self.store.tokens_of(found.ids)
        rows = knn_scatter(
            found.distances, tokens, temperature=self.temperature, max_entries=self.max_entries
        )
        return _to_host(rows, {WRONG_QUERY: found.wrong})

    def find(self, start: int, stop: int) -> Found:
        """The k neighbours of each position; its own key is left out by id."""
        keys, own = self.store.keys(start, stop), np.arange(start, stop)
        if self.contexts is None:
            return self.store.find(keys, self.k, exclude=own)
        windows = self.contexts.windows(self.contexts.tokens, own)
        return self.store.put(*self.contexts.search(self.store, keys, windows, self.k, own))


@dataclass(frozen=True)
class Top:
    """A teacher's most probable tokens at positions [start, stop).

    Attributes:
        log_probs: [positions, top_m].
        tokens: [positions, top_m].
        errors: what an :class:`InFlight` checks: that its logits are neither NaN nor infinite.
    """

    start: int
    stop: int
    log_probs: torch.Tensor
    tokens: torch.Tensor
    errors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class NeighbourSource:
    """The neighbours that a :class:`KnnSource` finds, whatever its temperature."""

    knn: KnnSource
    vocab_size: int
    dtype: Literal["float16", "float32"]

    def rows(self, start: int, stop: int) -> Iterator[Neighbours]:
        starts = range(start, stop, _ROWS_A_SEARCH)
        return in_order(self._rows(first, min(first + _ROWS_A_SEARCH, stop)) for first in starts)

    def _rows(self, start: int, stop: int) -> InFlight[Neighbours]:
        found = self.knn.find(start, stop)
        tokens = self.knn.store.tokens_of(found.ids)
        pack = partial(Neighbours.pack, vocab_size=self.vocab_size, dtype=self.dtype)
        return InFlight([found.distances, tokens], pack, {WRONG_QUERY: found.wrong})


@dataclass(frozen=True)
class TeacherSource:
    """The teacher's `top_m` most probable tokens; the rest is dropped mass.

    `start` of a range must begin a block: every block is a context of its own, as in training.
    """

    model: PreTrainedModel
    stream: TokenStream
    vocab_size: int
    top_m: int
    block_size: int
    batch_blocks: int

    def __post_init__(self) -> None:
        from memdec.evaluation.forward import check_model

        isolated = self.stream.isolate_documents
        check_model(self.model, self.block_size, self.vocab_size, isolate_documents=isolated)
        expected = f"at most {self.vocab_size}, the tokens there are"
        require(self.top_m <= self.vocab_size, "top_m", expected, self.top_m)

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets]:
        return in_order(
            _sparse_rows(top.log_probs, top.tokens, None, top.errors)
            for top in self.top(start, stop)
        )

    def top(self, start: int, stop: int) -> Iterator[Top]:
        for first, last, blocks in block_batches(start, stop, self.block_size, self.batch_blocks):
            inputs = {
                name: to_device(array, self.model.device)
                for name, array in self.stream.inputs(first, last, blocks).items()
            }
            with torch.inference_mode():
                logits = self.model(**inputs, use_cache=False).logits
                parts = [self._top_of_block(block) for block in logits]
                log_probs = torch.cat([values for values, _ in parts])
                no_numbers = ~torch.isfinite(log_probs).all()
            message = f"the teacher's logits at positions {first} to {last} are no numbers"
            ids = torch.cat([ids for _, ids in parts])
            yield Top(first, last, log_probs, ids, {message: no_numbers})

    def _top_of_block(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A block at a time: a batch's logits in float32 could be the largest thing in memory."""
        scores = logits[:, : self.vocab_size].float()
        values, ids = scores.topk(self.top_m, dim=1)
        return values - scores.logsumexp(1, keepdim=True), ids


@dataclass(frozen=True)
class MixtureSource:
    """``(1 - lmbda) * p_teacher + lmbda * p_knn``, which a kNN-LM answers (arXiv 1911.00172).

    Of the teacher's part only its `top_m` tokens count; the rest is dropped mass. A position
    without neighbours has the teacher's part alone.
    """

    teacher: TeacherSource
    knn: KnnSource
    lmbda: float

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets]:
        return in_order(self._rows(top) for top in self.teacher.top(start, stop))

    def _rows(self, top: Top) -> InFlight[SparseTargets]:
        found = self.knn.find(top.start, top.stop)
        tokens = self.knn.store.tokens_of(found.ids)
        scores = (-found.distances / self.knn.temperature).masked_fill(tokens < 0, -torch.inf)
        alone = torch.isinf(scores).all(dim=1, keepdim=True)
        lmbda = torch.where(alone, 0.0, self.lmbda)
        near = scores.softmax(dim=1).masked_fill(alone, 0.0).log()
        return _sparse_rows(
            torch.cat([top.log_probs + torch.log1p(-lmbda), near + lmbda.log()], dim=1),
            torch.cat([top.tokens, tokens], dim=1),
            self.knn.max_entries,
            {**top.errors, WRONG_QUERY: found.wrong},
        )


def _sparse_rows(
    log_weights: torch.Tensor,
    tokens: torch.Tensor,
    max_entries: int | None,
    errors: dict[str, torch.Tensor],
) -> InFlight[SparseTargets]:
    """Rows from weighed tokens [rows, n], repeats summed; what is missing to a mass of 1 is dropped.

    A minus log-weight is a distance at temperature 1.
    """
    rows = knn_scatter(-log_weights, tokens, max_entries=max_entries)
    mass = log_weights.exp().sum(dim=1, dtype=torch.float64)
    if rows.dropped_mass is not None:
        mass *= 1 - rows.dropped_mass
    dropped = (1 - mass).clamp(min=0).float()
    return _to_host(SparseTargets(rows.indptr, rows.token_ids, rows.probs, dropped), errors)


def _to_host(rows: SparseTargets, errors: dict[str, torch.Tensor]) -> InFlight[SparseTargets]:
    parts = [rows.indptr, rows.token_ids, rows.probs]
    if rows.dropped_mass is not None:
        parts.append(rows.dropped_mass)
    return InFlight(parts, lambda *parts: SparseTargets(*parts).compact(), errors)
