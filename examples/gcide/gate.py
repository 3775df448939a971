"""A lmbda for every token: how sure both models are, and which of them was right so far.

A small network reads, at each position, both models' highest log-probability and entropy, and how
much better the memory than the base predicted the tokens before, and answers the weight of the
memory. It is fitted on the validation split, where the mixture's likelihood is all that counts.

Text outside the domain it has never seen. There the weight is bounded by evidence: the gated mixture
and the base are two forecasters of the same sequence, mixed by their posterior (fixed share, Herbster
and Warmuth 1998). Whatever the gate does, the result loses to the base no more than
``log 2`` nats a context and about :data:`SHARE` nats a token. The posterior knows past tokens only,
so all of this is one lmbda a token, known before the token is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scores import Scores
from torch.nn.functional import logsigmoid

from memdec.evaluation.mixture import mix_log_probs

SHARE = 1e-3  # of the posterior that starts anew at every token, so that a change of text is seen
_MEMORIES = (0.8, 0.98)  # of the running means of past gains: the last few tokens, the last page
_LARGEST_GAIN = 5.0  # nats; one surprise must not drown the rest
_HIDDEN = 32
_STEPS = 300


@dataclass(frozen=True)
class Gate:
    """The fitted network and the blocks, at whose start all evidence is forgotten."""

    network: torch.nn.Module
    mean: torch.Tensor
    scale: torch.Tensor
    block_size: int

    @classmethod
    def fit(
        cls, base: Scores, memory: Scores, block_size: int, *, device: str = "cpu", seed: int = 0
    ) -> Gate:
        """Maximises the likelihood of the mixture on the validation split; a second on a GPU."""
        features = _features(base, memory, block_size, device)
        mean, scale = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        inputs = (features - mean) / scale
        log_base, log_memory = (torch.from_numpy(one.label).to(inputs) for one in (base, memory))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = torch.nn.Sequential(
                torch.nn.Linear(inputs.shape[1], _HIDDEN),
                torch.nn.Tanh(),
                torch.nn.Linear(_HIDDEN, 1),
                torch.nn.Flatten(0),
            ).to(device)
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
            for _ in range(_STEPS):
                scores = network(inputs)  # lmbda is their sigmoid
                mixed = torch.logaddexp(
                    logsigmoid(-scores) + log_base, logsigmoid(scores) + log_memory
                )
                loss = -mixed.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return cls(network, mean, scale, block_size)

    def lmbda(self, base: Scores, memory: Scores) -> np.ndarray:
        """The memory's weight at each position, float64 [positions]."""
        with torch.inference_mode():
            features = _features(base, memory, self.block_size, str(self.mean.device))
            scores = self.network((features - self.mean) / self.scale)
            lmbda = scores.double().sigmoid().cpu().numpy()
        mixed = mix_log_probs(base.label, memory.label, lmbda)
        return lmbda * posterior(base.label, mixed, self.block_size)


def posterior(base: np.ndarray, mixed: np.ndarray, block_size: int) -> np.ndarray:
    """The weight of `mixed` against `base` by the tokens before, float64 [positions].

    Args:
        base: log-probabilities of the labels, [positions]; as `mixed`.
        block_size: positions of a context, each begun at one half.
    """
    gains = _as_blocks(mixed - base, block_size)
    weights = np.empty_like(gains)
    weight = np.full(len(gains), 0.5)
    for column in range(block_size):
        weights[:, column] = weight
        odds = weight / (1 - weight) * np.exp(np.clip(gains[:, column], -50, 50))
        weight = SHARE / 2 + (1 - SHARE) * odds / (1 + odds)
    return weights.ravel()[: len(base)]


def _features(base: Scores, memory: Scores, block_size: int, device: str) -> torch.Tensor:
    """float32 [positions, features]; nothing in a row depends on its label or on later tokens."""
    gains = (memory.label - base.label).clip(-_LARGEST_GAIN, _LARGEST_GAIN)
    columns = [base.top, base.entropy, memory.top, memory.entropy]
    columns += [_running_mean(gains, block_size, keep) for keep in _MEMORIES]
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32)).to(device)


def _running_mean(gains: np.ndarray, block_size: int, keep: float) -> np.ndarray:
    """Exponential mean of the gains before each position of a block, from 0 at its start."""
    blocks = _as_blocks(gains, block_size)
    means = np.zeros_like(blocks)
    for column in range(1, block_size):
        means[:, column] = keep * means[:, column - 1] + (1 - keep) * blocks[:, column - 1]
    return means.ravel()[: len(gains)]


def _as_blocks(values: np.ndarray, block_size: int) -> np.ndarray:
    """float64 [blocks, block_size], zeros after the last position."""
    padding = -len(values) % block_size
    return np.pad(values.astype(np.float64), (0, padding)).reshape(-1, block_size)
