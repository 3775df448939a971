"""What an index costs and what it is worth: exact, IVF-flat and IVF-PQ over the same keys.

    python benchmarks/indexes.py --datastore out/datastore --tokens out/prepare --model out/adapt/model
    python benchmarks/indexes.py ... --indexes Flat IVF4096,Flat OPQ64,IVF4096,PQ64 --nprobe 16 64

Each index is built from the keys of a datastore that keeps them, in a temporary folder, and searched
for the same held-out positions of the corpus: its size, the seconds it took to build, queries a
second, the share of the exact k neighbours that it finds, and the perplexity of the kNN-LM that its
answers make. Temperature and lmbda are the best on validation, for each index; the perplexity is on
test.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_info
from table import indexes_table

from memdec.data.build_index import build_faiss, write_faiss
from memdec.data.calibration import choose, teacher_forced
from memdec.data.corpus import TokenCorpus
from memdec.data.datastore import Datastore
from memdec.data.exact import ExactIndex
from memdec.data.faiss_index import FaissIndex
from memdec.data.index import EXACT, choose_index, load_faiss
from memdec.data.keys import StoredKeys
from memdec.errors import MemdecError
from memdec.evaluation.knn_lm import knn_label_log_probs
from memdec.evaluation.mixture import mix_log_probs
from memdec.processes import join_processes

WARM_UP = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--datastore", type=Path, required=True, help="one that keeps its keys")
    parser.add_argument("--tokens", type=Path, required=True, help="directory of memdec prepare")
    parser.add_argument("--model", required=True, help="the teacher that made the datastore")
    parser.add_argument(
        "--indexes", nargs="+", help="FAISS factory strings; by default Flat, IVF-flat and IVF-PQ"
    )
    parser.add_argument("--nprobe", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--validation", type=int, default=4096, help="positions to choose on")
    parser.add_argument("--test", type=int, default=16_384, help="positions to report on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    try:
        result = measure(options)
    except MemdecError as error:
        parser.exit(1, f"error: {error}\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(indexes_table(result))


def default_indexes(size: int, width: int) -> list[str]:
    """Exact, and as many lists as ``auto`` takes with whole keys and with a byte for 8 numbers."""
    lists = 1 << round(math.log2(4 * size**0.5))
    codes = max(width // 8, 1)
    return [EXACT, f"IVF{lists},Flat", f"IVF{lists},PQ{codes}", f"OPQ{codes},IVF{lists},PQ{codes}"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    store = Datastore.open(options.datastore, options.device)
    if not store.keeps_keys:
        raise MemdecError(f"{options.datastore} keeps no keys, which every index is built of")
    corpus = TokenCorpus.open(options.tokens)
    held_out = {
        split: teacher_forced(options.model, store, corpus, split, positions)
        for split, positions in (("validation", options.validation), ("test", options.test))
    }
    shards = [
        np.load(store.artefact.file(name), mmap_mode="c")
        for name in store.artefact.manifest["files"]
        if name.startswith("keys/")
    ]
    exact = ExactIndex(shards, options.device)
    truth = exact.search(held_out["test"][0], options.k, None)[1]
    rows = []
    for spec in options.indexes or default_indexes(store.size, store.width):
        choose_index(spec, store.size, store.width)
        with tempfile.TemporaryDirectory() as work:
            for row in of_index(options, spec, store, shards, held_out, truth, Path(work)):
                rows.append(row)
                print(json.dumps(row), flush=True)
    log_probs = held_out["test"][1]
    return {
        "machine_info": machine_info(options.device),
        "setting": (
            f"{store.size:,} keys of width {store.width}, k = {options.k}, settings chosen on "
            f"{len(held_out['validation'][1]):,} positions of validation, "
            f"{len(log_probs):,} positions of test"
        ),
        "keys": store.size,
        "k": options.k,
        "teacher_perplexity": math.exp(-log_probs.mean(dtype=np.float64)),
        "indexes": rows,
    }


def of_index(
    options: argparse.Namespace,
    spec: str,
    store: Datastore,
    shards: list[np.ndarray],
    held_out: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    truth: np.ndarray,
    work: Path,
) -> Iterator[dict[str, Any]]:
    """A row for each nprobe, or one where the index has no lists to choose from."""
    begin = time.perf_counter()
    indexes: list[tuple[int | None, ExactIndex | FaissIndex]]
    if spec == EXACT:
        indexes = [(None, ExactIndex(shards, options.device))]
        size = sum(shard.nbytes for shard in shards)
        seconds = time.perf_counter() - begin
    else:
        processes, keys = join_processes(options.device), StoredKeys(shards)
        built = build_faiss(processes, work, spec, keys, options.seed, options.device)
        seconds = time.perf_counter() - begin
        path = work / "index.faiss"
        with open(path, "wb") as file:
            write_faiss(built, file)
        size = path.stat().st_size
        has_lists = load_faiss().try_extract_index_ivf(built) is not None
        del built
        probes = options.nprobe if has_lists else [1]
        indexes = [
            (nprobe if has_lists else None, FaissIndex(path, nprobe, options.device))
            for nprobe in probes
        ]
    for nprobe, index in indexes:
        answers = {}
        for split, (queries, _, _) in held_out.items():
            index.search(queries[:WARM_UP], options.k, None)
            begin = time.perf_counter()
            answers[split] = index.search(queries, options.k, None)
            rate = len(queries) / (time.perf_counter() - begin)  # of the last split, test
        chosen, perplexity = knn_lm(store, held_out, answers)
        ids = answers["test"][1]
        hits = [len(np.intersect1d(a, b)) for a, b in zip(ids, truth, strict=True)]
        yield {
            "index": spec,
            "nprobe": nprobe,
            "bytes": size,
            "build_seconds": seconds,
            "queries_per_second": rate,
            "recall": float(np.mean(hits) / options.k),
            "temperature": chosen["temperature"],
            "lmbda": chosen["lmbda"],
            "perplexity": perplexity,
        }


def knn_lm(
    store: Datastore,
    held_out: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    answers: dict[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[dict[str, Any], float]:
    """What is best on validation, and the kNN-LM's perplexity on test with it."""
    _, log_probs, labels = held_out["validation"]
    distances, ids = answers["validation"]
    chosen = choose(log_probs, distances, store.neighbor_tokens(ids), labels)
    _, log_probs, labels = held_out["test"]
    distances, ids = answers["test"]
    tokens = store.neighbor_tokens(ids)
    near = knn_label_log_probs(distances, tokens, labels, chosen["temperature"])
    nll = -mix_log_probs(log_probs, near, chosen["lmbda"]).mean()
    return chosen, math.exp(nll)


if __name__ == "__main__":
    main()
