"""token_log_probs against log-softmax and gather."""

from __future__ import annotations

import torch

from memdec import ops

SHAPES = {
    "cuda": [(4096, 50257), (4096, 128256), (4096, 151936)],
    "cpu": [(64, 151936)],
}


def log_softmax_and_gather(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]


def test_token_log_probs(contest, device, read_bandwidth, shape, contender):
    rows, vocab = shape
    logits = torch.randn(shape, device=device).mul_(3).bfloat16()
    labels = torch.randint(vocab, (rows,), device=device)
    functions = {
        "eager": log_softmax_and_gather,
        "compiled": torch.compile(log_softmax_and_gather, dynamic=False),
        "memdec": ops.token_log_probs,
    }

    def check(result: torch.Tensor) -> None:
        few = slice(0, 64)
        truth = torch.log_softmax(logits[few].double(), -1).gather(-1, labels[few, None])[:, 0]
        torch.testing.assert_close(result[few].double(), truth, rtol=1e-5, atol=1e-5)

    contest.run(
        op="token_log_probs",
        case=f"bfloat16, {rows} x {vocab:,}",
        contender=contender,
        run=lambda: functions[contender](logits, labels),
        check=check,
        floor_bytes=logits.numel() * logits.element_size(),
        goal={"share": 0.90} if device == "cuda" else None,
        bandwidth=read_bandwidth,
    )
