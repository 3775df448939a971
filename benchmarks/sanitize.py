"""Calls every CUDA kernel on small, ugly inputs: the program that compute-sanitizer watches.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import torch

from memdec import ops
from memdec.data.exact import ExactIndex


def main() -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # 300 rows are more than the multiprocessors: blocks take several.
    cases = [(dtype, 5, width) for dtype in dtypes for width in (1, 7, 1000, 50257)]
    for dtype, rows, width in [*cases, (torch.bfloat16, 300, 33)]:
        storage = torch.randn(rows, width + 3, device="cuda", dtype=dtype)
        base = storage[:, 1 : width + 1].requires_grad_()  # rows without 16-byte alignment
        memory = torch.randn(rows, width + 2, device="cuda", dtype=dtype, requires_grad=True)
        lmbda = torch.tensor([0.0, 0.3, 1.0, 0.5, float("nan")] * (rows // 5), device="cuda")
        lmbda.requires_grad_()
        ops.fused_interpolate(base, memory, lmbda, vocab_size=max(1, width - 1)).sum().backward()

        ops.fused_interpolate(memory, memory.flip(0), lmbda)  # rows that lie alike

        for filters in (
            {"temperature": 0},
            {},
            {"temperature": 0.8},
            {"top_k": 9, "top_p": 0.9},
            {"temperature": 0.8, "top_p": 0.9, "min_p": 1e-3},  # a cluster a row; of 300, a block
            {"top_p": 0.99},  # rows of very many tokens are left to it
            {"top_k": 600},
        ):
            ops.interpolate_sample(base, memory, lmbda, vocab_size=max(1, width - 1), **filters)
            ops.interpolate_sample(memory, memory.flip(0), lmbda, **filters)

        equal = torch.zeros(rows, width, device="cuda", dtype=dtype)  # cut by their ids alone
        ops.interpolate_sample(equal, equal, 0.5, top_p=0.5)

        labels = torch.tensor([0, -100, width - 1, width + 5, 0] * (rows // 5), device="cuda")
        ops.token_log_probs(base, labels).sum().backward()

        k = 33
        distances = torch.rand(rows, k, device="cuda", dtype=dtype)
        tokens = torch.randint(-1, width, (rows, k), device="cuda")
        targets = ops.knn_scatter(distances, tokens, temperature=0.1, max_entries=20)
        ops.sparse_kl_loss(base, targets, labels).loss.backward()
        ops.sparse_kl_loss(memory, targets, reduction="none").loss.sum().backward()
        hidden = torch.randn(rows, 8, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(width, 8, device="cuda", dtype=dtype, requires_grad=True)
        ops.linear_sparse_kl_loss(hidden, weight, targets, labels).loss.backward()
    for k in (0, 1, 1024, 4096):
        distances = torch.rand(3, k, device="cuda")
        tokens = torch.randint(-1, 300, (3, k), device="cuda", dtype=torch.int32)
        ops.knn_scatter(distances, tokens)
    keys = torch.randn(5000, 8).half().numpy()
    for k in (1, 33, 4096):  # the greatest buffer; blocks of keys end anywhere
        ExactIndex([keys[:, ::-1].copy(), keys], "cuda").search(keys[:7], k, None)
    torch.cuda.synchronize()
    print("every kernel was called")


if __name__ == "__main__":
    main()
