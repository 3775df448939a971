"""token_log_probs against log-softmax and gather."""

from __future__ import annotations

import torch

from memdec import ops

SHAPES = {"cuda": [(4096, 50257), (4096, 128256), (4096, 151936)], "cpu": [(64, 151936)]}


def eager(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]


def test_token_log_probs(contest, device, shape, contender):
    logits = torch.randn(shape, device=device).mul_(3).bfloat16()
    labels = torch.randint(shape[1], shape[:1], device=device)
    functions = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "memdec": ops.token_log_probs,
    }
    function = functions[contender]

    def check(result: torch.Tensor) -> None:
        truth = torch.log_softmax(logits[:64].double(), -1).gather(-1, labels[:64, None])[:, 0]
        torch.testing.assert_close(result[:64].double(), truth, rtol=1e-5, atol=1e-5)

    contest.run(
        op="token_log_probs",
        case=f"bfloat16, {shape[0]} x {shape[1]:,}",
        contender=contender,
        run=lambda: function(logits, labels),
        check=check,
        floor_bytes=logits.numel() * 2,
        goal={"share": 0.90},
    )
