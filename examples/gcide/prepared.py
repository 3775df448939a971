"""Writes what ``memdec prepare`` writes, from documents that are split and tokenised already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memdec.data.artefact import StageWriter
from memdec.data.corpus import SHARD_TOKENS
from memdec.data.stream_writer import StreamWriter


def write_prepared(
    writer: StageWriter,
    tokenizer: Any,
    separator: int,
    documents: Mapping[str, Sequence[np.ndarray]],
) -> None:
    """Finishes the artefact; goes on where an earlier run with the same documents was cut off.

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
        vocab_size=len(tokenizer),
        dtype="int32",
        counts={},
    )
