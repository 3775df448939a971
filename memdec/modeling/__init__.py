"""Models: loading them, the layer that gives the keys, the memory and its pairing with a base."""

from memdec.modeling.memory_decoder import MemoryDecoderForCausalLM

__all__ = ["MemoryDecoderForCausalLM"]
