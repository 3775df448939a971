"""Texts as tokens: those held out, the documents of a split, and a corpus written from documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memdec.data.artefact import StageWriter
from memdec.data.corpus import SHARD_TOKENS, TokenStream
from memdec.data.stream_writer import StreamWriter
from memdec.modeling.loading import vocabulary_size


@dataclass(frozen=True)
class Text:
    """A held-out text: `positions` of a stream from its start."""

    stream: TokenStream
    positions: int

    @property
    def labels(self) -> np.ndarray:
        return self.stream.read(1, self.positions + 1)

    def head(self, positions: int) -> Text:
        return Text(self.stream, min(positions, self.positions))


def documents(stream: TokenStream) -> list[np.ndarray]:
    """The tokens of each document, without separators."""
    ends = np.append(stream.documents[1:] - 1, len(stream) - 1)
    return [stream.read(*bounds) for bounds in zip(stream.documents, ends, strict=True)]


def write_prepared(
    writer: StageWriter,
    tokenizer: Any,
    separator: int,
    documents: Mapping[str, Sequence[np.ndarray]],
) -> None:
    """Writes what ``memdec prepare`` writes, from documents that are split and tokenised already.

    Finishes the artefact; goes on where an earlier run with the same documents was cut off.

    Args:
        separator: token id between documents.
        documents: by split; int32 token ids each, without separators.
    """
    if not writer.has_directory("tokenizer"):
        writer.write_directory("tokenizer", tokenizer.save_pretrained)
    splits = {}
    for name, split in documents.items():
        stream = StreamWriter(writer, name, separator, SHARD_TOKENS)
        for tokens in split[stream.documents_done :]:
            stream.add(tokens)
        splits[name] = {"documents": len(split), **stream.finish()}
    writer.finish(
        splits=splits,
        separator_id=separator,
        vocab_size=vocabulary_size(tokenizer),
        dtype="int32",
        counts={},
    )
