"""Search: exact against a float64 oracle, FAISS against what FAISS may hand back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_tiny import needs_faiss

from memdec.data import exact as exact_module
from memdec.data.build_index import build_faiss, write_faiss
from memdec.data.exact import ExactIndex, smallest, unpack
from memdec.data.faiss_index import FaissIndex
from memdec.data.index import choose_index, make_index
from memdec.data.keys import StoredKeys
from memdec.errors import MemdecError
from memdec.processes import join_processes

WIDTH = 24


def oracle(
    queries: np.ndarray, keys: np.ndarray, k: int, exclude: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All distances in float64, sorted by (distance, id)."""
    difference = queries[:, None].astype(np.float64) - keys[None].astype(np.float64)
    distances = np.square(difference).sum(-1)
    ids = np.broadcast_to(np.arange(len(keys)), distances.shape).copy()
    if exclude is not None:
        ids[ids == exclude[:, None]] = -1
        distances[ids < 0] = np.inf
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def make_keys(count: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((count, WIDTH)) + offset).astype(np.float16)


@pytest.fixture(params=["cpu", "cpu, halves", "cuda", "cuda, float32"])
def device(request, monkeypatch):
    """Where to search, and with which product, if not the device's own."""
    device, _, product = request.param.partition(", ")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if product:
        monkeypatch.setattr(exact_module, "_multiplies_halves", lambda _: product == "halves")
    return device


def cut_blocks(monkeypatch, keys: int) -> None:
    monkeypatch.setattr(exact_module, "_KEYS_A_BLOCK", {"cpu": keys, "cuda": keys})


