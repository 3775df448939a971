"""knn_scatter against softmax, sort and merge in plain PyTorch."""

from __future__ import annotations

import torch

from memdec import ops

VOCAB = 50257
SECONDS = {256: 12e-6, 1024: 30e-6}  # the goal on CUDA, for 1024 rows
SHAPES = {"cuda": [(1024, 256), (1024, 1024), (65536, 1024)], "cpu": [(1024, 1024)]}


def sort_and_merge(distances: torch.Tensor, tokens: torch.Tensor):
    """Per row: softmax, sort by token, add up runs; as CSR with the entries by token."""
    rows, k = tokens.shape
    weights = torch.softmax(-distances.float(), -1)
    tokens, order = tokens.long().sort(dim=-1, stable=True)
    weights = weights.gather(-1, order)
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    slot = first.flatten().cumsum(0) - 1
    probs = torch.zeros(rows * k, device=tokens.device).index_add_(0, slot, weights.flatten())
    ids = torch.full((rows * k,), -1, dtype=torch.int32, device=tokens.device)
    ids.scatter_(0, slot, tokens.flatten().int())
    indptr = torch.nn.functional.pad(first.sum(-1).cumsum(0), (1, 0))
    return indptr, ids, probs


def test_knn_scatter(contest, device, shape, contender):
    rows, k = shape
    generator = torch.Generator().manual_seed(0)

    def neighbors() -> tuple[torch.Tensor, torch.Tensor]:
        zipf = torch.rand(rows, k, generator=generator).pow(-0.9).sub(1).mul(3)
        distances = torch.rand(rows, k, generator=generator).mul(8)
        return distances.to(device), zipf.clamp(max=VOCAB - 1).int().to(device)

    distances, tokens = neighbors()
    functions = {
        "eager": sort_and_merge,
        "compiled": torch.compile(sort_and_merge, dynamic=False),
        "memdec": ops.knn_scatter,
    }
    function = functions[contender]

    def check(result) -> None:
        indptr, ids, probs = result[:3] if isinstance(result, tuple) else result_fields(result)
        end = int(indptr[1])
        ours = torch.zeros(VOCAB, dtype=torch.float64, device=device)
        ours.index_add_(0, ids[:end].long(), probs[:end].double())
        weights = torch.softmax(-distances[0].double(), -1)
        truth = torch.zeros_like(ours).index_add_(0, tokens[0].long(), weights)
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)

    def result_fields(targets: ops.SparseTargets):
        return targets.indptr, targets.token_ids, targets.probs

    def another():
        distances, tokens = neighbors()
        return lambda: function(distances, tokens)

    contest.run(
        op="knn_scatter",
        case=f"{rows} rows, k = {k}",
        contender=contender,
        run=lambda: function(distances, tokens),
        check=check,
        floor_bytes=rows * k * (4 + 4 + 4 + 4),
        another=another,
        goal={"seconds": SECONDS[k] * rows / 1024} if device == "cuda" else {"times_eager": 5},
    )
