"""Every environment variable that memdec reads, in one place.

At run time, read once when memdec is imported:

| variable | values | meaning |
|---|---|---|
| `MEMDEC_REQUIRE_NATIVE` | 0, 1 | 1: an op that would fall back to plain PyTorch raises RuntimeError |
| `MEMDEC_CHECK_VALUES` | 0, 1 | 1: ops check the values inside tensors (synchronises) and raise ValueError |
| `MEMDEC_SIMD` | baseline, avx2, avx512 | the CPU kernels' instruction set, instead of the best one |
| `MEMDEC_DEBUG` | 0, 1 | 1: the command line lets errors through with their traceback |

At build time (setup.py):

| variable | values | meaning |
|---|---|---|
| `MEMDEC_CUDA` | auto, on, off | build the CUDA kernels: when nvcc is found, always, never |
| `MEMDEC_CUDA_ARCHS` | such as 80;90 | compute capabilities of the machine code |
"""

import os
from dataclasses import dataclass


@dataclass
class Environment:
    """The variables that matter at run time."""

    require_native: bool
    check_values: bool
    simd: str | None
    debug: bool

    @classmethod
    def read(cls) -> "Environment":
        """What `os.environ` says now."""
        return cls(
            require_native=_flag("MEMDEC_REQUIRE_NATIVE"),
            check_values=_flag("MEMDEC_CHECK_VALUES"),
            simd=os.environ.get("MEMDEC_SIMD") or None,
            debug=_flag("MEMDEC_DEBUG"),
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


environment = Environment.read()
