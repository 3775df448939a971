"""``memdec info``: versions, what was built, and what each op runs on here, with the reason."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

_PACKAGES = (
    "memdec",
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "datasets",
    "gguf",
)


def print_info() -> None:
    """Prints the report, one ``name: value`` a line, in sections."""
    report = sections()
    width = 1 + max(len(name) for lines in report.values() for name in lines)
    for title, lines in report.items():
        print(title)
        for name, value in lines.items():
            print(f"  {name + ':':<{width}} {value}")


def sections() -> dict[str, dict[str, str]]:
    """The report: title to name to value."""
    return {
        "versions": dict(_versions()),
        "built": dict(_built()),
        "devices": dict(_devices()),
        "ops": dict(_ops()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _built() -> Iterator[tuple[str, str]]:
    from memdec import _native

    module = _native._C
    if module is None:
        yield "native kernels", f"none: {_native.why_missing('cpu')}"
        return
    yield "native kernels", f"built with {module.compiler}"
    yield "SIMD levels here", ", ".join(module.simd_levels())
    yield "CUDA", f"architectures {module.cuda_archs}" if module.with_cuda else "built without"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cpu", f"{torch.get_num_threads()} threads"
    yield "torch's CUDA", torch.version.cuda or "built without"
    if not torch.cuda.is_available():
        yield "cuda", "torch sees no GPU"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"


def _ops() -> Iterator[tuple[str, str]]:
    from memdec import ops

    yield "all of", ", ".join(name for name in ops.__all__ if name.islower())
    for device in ("cpu", "cuda"):
        yield f"on {device}", _implementation(device)


def _implementation(device: str) -> str:
    """What tensors of a device type run on; nothing here warns or raises, whatever is missing."""
    from memdec import _native

    reason = _native.why_missing(device)
    if reason is not None:
        return f"plain PyTorch ({reason})"
    try:
        module = _native.kernels_for(device)
    except ValueError as error:
        return f"unusable ({error})"
    assert module is not None
    return f"native ({module.simd_level()})" if device == "cpu" else "native"
