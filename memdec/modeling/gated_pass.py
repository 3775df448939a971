"""The gate's part in a forward pass, which may go on where an earlier one ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from memdec.modeling.cache import Evidence, MemoryDecoderCache
from memdec.modeling.gate import Gate, Told, confidence
from memdec.ops import token_log_probs

_IGNORED = -100


class GatedPass:
    """Made before base and memory read the tokens, since they lengthen the cache.

    Args:
        gate: chooses lmbda.
        cache: what the models go on from; None begins anew.
        input_ids, attention_mask, position_ids: of the pass.

    Raises:
        ValueError: a mask that does not say which tokens are padding; a cache that holds tokens and
            no evidence of them.
    """

    def __init__(
        self,
        gate: Gate,
        cache: MemoryDecoderCache | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        self.gate = gate
        self.input_ids = input_ids
        self.past = 0 if cache is None else int(cache.get_seq_length())
        self.before: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if cache is not None and self.past > 0:
            if cache.evidence is None:
                raise ValueError("a gate cannot go on from a cache that was filled without one")
            self.before = cache.evidence.last_of(self.past)
        self.continues = _continues(input_ids, attention_mask, position_ids, self.past > 0)

    @torch.no_grad()
    def states(self, base: Tensor, memory: Tensor, vocab_size: int) -> Tensor:
        """What `Gate.states` gives, from the logits at all positions, ``[rows, length, V]``.

        `vocab_size` is the number of real tokens.
        """
        *last, before = self.before
        given: list[Tensor] = []
        sure: list[Tensor] = []
        for logits, at_last in zip((base, memory), last, strict=True):
            real = min(vocab_size, logits.shape[-1])
            labels = pad(self.input_ids[:, 1:], (0, 1), value=_IGNORED)
            following = _log_probs(logits, labels, real).roll(1, dims=1)
            if at_last is not None:
                following[:, 0] = _log_probs(at_last, self.input_ids[:, 0], real)
            given.append(following)
            sure.append(confidence(logits, real))
        return self.gate.states(
            Told(given[0], given[1], torch.cat(sure, dim=-1), self.continues), before
        )

    def evidence(self, base: Tensor, memory: Tensor, states: Tensor, kept: Any) -> Evidence:
        """What a next pass goes on from: the positions kept at the end, all if not counted there.

        Args:
            kept: the pass's ``logits_to_keep``.
        """
        length = states.shape[1]
        keep = min(kept or length, length) if isinstance(kept, int) else length
        parts = (part.detach()[:, -keep:] for part in (base, memory, states))
        if keep < length:  # a view would keep the logits of a whole prompt alive
            parts = (part.clone() for part in parts)
        return Evidence(self.past + length, *parts)


def _continues(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    goes_on: bool,
) -> Tensor:
    """Where the token before belongs to the same context, bool ``[rows, length]``.

    Not where it or the token itself is padding, nor where positions begin at 0.
    """
    rows, length = input_ids.shape
    if attention_mask is None:
        attention_mask = input_ids.new_ones((rows, length + goes_on))
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError("a gate takes attention_mask as [batch, past + length], or None")
    real = attention_mask[:, -length - goes_on :].bool()
    real = pad(real, (length + 1 - real.shape[1], 0))  # nothing lies before the first position
    found = real[:, 1:] & real[:, :-1]
    if position_ids is not None and position_ids.ndim == 2:
        found = found & (position_ids != 0)
    return found


def _log_probs(logits: Tensor, ids: Tensor, real: int) -> Tensor:
    """Log-probability of each token; -inf for one that the model does not know."""
    found = token_log_probs(logits, torch.where(ids < real, ids, _IGNORED), vocab_size=real)
    return torch.where(ids < real, found, -torch.inf)
