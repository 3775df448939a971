"""Work that overlaps: results are taken from the device while it works on what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from memdec.errors import MemdecError

T = TypeVar("T")


class InFlight(Generic[T]):
    """Tensors of one device on their way to the host, and what becomes of them there.

    From a GPU they are copied into pinned memory behind the work that makes them, and the host waits
    for nothing before it asks for the result.

    Args:
        tensors: as the device will have made them.
        finish: takes them on the CPU, in order, and makes the result.
        errors: message to a bool tensor; the result is a MemdecError where it is true.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        finish: Callable[..., T],
        errors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._finish = finish
        self._errors = {
            message: flag.to("cpu", non_blocking=True) for message, flag in (errors or {}).items()
        }
        self._copied: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def result(self) -> T:
        if self._copied is not None:
            self._copied.synchronize()
        for message, flag in self._errors.items():
            if flag:
                raise MemdecError(message)
        return self._finish(*self._copies)


def in_order(started: Iterable[InFlight[T]]) -> Iterator[T]:
    """The results, each asked for when the next one has been started."""
    before = None
    for current in started:
        if before is not None:
            yield before.result()
        before = current
    if before is not None:
        yield before.result()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device behind the work it has, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
