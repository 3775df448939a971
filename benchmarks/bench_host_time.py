"""Host time of a call on one short row, against torch.log_softmax without grad in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memdec import ops

CALLS = 200  # in a row: fewer than a CUDA stream queues up before the host has to wait
COLUMNS = 64
# What the op returns beside its first tensor.
FURTHER_OUTPUTS = {
    "fused_interpolate": 0,
    "interpolate_sample, greedy": 1,
    "interpolate_sample": 1,
    "token_log_probs": 0,
    "knn_scatter": 3,
    "sparse_kl_loss": 2,
}
WITH_GRAD = ["fused_interpolate", "token_log_probs", "sparse_kl_loss"]


def host_seconds(call: Callable[[], Any], device: str) -> float:
    """Median host time of a call; what it launches is waited for outside of the clock."""
    seconds = []
    for _ in range(15):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        seconds.append((time.perf_counter() - begin) / CALLS)
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(seconds[2:])


@pytest.mark.parametrize(
    ("op", "with_grad"),
    [*((op, False) for op in FURTHER_OUTPUTS), *((op, True) for op in WITH_GRAD)],
)
def test_host_time(benchmark, device, copy_bandwidth, op, with_grad):
    base, memory = torch.randn(2, 1, COLUMNS, device=device)
    labels = torch.tensor([3], device=device)
    distances = torch.rand(1, 8, device=device)
    tokens = torch.randint(COLUMNS, (1, 8), device=device)
    targets = ops.knn_scatter(distances, tokens)
    calls = {
        "fused_interpolate": lambda: ops.fused_interpolate(base, memory, 0.3),
        "interpolate_sample, greedy": lambda: ops.interpolate_sample(
            base, memory, 0.3, temperature=0
        ),
        "interpolate_sample": lambda: ops.interpolate_sample(base, memory, 0.3),
        "token_log_probs": lambda: ops.token_log_probs(base, labels),
        "knn_scatter": lambda: ops.knn_scatter(distances, tokens),
        "sparse_kl_loss": lambda: ops.sparse_kl_loss(base, targets, labels),
    }
    log_softmax = host_seconds(lambda: torch.log_softmax(base, -1), device)
    empty = host_seconds(lambda: torch.empty(1, device=device), device)
    goal = {"seconds": 2.5 * log_softmax + FURTHER_OUTPUTS[op] * empty}
    base.requires_grad_(with_grad)  # forward alone is timed
    benchmark.extra_info.update(
        op=f"host time, one row of 64, {'with' if with_grad else 'no'} grad",
        case=op,
        contender="memdec",
        device_seconds=host_seconds(calls[op], device),
        floor_bytes=0,
        bandwidth=copy_bandwidth,
        goal=None if with_grad else goal,
        log_softmax_seconds=log_softmax,
    )
    benchmark.pedantic(calls[op], rounds=20, warmup_rounds=1)
