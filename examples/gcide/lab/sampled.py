"""More text to distil on: entries that the adapted teacher draws itself.

A small memory learns the train tokens by heart before it has learnt all that the teacher knows. But a
teacher answers on any text, and of its own there is as much as wanted: the memory then sees hardly a
token twice, all of it from the same train split (sequence-level distillation, Kim and Rush 2016).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import Cache, DynamicLayer, PreTrainedModel

from lab.texts import write_prepared
from memdec.console import Progress
from memdec.data.artefact import stage
from memdec.data.corpus import KIND, SPLITS, TokenCorpus
from memdec.modeling.cache import CACHE
from memdec.modeling.loading import load_model, model_fingerprint
from memdec.ops import interpolate_sample


def extend_with_samples(
    teacher: str,
    corpus: TokenCorpus,
    out: Path,
    *,
    rounds: int,
    batch: int,
    length: int,
    device: str,
    seed: int = 0,
) -> Path:
    """Writes an artefact of the stage ``prepare``: the corpus, its train split longer.

    Args:
        teacher: model to draw from, at temperature 1.
        rounds: draws of `batch` contexts of `length` tokens each; what a context's end cuts short
            is left out.
    """
    params = {"rounds": rounds, "batch": batch, "length": length, "seed": seed}
    inputs = {"tokens": corpus.fingerprint, "teacher": model_fingerprint(teacher)}
    with stage(out, KIND, params, inputs) as writer:
        if writer.finished:
            return out
        separator = corpus.separator_id
        splits = {name: corpus.split(name) for name in SPLITS}
        documents = {
            name: list(_documents(split.read(0, len(split)), separator))
            for name, split in splits.items()
        }
        model = load_model(teacher, device=device, dtype="bfloat16")
        torch.manual_seed(seed)
        with Progress("sampling", rounds * batch * length, "tokens") as progress:
            for _ in range(rounds):
                for row in _draw(model, separator, corpus.vocab_size, batch, length):
                    documents["train"] += _documents(row, separator)
                progress.advance(batch * length)
        write_prepared(writer, corpus.tokenizer(), separator, documents)
    return out


def _documents(tokens: np.ndarray, separator: int) -> Iterator[np.ndarray]:
    """What lies between two separators, if anything does."""
    for start, stop in pairwise(np.flatnonzero(tokens == separator)):
        if stop > start + 1:
            yield tokens[start + 1 : stop]


@torch.inference_mode()
def _draw(
    model: PreTrainedModel, separator: int, vocab_size: int, batch: int, length: int
) -> np.ndarray:
    """Contexts that begin with a separator, int32 [batch, 1 + length]."""
    tokens = torch.full((batch, 1 + length), separator, device=model.device)
    layers = model.config.get_text_config().num_hidden_layers
    cache = {CACHE: Cache(layers=[_Reserved(length) for _ in range(layers)])}
    for step in range(length):
        logits = model(input_ids=tokens[:, step : step + 1], use_cache=True, **cache).logits[:, -1]
        # One model beside itself is that model: the draw reads its logits once, writes no softmax.
        tokens[:, step + 1], _ = interpolate_sample(logits, logits, 0.0, vocab_size=vocab_size)
    return tokens.to("cpu", torch.int32).numpy()


class _Reserved(DynamicLayer):
    """A layer of a cache whose memory is taken at once: one that grows is copied at every token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _, width = key_states.shape
            shape = (2, batch, heads, self.length, width)
            self._room = key_states.new_empty(shape)
        stop = start + key_states.shape[-2]
        self._room[0, :, :, start:stop] = key_states
        self._room[1, :, :, start:stop] = value_states
        self.keys, self.values = self._room[:, :, :, :stop]
        return self.keys, self.values
