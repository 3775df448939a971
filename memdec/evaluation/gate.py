"""Fits the gate that chooses lmbda a token, on validation, in seconds; and applies it to a split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from memdec.data.corpus import TokenStream
from memdec.errors import MemdecError
from memdec.evaluation.forward import LabelScores
from memdec.modeling.gate import FEATURES, Gate, Told, lmbda_of, posterior

_HIDDEN = 32
_STEPS = 300


def fit_gate(
    base: LabelScores,
    memory: LabelScores,
    stream: TokenStream,
    block_size: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Gate:
    """The gate whose network's mixture gives the labels the most probability.

    The same scores and seed give the same gate on one kind of device and number of threads.

    Args:
        base, memory: of the same positions, from the stream's start, with confidence.
        stream: where contexts begin, with `block_size`.

    Raises:
        MemdecError: neither gives any label a probability above 0.
    """
    told = _told(base, memory, stream, block_size)
    known = np.isfinite(base.log_probs) | np.isfinite(memory.log_probs)  # else no lmbda helps
    if not known.any():
        raise MemdecError(
            f"base and memory both give each of {len(known)} labels the probability 0; "
            "there is nothing to fit a gate on"
        )
    features = told.features().flatten(0, 1)[: len(known)][known].float().to(device)
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    inputs = (features - mean) / scale
    log_base, log_memory = (
        torch.from_numpy(one.log_probs[known]).to(inputs) for one in (base, memory)
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        hidden, output = torch.nn.Linear(FEATURES, _HIDDEN), torch.nn.Linear(_HIDDEN, 1)
        network = torch.nn.Sequential(hidden, torch.nn.Tanh(), output, torch.nn.Flatten(0))
        network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            logits = network(inputs)
            mixed = torch.logaddexp(logsigmoid(-logits) + log_base, logsigmoid(logits) + log_memory)
            loss = -mixed.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    weight = hidden.weight.detach().double() / scale.double()
    bias = hidden.bias.detach().double() - weight @ mean.double()
    return Gate(
        tuple(map(tuple, weight.tolist())),
        tuple(bias.tolist()),
        tuple(output.weight[0].tolist()),
        output.bias.item(),
    )


def gate_lmbda(
    gate: Gate, base: LabelScores, memory: LabelScores, stream: TokenStream, block_size: int
) -> np.ndarray:
    """The memory's weight at each position, float64 [positions]; arguments of :func:`fit_gate`."""
    lmbda = lmbda_of(gate.states(_told(base, memory, stream, block_size)))
    return lmbda.flatten().numpy()[: len(base.log_probs)]


def evidence_lmbda(
    base: np.ndarray, other: np.ndarray, stream: TokenStream, block_size: int
) -> np.ndarray:
    """The posterior of `other` against `base` by the tokens before each label, float64 [positions].

    Args:
        base, other: log-probabilities of the labels, [positions].
    """
    with np.errstate(invalid="ignore"):  # NaN where neither gives the label any mass
        gains = _shifted(other.astype(np.float64) - base)
    continues = _continues(stream, len(base), block_size)
    rows = (_rows(values, block_size) for values in (gains, continues))
    return posterior(*rows).flatten().numpy()[: len(base)]


def _told(base: LabelScores, memory: LabelScores, stream: TokenStream, block_size: int) -> Told:
    assert base.confidence is not None
    assert memory.confidence is not None
    parts = (
        _shifted(base.log_probs),
        _shifted(memory.log_probs),
        np.concatenate([base.confidence, memory.confidence], axis=1),
        _continues(stream, len(base.log_probs), block_size),
    )
    return Told(*(_rows(part, block_size) for part in parts))


def _continues(stream: TokenStream, positions: int, block_size: int) -> np.ndarray:
    """Whether a position sees the one before: not at a block's start, nor an isolated document's."""
    found = np.arange(positions) % block_size != 0
    if stream.isolate_documents:
        separators = stream.documents - 1
        found[separators[separators < positions]] = False
    return found


def _shifted(labels: np.ndarray) -> np.ndarray:
    """From where a token is the label to where it is read."""
    return np.concatenate([np.zeros_like(labels[:1]), labels[:-1]])


def _rows(values: np.ndarray, block_size: int) -> Tensor:
    """[blocks, block_size, ...], zeros after the last position."""
    padding = [(0, -len(values) % block_size)] + [(0, 0)] * (values.ndim - 1)
    return torch.from_numpy(np.pad(values, padding)).unflatten(0, (-1, block_size))
