"""A tiny corpus, tokenizer and model, and stages run in child processes that may be killed."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="no FAISS")

IGNORED = {"timing.json", ".lock"}

_STAGES = {
    "prepare": ("memdec.data.corpus", "PrepareConfig", "prepare"),
    "datastore": ("memdec.data.datastore", "DatastoreConfig", "datastore"),
    "targets": ("memdec.data.targets", "TargetsConfig", "targets"),
}
_SHARD_SIZES = {
    "memdec.data.corpus.SHARD_TOKENS": 300,
    "memdec.data.datastore.SHARD_POSITIONS": 160,
    "memdec.data.targets.SHARD_ROWS": 128,
    "memdec.data.sources._ROWS_A_SEARCH": 32,
    "memdec.data.build_index._KEYS_A_CHUNK": 100,
}


_WORDS = "red green blue birds fish swim fly eat sing small big the a and often never"


def documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of a few sentences each, over a small vocabulary."""
    generator = random.Random(seed)
    words = _WORDS.split(" ")
    texts = []
    for number in range(count):
        sentences = [
            " ".join(generator.choices(words, k=generator.randint(4, 9))) + "."
            for _ in range(generator.randint(1, 6))
        ]
        texts.append(f"Entry {number}: " + " ".join(sentences))
    return texts


def write_corpus(directory: Path, texts: list[str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (directory / f"{number:04d}.txt").write_text(text)
    return directory


def write_tokenizer(directory: Path, **special: str) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = special or {"eos_token": "<eos>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(50), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return directory


def write_model(directory: Path, seed: int = 0, vocab_size: int = 320) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def run_stage(name: str, values: dict[str, Any], out: Path) -> Any:
    """Runs a stage from its configuration's values."""
    module_name, config_name, function_name = _STAGES[name]
    module = importlib.import_module(module_name)
    return getattr(module, function_name)(getattr(module, config_name)(**values), out)


def set_small_shards(set_attribute: Callable[[str, int], object]) -> None:
    for name, value in _SHARD_SIZES.items():
        set_attribute(name, value)


def start(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Starts a child that has torch and transformers loaded already, so that it starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",
            "transformers.models.llama.modeling_llama",
            "memdec.data.sources",
            "memdec.data.targets",
            "memdec.data.build_index",
            "memdec.evaluation.forward",
            "memdec.modeling.key_layer",
            "memdec.processes",
        ]
    )
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def stage_in_child(name: str, values: dict[str, Any], out: Path, steps: int = 0) -> None:
    """What a child runs: a stage with small shards and one thread.

    It kills itself before it finishes its `steps`-th file or record, if `steps` is not 0.
    """
    import torch

    torch.set_num_threads(1)

    def set_attribute(path: str, value: int) -> None:
        module, attribute = path.rsplit(".", 1)
        setattr(importlib.import_module(module), attribute, value)

    set_small_shards(set_attribute)
    replace = os.replace
    count = itertools.count(1)

    def counted(*arguments: Any) -> None:
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)

    os.replace = counted
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        run_stage(name, values, out)


def start_team(
    count: int, name: str, values: dict[str, Any], out: Path, dying: int = -1, steps: int = 0
) -> list[BaseProcess]:
    """Starts a stage in `count` processes, as a launcher would; the `dying`-th has only `steps`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(_in_team, rank, count, port, name, values, out, steps if rank == dying else 0)
        for rank in range(count)
    ]


def _in_team(rank: int, count: int, port: int, *arguments: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # FAISS's too
    if count > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    stage_in_child(*arguments)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but timing and lock, by its relative name."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in IGNORED
    }
