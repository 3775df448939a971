"""Writes one split's token stream in shards."""

from __future__ import annotations

import numpy as np

from memdec.data.artefact import StageWriter


class StreamWriter:
    """Cuts one split's stream into shards, and goes on behind those of an earlier run.

    Beside a shard's tokens lie the starts of the documents that begin in it: the last start known
    is where tokenising begins again.

    Args:
        writer: of the stage.
        split: names the files.
        separator: token id before, between and behind the documents.
        shard_tokens: tokens of each shard but the last.

    Attributes:
        documents_done: documents that need no :meth:`add` any more.
    """

    def __init__(self, writer: StageWriter, split: str, separator: int, shard_tokens: int) -> None:
        self._writer = writer
        self._split = split
        self._shard_tokens = shard_tokens
        self._separator = np.asarray([separator], dtype=np.int32)
        self._shard = 0
        self._written = 0
        starts: list[np.ndarray] = []
        while writer.has(self._name(".npy")):
            self._written += len(np.load(writer.file(self._name(".npy")), mmap_mode="r"))
            starts.append(np.load(writer.file(self._name(".documents.npy"))))
            self._shard += 1
        known = np.concatenate(starts) if starts else np.empty(0, np.int64)
        self.documents_done = max(len(known) - 1, 0)
        self._position = 0  # in the stream, of what add() gets next
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._starts: list[int] = []
        if len(known):
            self._position = int(known[-1])
        else:
            self._extend(self._separator)

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document and the separator behind it."""
        if self._position >= self._written:
            self._starts.append(self._position)
        self._extend(tokens)
        self._extend(self._separator)
        while self._pending_tokens >= self._shard_tokens:
            self._cut()

    def finish(self) -> dict[str, int]:
        """Writes what is left; the numbers of tokens and shards."""
        if self._pending:
            self._cut()
        return {"tokens": self._written, "shards": self._shard}

    def _extend(self, tokens: np.ndarray) -> None:
        new = tokens[max(self._written - self._position, 0) :]
        self._position += len(tokens)
        if len(new):
            self._pending.append(new)
            self._pending_tokens += len(new)

    def _cut(self) -> None:
        tokens = np.concatenate(self._pending)
        shard, rest = tokens[: self._shard_tokens], tokens[self._shard_tokens :]
        self._written += len(shard)
        starts = [start for start in self._starts if start < self._written]
        self._starts = self._starts[len(starts) :]
        self._pending = [rest] if len(rest) else []
        self._pending_tokens = len(rest)
        # The tokens come last: a shard that has them has its starts too.
        documents = np.asarray(starts, dtype=np.int64)
        if not self._writer.has(self._name(".documents.npy")):
            self._writer.write(self._name(".documents.npy"), lambda file: np.save(file, documents))
        self._writer.write(self._name(".npy"), lambda file: np.save(file, shard))
        self._shard += 1

    def _name(self, ending: str) -> str:
        return shard_name(self._split, self._shard, ending)


def shard_name(split: str, shard: int, ending: str) -> str:
    """File of a shard's tokens (``.npy``) or document starts (``.documents.npy``)."""
    return f"tokens/{split}-{shard:05d}{ending}"