@pytest.fixture(params=["one chunk", "many chunks", "not resident"])
def memory(request, monkeypatch):
    """The ways the keys can be cut and kept."""
    if request.param != "one chunk":
        cut_blocks(monkeypatch, 70)
    if request.param == "not resident":
        monkeypatch.setattr(exact_module, "_RESIDENT_BYTES", 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("k", [1, 7, 299, 300])
def test_exact_search_finds_the_nearest(device, k):
    keys = make_keys(300)
    queries = make_keys(40, seed=1).astype(np.float32)
    distances, ids = ExactIndex([keys[:101], keys[101:]], device).search(queries, k, None)
    expected, _ = oracle(queries, keys, k)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    # Two keys whose distances differ by less than float32 holds may come in either order.
    every, order = oracle(queries, keys, len(keys))
    by_id = np.take_along_axis(every, order.argsort(1), 1)
    np.testing.assert_allclose(np.take_along_axis(by_id, ids, 1), expected, rtol=1e-6)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert distances.dtype == np.float32
    assert ids.dtype == np.int64


@pytest.mark.usefixtures("memory")
def test_equal_distances_come_by_id_at_the_cut_too(device):
    distinct = make_keys(30)
    which = np.random.default_rng(2).integers(0, len(distinct), 400)
    keys = distinct[which]
    queries = make_keys(50, seed=3).astype(np.float32)
    for k in (1, 5, 50, 399):
        _, ids = ExactIndex([keys], device).search(queries, k, None)
        np.testing.assert_array_equal(ids, oracle(queries, keys, k)[1])


def test_equal_keys_are_equally_far_in_the_last_columns_of_a_product_too(device, monkeypatch):
    """A matrix product may round the columns at its edge in another way than the others."""
    distinct = make_keys(300)
    keys = distinct[np.random.default_rng(0).integers(0, len(distinct), 3000)]
    queries = make_keys(200, seed=3).astype(np.float32)
    cut_blocks(monkeypatch, 333)
    _, ids = ExactIndex([keys], device).search(queries, 100, None)
    np.testing.assert_array_equal(ids, oracle(queries, keys, 100)[1])


def test_all_keys_equal(device):
    keys = np.repeat(make_keys(1), 200, axis=0)
    _, ids = ExactIndex([keys], device).search(keys[:3], 10, np.array([0, 5, 150]))
    assert ids.tolist() == [[*range(1, 11)], [0, 1, 2, 3, 4, 6, 7, 8, 9, 10], [*range(10)]]


@pytest.mark.usefixtures("memory")
def test_self_is_left_out_by_id_not_by_place(device):
    """A twin at distance 0 with a lower id stays; dropping the first column would drop it."""
    keys = make_keys(150)
    keys[120] = keys[3]
    own = np.array([120, 3, 7])
    _, ids = ExactIndex([keys], device).search(keys[own], 4, own)
    np.testing.assert_array_equal(ids, oracle(keys[own], keys, 4, own)[1])
    assert ids[0, 0] == 3
    assert ids[1, 0] == 120


def test_no_exclusion_is_minus_one(device):
    keys = make_keys(50)
    exclude = np.array([-1, 1])
    _, ids = ExactIndex([keys], device).search(keys[:2], 3, exclude)
    np.testing.assert_array_equal(ids, oracle(keys[:2], keys, 3, exclude)[1])


@pytest.mark.usefixtures("memory")
def test_too_few_keys_are_padded_at_the_end(device):
    keys = make_keys(3)
    distances, ids = ExactIndex([keys], device).search(keys[:2], 5, np.array([0, -1]))
    assert ids[0, 2:].tolist() == [-1, -1, -1]
    assert ids[1, 3:].tolist() == [-1, -1]
    assert np.isinf(distances[0, 2:]).all()
    assert np.isfinite(distances[0, :2]).all()
    assert sorted(ids[0, :2].tolist()) == [1, 2]


def test_a_large_common_offset_costs_no_digits(device):
    keys = make_keys(300, offset=100.0)
    queries = keys[:20].astype(np.float32) + 0.25
    distances, _ = ExactIndex([keys], device).search(queries, 50, None)
    np.testing.assert_allclose(distances, oracle(queries, keys, 50)[0], rtol=1e-4)


def test_no_query_gives_no_row(device):
    distances, ids = ExactIndex([make_keys(9)], device).search(np.empty((0, WIDTH)), 4, None)
    assert distances.shape == ids.shape == (0, 4)


def test_queries_beyond_a_batch(device, monkeypatch):
    keys = make_keys(90)
    own = np.arange(90)
    whole = ExactIndex([keys], device).search(keys, 5, own)
    monkeypatch.setattr(exact_module, "_QUERIES_A_BATCH", 32)
    np.testing.assert_array_equal(ExactIndex([keys], device).search(keys, 5, own)[1], whole[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("k", [1, 100, 512, 2048, 4096, 4097])
@pytest.mark.parametrize("order", ["random", "nearest last", "nearest first", "all equal"])
def test_the_kernel_keeps_what_plain_pytorch_keeps(order, k, monkeypatch):
    """Also where every key is nearer than all before it, and where few or many are equally far."""
    keys = np.random.default_rng(0).integers(-3, 4, (20_000, 8)).astype(np.float16)
    rank = np.square(keys.astype(np.float32)).sum(1).argsort(kind="stable")
    keys = {
        "random": keys,
        "nearest last": keys[rank[::-1]],
        "nearest first": keys[rank],
        "all equal": np.repeat(keys[:1], 3000, axis=0),
    }[order].copy()
    queries = np.concatenate([np.zeros((1, 8), np.float16), keys[:40]])
    own = np.arange(-1, 40)
    cut_blocks(monkeypatch, 7000)
    found = ExactIndex([keys], "cuda").search(queries, k, own)
    monkeypatch.setattr(exact_module, "kernels_for", lambda device: None)
    for one, other in zip(found, ExactIndex([keys], "cuda").search(queries, k, own), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("devices", [2, 3, 9])
def test_keys_spread_over_devices_give_the_same_bits(devices, halves, monkeypatch):
    """Twins and the excluded key lie on different devices; of nine the last have no key."""
    cut_blocks(monkeypatch, 70)
    keys = make_keys(400)
    keys[200:] = keys[np.random.default_rng(0).integers(0, 200, 200)]
    own = np.arange(3, 400, 7)
    for k in (1, 90, 399):
        expected = ExactIndex([keys], "cpu", halves).search(keys[own], k, own)
        index = ExactIndex([keys], ["cpu"] * devices, halves)
        assert [len(blocks) for _, blocks in index._parts()][:2] == [-(-6 // devices)] * 2
        for found, wanted in zip(index.search(keys[own], k, own), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("free", "spread"),
    [([10_000, 10_000, 10_000], 1), ([3_000, 5_000, 4_500], 3), ([3_000, 5_000, 100], 0)],
)
def test_keys_too_large_for_one_gpu_are_spread_over_all(free, spread, monkeypatch, capsys):
    """With memories made up: of 40 keys' 3,840 bytes half must be free, on each the same share."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (free[torch.device(device).index or 0], 0)
    )
    monkeypatch.setattr(exact_module, "_KEYS_OF_THE_CENTRE", 0)
    monkeypatch.setattr(ExactIndex, "_blocks", lambda self, device, number, count: iter([device]))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    index = ExactIndex([make_keys(40)], "cuda", halves=False)
    parts = list(index._parts())
    assert len(parts) == max(spread, 1)
    assert (index._resident is None) == (spread == 0)
    assert ("spread over 3 GPUs" in capsys.readouterr().err) == (spread == 3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_find_what_one_finds():
    keys = make_keys(5000)
    own = np.arange(0, 5000, 3)
    one = ExactIndex([keys], "cuda:0").search(keys[own], 200, own)
    two = ExactIndex([keys], ["cuda:0", "cuda:1"]).search(keys[own], 200, own)
    for found, wanted in zip(two, one, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("k", [1, 3, 20, 500, 4095, 4096, 5000])
@pytest.mark.parametrize("distinct", [4096, 40, 1])
def test_the_smallest_of_a_row_are_those_of_a_stable_sort(k, distinct):
    """Groups of any width, ties in and across them, negative rounding and infinite columns."""
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(distinct, (20, 4096), generator=generator).float() - 0.25
    values[:, 4000:] = torch.inf
    found, columns = unpack(smallest(values, k))
    expected = torch.sort(values.clamp(min=0), stable=True)
    assert torch.equal(found, expected.values[:, :k])
    assert torch.equal(columns, expected.indices[:, :k])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_keys_may_be_narrow(device, width):
    keys, queries = make_keys(90)[:, :width], make_keys(9, seed=1)[:, :width]
    distances, _ = ExactIndex([keys], device).search(queries, 90, None)
    gaps = queries.astype(np.float64)[:, None] - keys
    expected = np.sort((gaps**2).sum(axis=2), axis=1)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-5)


def test_halves_keep_the_digits_of_float32():
    """With keys of very different lengths, and columns far larger than the others."""
    keys = make_keys(600).astype(np.float32)
    keys[:, 3] *= 50.0
    keys[:, 7] += 40.0
    keys[200:400] *= 2.0**-10
    keys = keys.astype(np.float16)
    queries = keys[::7].astype(np.float32) * 1.01
    truth = oracle(queries, keys, 600)[0]
    errors = [
        np.abs(ExactIndex([keys], "cpu", halves).search(queries, 600, None)[0] - truth).max()
        for halves in (True, False)
    ]
    assert errors[0] <= 4 * errors[1]
    assert errors[0] <= 1e-6 * truth.max()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30])
def test_queries_that_cannot_be_of_this_layer_are_refused(device, wrong):
    keys = make_keys(70)
    queries = keys[:4].astype(np.float32)
    queries[2, 5] = wrong
    with pytest.raises(MemdecError, match="a query is not a number, or too far"):
        ExactIndex([keys], device).search(queries, 5, None)


def test_a_query_far_from_equal_keys_is_answered(device):
    keys = np.full((70, WIDTH), 3.0, np.float16)
    queries = np.full((1, WIDTH), -3.5, np.float32)
    distances, ids = ExactIndex([keys], device).search(queries, 5, None)
    assert ids.tolist() == [[0, 1, 2, 3, 4]]
    np.testing.assert_allclose(distances, WIDTH * 6.5**2, rtol=1e-5)


# FAISS


def built(spec: str, keys: list[np.ndarray], seed: int = 0):
    return build_faiss(join_processes("cpu"), Path("unused"), spec, StoredKeys(keys), seed)


def saved(spec: str, keys: list[np.ndarray], path: Path, seed: int = 0) -> Path:
    with open(path, "wb") as file:
        write_faiss(built(spec, keys, seed), file)
    return path


@needs_faiss
@pytest.mark.parametrize("spec", ["IVF8,Flat", "IVF8,SQfp16", "OPQ4,IVF8,Flat", "HNSW16"])
def test_faiss_indexes_find_what_exact_search_finds(tmp_path, spec):
    keys = make_keys(400)
    own = np.arange(0, 400, 7)
    path = saved(spec, [keys[:150], keys[150:]], tmp_path / "index")
    _, ids = FaissIndex(path, nprobe=8).search(keys[own], 5, own)
    expected = oracle(keys[own], keys, 5, own)[1]
    assert (ids == expected).mean() > (0.95 if spec == "HNSW16" else 0.99)


@needs_faiss
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_faiss_is_asked_for_no_query_that_is_none(tmp_path, wrong):
    """FAISS would find it no neighbour, and a target without any teaches nothing."""
    keys = make_keys(400)
    index = FaissIndex(saved("IVF4,Flat", [keys], tmp_path / "index"), nprobe=4)
    queries = keys[:3].copy()
    queries[1, 5] = wrong
    with pytest.raises(MemdecError, match="a query is not a number"):
        index.search(queries, 4, None)


@needs_faiss
def test_nprobe_reaches_an_index_behind_a_transform(tmp_path):
    keys = make_keys(400)
    path = saved("OPQ4,IVF8,Flat", [keys], tmp_path / "index")
    few = FaissIndex(path, nprobe=1).search(keys, 200, None)[1]
    all_lists = FaissIndex(path, nprobe=8).search(keys, 200, None)[1]
    assert (few < 0).any()
    assert (all_lists >= 0).all()


@needs_faiss
def test_lists_with_too_few_keys_give_minus_one_at_the_end(tmp_path):
    keys = make_keys(100)
    own = np.arange(100)
    path = saved("IVF16,Flat", [keys], tmp_path / "index")
    distances, ids = FaissIndex(path, nprobe=1).search(keys, 60, own)
    missing = ids < 0
    assert missing.any()
    assert np.isinf(distances[missing]).all()
    assert np.isfinite(distances[~missing]).all()
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    assert not (ids == own[:, None]).any()


@needs_faiss
def test_unsorted_answers_with_gaps_and_self_anywhere_are_put_right(tmp_path, monkeypatch):
    import faiss

    class Answers:
        def search(self, queries, k, D, I):  # noqa: E741
            assert k == 5
            D[:] = [[3.0, 0.5, 0.5, -1e-7, 9.0], [1.0, 7.0, 2.0, 3.0, 4.0]]
            I[:] = [[4, 9, 2, 7, -1], [-1, 6, 5, -1, 8]]

    monkeypatch.setattr(faiss, "read_index", lambda *_: Answers())
    monkeypatch.setattr(faiss, "try_extract_index_ivf", lambda _: None)
    queries = np.zeros((2, WIDTH), np.float32)
    distances, ids = FaissIndex(tmp_path, 1).search(queries, 4, np.array([4, 0]))
    assert ids.tolist() == [[7, 2, 9, -1], [5, 8, 6, -1]]
    assert distances.tolist() == [[0.0, 0.5, 0.5, np.inf], [2.0, 4.0, 7.0, np.inf]]


@needs_faiss
def test_the_same_seed_builds_the_same_bytes(tmp_path):
    keys = make_keys(20_000)
    first = saved("IVF8,Flat", [keys], tmp_path / "a").read_bytes()
    assert saved("IVF8,Flat", [keys], tmp_path / "b").read_bytes() == first
    assert saved("IVF8,Flat", [keys], tmp_path / "c", seed=1).read_bytes() != first


@needs_faiss
def test_auto_is_exact_up_to_a_million_keys():
    assert choose_index("auto", 1 << 20, 64) == "Flat"
    assert choose_index("auto", (1 << 20) + 1, 64) == "IVF4096,SQfp16"
    assert choose_index("Flat", 1 << 40, 64) == "Flat"


@needs_faiss
def test_an_unknown_index_is_named():
    with pytest.raises(MemdecError, match="FAISS makes no index of width 24 from 'Tree9'"):
        choose_index("Tree9", 1000, WIDTH)


@needs_faiss
def test_too_few_keys_to_train_on():
    with pytest.raises(MemdecError, match="IVF64,Flat has 64 lists, expected 1 to 20"):
        choose_index("IVF64,Flat", 20, WIDTH)
    with pytest.raises(MemdecError, match=r"FAISS cannot train PQ4x8 on 100 keys: .*\(100\)"):
        built("PQ4x8", [make_keys(100)])


@needs_faiss
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("IDMap,Flat", "IDMap,Flat maps ids"),
        ("IDMap2,HNSW8", "IDMap2,HNSW8 maps ids"),
        ("IVF0,Flat", "IVF0,Flat has 0 lists, expected 1 to 1000"),
    ],
)
def test_an_index_that_could_not_be_filled_or_searched(spec, message):
    with pytest.raises(MemdecError, match=message):
        choose_index(spec, 1000, WIDTH)


@needs_faiss
@pytest.mark.parametrize("spec", ["IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4", "PQ4x4"])
def test_codes_are_not_sorted_for_a_filter_that_nobody_asks(spec):
    """FAISS's own factory would, which takes longer than all of the training; answers are the same."""
    import faiss

    keys = make_keys(2000).astype(np.float32)
    quick, slow = make_index(spec, WIDTH), faiss.index_factory(WIDTH, spec)
    for index in (quick, slow):
        index.train(keys)
        index.add(keys)
    for index in (quick, slow):
        if (lists := faiss.try_extract_index_ivf(index)) is not None:
            lists.nprobe = 8
    found, expected = (index.search(keys[:50], 5)[0] for index in (quick, slow))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    inner = faiss.downcast_index(quick.index) if "OPQ" in spec else quick
    assert not inner.do_polysemous_training


@needs_faiss
def test_a_damaged_index_is_named(tmp_path):
    path = saved("IVF8,Flat", [make_keys(100)], tmp_path / "index.faiss")
    path.write_bytes(bytes(4) + path.read_bytes()[4:])
    with pytest.raises(MemdecError, match=r"FAISS cannot read .*index\.faiss: "):
        FaissIndex(path, 1)


def test_faiss_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert choose_index("auto", 1000, WIDTH) == "Flat"
    with pytest.raises(MemdecError, match="pip install faiss-cpu"):
        choose_index("IVF8,Flat", 1000, WIDTH)
