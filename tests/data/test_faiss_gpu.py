"""FAISS on GPUs: what is asked of one, what the CPU does instead; with a real one the same answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memdec import console
from memdec.data.build_index import build_faiss, write_faiss
from memdec.data.exact import ExactIndex
from memdec.data.faiss_gpu import gpus_of, takes, train_with, visible_gpus
from memdec.data.faiss_index import FaissIndex
from memdec.data.index import make_index
from memdec.data.keys import StoredKeys
from memdec.processes import join_processes

faiss = pytest.importorskip("faiss")

WIDTH = 24

needs_gpu = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0,
    reason="needs a FAISS with a GPU",
)


def make_keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float16)


def build(spec: str, keys: np.ndarray, device: str) -> bytes:
    index = build_faiss(join_processes("cpu"), Path("unused"), spec, StoredKeys([keys]), 0, device)
    return faiss.serialize_index(index).tobytes()


def saved(spec: str, keys: np.ndarray, path: Path, device: str = "cpu") -> Path:
    with open(path, "wb") as file:
        write_faiss(
            faiss.deserialize_index(np.frombuffer(build(spec, keys, device), np.uint8)), file
        )
    return path


class Gpus:
    """Stands in for FAISS's GPUs: copies stay on the CPU, and are counted; some calls fail."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.copied: list[tuple[object, str]] = []
        self.cuvs: list[bool] = []
        self.searched = 0
        self.full: set[str] = set()

    def copy(self, resources, gpu, index, options=None):
        self.copied.append((gpu, type(index).__name__))
        if "copy" in self.full:
            raise RuntimeError("Error in f at g.cu:1: out of memory")
        clone = faiss.clone_index(index)
        if options is not None:
            self.cuvs.append(options.use_cuvs)
        if options is None:  # of centroids, which FAISS itself has to be able to call
            if "search" in self.full:
                return SimpleNamespace(search=self.fail)
            return clone

        def search(queries, k, **arrays):
            if "search" in self.full:
                self.fail()
            self.searched += 1
            return clone.search(queries, k, **arrays)

        return SimpleNamespace(search=search)

    def fail(self, *_, **__):
        raise RuntimeError("Error in f at g.cu:1: out of memory")


@pytest.fixture
def gpus(monkeypatch):
    def install(count: int) -> Gpus:
        made = Gpus(count)
        for name, value in {
            "StandardGpuResources": object,
            "GpuClonerOptions": partial(SimpleNamespace, use_cuvs=True),
            "GpuMultipleClonerOptions": partial(SimpleNamespace, use_cuvs=True),
            "get_num_gpus": lambda: count,
            "index_cpu_to_gpu": made.copy,
            "index_cpu_to_gpus_list": lambda index, options, gpus: made.copy(
                None, tuple(gpus) if options.shard else None, index, options
            ),
        }.items():
            monkeypatch.setattr(faiss, name, value, raising=False)
        # Answers are put in order on the device, which torch does not have here.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        to = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda x, place, **how: to(x, "cpu", **how))
        return made

    console.say_once.cache_clear()
    return install


def test_the_gpus_of_a_device(gpus, capsys):
    gpus(3)
    found = [visible_gpus(device) for device in ("cpu", "cuda", "cuda:0", "cuda:2", "cuda:3")]
    assert found == [[], [0, 1, 2], [0], [2], []]
    gpus(0)
    assert gpus_of("cuda") == []
    assert capsys.readouterr().err == ""
    assert visible_gpus("cuda") == visible_gpus("cuda") == []
    assert capsys.readouterr().err.count("FAISS works on the CPU") == 1


