"""How busy the GPU is, and its memory: nvidia-smi's samples.

Busy is the share of the last moment that a kernel ran; memory is everyone's, torch's cache and
FAISS's own too.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import torch


class GpuBusy:
    """Samples with their times, taken while :meth:`watch` is open."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, int]] = []  # time, share, bytes

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Asks nvidia-smi again and again; without a GPU it does nothing."""
        if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
            yield
            return
        # By its own id: nvidia-smi counts GPUs that are hidden from this process too.
        gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        command = ["nvidia-smi", "-i", gpu, "--query-gpu=utilization.gpu,memory.used"]
        command += ["--format=csv,noheader,nounits"]
        over = threading.Event()

        def ask() -> None:
            while not over.wait(0.1):
                answer = subprocess.run(command, capture_output=True, text=True).stdout
                with contextlib.suppress(ValueError):  # "[N/A]"
                    busy, used = map(float, answer.split(","))
                    self._samples.append((time.perf_counter(), busy / 100, int(used * 2**20)))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()

    def share(self, begin: float, end: float) -> float | None:
        """The mean of the samples between two times of ``time.perf_counter``."""
        within = [busy for at, busy, _ in self._samples if begin < at < end]
        return sum(within) / len(within) if within else None

    def peak_bytes(self, begin: float, end: float) -> int | None:
        """The most memory in use between two such times."""
        return max((used for at, _, used in self._samples if begin < at < end), default=None)
