"""Chooses the temperature of the targets: the kNN-LM that predicts the validation tokens best."""

from __future__ import annotations

from typing import Any

import numpy as np

from memdec.console import Progress, say
from memdec.data.contexts import Contexts
from memdec.data.corpus import Split, TokenCorpus
from memdec.data.datastore import Datastore
from memdec.errors import MemdecError

# In units of the spread of the squared distances. The best lay near 0.2 to 0.4 on real text.
_TEMPERATURES = np.geomspace(0.05, 16.0, 18)


def calibrate(
    model_name: str,
    datastore: Datastore,
    corpus: TokenCorpus,
    k: int,
    positions: int,
    *,
    temperature: float | None = None,
    lmbda: float | None = None,
    contexts: Contexts | None = None,
) -> dict[str, Any]:
    """Chooses temperature and lmbda (:func:`choose`) on the first `positions` of validation.

    Neighbours are looked for as `contexts` does, if given.
    """
    keys, log_probs, labels = teacher_forced(model_name, datastore, corpus, "validation", positions)
    if contexts is None:
        distances, ids = datastore.search(keys, k)
    else:
        tokens = corpus.split("validation").read(0, len(keys))
        windows = contexts.windows(tokens, np.arange(len(keys)))
        distances, ids = contexts.search(datastore, keys, windows, k)
    tokens = datastore.neighbor_tokens(ids)
    chosen = choose(log_probs, distances, tokens, labels, temperature=temperature, lmbda=lmbda)
    say(
        f"temperature {chosen['temperature']:.4g} chosen on {len(labels):,} validation positions: "
        f"nll {chosen['nll']:.3f} at lmbda {chosen['lmbda']:g}, the teacher alone "
        f"{chosen['teacher_nll']:.3f}"
    )
    return chosen


def choose(
    log_probs: np.ndarray,
    distances: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | None = None,
    lmbda: float | None = None,
) -> dict[str, Any]:
    """Tries temperatures, or takes the one given, on positions whose neighbours are known.

    Each is judged by the mean nll of ``(1 - lmbda) p_teacher + lmbda p_knn`` at `lmbda`, or at its
    best lmbda. The spread that scales the temperatures is the median over queries of the standard
    deviation of their k squared distances.

    Args:
        log_probs: the teacher's of the labels, [n].
        distances: squared, [n, k].
        tokens: what followed the neighbours, [n, k].
        labels: [n].

    Returns:
        ``temperature``, ``lmbda`` and ``nll`` of the best, the ``teacher_nll``, the number of
        ``positions``, the ``spread``, and ``tried``: one row for each temperature.
    """
    from memdec.evaluation.knn_lm import knn_label_log_probs
    from memdec.evaluation.mixture import best_lmbda, mix_log_probs

    spread = _spread(distances)
    tried = []
    temperatures = (_TEMPERATURES * spread).tolist() if temperature is None else [temperature]
    for candidate in temperatures:
        knn = knn_label_log_probs(distances, tokens, labels, candidate)
        if lmbda is None:
            weight, nll = best_lmbda(log_probs, knn)
        else:
            weight, nll = lmbda, float(-mix_log_probs(log_probs, knn, lmbda).mean())
        tried.append({"temperature": candidate, "lmbda": weight, "nll": nll})
    return {
        **min(tried, key=lambda row: row["nll"]),
        "teacher_nll": float(-log_probs.mean(dtype=np.float64)),
        "positions": len(labels),
        "spread": spread,
        "tried": tried,
    }


def teacher_forced(
    model_name: str, datastore: Datastore, corpus: TokenCorpus, split: Split, positions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys [n, width], log p(label) [n] and labels [n] of the head of a split."""
    from memdec.evaluation.forward import forward_blocks
    from memdec.modeling.key_layer import KeyRecorder
    from memdec.modeling.loading import load_model

    stream = corpus.split(split, isolate_documents=datastore.isolate_documents)
    positions = min(positions, stream.positions)
    model = load_model(model_name, device=datastore.device, dtype=datastore.dtype)
    keys = []
    log_probs = []
    with (
        Progress(f"keys of {split}", positions, "tokens") as progress,
        KeyRecorder(model, datastore.key_layer) as recorder,
    ):
        for batch in forward_blocks(
            model,
            stream,
            block_size=datastore.block_size,
            batch_blocks=1,
            vocab_size=corpus.vocab_size,
            positions=positions,
        ):
            keys.append(recorder.keys.flatten(0, 1).float().cpu().numpy())
            log_probs.append(batch.log_probs)
            progress.advance(batch.stop - batch.start)
    found = np.concatenate(log_probs)
    if not np.isfinite(found).all():
        raise MemdecError(f"the teacher {model_name} gives a {split} token probability 0 or NaN")
    return np.concatenate(keys), found, stream.read(1, positions + 1)


def _spread(distances: np.ndarray) -> float:
    """Median over queries of the standard deviation of the distances to real neighbours."""
    real = np.isfinite(distances)
    rows = real.sum(axis=1) > 1
    if not rows.any():
        return 1.0
    known = np.where(real, distances, np.nan)[rows].astype(np.float64)
    return float(np.median(np.nanstd(known, axis=1))) or 1.0
