"""The ops again, from their definitions: numpy, float64, a row at a time, nothing of memdec.

Every function takes what the op was really given (logits already rounded to their dtype) and
returns float64.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def as_array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def log_softmax(row: Array) -> Array:
    """NaN throughout without a finite logit, or with a NaN or +inf."""
    peak = np.argmax(row) if not np.isnan(row).any() else 0
    if not np.isfinite(row[peak]) or np.isnan(row).any():
        return np.full_like(row, math.nan)
    shifted = row - row[peak]
    tail = np.exp(np.delete(shifted, peak)).sum()
    return shifted - np.log1p(tail)


def interpolate(
    base: Tensor,
    memory: Tensor,
    lmbda: Tensor | float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """[..., V_base] log-probabilities."""
    rows = []
    for b, m, weight in _mixture_rows(base, memory, lmbda, temperature, vocab_size):
        p = _mix(b, m, weight)
        with np.errstate(divide="ignore"):
            log_p = np.log(p)
            # Near 1 from the complement, which the sum of the others gives without cancellation.
            for peak in np.nonzero(p > 0.5)[0]:
                log_p[peak] = np.log1p(-np.delete(p, peak).sum())
            # Far below what a float64 probability can hold, from the logarithms.
            for tiny in np.nonzero(p < 1e-280)[0]:
                log_p[tiny] = np.logaddexp(
                    _weighted(b[tiny], 1 - weight), _weighted(m[tiny], weight)
                )
        rows.append(_pad(log_p, base.shape[-1], -math.inf))
    return _tensor(rows, base.shape)


def interpolate_gradients(
    grad: Tensor,
    base: Tensor,
    memory: Tensor,
    lmbda: Tensor | float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of base, memory and (one a row) lmbda."""
    to_base, to_memory, to_lmbda = [], [], []
    upstream = as_array(grad).reshape(-1, grad.shape[-1])
    mixtures = _mixture_rows(base, memory, lmbda, temperature, vocab_size)
    for g, (b, m, weight) in zip(upstream, mixtures, strict=True):
        p = _mix(b, m, weight)
        g = g[: p.size]
        slope = np.where(p > 0, g / np.where(p > 0, p, 1), 0)  # d loss / d p
        for result, log_q, share, scale, width in (
            (to_base, b, 1 - weight, 1.0, base.shape[-1]),
            (to_memory, m, weight, 1 / temperature, memory.shape[-1]),
        ):
            q = np.exp(log_q) if share else np.zeros_like(log_q)
            row = scale * share * q * (slope - (q * slope).sum())
            result.append(_pad(row[:width], width, 0.0))
        to_lmbda.append(np.array([(slope * (np.exp(m) - np.exp(b))).sum()]))
    lead = base.shape[:-1]
    return (
        _tensor(to_base, base.shape),
        _tensor(to_memory, memory.shape),
        _tensor(to_lmbda, (*lead, 1))[..., 0],
    )


def token_log_probs(
    logits: Tensor, labels: Tensor, vocab_size: int | None = None, ignore_index: int = -100
) -> Tensor:
    values = []
    for row, label in _labelled(logits, labels, vocab_size):
        known = 0 <= label < row.size
        value = log_softmax(row)[label] if known else math.nan
        values.append(np.array([0.0 if label == ignore_index else value]))
    return _tensor(values, (*labels.shape, 1))[..., 0]


