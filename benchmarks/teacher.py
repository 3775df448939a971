"""The teacher's stages against their floors, how busy they keep the GPU, and their memory.

    python benchmarks/teacher.py                         # on an H100 in under 4 minutes
    python benchmarks/teacher.py --model DIR --tokens DIR  # a real teacher, tokens of `prepare`
    python benchmarks/teacher.py --tiny --out now.json   # anywhere in under a minute: does it run

Everything runs in one process on the same tokens, and a floor is measured in the same run as what it
is the floor of:

- key extraction, as the stage datastore does it (read, forward pass, copy, check, write, hash),
  against the bare forward pass of the same model over the same batches;
- exact search against the matrix product that it makes, and plain PyTorch's product and topk;
- targets, as the stage does it (search, next tokens, sparse rows, copy, write, hash), against the
  same search alone.

Without --model the teacher has the shape of SmolLM2-135M and random weights; without --tokens the
tokens are random, as frequent as words are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gpu_busy import GpuBusy
from machine import file_name, machine_info
from search import compare, spread
from table import teacher_table
from training_step import SMOLLM2_135M, TINY
from transformers import LlamaConfig, LlamaForCausalLM

from memdec.data import datastore as datastore_module
from memdec.data import targets as targets_module
from memdec.data.artefact import stage
from memdec.data.corpus import KIND, SPLITS, TokenCorpus, block_batches
from memdec.data.datastore import SHARD_POSITIONS, Datastore, DatastoreConfig, datastore
from memdec.data.targets import TargetsConfig, targets
from memdec.modeling.loading import has_tokenizer, load_model, load_tokenizer

EXTRACTION_GOAL = 0.9  # of the bare forward pass
TARGETS_GOAL = 1 / 1.1  # of the search: at most a tenth more time
SEARCH_GOAL = 40_000  # queries a second of 2 M keys of width 576, k = 512, on an H100
BUSY_GOAL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a model and tokens that a CPU can do")
    parser.add_argument("--model", help="a teacher instead of random weights")
    parser.add_argument("--tokens", type=Path, help="directory that memdec prepare wrote")
    parser.add_argument("--positions", type=int, default=2_000_000, help="of random tokens")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="blocks in a forward pass")
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--queries", type=int, default=16_384, help="of the search alone")
    parser.add_argument("--rounds", type=int, default=3, help="of the search alone")
    parser.add_argument("--work", type=Path, help="where to write, by default the temporary folder")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results, by the device's name"
    )
    options = parser.parse_args()
    if options.tiny:
        options.positions, options.block_size, options.batch = 40_000, 64, 8
        options.k, options.queries = 32, 2048
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        result = measure(options, Path(work))
    name = file_name(result["machine_info"]["device"])
    out = options.out or Path(__file__).parent / "results" / f"{name}-teacher.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(teacher_table(result))


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    model = options.model or save_model(work / "model", tiny=options.tiny)
    tokens = options.tokens or write_tokens(work / "tokens", model, options.positions)
    corpus = TokenCorpus.open(tokens)
    rates = Rates()
    with rates.gpu.watch():
        forward = forward_alone(options, rates, model, dtype, corpus)
        made = work / "datastore"
        config = DatastoreConfig(
            model=model,
            tokens=tokens,
            block_size=options.block_size,
            batch_blocks=options.batch,
            index="Flat",
            device=options.device,
            dtype=dtype,
        )
        with rates.of_shards(
            datastore_module,
            "key extraction",
            "tokens",
            floor=("the forward pass", forward),
            goal=EXTRACTION_GOAL,
        ):
            datastore(config, made)
        store = Datastore.open(made, options.device)
        search = search_alone(options, rates, store)
        config = TargetsConfig(
            datastore=made, tokens=tokens, k=options.k, temperature=10.0, device=options.device
        )
        with rates.of_shards(
            targets_module, "targets", "rows", floor=("the search", search), goal=TARGETS_GOAL
        ):
            targets(config, work / "targets")
    shape = "a tiny model" if options.tiny else "the shape of SmolLM2-135M, random weights"
    files = [path.stat().st_size for path in (work / "targets").rglob("*.safetensors")]
    return {
        "machine_info": machine_info(),
        "setting": (
            f"{Path(options.model).name if options.model else shape}, {dtype}, "
            f"{'tokens of prepare' if options.tokens else 'random tokens'}, "
            f"{store.size:,} keys of width {store.width}, "
            f"{options.batch} blocks of {options.block_size} in a pass, k = {options.k}, "
            f"{sum(files) / store.size:,.0f} bytes a row of targets"
        ),
        "teacher": rates.rows,
    }


def save_model(path: Path, *, tiny: bool) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(TINY if tiny else SMOLLM2_135M))).save_pretrained(path)
    return str(path)


def write_tokens(path: Path, model: str, positions: int) -> Path:
    """Random tokens laid out as the stage prepare does, their frequencies falling with the rank."""
    vocabulary = transformers.AutoConfig.from_pretrained(model).vocab_size
    generator = np.random.default_rng(0)
    weights = 1 / (np.arange(vocabulary) + 2.7)
    splits = {}
    with stage(path, KIND, {}, {}) as writer:
        if has_tokenizer(model):
            tokenizer = load_tokenizer(model)
            vocabulary = len(tokenizer)
            weights = weights[:vocabulary]
            writer.write_directory("tokenizer", tokenizer.save_pretrained)
        for name in SPLITS:
            count = positions + 1 if name == "train" else 2
            stream = generator.choice(vocabulary, count, p=weights / weights.sum())
            arrays = {".npy": stream.astype(np.int32), ".documents.npy": np.ones(1, np.int64)}
            for ending, array in arrays.items():
                writer.write(f"tokens/{name}-00000{ending}", lambda file, a=array: np.save(file, a))
            splits[name] = {"documents": 1, "tokens": count, "shards": 1}
        writer.finish(splits=splits, separator_id=0, vocab_size=vocabulary, dtype="int32")
    return path


class Rates:
    """Rows of the table, one a stage."""

    def __init__(self) -> None:
        self.gpu = GpuBusy()
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        stage: str,
        unit: str,
        count: int,
        begin: float,
        end: float,
        *,
        floor: tuple[str, float] | None = None,
        goal: float | None = None,
        rate: float | None = None,
        rate_goal: float | None = None,
        busy_goal: float | None = None,
    ) -> float:
        """Notes that `count` took from `begin` to `end`, or ran at `rate` then; returns the rate."""
        on_gpu = torch.cuda.is_available()
        rate = count / (end - begin) if rate is None else rate
        name, at_best = floor or (None, None)
        row = {
            "stage": stage,
            "unit": unit,
            "count": count,
            "seconds": end - begin,
            "rate": rate,
            "floor_name": name,
            "floor": at_best,
            "share": None if at_best is None else rate / at_best,
            "goal": goal,
            "rate_goal": rate_goal,
            "gpu_busy": self.gpu.share(begin, end),
            "busy_goal": busy_goal if on_gpu else None,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return rate

    @contextlib.contextmanager
    def of_shards(
        self, module: Any, stage: str, unit: str, *, floor: tuple[str, float], goal: float
    ) -> Iterator[None]:
        """Times the writing of all shards by the stage of `module` that runs meanwhile."""
        write = module.write_shards

        def timed(processes: Any, writer: Any, shards: Any, *rest: Any) -> None:
            clear_memory()
            begin = time.perf_counter()
            write(processes, writer, shards, *rest)
            count = sum(map(len, shards))
            now = time.perf_counter()
            self.add(stage, unit, count, begin, now, floor=floor, goal=goal, busy_goal=BUSY_GOAL)

        module.write_shards = timed
        try:
            yield
        finally:
            module.write_shards = write


def clear_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def timed(run: Callable[[], None]) -> tuple[float, float]:
    clear_memory()
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return begin, time.perf_counter()


def forward_alone(
    options: argparse.Namespace, rates: Rates, name: str, dtype: Any, corpus: TokenCorpus
) -> float:
    """Tokens a second of the forward passes that the stage makes, their tokens on the device."""
    model = load_model(name, device=options.device, dtype=dtype)
    stream = corpus.split("train")
    shard = SHARD_POSITIONS // options.block_size * options.block_size
    passes = [
        stream.read(first, last).reshape(rows, -1)
        for start in range(0, stream.positions, shard)
        for first, last, rows in block_batches(
            start, min(start + shard, stream.positions), options.block_size, options.batch
        )
    ]
    batches = [torch.from_numpy(tokens).long().to(options.device) for tokens in passes]

    def run(some: list[torch.Tensor]) -> None:
        with torch.inference_mode():
            for tokens in some:
                model(input_ids=tokens, use_cache=False, logits_to_keep=1)

    run(batches[:5])
    begin, end = timed(lambda: run(batches))
    return rates.add("forward pass alone", "tokens", stream.positions, begin, end)


def search_alone(options: argparse.Namespace, rates: Rates, store: Datastore) -> float:
    """Queries a second of memdec's exact search; its contenders are rows too."""
    keys = store.keys(0, store.size)
    queries = spread(keys, options.queries)
    clear_memory()
    begin = time.perf_counter()
    found = compare(
        keys, queries, options.k, options.device, options.rounds, float32=options.device == "cpu"
    )
    end = time.perf_counter()
    by_name = {row["name"]: row["queries_per_second"] for row in found}
    ours = next(name for name in by_name if name.startswith("memdec"))
    product = "its product alone" if "its product alone" in by_name else "the float32 product alone"
    plain = next(name for name in by_name if name.startswith("plain"))
    counted = (len(queries), begin, end)
    rates.add(plain, "queries", *counted, rate=by_name[plain])
    rates.add(
        f"exact search, {ours}",
        "queries",
        *counted,
        rate=by_name[ours],
        floor=("its matrix product", by_name[product]),
        rate_goal=SEARCH_GOAL if (*keys.shape, options.k) == (2_000_000, 576, 512) else None,
    )

    def run(count: int) -> None:
        for start in range(0, count, len(queries)):
            own = np.arange(start, min(start + len(queries), count))
            store.search(keys[own], options.k, own)

    run(len(queries))  # the index is made at the first search
    count = store.size // 4
    begin, end = timed(lambda: run(count))
    return rates.add("search alone", "queries", count, begin, end, busy_goal=BUSY_GOAL)


if __name__ == "__main__":
    main()
