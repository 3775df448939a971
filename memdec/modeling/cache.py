"""The key-value caches of base and memory, handled by generation as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls a cache, in arguments and in results: "cache" since 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass(frozen=True)
class Evidence:
    """What a gate goes on from: the last positions of a pass, those whose logits were asked for.

    Attributes:
        length: how many positions the cache held after the pass.
        base, memory: logits, ``[rows, kept, V]`` of either's width.
        states: what `Gate.states` gave there, ``[rows, kept, ...]``.
    """

    length: int
    base: Tensor
    memory: Tensor
    states: Tensor

    def last_of(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of base and memory and the state at the last of `length` positions, ``[rows, ...]``.

        Raises:
            ValueError: the cache was cropped to before what was kept.
        """
        kept = self.states.shape[1]
        place = length - 1 - (self.length - kept)
        if not 0 <= place < kept:
            raise ValueError(
                f"a gate can go on from the last {kept} of {self.length} positions, where the last "
                f"pass kept logits; the cache holds {length}"
            )
        return self.base[:, place], self.memory[:, place], self.states[:, place]


class MemoryDecoderCache(Cache):
    """Holds a cache of the base and one of the memory, and a gate's evidence.

    Whatever transformers does to a cache's layers (reorder for beams, crop, reset, repeat) happens
    to both, whose layers it lists one after the other. Lengths are the base's; the memory has seen
    the same tokens.
    """

    # Layers belong to the two caches. Compilation and ready-made 4D masks are for one model alone.
    layer_class_to_replicate = None
    offloading = False
    is_compileable = False

    def __init__(self, base: Cache, memory: Cache, evidence: Evidence | None = None) -> None:
        self.base = base
        self.memory = memory
        self.evidence = evidence

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        return [*self.base.layers, *self.memory.layers]

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.evidence is not None:
            rows = torch.arange(len(self.evidence.states), device=self.evidence.states.device)
            self._select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        self.evidence = None

    def _select(self, rows: Tensor) -> None:
        if (kept := self.evidence) is not None:
            parts = (part[rows.to(part.device)] for part in (kept.base, kept.memory, kept.states))
            self.evidence = Evidence(kept.length, *parts)
