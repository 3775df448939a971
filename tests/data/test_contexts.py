"""Copies of a passage are left out of its neighbours, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_tiny import contents, documents, run_stage, write_corpus

from memdec.data.audit import AuditConfig, audit
from memdec.data.contexts import Contexts, contexts_of
from memdec.data.corpus import TokenCorpus
from memdec.data.datastore import Datastore
from memdec.data.exact import ExactIndex
from memdec.data.targets import TargetsConfig, TargetStore
from memdec.errors import MemdecError

PARAGRAPH = (
    "Small green birds never sing, and the big red fish often swim and eat a small blue fly."
)


def oracle(tokens, positions, length, distances, ids, k):
    """Row by row: the first k of all neighbours whose last tokens differ."""

    def context(place):
        return tokens[place - length + 1 : place + 1].tolist() if place >= length - 1 else None

    rows = []
    for position, near, found in zip(positions, distances, ids, strict=True):
        own = context(position)
        kept = [
            (far, place)
            for far, place in zip(near, found, strict=True)
            if place >= 0 and (own is None or context(place) != own)
        ]
        rows.append((kept + [(np.inf, -1)] * k)[:k])
    return [[place for _, place in row] for row in rows], [[far for far, _ in row] for row in rows]


@pytest.fixture
def store():
    """400 keys of a stream in which two passages occur again and again."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, 400).astype(np.int32)
    for start in (60, 150, 220, 310, 330):
        tokens[start : start + 15] = tokens[:15]
    tokens[395:] = tokens[20:25]
    keys = np.stack([np.roll(tokens, n)[:, None] % m for n in range(3) for m in (3, 7)], 1)[..., 0]
    keys = (keys + generator.standard_normal(keys.shape) * 0.1).astype(np.float16)
    index = ExactIndex([keys], "cpu")
    found = SimpleNamespace(size=400, tokens=tokens, keys=keys, asked=[])

    def search(queries, k, exclude=None):
        found.asked.append((len(queries), k))
        return index.search(queries, k, exclude)

    found.search = search
    return found


@pytest.mark.parametrize("length", [1, 2, 8, 16, 500])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_nearest_that_are_no_copies(store, length, k):
    contexts = Contexts(store.tokens, length)
    own = np.arange(400)
    windows = contexts.windows(store.tokens, own)
    found = contexts.search(store, store.keys, windows, k, own)
    everything = store.search(store.keys, 400, own)
    ids, distances = oracle(store.tokens, own, length, *everything, k)
    assert found[1].tolist() == ids
    np.testing.assert_allclose(found[0], distances, rtol=1e-6)


def test_rows_with_many_copies_are_searched_again_and_further(store):
    """One token of context: of 50 tokens each occurs 8 times, and the key tells them apart well."""
    contexts = Contexts(store.tokens, 1)
    own = np.arange(400)
    contexts.search(store, store.keys, contexts.windows(store.tokens, own), 5, own)
    rows, widths = zip(*store.asked, strict=True)
    assert rows[0] == 400
    assert widths[0] == 5 + 1 + 16
    contexts = Contexts(np.zeros(400, np.int32), 1)  # all are copies
    store.asked.clear()
    found = contexts.search(store, store.keys, contexts.windows(contexts.tokens, own), 5, own)
    assert (found[1] == -1).all()
    assert store.asked == [(400, 22), (400, 44), (400, 88), (400, 96)]


@pytest.fixture(scope="module")
def repeated(tiny, tmp_path_factory) -> Path:
    """A datastore of a corpus with a paragraph in every fifth document."""
    out = tmp_path_factory.mktemp("repeated")
    texts = [
        text if number % 5 else f"{text}\n\n{PARAGRAPH}\n\n{text[::-1]}"
        for number, text in enumerate(documents(60))
    ]
    values = {"tokenizer": str(tiny / "model"), "corpus": write_corpus(out / "corpus", texts)}
    shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
    run_stage("prepare", {**values, **shares}, out / "tokens")
    values = {"model": str(tiny / "model"), "tokens": out / "tokens", "block_size": 32}
    run_stage("datastore", {**values, "device": "cpu"}, out / "datastore")
    return out


@pytest.mark.parametrize("source", ["knn", "mixture"])
def test_targets_without_copies(source, repeated, tiny, tmp_path):
    tokens = {"tokens": repeated / "tokens", "device": "cpu"}
    values = {"datastore": repeated / "datastore", "model": str(tiny / "model"), "k": 12, **tokens}
    values |= {"source": source, "calibration_positions": 64}
    run_stage("targets", values, tmp_path / "with")
    run_stage("targets", {**values, "drop_same_context": 8}, tmp_path / "without")
    store = TargetStore.open(tmp_path / "without")
    assert store.drop_same_context == 8
    assert TargetStore.open(tmp_path / "with").drop_same_context == 0
    assert contents(tmp_path / "with") != contents(tmp_path / "without")
    if source == "knn":
        corpus = TokenCorpus.open(repeated / "tokens")
        datastore = Datastore.open(repeated / "datastore")
        own = np.arange(0, datastore.size, 9)
        keys = datastore.keys(0, datastore.size)[own]
        everything = datastore.search(keys, datastore.size, own)
        inputs = corpus.split("train").read(0, datastore.size)
        ids, distances = oracle(inputs, own, 8, *everything, 12)
        dropped = (np.array(ids) != datastore.search(keys, 12, own)[1]).any(axis=1)
        assert 10 < dropped.sum() < len(own) / 2
        weights = np.exp(-np.array(distances) / store.temperature)
        dense = np.zeros((len(own), corpus.vocab_size))
        np.add.at(
            dense, (np.arange(len(own))[:, None], datastore.next_tokens[np.array(ids)]), weights
        )
        dense /= dense.sum(axis=1, keepdims=True)
        found = store.gather(own).targets.to_dense(corpus.vocab_size).numpy()
        np.testing.assert_allclose(found, dense, atol=1e-4)
    given = {"targets": tmp_path / "without", "datastore": repeated / "datastore", "rows": 200}
    assert audit(AuditConfig(**given, max_dropped_mass=1.0, **tokens)) == 0


def test_the_temperature_is_chosen_without_copies_too(repeated, tiny, tmp_path):
    """The first validation positions are in a copy of what is in the train split."""
    values = {"datastore": repeated / "datastore", "tokens": repeated / "tokens", "k": 12}
    values |= {"model": str(tiny / "model"), "device": "cpu"}
    chosen = [
        run_stage("targets", {**values, "drop_same_context": n}, tmp_path / str(n)).manifest
        for n in (0, 2)
    ]
    assert chosen[0]["calibration"]["nll"] < chosen[1]["calibration"]["nll"]


def test_off_there_is_nothing(corpus):
    assert contexts_of(0, corpus) is None
    with pytest.raises(MemdecError, match="drop_same_context must be at least 0, got -1"):
        TargetsConfig(tokens="t", datastore="d", temperature=1.0, drop_same_context=-1)
    with pytest.raises(MemdecError, match="drop_same_context does not go with source teacher"):
        TargetsConfig(tokens="t", model="m", source="teacher", drop_same_context=4)
