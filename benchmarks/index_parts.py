"""What making a FAISS index and searching in it consists of, each part against what bounds it.

    python benchmarks/index_parts.py --json benchmarks/results/index/NAME.json
    python benchmarks/index_parts.py --keys 20000 --indexes IVF64,SQfp16 --json now.json

On one core, as the stages do it on theirs: clustering a sample, choosing each key's list and scanning
lists for queries, as shares of the rate of a matrix product; reading keys and making them float32,
adding them to their lists, and writing the file (with fsync and SHA-256), in bytes a second.
memdec/plan/index_needs.py counts by these. Seconds are those that the process computes, so that other
work on the machine counts little; only those of writing are the clock's, the disk's share being in them.
Keys lie in clusters; reading, adding and writing are the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_info
from search import make_keys

from memdec.data.artefact import stage
from memdec.data.build_index import write_faiss
from memdec.data.faiss_gpu import train_with
from memdec.data.index import count_lists, load_faiss, make_index, plain_lists

CHUNK = 1 << 16
SAMPLE = 1 << 15
ROUNDS = 10  # of FAISS's clustering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=3 * CHUNK)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--indexes", nargs="+", default=["IVF1024,SQfp16", "IVF4096,SQfp16"])
    parser.add_argument("--nprobe", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True, help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_faiss().omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        result = measure(options, Path(work))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    np.save(work / "keys.npy", make_keys(options.keys, options.width))
    keys = np.load(work / "keys.npy", mmap_mode="r")
    rows = []
    for spec in options.indexes:
        rows.append(parts(spec, keys, options, work))
        print(json.dumps(rows[-1]), flush=True)
    return {
        "machine_info": machine_info("cpu"),
        "setting": f"{options.keys:,} keys of width {options.width}, {options.queries:,} queries, "
        f"k = {options.k}",
        "index_parts": rows,
    }


def parts(spec: str, keys: np.ndarray, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    trained = make_index(spec, keys.shape[1])
    lists = count_lists(trained)
    sample = keys[:SAMPLE].astype(np.float32)
    product = rate()
    train = computed(lambda: train_with([], trained, plain_lists(trained), sample))
    found: dict[str, float] = {}
    for number in range(options.rounds):
        index = load_faiss().clone_index(trained)
        seconds = added(index, keys)
        path = work / f"{spec}-{number}"
        with stage(path, "index", {}, {}) as writer:
            begin = time.perf_counter()
            writer.write("index", lambda file, index=index: write_faiss(index, file))
            seconds["write"] = time.perf_counter() - begin
        size = (path / "index").stat().st_size
        found = {name: min(s, found.get(name, s)) for name, s in seconds.items()}
    one_list = 2 * keys.shape[1] * lists
    return {
        "index": spec,
        "product": product,
        "train_share": ROUNDS * len(sample) * one_list / train / product,
        "choose_share": len(keys) * one_list / found["choose"] / product,
        "read_bytes_a_second": keys.nbytes / found["read"],
        "add_bytes_a_second": keys.nbytes / found["add"],
        "write_bytes_a_second": size / found["write"],
        "scan_share": {
            str(nprobe): scanned(index, keys, nprobe, options) / product
            for nprobe in options.nprobe
        },
    }


def added(index: Any, keys: np.ndarray) -> dict[str, float]:
    """Adds the keys as memdec.data.faiss_gpu.ListFiller does; seconds of each part."""
    lists = plain_lists(index)
    seconds = dict.fromkeys(("read", "choose", "add"), 0.0)

    def timed(name: str, run: Callable[[], Any]) -> Any:
        begin = time.process_time()
        value = run()
        seconds[name] += time.process_time() - begin
        return value

    for first in range(0, len(keys), CHUNK):
        part = timed("read", lambda a=first: np.array(keys[a : a + CHUNK]).astype(np.float32))
        chosen = timed("choose", lambda p=part: lists.quantizer.search(p, 1)[1].ravel())
        arrays = (part, np.arange(first, first + len(part)), np.ascontiguousarray(chosen))
        pointers = [load_faiss().swig_ptr(array) for array in arrays]
        timed("add", lambda p=part, given=pointers: lists.add_core(len(p), *given))
    index.ntotal = lists.ntotal
    return seconds


def scanned(index: Any, keys: np.ndarray, nprobe: int, options: argparse.Namespace) -> float:
    """Operations a second in lists, the choice of them left out."""
    lists = plain_lists(index)
    queries = keys[:: len(keys) // options.queries][: options.queries].astype(np.float32)
    lists.nprobe = nprobe
    chosen = computed(lambda: lists.quantizer.search(queries, nprobe))
    seconds = computed(lambda: index.search(queries, options.k)) - chosen
    return 2 * queries.size * len(keys) * nprobe / count_lists(index) / seconds


def rate() -> float:
    """Operations a second of a square float32 matrix product, the best of five."""
    matrix = torch.ones(1024, 1024)
    return 2 * 1024**3 / min(computed(lambda: matrix @ matrix) for _ in range(5))


def computed(run: Callable[[], Any]) -> float:
    """Seconds that this process computes in `run`."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
