"""What a search in FAISS's indexes will need, and whether a GPU will do it."""

from __future__ import annotations

import dataclasses
import re

import pytest

from memdec.data import faiss_gpu
from memdec.plan.index_needs import IndexNeed, IndexNeeds
from memdec.plan.machine import Machine

pytest.importorskip("faiss")

GB = 10**9
RATES = {"float32": 5e13, "bfloat16": 6e14, "host": 1e12}
NO_FAISS_GPU = Machine("cuda", 10**13, 10**12, 80 * GB, RATES)
GPU = dataclasses.replace(NO_FAISS_GPU, faiss_gpus=(0,))
TWO = dataclasses.replace(NO_FAISS_GPU, faiss_gpus=(0, 1))
CPU = Machine("cpu", 10**13, 10**12, 0, RATES)

SIZE, WIDTH, QUERIES = 10_000_000, 576, 1000
AUTO = "IVF16384,SQfp16"


@pytest.fixture(autouse=True)
def _takes_all(monkeypatch):
    monkeypatch.setattr(faiss_gpu, "takes", lambda *_: True)


def search(machine: Machine, spec: str = AUTO, k: int = 512, beside: int = 0) -> IndexNeed:
    return IndexNeeds(spec, SIZE, WIDTH, machine).to_search(QUERIES, k, 64, beside)


def build(machine: Machine, spec: str = AUTO, beside: int = 0) -> IndexNeed:
    return IndexNeeds(spec, SIZE, WIDTH, machine).to_build(beside)


def test_a_copy_on_the_gpu():
    need = search(GPU)
    codes = SIZE * (2 * WIDTH + 8)
    assert codes < need.device < 1.2 * codes
    assert need.note == "FAISS searches a copy on the GPU"
    assert need.seconds < search(NO_FAISS_GPU).seconds / 5
    assert need.host == search(CPU).host  # the file stays mapped


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_a_key_in_a_list_takes_longer_than_a_centroid(machine):
    """All centroids are one matrix product; the lists of a query are read for it alone."""
    one, two, three = (
        IndexNeeds(AUTO, SIZE, WIDTH, machine).to_search(QUERIES, 512, nprobe, 0).seconds
        for nprobe in (1, 2, 3)
    )
    a_list = two - one
    assert three - two == pytest.approx(a_list)
    assert a_list / (SIZE / 16384) > 3 * (one - a_list) / 16384


def test_gpus_share_the_keys():
    one, two = search(GPU), search(TWO)
    workspace = 1.5 * 2**30
    assert two.device - workspace == pytest.approx((one.device - workspace) / 2, rel=0.05)
    assert two.seconds == one.seconds / 2
    assert two.note == "FAISS searches a copy on 2 GPUs"


def test_a_smaller_index_has_a_smaller_copy():
    assert search(GPU, "OPQ64,IVF16384,PQ64").device < search(GPU).device / 4


@pytest.mark.parametrize(
    ("machine", "k", "beside", "note"),
    [
        (NO_FAISS_GPU, 512, 0, "the one installed has no GPU"),
        (GPU, 2048, 0, "2049 neighbours with the query's own, a GPU finds 2048"),
        (GPU, 512, 70 * GB, r"a copy needs 13\.\d GB of GPU memory, 10\.0 GB are left"),
        (GPU, 512, 90 * GB, r"a copy needs 13\.\d GB of GPU memory, 0 kB are left"),
    ],
)
def test_where_the_cpu_searches_and_why(machine, k, beside, note):
    need = search(machine, k=k, beside=beside)
    assert need.device == 0
    assert need.seconds == search(NO_FAISS_GPU).seconds
    assert re.fullmatch(f"FAISS searches on the CPU: {note}", need.note)


def test_what_fits_just_so():
    device = search(GPU).device
    assert search(GPU, beside=80 * GB - device).device == device
    assert search(GPU, beside=80 * GB - device + 1).device == 0


def test_an_index_that_no_gpu_takes(monkeypatch):
    monkeypatch.setattr(faiss_gpu, "takes", lambda *_: False)
    need = search(GPU, "IVF16384,PQ72")
    assert need.note == "FAISS searches on the CPU: no GPU takes such an index"
    assert need.device == 0


def test_without_a_gpu_there_is_nothing_to_say():
    assert search(CPU).note == ""
    assert search(CPU).device == 0


def test_making_an_index():
    """Clustering and the choice of lists are the GPU's; codes, lists and the file the host's."""
    on_gpu, on_cpu = build(GPU), build(NO_FAISS_GPU)
    faster = dataclasses.replace(GPU, rates={**RATES, "float32": 1e30})
    host_alone = build(faster).seconds
    assert host_alone < on_gpu.seconds < on_cpu.seconds / 2
    smaller = build(faster, "IVF16384,PQ64").seconds
    codes = SIZE * (2 * WIDTH - 64)
    assert codes / 1e9 < host_alone - smaller < codes / 1e8  # what a disk writes in a second
    assert on_gpu.host == on_cpu.host > SIZE * 2 * WIDTH
    assert 0 < on_gpu.device < 2 * GB
    assert on_cpu.device == build(GPU, beside=79 * GB).device == 0
    assert build(GPU, "HNSW32").device == 0
    assert build(GPU, "Flat") == IndexNeed(0.0)
    twice = IndexNeeds(AUTO, 2 * SIZE, WIDTH, CPU).to_build(0).seconds
    assert build(CPU).seconds < twice < 2 * build(CPU).seconds  # the sample is as large


@pytest.mark.parametrize("spec", ["SQfp16", "HNSW32"])
def test_an_index_without_lists_takes_no_longer_than_products_with_all_keys(spec):
    assert search(CPU, spec).seconds == search(CPU, "SQ8").seconds
    assert search(CPU, spec).seconds < search(CPU, "IVF1,SQfp16").seconds
