"""Exact search: queries a second of memdec, of plain PyTorch, and of the matrix product alone.

    python benchmarks/search.py --json benchmarks/results/search/NAME.json    # CUDA if there is one
    python benchmarks/search.py --keys 200000 --queries 1024 --device cpu

Every contender searches the same keys for the same queries, on the device's own clock and in one
run; a search is timed only after its distances agreed with float64 on some of the queries.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memdec
from memdec.data.exact import ExactIndex

CHUNK = 1 << 16
BATCH = 1024
CHECKED = 32


def make_keys(count: int, width: int, seed: int = 0) -> np.ndarray:
    """float16 keys in clusters around a common offset, as hidden states are."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((1000, width), np.float32) + 2.0
    keys = np.empty((count, width), np.float16)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        noise = generator.standard_normal((stop - start, width), np.float32) * 0.7
        keys[start:stop] = centres[generator.integers(0, len(centres), stop - start)] + noise
    return keys


def product_and_topk(keys: torch.Tensor, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Plain PyTorch: distances of a chunk of keys, their k smallest, merged with the ones before."""
    norms = keys.float().square().sum(1)

    def search(queries: torch.Tensor) -> torch.Tensor:
        own = queries.float().square().sum(1, keepdim=True)
        best = queries.new_full((len(queries), k), torch.inf, dtype=torch.float32)
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            distances = norms[start : start + CHUNK] - 2 * product(queries, chunk)
            near = distances.topk(min(k, len(chunk)), dim=1, largest=False).values
            best = torch.cat([best, near], dim=1).topk(k, dim=1, largest=False).values
        return (best + own).clamp(min=0)

    return search


def product(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    if queries.dtype == torch.float16 and queries.is_cuda:
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return queries @ keys.T


def product_alone(keys: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def search(queries: torch.Tensor) -> None:
        for start in range(0, len(keys), 8 * CHUNK):
            product(queries, keys[start : start + 8 * CHUNK])

    return search


def block_alone(block: torch.Tensor, keys: int) -> Callable[[torch.Tensor], None]:
    """The products with as many `keys`, the block again and again."""

    def search(queries: torch.Tensor) -> None:
        for start in range(0, keys, len(block)):
            product(queries, block[: keys - start])

    return search


def batches(search: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], list[Any]]:
    return lambda queries: [search(part) for part in queries.split(BATCH)]


def seconds(run: Callable[[], Any], device: str, rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


def exhaustive(keys: np.ndarray, queries: np.ndarray, k: int, device: str) -> np.ndarray:
    """The k smallest squared distances in float64, sorted."""
    wide = torch.from_numpy(queries).to(device).double()
    best = wide.new_full((len(queries), k), torch.inf)
    for start in range(0, len(keys), CHUNK):
        chunk = torch.from_numpy(keys[start : start + CHUNK]).to(device).double()
        distances = torch.cdist(wide, chunk).square()
        best = torch.cat([best, distances], 1).topk(k, dim=1, largest=False).values
    return best.cpu().numpy()


def spread(keys: np.ndarray, count: int) -> np.ndarray:
    """About `count` of the keys, from all over them, as queries."""
    return keys[:: max(len(keys) // count, 1)][:count].copy()


def compare(
    keys: np.ndarray, queries: np.ndarray, k: int, device: str, rounds: int, float32: bool = True
) -> list[dict[str, Any]]:
    """A row a contender; on a GPU those that multiply float32 may be left out."""
    truth = exhaustive(keys, queries[:CHECKED], k, device)
    on_gpu = device == "cuda"
    rows = []

    def add(name: str, search: Callable[[Any], Any], given: Any, found: Any = None) -> None:
        if found is not None:
            np.testing.assert_allclose(found, truth, rtol=1e-3, atol=0.05)
        took = seconds(lambda: search(given), device, rounds)
        error = None if found is None else float(np.abs(found - truth).max())
        row = {"name": name, "queries_per_second": len(queries) / took, "largest_error": error}
        rows.append(row)
        shown = "" if error is None else f"{error:.1e}"
        print(f"| {name} | {row['queries_per_second']:,.0f} | {shown} |", flush=True)

    print(f"\n| {len(keys):,} keys of {keys.shape[1]}, k = {k} | queries/s | largest error |")
    print("|---|---|---|", flush=True)
    dtypes = [torch.float32] * (float32 or not on_gpu) + [torch.float16] * on_gpu
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        theirs = torch.from_numpy(keys).to(device, dtype)
        given = torch.from_numpy(queries).to(device, dtype)
        add(f"the {name} product alone", batches(product_alone(theirs)), given)
        plain = product_and_topk(theirs, k)
        add(
            f"plain {name} product and topk",
            batches(plain),
            given,
            plain(given[:CHECKED]).cpu().numpy(),
        )
        del theirs, plain
    for halves in [False] * (float32 or not on_gpu) + [True] * on_gpu:
        index = ExactIndex([keys], device, halves)
        name = f"memdec, {'pairs of float16' if halves else 'float32'}"
        found = index.search(queries[:CHECKED], k, None)[0]
        add(name, lambda given, index=index: index.search(given, k, None), queries, found)
        if halves:
            ((_, blocks),) = index._parts()
            block = next(iter(blocks)).keys
            wide = torch.randn(len(queries), block.shape[1], device=device).half()
            repeated = block_alone(block, len(keys))
            add("its product alone", batches(repeated), wide)
            del blocks, block, wide, repeated
        del index
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    keys = make_keys(arguments.keys, arguments.width)
    queries = spread(keys, arguments.queries)
    rows = compare(keys, queries, arguments.k, device, arguments.rounds)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "memdec": memdec.__version__,
        "keys": len(keys),
        "width": arguments.width,
        "k": arguments.k,
        "queries": len(queries),
        "contenders": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--queries", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(f"\n{result['device']}, torch {result['torch']}, {result['queries']:,} queries, medians.")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
