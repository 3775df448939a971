"""Where target rows come from: neighbours, the teacher's own distribution, both, or a file.

A source gives the rows of consecutive train positions. What is written, and who reads it, does not
depend on which source it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from memdec.config import require
from memdec.data.contexts import Contexts
from memdec.data.corpus import TokenCorpus, TokenStream, block_batches
from memdec.data.datastore import Datastore
from memdec.data.exact import WRONG_QUERY, Found
from memdec.data.in_flight import InFlight, in_order, to_device
from memdec.data.neighbours import Neighbours
from memdec.errors import MemdecError
from memdec.ops import SparseTargets, knn_scatter

_ROWS_A_SEARCH = 1024
_SUM_TOLERANCE = 1e-3
_FILE_DTYPES = {
    "indptr": torch.int64,
    "token_ids": torch.int32,
    "probs": torch.float32,
    "label": torch.int32,
}


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


class FileSource:
    """Rows of the user's own, from a safetensors file.

    ``indptr`` int64 [positions + 1], ``token_ids`` int32 and ``probs`` float32 as in
    :class:`memdec.ops.SparseTargets`, a row for each train position, and ``label`` int32
    [positions], the token that follows each, by which rows and tokens are known to match.

    Raises:
        MemdecError: no such file, an array that is missing, of another dtype or length, a label
            that is not the corpus's.
    """

    def __init__(self, path: Path, corpus: TokenCorpus) -> None:
        self._path = path
        self._vocab_size = corpus.vocab_size
        arrays = _read_arrays(path)
        stream = corpus.split("train")
        lengths = {"indptr": stream.positions + 1, "label": stream.positions}
        for name, expected in lengths.items():
            if arrays[name].shape != (expected,):
                raise MemdecError(
                    f"{path}: {name} must have shape [{expected}], the train split's, "
                    f"got {list(arrays[name].shape)}"
                )
        labels = torch.from_numpy(stream.read(1, len(stream)))
        wrong = torch.nonzero(arrays["label"] != labels)
        if len(wrong):
            first = int(wrong[0])
            raise MemdecError(
                f"{path}: {len(wrong)} labels are not the train tokens; at position {first} "
                f"expected {labels[first]}, got {arrays['label'][first]}"
            )
        self._targets = SparseTargets(arrays["indptr"], arrays["token_ids"], arrays["probs"])

    def rows(self, start: int, stop: int) -> Iterator[SparseTargets]:
        rows = self._targets[start:stop]
        try:
            rows = rows.compact().validate(self._vocab_size)
        except (ValueError, RuntimeError) as error:
            raise MemdecError(f"{self._path}: rows {start} to {stop}: {error}") from error
        lengths = rows.indptr.diff()
        owner = torch.repeat_interleave(torch.arange(len(rows)), lengths)
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, rows.probs.double())
        wrong = torch.nonzero(((sums - 1).abs() > _SUM_TOLERANCE) & (lengths > 0))
        if len(wrong):
            first = int(wrong[0])
            raise MemdecError(
                f"{self._path}: a row must sum to 1 or be empty, row {start + first} sums to "
                f"{sums[first]:.4f}"
            )
        yield rows


def _read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a user's file, memory-mapped, names and dtypes checked."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MemdecError(f"{path} cannot be read as safetensors: {error}") from error
    for name, dtype in _FILE_DTYPES.items():
        found = arrays[name].dtype if name in arrays else "no such array"
        if found != dtype:
            raise MemdecError(f"{path}: {name} must be {dtype}, got {found}")
    return arrays
