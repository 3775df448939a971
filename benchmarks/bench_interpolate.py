"""fused_interpolate against the same mathematics in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from memdec import ops

# Rows, columns of the base and, where they are others, of the memory.
WIDER = (4096, 151936, 152064)
GOALS = {
    "cuda": {
        (1, 151936): {"seconds": 8e-6},
        (16, 151936): {"seconds": 12e-6},
        (256, 50257): {"share": 0.70},
        (256, 128256): {"share": 0.80},
        (256, 151936): {"share": 0.80},
        (4096, 50257): {"share": 0.90},
        (4096, 128256): {"share": 0.90},
        (4096, 151936): {"share": 0.90},
        WIDER: {"share": 0.90},
    },
    "cpu": {
        (1, 151936, torch.float32): {"times_eager": 4},
        (1, 151936, torch.bfloat16): {"times_eager": 5},
        (64, 151936, torch.float32): {"times_eager": 7, "share": 0.40},
        (64, 151936, torch.bfloat16): {"times_eager": 9, "share": 0.27},
    },
}
SHAPES = {"cuda": list(GOALS["cuda"]), "cpu": [(1, 151936), (64, 151936)]}
DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
]
LMBDA = 0.3


def mixture(base: torch.Tensor, memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.logaddexp(
        torch.log_softmax(base.to(dtype), -1) + math.log1p(-LMBDA),
        torch.log_softmax(memory.to(dtype), -1) + math.log(LMBDA),
    )


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "dtypes", DTYPES, ids=[f"{name(read)}-{name(written)}" for read, written in DTYPES]
)
def test_interpolate(contest, device, shape, dtypes, contender):
    rows, vocab = shape[:2]
    dtype, out_dtype = dtypes
    if device == "cuda" and dtype == torch.float32 and shape != (4096, 151936):
        pytest.skip("bfloat16 is what models give")
    if out_dtype == torch.bfloat16 and rows < 4096:
        pytest.skip("the result is rounded where it is large")

    if contender == "compiled" and (vocab == 128256 or shape in ((256, 50257), WIDER)):
        pytest.skip("the shapes on both sides show it")

    def eager(base: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return mixture(base, memory[:, :vocab], torch.float32).to(out_dtype)

    functions = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "memdec": lambda b, m: ops.fused_interpolate(b, m, LMBDA, out_dtype=out_dtype),
    }
    function = functions[contender]

    def logits(columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).mul_(3).to(dtype)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return logits(vocab), logits(shape[-1])

    base, memory = both()

    def check(result: torch.Tensor) -> None:
        few = slice(0, 8)
        truth = mixture(base[few], memory[few, :vocab], torch.float64)
        allowed = 1e-5 if out_dtype == torch.float32 else 4e-3
        torch.testing.assert_close(result[few].double(), truth, rtol=allowed, atol=1e-5)

    def another():
        base, memory = both()
        return lambda: function(base, memory)

    contest.run(
        op="fused_interpolate",
        case=f"{name(dtype)} -> {name(out_dtype)}, {rows} x "
        + " against ".join(f"{columns:,}" for columns in shape[1:]),
        contender=contender,
        run=lambda: function(base, memory),
        check=check,
        floor_bytes=base.numel() * (2 * dtype.itemsize + out_dtype.itemsize),
        another=another if rows <= 256 else None,
        goal=GOALS[device][shape if device == "cuda" else (*shape, dtype)],
    )
