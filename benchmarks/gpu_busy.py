"""How busy the GPU is: nvidia-smi's samples of the share of the last moment that a kernel ran."""

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
        self._samples: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Asks nvidia-smi again and again; without a GPU it does nothing."""
        if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
            yield
            return
        command = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu"]
        command += ["--format=csv,noheader,nounits"]
        over = threading.Event()

        def ask() -> None:
            while not over.wait(0.1):
                answer = subprocess.run(command, capture_output=True, text=True).stdout
                with contextlib.suppress(ValueError):  # "[N/A]"
                    self._samples.append((time.perf_counter(), float(answer) / 100))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()

    def share(self, begin: float, end: float) -> float | None:
        """The mean of the samples between two times of ``time.perf_counter``."""
        within = [busy for at, busy in self._samples if begin < at < end]
        return sum(within) / len(within) if within else None
