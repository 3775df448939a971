"""Memory Decoder: a small memory that sits beside a frozen language model (arXiv 2508.09874).

Importing memdec is cheap; what is named here is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memdec import ops as ops
    from memdec.modeling import MemoryDecoderForCausalLM as MemoryDecoderForCausalLM

__all__ = ["MemoryDecoderForCausalLM", "__version__", "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("memdec.ops")
    if name == "MemoryDecoderForCausalLM":
        return import_module("memdec.modeling").MemoryDecoderForCausalLM
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("memdec")
        except PackageNotFoundError:  # a source tree that is on the path and not installed
            return "0+unknown"
    raise AttributeError(f"module 'memdec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
