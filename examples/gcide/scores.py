"""What models and neighbours say of each held-out token, one number a position."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from memdec.data.corpus import TokenStream, block_batches
from memdec.data.datastore import Datastore
from memdec.evaluation.knn_lm import knn_label_log_probs
from memdec.modeling.key_layer import KeyRecorder


@dataclass(frozen=True)
class Text:
    """A held-out text: `positions` of a stream from its start."""

    stream: TokenStream
    positions: int

    @property
    def labels(self) -> np.ndarray:
        return self.stream.read(1, self.positions + 1)

    def head(self, positions: int) -> Text:
        return Text(self.stream, min(positions, self.positions))


@dataclass(frozen=True)
class Scores:
    """A model's answers to one text, float32 [positions] each.

    Attributes:
        label: log p(label).
        top: log-probability of the most probable token.
        entropy: of the whole distribution, in nats.
    """

    label: np.ndarray
    top: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class Settings:
    """How text passes through a model: blocks of `block_size` tokens, each a context of its own."""

    block_size: int
    batch_blocks: int
    vocab_size: int


def score(model: PreTrainedModel, text: Text, settings: Settings) -> Scores:
    """One teacher-forced pass of the model over the text."""
    parts = [
        _answers(logits[:, : settings.vocab_size], labels)
        for _, _, batch, targets in _passes(model, text, settings)
        for logits, labels in zip(batch, targets, strict=True)  # a block's float32 logits at a time
    ]
    return Scores(*torch.cat(parts, dim=1).cpu().numpy())


def score_neighbours(
    model: PreTrainedModel,
    datastore: Datastore,
    text: Text,
    settings: Settings,
    *,
    k: int,
    temperatures: Sequence[float],
) -> np.ndarray:
    """Log p(label) among the k nearest keys, float32 [temperatures, positions]; -inf where absent."""
    result = np.empty((len(temperatures), text.positions), np.float32)
    with KeyRecorder(model, datastore.key_layer) as recorder:
        for start, stop, _, labels in _passes(model, text, settings):
            queries = recorder.keys.flatten(0, 1).float().cpu().numpy()
            distances, ids = datastore.search(queries, k)
            tokens = datastore.neighbor_tokens(ids)
            wanted = labels.flatten().cpu().numpy()
            for row, temperature in zip(result, temperatures, strict=True):
                row[start:stop] = knn_label_log_probs(distances, tokens, wanted, temperature)
    return result


class ScoreFile:
    """The scores of one model on every text, kept for the next run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, fingerprint: str) -> dict[str, Scores] | None:
        """Scores by text, None unless they are of this very model."""
        if not self.path.is_file():
            return None
        with np.load(self.path) as arrays:
            if str(arrays["model"]) != fingerprint:
                return None
            names = sorted({key.rpartition("/")[0] for key in arrays.files if "/" in key})
            return {
                name: Scores(*(arrays[f"{name}/{field}"] for field in Scores.__annotations__))
                for name in names
            }

    def write(self, fingerprint: str, scores: Mapping[str, Scores]) -> None:
        arrays = {
            f"{name}/{field}": array
            for name, one in scores.items()
            for field, array in vars(one).items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.npz")  # seeds share the base's
        np.savez(temporary, model=np.array(fingerprint), **arrays)
        temporary.replace(self.path)


def _passes(
    model: PreTrainedModel, text: Text, settings: Settings
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Positions [start, stop), logits [rows, length, vocabulary] and labels [rows, length]."""
    cuts = block_batches(0, text.positions, settings.block_size, settings.batch_blocks)
    for start, stop, rows in cuts:
        read = text.stream.read(start, stop + 1).astype(np.int64)
        tokens = torch.from_numpy(read).to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=tokens[:-1].view(rows, -1), use_cache=False).logits
        yield start, stop, logits, tokens[1:].view(rows, -1)


@torch.inference_mode()
def _answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Label, top and entropy of rows of logits, float32 [3, rows]."""
    log_probs = logits.float().log_softmax(dim=1)
    return torch.stack(
        [
            log_probs.gather(1, labels[:, None])[:, 0],
            log_probs.amax(dim=1),
            -(log_probs.exp() * log_probs).sum(dim=1),
        ]
    )