@pytest.mark.parametrize(("device", "gpu"), [("cpu", None), ("cuda:1", 1), ("cuda", (0, 1))])
def test_a_copy_searches(device, gpu, gpus, tmp_path):
    """On the device's own GPU, or with the keys dealt out over all of them."""
    keys, own = make_keys(500), np.arange(0, 500, 7)
    path = saved("IVF8,Flat", keys, tmp_path / "index")
    expected = FaissIndex(path, 4).search(keys[own], 6, own)
    made = gpus(2)
    index = FaissIndex(path, 4, device)
    assert made.copied == ([] if gpu is None else [(gpu, "IndexIVFFlat")])
    for found, wanted in zip(index.search(keys[own], 6, own), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert made.searched == (0 if gpu is None else 1)


@pytest.mark.parametrize(
    ("spec", "cuvs"), [("IVF8,Flat", True), ("IVF8,PQ8", True), ("PCA16,IVF8,SQfp16", False)]
)
@pytest.mark.parametrize("count", [1, 2])
def test_what_cuvs_does_not_know_faiss_itself_does(spec, cuvs, count, gpus):
    made = gpus(count)
    assert takes(spec, WIDTH, list(range(count)))
    assert made.cuvs == [cuvs]


def test_an_index_that_no_gpu_takes(gpus, capsys):
    gpus(1).full.add("copy")
    assert not takes("IVF8,Flat", WIDTH, [0])
    assert "FAISS searches on the CPU, not on a GPU" in capsys.readouterr().err


def test_more_neighbours_than_a_gpu_finds_come_from_the_cpu(gpus, tmp_path, capsys):
    keys, own = make_keys(3000), np.arange(2)
    path = saved("IVF8,Flat", keys, tmp_path / "index")
    made = gpus(1)
    index = FaissIndex(path, 8, "cuda")
    index.search(keys[own], 2048, None)
    index.search(keys[own], 2047, own)
    assert made.searched == 2
    for _ in range(2):
        assert (index.search(keys[own], 2048, own)[1] >= 0).all()
    assert made.searched == 2
    assert capsys.readouterr().err.count("2049 neighbours (with the query's own) are asked") == 1
    index.search(keys[own], 5, own)
    assert made.searched == 3


@pytest.mark.parametrize("full", ["copy", "search"])
def test_without_memory_the_cpu_searches(full, gpus, tmp_path, capsys):
    keys, own = make_keys(500), np.arange(4)
    path = saved("IVF8,Flat", keys, tmp_path / "index")
    expected = FaissIndex(path, 8).search(keys[own], 6, own)[1]
    made = gpus(1)
    made.full.add(full)
    index = FaissIndex(path, 8, "cuda")
    for _ in range(2):
        np.testing.assert_array_equal(index.search(keys[own], 6, own)[1], expected)
    said = capsys.readouterr().err
    assert said.count("FAISS searches on the CPU") == 1
    assert said.endswith("out of memory\n")


@pytest.mark.parametrize("spec", ["IVF8,Flat", "IVF8,SQfp16", "PCA16,IVF8,PQ4x4"])
@pytest.mark.parametrize("full", [None, "copy"])
def test_an_index_built_with_a_gpu_is_the_same(spec, full, gpus, capsys):
    """The stand-in rounds as the CPU does, so the bytes tell that nothing was left out."""
    keys = make_keys(2000)
    expected = build(spec, keys, "cpu")
    made = gpus(2)
    made.full |= {full} - {None}
    assert build(spec, keys, "cuda:1") == expected
    assert [gpu for gpu, _ in made.copied] == [1, 1]  # for the clustering, and for adding
    assert capsys.readouterr().err.count("not on a GPU: out of memory") == (2 if full else 0)


def test_what_helped_with_clustering_is_freed(monkeypatch):
    """FAISS takes what it is given to cluster with from Python, and never frees it."""
    helpers = []

    def copy(index, gpu):
        helpers.append(index)
        return index

    monkeypatch.setattr("memdec.data.faiss_gpu._on_gpu", copy)
    index = make_index("IVF8,SQfp16", WIDTH)
    train_with([0], index, index, make_keys(400).astype(np.float32))
    assert index.is_trained
    assert index.clustering_index is None
    assert [helper.thisown for helper in helpers] == [True]


def test_adding_goes_on_where_the_gpu_gave_up(gpus, monkeypatch, capsys):
    keys = make_keys(2000)
    monkeypatch.setattr("memdec.data.build_index._KEYS_A_CHUNK", 300)
    expected = build("IVF8,Flat", keys, "cpu")
    made = gpus(1)
    calls = []

    def copy(resources, gpu, index, options=None):
        clone = faiss.clone_index(index)
        if index.ntotal == 0:  # for the clustering
            return clone

        def search(queries, k):
            calls.append(len(queries))
            return clone.search(queries, k) if len(calls) < 3 else made.fail()

        return SimpleNamespace(search=search)

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy)
    assert build("IVF8,Flat", keys, "cuda") == expected
    assert calls == [300, 300, 300]
    assert "FAISS adds keys on the CPU" in capsys.readouterr().err


@needs_gpu
@pytest.mark.parametrize("spec", ["IVF16,Flat", "IVF16,SQfp16", "IVF16,PQ8", "OPQ8_16,IVF16,PQ8"])
@pytest.mark.parametrize("k", [10, 1500])
def test_a_gpu_answers_as_the_cpu_does(spec, k, tmp_path, capsys):
    console.say_once.cache_clear()
    keys, own = make_keys(20_000), np.arange(0, 20_000, 211)
    path = saved(spec, keys, tmp_path / "index")
    on_gpu = FaissIndex(path, 16, "cuda:0")
    assert on_gpu._on_gpus is not None, capsys.readouterr().err
    distances, ids = on_gpu.search(keys[own], k, own)
    assert on_gpu._on_gpus is not None, capsys.readouterr().err
    expected, expected_ids = FaissIndex(path, 16).search(keys[own], k, own)
    same = [len(np.intersect1d(*rows)) / k for rows in zip(ids, expected_ids, strict=True)]
    assert np.mean(same) > (0.95 if "PQ" in spec else 0.999)
    tolerance = 2e-2 if "PQ" in spec else 1e-3  # short tables on the GPU
    np.testing.assert_allclose(distances, expected, rtol=tolerance, atol=tolerance)
    assert (np.diff(distances, axis=1) >= 0).all()
    assert not (ids == own[:, None]).any()


@needs_gpu
def test_lists_that_run_dry_on_a_gpu_give_minus_one(tmp_path):
    keys, own = make_keys(300), np.arange(300)
    path = saved("IVF16,Flat", keys, tmp_path / "index")
    distances, ids = FaissIndex(path, 1, "cuda:0").search(keys, 100, own)
    assert (ids < 0).any()
    assert np.isinf(distances[ids < 0]).all()
    assert np.isfinite(distances[ids >= 0]).all()


@needs_gpu
@pytest.mark.parametrize("spec", ["IVF64,Flat", "OPQ8_16,IVF64,PQ8"])
def test_an_index_built_with_a_real_gpu_finds_as_much(spec, tmp_path, capsys):
    console.say_once.cache_clear()
    keys, own = make_keys(50_000), np.arange(0, 50_000, 501)
    truth = ExactIndex([keys], "cpu").search(keys[own], 20, own)[1]
    recalls = []
    for device in ("cpu", "cuda:0"):
        index = FaissIndex(saved(spec, keys, tmp_path / device[:4], device), 16)
        found = index.search(keys[own], 20, own)[1]
        recalls.append(
            np.mean([len(np.intersect1d(*pair)) for pair in zip(found, truth, strict=True)])
        )
    assert "not on a GPU" not in capsys.readouterr().err
    assert recalls[1] > 0.97 * recalls[0] > 1
