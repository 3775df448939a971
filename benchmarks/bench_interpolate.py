"""fused_interpolate against the same mathematics in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from memdec import ops

SHAPES = {
    "cuda": [(1, 151936), (16, 151936), (256, 151936), (4096, 50257), (4096, 151936)],
    "cpu": [(1, 151936), (64, 151936)],
}
LMBDA = 0.3


def mixture(base: torch.Tensor, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.logaddexp(
        torch.log_softmax(base.to(dtype), -1) + math.log1p(-LMBDA),
        torch.log_softmax(memory.to(dtype), -1) + math.log(LMBDA),
    )


def eager(base: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return mixture(base, memory, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_interpolate(contest, device, shape, dtype, contender):
    base = torch.randn(shape, device=device).mul_(3).to(dtype)
    memory = torch.randn(shape, device=device).mul_(3).to(dtype)
    functions = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "memdec": lambda b, m: ops.fused_interpolate(b, m, LMBDA),
    }
    function = functions[contender]

    def check(result: torch.Tensor) -> None:
        rows = slice(0, 8)
        truth = mixture(base[rows], memory[rows], torch.float64)
        torch.testing.assert_close(result[rows].double(), truth, rtol=1e-5, atol=1e-5)

    contest.run(
        op="fused_interpolate",
        case=f"{str(dtype)[6:]} -> float32, {shape[0]} x {shape[1]:,}",
        contender=contender,
        run=lambda: function(base, memory),
        check=check,
        floor_bytes=base.numel() * (2 * base.element_size() + 4),
    )
