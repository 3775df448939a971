"""interpolate_sample against the mixture and torch's own draw from it."""

from __future__ import annotations

import math

import pytest
import torch

from memdec import ops

SHAPES = {
    "cuda": [(1, 151936), (16, 151936), (4096, 50257), (4096, 151936)],
    "cpu": [(1, 151936), (64, 151936)],
}
FILTERS = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
}
SECONDS = {1: 10e-6, 16: 15e-6}
SHARES = {
    "top-k 50, top-p 0.9": 0.60,
    "top-p 0.9": None,
    "temperature 0.7, top-p 0.9": None,
}
LMBDA = 0.3


def mixture(base: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(
        torch.log_softmax(base.float(), -1) + math.log1p(-LMBDA),
        torch.log_softmax(memory.float(), -1) + math.log(LMBDA),
    )


def eager_draw(base: torch.Tensor, memory: torch.Tensor, filters: dict) -> tuple:
    """As transformers' processors do it: filtered in the vocabulary, then multinomial."""
    mixed = mixture(base, memory)
    if filters.get("temperature") == 0:
        tokens = mixed.argmax(-1, keepdim=True)
    else:
        scores = mixed / filters.get("temperature", 1.0)
        if "top_k" in filters:
            least = scores.topk(filters["top_k"]).values[..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if "top_p" in filters:
            rising, ids = scores.sort(-1)
            left_out = rising.softmax(-1).cumsum(-1) <= 1 - filters["top_p"]
            scores = scores.masked_fill(left_out.scatter(-1, ids, left_out), -math.inf)
        tokens = torch.multinomial(scores.softmax(-1), 1)
    return tokens, mixed.gather(-1, tokens)


@pytest.mark.parametrize("filters", FILTERS)
def test_interpolate_sample(contest, device, shape, filters, contender):
    options = FILTERS[filters]
    nucleus = "top_p" in options and "top_k" not in options
    if nucleus and shape[0] > 16 and (shape[1] == 50257 or device == "cpu"):
        pytest.skip("shown at another shape")

    def eager(base: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return eager_draw(base, memory, options)

    functions = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "memdec": lambda b, m: ops.interpolate_sample(b, m, LMBDA, **options),
    }
    if contender == "compiled" and filters != "greedy":
        pytest.skip("the draw itself is not compiled")
    function = functions[contender]

    def logits() -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(3).to(torch.bfloat16)

    base, memory = logits(), logits()

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        tokens, log_probs = (value.reshape(-1)[:8] for value in result)
        mixed = mixture(base[:8], memory[:8]).double()
        torch.testing.assert_close(
            log_probs.double(), mixed.gather(-1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5
        )
        if filters == "greedy":
            assert torch.equal(log_probs.double() > mixed.amax(-1) - 1e-5, tokens >= 0)

    def another():
        base, memory = logits(), logits()
        return lambda: function(base, memory)

    share = SHARES.get(filters, 0.85)
    goal = {"seconds": SECONDS[shape[0]]} if shape[0] in SECONDS else {"share": share}
    contest.run(
        op="interpolate_sample",
        case=f"{filters}, {shape[0]} x {shape[1]:,}",
        contender=contender,
        run=lambda: function(base, memory),
        check=check,
        floor_bytes=base.numel() * 4,
        another=another if shape[0] <= 16 and contender != "eager" else None,
        goal=None if share is None or device == "cpu" else goal,
    )
