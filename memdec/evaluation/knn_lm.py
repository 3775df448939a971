"""The kNN-LM that a memory imitates (arXiv 1911.00172): its probability of each label."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # torch and transformers are slow to import
    from transformers import PreTrainedModel

    from memdec.data.corpus import TokenStream
    from memdec.data.datastore import Datastore


def score_neighbours(
    model: PreTrainedModel,
    stream: TokenStream,
    datastore: Datastore,
    *,
    k: int,
    temperature: float,
    block_size: int,
    batch_blocks: int,
    vocab_size: int,
    positions: int | None = None,
    description: str | None = None,
) -> np.ndarray:
    """Log p(label) of the neighbours alone at every position, float32 [positions].

    Args:
        model: the teacher that made the datastore's keys.
        k: neighbours of a position.
        temperature: divides their squared distances.
        description: as in :func:`memdec.evaluation.forward.label_scores`, with what follows
            `temperature`.
    """
    from memdec.evaluation.forward import forward_blocks, with_progress
    from memdec.modeling.key_layer import KeyRecorder

    total = stream.positions if positions is None else positions
    result = np.empty(total, np.float32)
    batches = forward_blocks(
        model,
        stream,
        block_size=block_size,
        batch_blocks=batch_blocks,
        vocab_size=vocab_size,
        positions=total,
    )
    with KeyRecorder(model, datastore.key_layer) as recorder:
        for batch in with_progress(batches, total, description):
            queries = recorder.keys.flatten(0, 1).float().cpu().numpy()
            distances, ids = datastore.search(queries, k)
            result[batch.start : batch.stop] = knn_label_log_probs(
                distances,
                datastore.neighbor_tokens(ids),
                stream.read(batch.start + 1, batch.stop + 1),
                temperature,
            )
    return result


def knn_label_log_probs(
    distances: np.ndarray, neighbor_tokens: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    """log of the share of the label's neighbours, each weighing ``exp(-distance / temperature)``.

    Args:
        distances: float32 [positions, k], squared; +inf is no neighbour.
        neighbor_tokens: the token after each neighbour, [positions, k]; read only where there is one.
        labels: [positions].

    Returns:
        float32 [positions]; -inf where no neighbour has the label.
    """
    nearest = distances.min(axis=1, keepdims=True)
    nearest[np.isinf(nearest)] = 0.0
    weights = np.exp((nearest - distances).astype(np.float64) / temperature)
    share = np.where(neighbor_tokens == labels[:, None], weights, 0.0).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probs = np.log(share) - np.log(weights.sum(axis=1))
    return np.nan_to_num(log_probs, nan=-np.inf, neginf=-np.inf).astype(np.float32)
