"""linear_sparse_kl_loss, forward and backward from hidden states, against whole logits.

"three products" are the matrix products alone, over a vocabulary padded to a multiple of 64: what no
implementation can do without. cut-cross-entropy and Liger compute the cross-entropy alone and take
part where they are installed; "memdec, CE alone" is the like of them.
"""

from __future__ import annotations

import pytest
import torch

from memdec import ops
from memdec.ops.linear_sparse_kl import reference_linear_sparse_kl_backward

SHAPES = {
    "cuda": [(8192, 896, 151936), (16384, 768, 50257)],
    "cpu": [(256, 64, 50257)],
}
RIVALS = [
    "three products",
    "cut-cross-entropy, CE alone",
    "Liger, CE alone",
    "memdec, CE alone",
    "memdec, chunks of 1024",
]
# What memdec shall reach: seconds, times the three products, bytes beyond the inputs.
GOALS = {
    (8192, 896, 151936): {
        "memdec": {"seconds": 13.8e-3, "products": 1.45, "bytes": 1.25e9},
        "memdec, chunks of 1024": {"products": 1.75, "bytes": 0.9e9},
    },
    (16384, 768, 50257): {"memdec": {"seconds": 14e-3, "bytes": 1e9}},
}
ENTRIES = 64
ALPHA = 0.5


def eager(hidden, weight, ids, probs, labels):
    """What plain PyTorch does best: all logits, log-softmax, gather at the targets."""
    log_q = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1)
    kl = (probs * (probs.log() - log_q.gather(-1, ids))).sum(-1).mean()
    ce = torch.nn.functional.nll_loss(log_q, labels)
    return ALPHA * kl + (1 - ALPHA) * ce


def true_gradients(hidden, weight, targets, labels, alpha):
    """Of hidden and weight in float64, some rows at a time."""
    to_hidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
    to_weight = torch.zeros(weight.shape, dtype=torch.float64, device=hidden.device)
    rows = len(labels)
    for start in range(0, rows, 256):
        part = slice(start, start + 256)
        chunk = targets[part].compact()
        upstream = torch.full((len(chunk),), 1 / rows, device=hidden.device)
        arguments = chunk.indptr, chunk.token_ids, chunk.probs, labels[part], alpha, -100
        to_hidden[part], added, _ = reference_linear_sparse_kl_backward(
            upstream, hidden[part], weight, None, *arguments, weight.shape[0]
        )
        to_weight += added
    return to_hidden, to_weight


@pytest.mark.parametrize("entries", [ENTRIES, 600])
def test_linear_sparse_kl(contest, device, shape, entries, contender):
    if entries != ENTRIES and contender not in ("memdec", "three products"):
        pytest.skip("the other contenders do not read the entries, or are slower with 64 already")
    rows, width, vocab = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, device=device).mul_(0.1).to(dtype).requires_grad_()
    ids = torch.rand(rows, vocab // 4, device=device).topk(entries).indices * 4
    probs = torch.softmax(torch.randn(rows, entries, device=device), -1)
    labels = torch.randint(vocab, (rows,), device=device)
    indptr = torch.arange(rows + 1, device=device) * entries
    targets = ops.SparseTargets(indptr, ids.flatten().int(), probs.flatten())

    alpha = 0.0 if "CE alone" in contender else ALPHA
    if contender == "memdec, CE alone":
        none = torch.zeros_like(indptr)
        targets = ops.SparseTargets(none, targets.token_ids[:0], targets.probs[:0])

    def fused(**options: int) -> torch.Tensor:
        return ops.linear_sparse_kl_loss(
            hidden, weight, targets, labels, alpha=alpha, **options
        ).loss

    functions = {
        "eager": lambda: eager(hidden, weight, ids, probs, labels),
        "memdec": fused,
        "memdec, CE alone": fused,
        "memdec, chunks of 1024": lambda: fused(chunk_rows=1024),
    }
    if contender == "compiled":
        compiled = torch.compile(eager, dynamic=False)
        functions["compiled"] = lambda: compiled(hidden, weight, ids, probs, labels)

    if contender == "three products":
        run, check = products(hidden.detach(), weight.detach())
    else:
        loss_of = functions.get(contender) or cross_entropy_of(
            contender, device, hidden, weight, labels
        )

        def run() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(loss_of(), (hidden, weight))

        def check(gradients: tuple[torch.Tensor, ...]) -> None:
            truth = true_gradients(hidden.detach(), weight.detach(), targets, labels, alpha)
            allowed = 0.05 if contender.startswith(("cut", "Liger")) else 0.01
            for gradient, wanted in zip(gradients, truth, strict=True):
                error = (gradient.double() - wanted).norm() / wanted.norm()
                assert error < allowed, error

    contest.run(
        op="linear_sparse_kl_loss, forward and backward",
        case=f"{str(dtype)[6:]}, hidden {rows} x {width}, V {vocab:,}, {entries} entries a row",
        contender=contender,
        run=run,
        check=check,
        floor_bytes=2 * (hidden.numel() + weight.numel()) * hidden.element_size(),
        goal=GOALS.get(shape, {}).get(contender),
    )


def products(hidden, weight):
    """Logits, and the gradients of hidden and weight as if the logits were their own gradient."""
    padding = -weight.shape[0] % 64
    weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))

    def run() -> tuple[torch.Tensor, ...]:
        logits = hidden @ weight.T
        return logits, logits @ weight, logits.T @ hidden

    def check(result: tuple[torch.Tensor, ...]) -> None:
        truth = hidden[:8].double() @ weight.double().T
        assert (result[0][:8].double() - truth).norm() < 0.01 * truth.norm()

    return run, check


def cross_entropy_of(contender, device, hidden, weight, labels):
    """The loss of another library, which must be installed and have the device."""
    if device == "cpu":
        pytest.skip("its kernels are for GPUs")
    if contender.startswith("cut"):
        library = pytest.importorskip("cut_cross_entropy")
        return lambda: library.linear_cross_entropy(hidden, weight, labels)
    library = pytest.importorskip("liger_kernel.transformers")
    loss = library.LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(weight, hidden, labels)
