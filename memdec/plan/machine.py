"""What a machine has free and how fast it is, measured on the spot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Machine:
    """Bytes free, operations a second, and the GPUs that FAISS would use.

    Attributes:
        device: "cpu" or "cuda".
        gpu_memory: free on each GPU, the least of several; 0 on a CPU.
        rates: of a matrix product: "float32" and "bfloat16" on the device, "host" in float32 on the
            CPU.
        faiss_gpus: their numbers; none where FAISS is missing or has no GPU.
    """

    device: str
    disk: int
    memory: int
    gpu_memory: int
    rates: dict[str, float]
    faiss_gpus: tuple[int, ...] = ()


def measure_machine(device: str, out: Path) -> Machine:
    """Free disk where `out` will be, free memory, and the rate of a matrix product."""
    import torch

    from memdec.data.faiss_gpu import gpus_of
    from memdec.modeling.loading import pick_device

    picked = pick_device(device)
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    has_faiss = importlib.util.find_spec("faiss") is not None
    gpus = gpus_of(str(picked)) if has_faiss else []
    gpu_memory = 0
    if picked.type == "cuda":
        free = [torch.cuda.mem_get_info(picked)[0]]
        gpu_memory = min(free + [torch.cuda.mem_get_info(gpu)[0] for gpu in gpus])
    rates = {name: _rate(picked, getattr(torch, name)) for name in ("float32", "bfloat16")}
    rates["host"] = _rate(torch.device("cpu"), torch.float32)
    disk = shutil.disk_usage(existing).free
    return Machine(picked.type, disk, _free_memory(), gpu_memory, rates, tuple(gpus))


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if "MemAvailable" in line) * 1024
    except (OSError, StopIteration):  # not Linux: all of it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rate(device: Any, dtype: Any) -> float:
    """Operations a second of a square matrix product, the best of three."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)
