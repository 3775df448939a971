"""One teacher-forced pass of a model over a split: the log-probability of each position's label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from memdec.console import Progress
from memdec.data.corpus import TokenStream, block_batches
from memdec.errors import MemdecError
from memdec.modeling.gate import confidence
from memdec.modeling.isolation import check_isolation
from memdec.ops import token_log_probs


@dataclass(frozen=True)
class ForwardBatch:
    """Positions [start, stop) of a stream: log p(label), float32 [stop - start], and confidence.

    `confidence` is float32 [stop - start, 2] (:func:`memdec.modeling.gate.confidence`), or None.
    """

    start: int
    stop: int
    log_probs: np.ndarray
    confidence: np.ndarray | None


def forward_blocks(
    model: PreTrainedModel,
    stream: TokenStream,
    *,
    block_size: int,
    batch_blocks: int,
    vocab_size: int,
    positions: int | None = None,
    with_confidence: bool = False,
) -> Iterator[ForwardBatch]:
    """Runs the model over a stream's blocks, in order, each block a context of its own.

    The batches have fixed global boundaries: `batch_blocks` whole blocks each, the short last block
    alone. A caller that needs hidden states enters a ``KeyRecorder`` around the loop and reads it
    after each batch.

    Args:
        model: on its device; run in evaluation mode without gradients, left as it was.
        vocab_size: the tokenizer's real tokens; logits beyond them are padding and take no mass.
        positions: how many positions to run (default: all of them).
        with_confidence: whether each batch has it.

    Raises:
        MemdecError: the model is narrower than the vocabulary or its context than a block.
    """
    check_model(model, block_size, vocab_size)
    positions = stream.positions if positions is None else positions
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for start, stop, rows in block_batches(0, positions, block_size, batch_blocks):
            inputs = {
                name: torch.from_numpy(array).to(device)
                for name, array in stream.inputs(start, stop, rows).items()
            }
            labels = stream.read(start + 1, stop + 1).astype(np.int64).reshape(rows, -1)
            with torch.inference_mode():
                logits = model(**inputs, use_cache=False).logits
                real = min(vocab_size, logits.shape[-1])
                scores = token_log_probs(
                    logits, torch.from_numpy(labels).to(device), vocab_size=real
                )
                sure = confidence(logits, real) if with_confidence else None
            yield ForwardBatch(
                start,
                stop,
                scores.flatten().cpu().numpy(),
                None if sure is None else sure.flatten(0, 1).cpu().numpy(),
            )
    finally:
        model.train(was_training)


def with_progress(
    batches: Iterable[ForwardBatch], total: int, description: str | None
) -> Iterator[ForwardBatch]:
    """The batches, under a bar of `total` positions unless `description` is None."""
    if description is None:
        yield from batches
        return
    with Progress(description, total, "tokens") as progress:
        for batch in batches:
            yield batch
            progress.advance(batch.stop - batch.start)


@dataclass(frozen=True)
class LabelScores:
    """Log p(label), float32 [positions], and confidence, float32 [positions, 2], or None."""

    log_probs: np.ndarray
    confidence: np.ndarray | None

    def check(self, name: str) -> None:
        """Raises :class:`MemdecError` where the logits of the model, called `name`, are NaN."""
        wrong = np.isnan(self.log_probs)
        if wrong.any():
            raise MemdecError(f"the logits of {name} are no numbers at position {wrong.argmax()}")


def label_scores(
    model: PreTrainedModel,
    stream: TokenStream,
    *,
    block_size: int,
    batch_blocks: int,
    vocab_size: int,
    positions: int | None = None,
    with_confidence: bool = False,
    description: str | None = None,
) -> LabelScores:
    """Every position at once; arguments of :func:`forward_blocks`.

    `description` names the pass in a progress bar; None shows no bar.
    """
    total = stream.positions if positions is None else positions
    log_probs = np.empty(total, np.float32)
    sure = np.empty((total, 2), np.float32) if with_confidence else None
    batches = forward_blocks(
        model,
        stream,
        block_size=block_size,
        batch_blocks=batch_blocks,
        vocab_size=vocab_size,
        positions=positions,
        with_confidence=with_confidence,
    )
    for batch in with_progress(batches, total, description):
        log_probs[batch.start : batch.stop] = batch.log_probs
        if sure is not None:
            sure[batch.start : batch.stop] = batch.confidence
    return LabelScores(log_probs, sure)


def check_model(
    model: PreTrainedModel, block_size: int, vocab_size: int, *, isolate_documents: bool = False
) -> None:
    """Raises :class:`MemdecError` when the model cannot take the blocks or lacks tokens.

    Or, where that is asked for, cannot keep the documents in a block apart.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise MemdecError(
            f"block_size must be at most {context}, the context of this {config.model_type}, "
            f"got {block_size}"
        )
    if config.vocab_size < vocab_size:
        raise MemdecError(
            f"expected a model with at least the tokenizer's {vocab_size} tokens, "
            f"this {config.model_type} has {config.vocab_size}"
        )
    if isolate_documents:
        check_isolation(model)


def check_blocks(stream: TokenStream, block_size: int) -> None:
    """Raises :class:`MemdecError` when a train split has less than one whole block."""
    if stream.positions < block_size:
        raise MemdecError(
            f"block_size must be at most {stream.positions}, the positions of the train split, "
            f"got {block_size}; a smaller block_size or a longer corpus is needed"
        )
