"""The key-value caches of base and memory, handled by generation as one."""

from __future__ import annotations

from typing import Any

from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

# What transformers calls a cache, in arguments and in results: "cache" since 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MemoryDecoderCache(Cache):
    """Holds a cache of the base and one of the memory.

    Whatever transformers does to a cache's layers (reorder for beams, crop, reset, repeat) happens
    to both, whose layers it lists one after the other. Lengths are the base's; the memory has seen
    the same tokens.
    """

    # Layers belong to the two caches. Compilation and ready-made 4D masks are for one model alone.
    layer_class_to_replicate = None
    offloading = False
    is_compileable = False

    def __init__(self, base: Cache, memory: Cache) -> None:
        self.base = base
        self.memory = memory

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        return [*self.base.layers, *self.memory.layers]
