"""In-context retrieval: the best train entries put before the text (arXiv 2302.00083).

The text is cut into pieces of a stride. Before each piece the entry so far is the query, BM25
answers with train entries, and these stand before the text in the model's context, the best one
next to it; what does not fit into a block is cut off the text's far end. A query never holds a
token that its piece predicts. An entry's first piece is half a stride long, for until then there is no
query and the base is alone. Needs the package bm25s (``pip install 'memdec[rivals]'``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from lab.texts import Text, documents
from memdec.config import require
from memdec.console import Progress
from memdec.data.artefact import stage
from memdec.data.corpus import TokenCorpus
from memdec.ops import token_log_probs

MOST_FOUND = 24  # entries a piece; more than fit into half a block of 1024
_TOKENS_A_PASS = 1 << 15


@dataclass(frozen=True)
class Pieces:
    """Runs of positions, each with the train entries found for it.

    Attributes:
        bounds: int64 [pieces, 2], positions [start, stop).
        found: int32 [pieces, most], numbers of train documents, the best first, then -1.
    """

    bounds: np.ndarray
    found: np.ndarray

    def head(self, positions: int) -> Pieces:
        """Those that lie in the first `positions`, the last one cut."""
        kept = self.bounds[:, 0] < positions
        return Pieces(self.bounds[kept].clip(max=positions), self.found[kept])


def cut(text: Text, separator: int, block_size: int, stride: int) -> np.ndarray:
    """Bounds of the pieces, int64 [pieces, 2].

    A piece lies in one block and one entry. In an entry the first piece ends after half a stride,
    the second after a stride, and so on, a stride each.
    """
    tokens = text.stream.read(0, text.positions)
    begins = tokens == separator
    begins[::block_size] = True
    starts = np.flatnonzero(begins)
    since = np.arange(text.positions) - np.repeat(starts, np.diff([*starts, text.positions]))
    cuts = np.flatnonzero(begins | (since == stride // 2) | ((since > 0) & (since % stride == 0)))
    return np.stack([cuts, [*cuts[1:], text.positions]], axis=1)


def queries(text: Text, bounds: np.ndarray, separator: int, block_size: int, most: int) -> list:
    """Before each piece the last `most` tokens of its entry, as far as its block has them."""
    tokens = text.stream.read(0, text.positions)
    found = []
    for start in bounds[:, 0].tolist():
        first = max(start // block_size * block_size, start + 1 - most)
        seen = tokens[first : start + 1]  # position `start` is known: its label is predicted
        separators = np.flatnonzero(seen == separator)
        found.append(seen[separators[-1] + 1 :] if len(separators) else seen)
    return found


def retrieve(
    corpus: TokenCorpus,
    texts: Mapping[str, Text],
    out: Path,
    inputs: Mapping[str, str],
    *,
    block_size: int,
    stride: int,
    query_tokens: int,
) -> dict[str, Pieces]:
    """The pieces of each text; BM25 over the train split, on the CPU, kept in `out`.

    Args:
        inputs: fingerprints of where the texts are from.
    """
    params = {"block_size": block_size, "stride": stride, "query_tokens": query_tokens}
    params["positions"] = {name: text.positions for name, text in texts.items()}
    with stage(out, "retrieved", params, inputs) as writer:
        if not writer.finished:
            search = _Search(corpus)
            for name, text in texts.items():
                bounds = cut(text, corpus.separator_id, block_size, stride)
                asked = queries(text, bounds, corpus.separator_id, block_size, query_tokens)
                arrays = {"bounds": bounds, "found": search(asked)}
                writer.write(_file(name), lambda file, arrays=arrays: np.savez(file, **arrays))
            writer.finish()
    return {name: Pieces(**np.load(out / _file(name))) for name in texts}


def _file(name: str) -> str:
    return f"{name}.npz"


class _Search:
    """BM25 over the documents of the train split; words without case, common English ones dropped."""

    def __init__(self, corpus: TokenCorpus) -> None:
        import bm25s  # what was found may have come from another machine

        self._bm25s = bm25s
        self._tokenizer = corpus.tokenizer()
        self._index = bm25s.BM25()
        entries = documents(corpus.split("train"))
        self._index.index(self._words(entries), show_progress=False)
        self._most = min(MOST_FOUND, len(entries))

    def __call__(self, asked: Sequence[np.ndarray]) -> np.ndarray:
        """Numbers of documents that share a word with each query, int32 [queries, most]."""
        found = np.full((len(asked), self._most), -1, np.int32)
        words = self._words(asked)
        answerable = [row for row, one in enumerate(words) if one]
        with Progress("BM25", len(answerable), "queries") as progress:
            for first in range(0, len(answerable), 256):
                rows = answerable[first : first + 256]
                ids, scores = self._index.retrieve(
                    [words[row] for row in rows], k=self._most, show_progress=False
                )
                found[rows] = np.where(scores > 0, ids, -1)
                progress.advance(len(rows))
        return found

    def _words(self, tokens: Sequence[np.ndarray]) -> list[list[str]]:
        texts = self._tokenizer.batch_decode(tokens)
        options = {"stopwords": "en", "return_ids": False, "show_progress": False}
        return self._bm25s.tokenize(texts, **options)


def score_retrieved(
    model: PreTrainedModel,
    text: Text,
    pieces: Pieces,
    entries: Sequence[np.ndarray],
    alone: np.ndarray,
    *,
    separator: int,
    vocab_size: int,
    block_size: int,
    room: int,
    description: str,
) -> np.ndarray:
    """Log p(label), float32 [positions].

    Args:
        entries: the train split's :func:`lab.texts.documents`.
        alone: the base's, [positions]; of pieces for which nothing was found.
        room: tokens of a context for what was found; an entry that is longer is cut.

    Raises:
        MemdecError: no room beside that for the longest piece.
    """
    longest = int(np.diff(pieces.bounds, axis=1).max())
    require(room + longest <= block_size, "room", f"at most {block_size - longest}", room)
    tokens = text.stream.read(0, text.positions + 1)
    log_probs = alone.astype(np.float32)
    wanted = np.flatnonzero(pieces.found[:, 0] >= 0)
    contexts = {}
    for piece in wanted.tolist():
        start, stop = pieces.bounds[piece].tolist()
        before = passage([entries[i] for i in pieces.found[piece] if i >= 0], separator, room)
        first = max(start // block_size * block_size, stop - (block_size - len(before)))
        contexts[piece] = np.concatenate([before, tokens[first:stop]])
    order = sorted(contexts, key=lambda piece: len(contexts[piece]))
    with Progress(description, len(order), "pieces") as progress:
        while order:
            rows = max(_TOKENS_A_PASS // len(contexts[order[-1]]), 1)
            batch, order = order[-rows:], order[:-rows]
            bounds = pieces.bounds[batch]
            found = _last_log_probs(
                model, [contexts[piece] for piece in batch], bounds, tokens, vocab_size
            )
            for (start, stop), row in zip(bounds.tolist(), found, strict=True):
                log_probs[start:stop] = row[: stop - start]
            progress.advance(len(batch))
    return log_probs


def passage(found: Sequence[np.ndarray], separator: int, room: int) -> np.ndarray:
    """Entries with separators around each, the best last, as many as `room` tokens take."""
    parts: list[np.ndarray] = []
    left = room - 1
    for entry in found:
        if parts and len(entry) + 1 > left:
            break
        parts.append(np.append(entry[: left - 1], separator))
        left -= len(parts[-1])
    return np.concatenate([[separator], *reversed(parts)]).astype(np.int32)


@torch.inference_mode()
def _last_log_probs(
    model: PreTrainedModel,
    contexts: Sequence[np.ndarray],
    bounds: np.ndarray,
    tokens: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
    """Of each context's last tokens, as many as its piece has; float32 [contexts, longest piece].

    Contexts are padded at their end, which no earlier token sees; only the pieces get logits.
    """
    lengths = np.array([len(context) for context in contexts])
    sizes = bounds[:, 1] - bounds[:, 0]
    ids = np.zeros((len(contexts), lengths.max()), np.int64)
    for row, context in zip(ids, contexts, strict=True):
        row[: len(context)] = context
    steps = np.arange(sizes.max())
    places = np.minimum((lengths - sizes)[:, None] + steps, lengths[:, None] - 1)
    labels = tokens[np.minimum(bounds[:, :1] + steps, bounds[:, 1:] - 1) + 1].astype(np.int64)
    device = model.device
    hidden = model.base_model(torch.from_numpy(ids).to(device), use_cache=False).last_hidden_state
    rows = torch.arange(len(contexts), device=device)[:, None]
    logits = model.get_output_embeddings()(hidden[rows, torch.from_numpy(places).to(device)])
    return (
        token_log_probs(logits, torch.from_numpy(labels).to(device), vocab_size=vocab_size)
        .cpu()
        .numpy()
    )
