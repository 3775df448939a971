"""Text outside the domain: what a model that was trained on the domain may have lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from memdec.data.corpus import TokenCorpus, TokenStream, tokenise
from memdec.data.documents import collect, read_corpus
from memdec.errors import MemdecError


def stream_name(text: str) -> str:
    """What the text is called beside the splits."""
    return f"outside-{text}"


def read_outside(
    path: Path,
    corpus: TokenCorpus,
    tokenizer: Any,
    positions: int,
    *,
    isolate_documents: bool = False,
) -> tuple[TokenStream, str]:
    """A text as a stream, in the corpus's tokens and with its separator, and its fingerprint.

    A file is one document, a line of a ``.jsonl`` file too. Repeats of a document are dropped.

    Args:
        positions: the stream has so many at most, from the head of the text.

    Raises:
        MemdecError: nothing there, or nothing that is text.
    """
    documents = collect(read_corpus(path, "file", "text"), drop_repeated_paragraphs=False)
    separator = np.asarray([corpus.separator_id], np.int32)
    parts, starts, length = [separator], [], 1
    for _, tokens in tokenise(tokenizer, documents.texts):
        if length > positions:
            break
        starts.append(length)
        parts += [tokens, separator]
        length += len(tokens) + 1
    if not starts:
        raise MemdecError(f"{path} holds no text")
    stream = np.concatenate(parts)[: positions + 1]
    found = TokenStream((stream,), np.asarray(starts), isolate_documents, corpus.vocab_size)
    return found, documents.fingerprint
