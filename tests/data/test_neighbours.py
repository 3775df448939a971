"""Neighbours kept in narrow types: what any temperature and k make of them, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memdec.data.neighbours import Neighbours
from memdec.data.targets import TargetsConfig, TargetStore, targets
from memdec.errors import MemdecError
from memdec.ops import SparseTargets, knn_scatter

VOCAB = 320
# Of float16: 2^-11 of each exponent, of which those that matter are below 10 or so.
TOTAL_VARIATION = 1e-3


def total_variation(ours: SparseTargets, wanted: SparseTargets, vocab_size: int) -> float:
    difference = ours.to_dense(vocab_size).double() - wanted.to_dense(vocab_size).double()
    return float(difference.abs().sum(1).max() / 2)


def random_rows(rows: int, k: int, *, spread: float, offset: float = 0.0, seed: int = 0):
    """Squared distances as of 64-wide keys, nearest first, and tokens of which many are alike."""
    generator = np.random.default_rng(seed)
    distances = np.sort(generator.chisquare(64, (rows, k)) * spread / 11 + offset, axis=1)
    tokens = generator.zipf(1.5, (rows, k)).clip(max=VOCAB) - 1
    return torch.from_numpy(distances).float(), torch.from_numpy(tokens).int()


def assert_same_rows(ours: SparseTargets, wanted: SparseTargets) -> None:
    ours, wanted = ours.compact(), wanted.compact()
    for name in ("indptr", "token_ids", "probs"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name)), name


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 16.0])
def test_narrow_distances_of_any_size_make_nearly_the_same_targets(scale, temperature):
    """At temperatures of the spread, as they are searched; float16 alone overflows at 65504."""
    distances, tokens = random_rows(50, 256, spread=scale)
    kept = Neighbours.pack(distances, tokens, vocab_size=VOCAB, dtype="float16")
    assert kept.distances.isfinite().all()
    assert (kept.distances[:, 1:] >= kept.distances[:, :-1]).all()
    at = temperature * scale
    wanted = knn_scatter(distances, tokens, temperature=at)
    error = total_variation(kept.to_targets(at), wanted, VOCAB)
    assert error < TOTAL_VARIATION


def test_a_far_nearest_neighbour_costs_no_digits():
    """Only differences count: of 10,000.1 and 10,000.2 float16 would make one number."""
    distances = 10_000 + torch.tensor([[0.0, 0.125, 0.25, 0.5]])
    tokens = torch.tensor([[3, 1, 2, 0]], dtype=torch.int32)
    kept = Neighbours.pack(distances, tokens, vocab_size=VOCAB, dtype="float16")
    wanted = knn_scatter(distances, tokens, temperature=0.2)
    assert total_variation(kept.to_targets(0.2), wanted, VOCAB) < 1e-6


def test_float32_distances_make_the_same_targets():
    distances, tokens = random_rows(20, 64, spread=3.0, offset=100.0)
    kept = Neighbours.pack(distances, tokens, vocab_size=VOCAB, dtype="float32")
    for entries in (None, 5):
        assert_same_rows(
            kept.to_targets(0.7, entries),
            knn_scatter(distances, tokens, temperature=0.7, max_entries=entries),
        )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_lack_neighbours(dtype):
    inf, nan = torch.inf, torch.nan
    distances = torch.tensor([[2.0, 3.0, inf], [5.0, inf, inf], [inf, inf, inf], [0.0, 0.0, nan]])
    tokens = torch.tensor([[7, 8, -1], [9, -1, -1], [-1, -1, -1], [1, 2, 3]], dtype=torch.int32)
    kept = Neighbours.pack(distances, tokens, vocab_size=VOCAB, dtype=dtype)
    assert kept.distances.isinf().tolist() == distances.isinf().logical_or(tokens == 3).tolist()
    found = kept.to_targets(1.0)
    assert found.indptr.tolist() == [0, 2, 3, 3, 5]
    torch.testing.assert_close(
        found.to_dense(VOCAB), knn_scatter(distances, tokens).to_dense(VOCAB), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "none"),
    [(65_535, torch.uint16, 65_535), (65_536, torch.int32, -1), (151_936, torch.int32, -1)],
)
def test_tokens_are_as_narrow_as_the_vocabulary_allows(vocab_size, dtype, none):
    tokens = torch.tensor([[vocab_size - 1, 0, -1]], dtype=torch.int32)
    distances = torch.tensor([[1.0, 1.0, torch.inf]])
    kept = Neighbours.pack(distances, tokens, vocab_size=vocab_size, dtype="float16")
    assert kept.tokens.dtype == dtype
    assert kept.tokens.int().tolist() == [[vocab_size - 1, 0, none]]
    assert kept.to_targets(1.0).compact().token_ids.tolist() == [0, vocab_size - 1]


@pytest.fixture
def options(tiny, datastore_dir, small_shards):
    return {"datastore": datastore_dir, "tokens": tiny / "tokens", "k": 16, "device": "cpu"}


@pytest.fixture
def small_shards(monkeypatch):
    from data_tiny import set_small_shards

    set_small_shards(monkeypatch.setattr)


def make(options, out, **other) -> TargetStore:
    targets(TargetsConfig(**{**options, "temperature": 3.0, **other}), out)
    return TargetStore.open(out)


def everything(store: TargetStore) -> SparseTargets:
    return store.gather(np.arange(len(store))).targets


def test_the_stage_keeps_the_neighbours_of_the_targets(options, tmp_path):
    wanted = everything(make(options, tmp_path / "targets"))
    exact = make(options, tmp_path / "wide", keep="neighbours", distance_dtype="float32")
    assert_same_rows(everything(exact), wanted)
    narrow = make(options, tmp_path / "narrow", keep="neighbours")
    assert 0 < total_variation(everything(narrow), wanted, VOCAB) < TOTAL_VARIATION


@pytest.mark.parametrize(("k", "temperature", "max_entries"), [(16, 0.8, None), (5, 2.0, 3)])
def test_other_settings_are_those_of_a_fresh_run(options, tmp_path, k, temperature, max_entries):
    given = {"k": k, "temperature": temperature, "max_entries": max_entries}
    wanted = everything(make(options, tmp_path / "fresh", **given))
    for dtype in ("float32", "float16"):
        store = make(options, tmp_path / dtype, keep="neighbours", distance_dtype=dtype)
        kept = store.gather_neighbours(np.arange(len(store)), k).neighbours
        found = kept.to_targets(temperature, max_entries)
        if dtype == "float32":
            assert_same_rows(found, wanted)
        else:
            assert total_variation(found, wanted, VOCAB) < TOTAL_VARIATION


def test_what_lies_on_disk(options, corpus, tmp_path):
    store = make(options, tmp_path, keep="neighbours")
    shard = load_file(store.artefact.file("targets/targets-00001.safetensors"))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shard.items()} == {
        "distances": (torch.float16, (128, 16)),
        "tokens": (torch.uint16, (128, 16)),
        "units": (torch.float32, (128,)),
        "position": (torch.int64, (128,)),
        "label": (torch.int32, (128,)),
    }
    assert store.artefact.manifest["params"]["keep"] == "neighbours"
    assert store.keeps_neighbours
    assert (store.k, store.temperature) == (16, 3.0)
    positions = np.random.default_rng(0).permutation(len(store))
    rows = store.gather_neighbours(positions, 4)
    stream = corpus.split("train")
    assert rows.positions.tolist() == positions.tolist()
    assert rows.labels.tolist() == stream.read(1, len(stream))[positions].tolist()
    assert rows.neighbours.distances.shape == rows.neighbours.tokens.shape == (len(store), 4)
    assert len(store.gather_neighbours(positions[:0]).neighbours) == 0
    with pytest.raises(IndexError, match=r"positions must be in \[0"):
        store.gather_neighbours(np.array([len(store)]))


def test_targets_as_they_were_say_nothing_of_neighbours(options, tmp_path):
    """Artefacts made before there was a choice are the same request."""
    params = make(options, tmp_path).artefact.manifest["params"]
    assert set(params) == {"k", "temperature", "max_entries", "calibration_positions", "shard_rows"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_entries": 4}, "max_entries does not go with kept neighbours: give it to train"),
        ({"source": "teacher", "datastore": None}, "keep does not go with source teacher"),
        ({"keep": "targets", "distance_dtype": "float32"}, "goes with kept neighbours only"),
        ({"keep": "all"}, "keep must be one of 'targets', 'neighbours'"),
    ],
)
def test_options_that_do_not_go_together(options, wrong, message):
    given = {**options, "keep": "neighbours", "temperature": 1.0, "model": "m", **wrong}
    if given.get("source") == "teacher":
        del given["temperature"], given["k"]
    with pytest.raises(MemdecError, match=message):
        TargetsConfig(**given)