def token_log_probs_gradient(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    rows = []
    upstream = as_array(grad).reshape(-1)
    for g, (row, label) in zip(upstream, _labelled(logits, labels, vocab_size), strict=True):
        if label == ignore_index:
            result = np.zeros_like(row)
        elif not 0 <= label < row.size:
            result = np.full_like(row, math.nan)
        else:
            result = -g * _minus_onehot(np.exp(log_softmax(row)), label)
        rows.append(_pad(result, logits.shape[-1], 0.0))
    return _tensor(rows, logits.shape)


def sparse_kl(
    logits: Tensor,
    targets: list[dict[int, float]],
    labels: Tensor | None,
    alpha: float = 0.5,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, kl and ce of each row; targets are a dict from token to probability for each."""
    values = []
    for row, label, target in _targeted(logits, targets, labels, vocab_size):
        if label == ignore_index or (label is None and not target):
            values.append(np.zeros(3))
            continue
        log_q = log_softmax(row)
        kl = sum((p * (math.log(p) - log_q[t]) for t, p in target.items() if p > 0), 0.0)
        ce = 0.0 if label is None else -log_q[label]
        loss = kl if label is None else _blend(alpha, kl, ce)
        values.append(np.array([loss, kl, ce]))
    return tuple(_tensor(values, (*logits.shape[:-1], 3)).unbind(-1))


def sparse_kl_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: list[dict[int, float]],
    labels: Tensor | None,
    alpha: float = 0.5,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """With `grad` one upstream gradient a row."""
    rows = []
    upstream = as_array(grad).reshape(-1)
    cases = _targeted(logits, targets, labels, vocab_size)
    for g, (row, label, target) in zip(upstream, cases, strict=True):
        result = np.zeros_like(row)
        if label != ignore_index and not (label is None and not target):
            q = np.exp(log_softmax(row))
            weight = 1.0 if label is None else alpha
            result += weight * sum(target.values()) * q
            for token, p in target.items():
                result[token] -= weight * p
            if label is not None:
                # 1 - q from the others: q itself may have rounded to 1.
                result += (1 - alpha) * _minus_onehot(q, label)
        rows.append(_pad(g * result, logits.shape[-1], 0.0))
    return _tensor(rows, logits.shape)


def knn(
    distances: Tensor, tokens: Tensor, temperature: float = 1.0, max_entries: int | None = None
) -> tuple[list[dict[int, float]], list[float]]:
    """Each row's tokens with their probabilities, most probable first, and its dropped mass."""
    rows, dropped = [], []
    for ds, ts in zip(as_array(distances), tokens.cpu().tolist(), strict=True):
        valid = [(d, t) for d, t in zip(ds, ts, strict=True) if t >= 0 and d < math.inf]
        nearest = min((d for d, _ in valid), default=0.0)
        masses: dict[int, float] = {}
        for d, t in valid:
            farther = 0.0 if d == nearest else d - nearest
            masses[t] = masses.get(t, 0.0) + math.exp(-farther / temperature)
        total = math.fsum(masses.values())
        entries = sorted((-np.float32(mass / total), t) for t, mass in masses.items())
        kept = [t for negative, t in entries if negative < 0]
        kept, cut = kept[:max_entries], kept[max_entries:] if max_entries is not None else []
        kept_total = math.fsum(masses[t] for t in kept) if cut else total
        rows.append({t: masses[t] / kept_total for t in kept})
        dropped.append(math.fsum(masses[t] for t in cut) / total if total else 0.0)
    return rows, dropped


def _mixture_rows(
    base: Tensor,
    memory: Tensor,
    lmbda: Tensor | float,
    temperature: float,
    vocab_size: int | None,
) -> list[tuple[Array, Array, float]]:
    """Log-softmaxes of both models over the real tokens, and the weight, of each row."""
    vocab = base.shape[-1] if vocab_size is None else vocab_size
    weights = torch.as_tensor(lmbda).float().double().cpu().expand(base.shape[:-1]).reshape(-1)
    rows = []
    for b, m, weight in zip(
        as_array(base).reshape(-1, base.shape[-1]),
        as_array(memory).reshape(-1, memory.shape[-1]),
        weights.tolist(),
        strict=True,
    ):
        log_memory = log_softmax(m[:vocab] / temperature)
        rows.append((log_softmax(b[:vocab]), _pad(log_memory, vocab, -math.inf), weight))
    return rows


def _mix(log_base: Array, log_memory: Array, weight: float) -> Array:
    """The mixture's probabilities; a model without weight has no influence."""
    if not 0 <= weight <= 1:
        return np.full_like(log_base, math.nan)
    p = np.zeros_like(log_base)
    if weight < 1:
        p += (1 - weight) * np.exp(log_base)
    if weight > 0:
        p += weight * np.exp(log_memory)
    return p


def _weighted(log_p: float, weight: float) -> float:
    return log_p + math.log(weight) if weight > 0 else -math.inf


def _blend(alpha: float, kl: float, ce: float) -> float:
    """A term without weight has no influence, not even its infinity."""
    return (alpha * kl if alpha else 0.0) + ((1 - alpha) * ce if alpha < 1 else 0.0)


def _minus_onehot(q: Array, label: int) -> Array:
    result = q.copy()
    result[label] = -np.delete(q, label).sum() if q[label] > 0.5 else q[label] - 1
    return result


def _labelled(logits: Tensor, labels: Tensor, vocab_size: int | None) -> list[tuple[Array, int]]:
    rows = as_array(logits).reshape(-1, logits.shape[-1])[:, :vocab_size]
    return list(zip(rows, labels.reshape(-1).tolist(), strict=True))


def _targeted(
    logits: Tensor,
    targets: list[dict[int, float]],
    labels: Tensor | None,
    vocab_size: int | None,
) -> list[tuple[Array, int | None, dict[int, float]]]:
    rows = as_array(logits).reshape(-1, logits.shape[-1])[:, :vocab_size]
    all_labels = [None] * len(rows) if labels is None else labels.reshape(-1).tolist()
    return list(zip(rows, all_labels, targets, strict=True))


def _pad(row: Array, width: int, value: float) -> Array:
    return np.pad(row, (0, width - row.size), constant_values=value)


def _tensor(rows: list[Array], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.array(rows)).reshape(shape)
