"""In-context retrieval: where the text is cut, what is asked, and what stands in the context."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from memdec.data.corpus import TokenCorpus
from memdec.errors import MemdecError
from memdec.modeling.loading import load_model

BLOCK, STRIDE, ROOM = 32, 8, 14


@pytest.fixture(scope="module")
def retrieval(gcide: None) -> ModuleType:
    return importlib.import_module("lab.retrieval")


@pytest.fixture(scope="module")
def corpus(tiny: ModuleType) -> TokenCorpus:
    return TokenCorpus.open(tiny.tokens)


@pytest.fixture(scope="module")
def text(gcide: None, corpus: TokenCorpus) -> object:
    return importlib.import_module("lab.texts").Text(corpus.split("test"), 200)


@pytest.fixture(scope="module")
def bounds(retrieval: ModuleType, corpus: TokenCorpus, text: object) -> np.ndarray:
    return retrieval.cut(text, corpus.separator_id, BLOCK, STRIDE)


def test_pieces_cover_the_text_and_stay_in_block_and_entry(
    corpus: TokenCorpus, text: object, bounds: np.ndarray
) -> None:
    assert bounds[0, 0] == 0
    assert bounds[-1, 1] == text.positions
    assert np.array_equal(bounds[1:, 0], bounds[:-1, 1])
    tokens = text.stream.read(0, text.positions)
    for start, stop in bounds.tolist():
        assert 0 < stop - start <= STRIDE
        assert start // BLOCK == (stop - 1) // BLOCK
        assert corpus.separator_id not in tokens[start + 1 : stop]
        if tokens[start] == corpus.separator_id:
            assert stop - start <= STRIDE // 2


def test_a_query_is_the_entry_so_far(
    retrieval: ModuleType, corpus: TokenCorpus, text: object, bounds: np.ndarray
) -> None:
    tokens = text.stream.read(0, text.positions)
    asked = retrieval.queries(text, bounds, corpus.separator_id, BLOCK, 6)
    for (start, _), query in zip(bounds.tolist(), asked, strict=True):
        seen = tokens[start // BLOCK * BLOCK : start + 1].tolist()
        wanted = seen[::-1]
        if corpus.separator_id in wanted:
            wanted = wanted[: wanted.index(corpus.separator_id)]
        assert query.tolist() == wanted[:6][::-1]


def test_what_is_found_shares_words_with_the_query(
    retrieval: ModuleType, corpus: TokenCorpus, text: object, bounds: np.ndarray, tmp_path: Path
) -> None:
    options = {"block_size": BLOCK, "stride": STRIDE, "query_tokens": 6}
    found = retrieval.retrieve(corpus, {"test": text}, tmp_path / "a", {}, **options)["test"]
    assert np.array_equal(found.bounds, bounds)
    entries = importlib.import_module("lab.texts").documents(corpus.split("train"))
    asked = retrieval.queries(text, bounds, corpus.separator_id, BLOCK, 6)
    for query, documents in zip(asked, found.found, strict=True):
        assert (documents >= 0).any() == (len(query) > 0)
        for document in documents[documents >= 0].tolist():
            assert set(query.tolist()) & set(entries[document].tolist())


def test_scores_are_those_of_the_entries_before_the_text(
    retrieval: ModuleType, corpus: TokenCorpus, text: object, bounds: np.ndarray, tiny: ModuleType
) -> None:
    entries = importlib.import_module("lab.texts").documents(corpus.split("train"))
    found = np.full((len(bounds), 3), -1, np.int32)
    found[1::2] = [[4, 7, 9]]
    alone = -np.arange(text.positions, dtype=np.float32)
    model = load_model(tiny.model)
    scores = retrieval.score_retrieved(
        model,
        text,
        retrieval.Pieces(bounds, found),
        entries,
        alone,
        separator=corpus.separator_id,
        vocab_size=corpus.vocab_size,
        block_size=BLOCK,
        room=ROOM,
        description="test",
    )
    before = retrieval.passage([entries[4], entries[7], entries[9]], corpus.separator_id, ROOM)
    assert len(before) <= ROOM
    assert before[0] == before[-1] == corpus.separator_id
    tokens = text.stream.read(0, text.positions + 1)
    for number, (start, stop) in enumerate(bounds.tolist()):
        if number % 2 == 0:
            assert np.array_equal(scores[start:stop], alone[start:stop])
            continue
        first = max(start // BLOCK * BLOCK, stop - (BLOCK - len(before)))
        context = np.concatenate([before, tokens[first:stop]]).astype(np.int64)
        assert len(context) <= BLOCK
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(context)[None]).logits[0]
        log_probs = logits[:, : corpus.vocab_size].log_softmax(1)[-(stop - start) :]
        wanted = log_probs.gather(1, torch.from_numpy(tokens[start + 1 : stop + 1])[:, None].long())
        assert np.allclose(scores[start:stop], wanted[:, 0], atol=1e-4)


def test_a_passage_ends_with_the_best_and_cuts_what_is_too_long(retrieval: ModuleType) -> None:
    entries = [np.array([1, 2]), np.array([3, 4, 5]), np.array([6])]
    assert retrieval.passage(entries, 0, 8).tolist() == [0, 3, 4, 5, 0, 1, 2, 0]
    assert retrieval.passage(entries, 0, 7).tolist() == [0, 1, 2, 0]
    assert retrieval.passage([np.arange(1, 20)], 0, 6).tolist() == [0, 1, 2, 3, 4, 0]


def test_a_passage_must_leave_room_for_the_piece(
    retrieval: ModuleType, corpus: TokenCorpus, text: object, bounds: np.ndarray, tiny: ModuleType
) -> None:
    """Else the answers of a piece's first tokens would be taken from what was found."""
    with pytest.raises(MemdecError, match="room must be at most 24, got 25"):
        retrieval.score_retrieved(
            load_model(tiny.model),
            text,
            retrieval.Pieces(bounds, np.zeros((len(bounds), 1), np.int32)),
            importlib.import_module("lab.texts").documents(corpus.split("train")),
            np.zeros(text.positions),
            separator=corpus.separator_id,
            vocab_size=corpus.vocab_size,
            block_size=BLOCK,
            room=BLOCK - STRIDE + 1,
            description="test",
        )
