"""Finds the native kernels, `memdec._C`, and says once why an op runs without them."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch  # before memdec._C, so that one OpenMP runtime is loaded: torch's

from memdec.environment import environment

_C: ModuleType | None = None
try:
    _C = importlib.import_module("memdec._C")
except ModuleNotFoundError:  # never fatal: the first op that runs without it says why
    # A clone is imported in place of an installed memdec by whoever runs python in its directory.
    _import_error = (
        f"no memdec._C in {Path(__file__).parent}, is it a source tree that is not built?"
    )
except ImportError as error:
    _import_error = str(error)

_in_use: dict[str, ModuleType | None] = {}
_said: set[str] = set()


def kernels_for(device_type: str) -> ModuleType | None:
    """The module with the kernels for "cpu" or "cuda" tensors, or None: use the reference.

    The first None for a device type warns. With `MEMDEC_REQUIRE_NATIVE=1` it is a RuntimeError
    instead; a `MEMDEC_SIMD` that does not exist here is a ValueError.
    """
    try:
        return _in_use[device_type]
    except KeyError:
        return _find(device_type)


def _find(device_type: str) -> ModuleType | None:
    reason = why_missing(device_type)
    if reason is not None:
        fall_back(f"memdec has no native kernels for {device_type} tensors: {reason}")
        found = None
    else:
        assert _C is not None
        if environment.simd is not None and environment.simd not in _C.simd_levels():
            levels = ", ".join(_C.simd_levels())
            raise ValueError(f"MEMDEC_SIMD must be one of {levels}, got {environment.simd!r}")
        if environment.simd is not None:
            _C.set_simd_level(environment.simd)
        found = _C
    _in_use[device_type] = found
    return found


def why_missing(device_type: str) -> str | None:
    """Why there are no native kernels for tensors of this device type; None when there are."""
    if _C is None:
        return _import_error
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return _C.cuda_unavailable_reason()
    return "they exist for cpu and cuda"


def fall_back(reason: str) -> None:
    """Says, once a process for each reason, that an op runs as plain PyTorch, or refuses to."""
    if environment.require_native:
        raise RuntimeError(f"{reason} (MEMDEC_REQUIRE_NATIVE=1 forbids the plain PyTorch fallback)")
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"{reason}. The same result is computed in plain PyTorch, which is slower; "
            "`memdec info` tells more, MEMDEC_REQUIRE_NATIVE=1 makes this an error.",
            RuntimeWarning,
            stacklevel=2,
        )


def launch_on(device: torch.device) -> tuple[int, int]:
    """The first two arguments of every kernel: device index and stream, or -1 and threads."""
    if device.type == "cpu":
        return -1, torch.get_num_threads()
    # The raw handle: torch.cuda.current_stream() builds an object, which costs more than a launch.
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Asks the system for huge pages behind a large new CPU tensor, before it is first written."""
    if _C is not None:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
