"""sparse_kl_loss, forward and backward, against a dense target and against gathered targets."""

from __future__ import annotations

import pytest
import torch

from memdec import ops

SHAPES = {
    "cuda": [(8192, 50257), (4096, 128256), (4096, 151936)],
    "cpu": [(512, 50257)],
}
GOALS = {"cuda": {"share": 0.80}, "cpu": {"times_eager": 6, "times_dense": 15}}
ALPHA = 0.5


def sparse_eager(logits, ids, probs, labels, dtype=torch.float32):
    """What plain PyTorch does best: log-softmax, gather at the targets."""
    log_q = torch.log_softmax(logits.to(dtype), -1)
    kl = (probs * (probs.log() - log_q.gather(-1, ids))).sum(-1).mean()
    ce = torch.nn.functional.nll_loss(log_q, labels)
    return ALPHA * kl + (1 - ALPHA) * ce


def dense_eager(logits, dense, labels):
    """The official code: a dense target, F.kl_div and F.cross_entropy."""
    log_q = torch.log_softmax(logits.float(), -1)
    kl = torch.nn.functional.kl_div(log_q, dense, reduction="batchmean")
    ce = torch.nn.functional.cross_entropy(logits.float(), labels)
    return ALPHA * kl + (1 - ALPHA) * ce


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("target", ["dense", "64 entries", "600 entries"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_sparse_kl(contest, device, shape, dtype, target, reduction, upstream, contender):
    dense_on_cpu = target == "dense" and device == "cpu" and dtype == torch.float32
    fewer = target != "64 entries" and not dense_on_cpu
    if fewer and (dtype != torch.bfloat16 or reduction == "none"):
        pytest.skip("bfloat16 shows it")
    usual = dtype == torch.bfloat16 and target == "64 entries" and reduction == "mean"
    if upstream != 1 and not (usual and contender == "memdec" and device == "cuda"):
        pytest.skip("what the gradient costs to rescale is memdec's own")
    if target == "dense" and contender != "eager":
        pytest.skip("the dense target is what eager code does")
    if target == "600 entries" and (contender != "memdec" or device == "cpu"):
        pytest.skip("the others are slower with 64 already")
    two_passes = dtype == torch.float16 or reduction == "none"
    if two_passes and (device == "cpu" or contender == "compiled"):
        pytest.skip("on a GPU, beside eager code")
    if reduction == "none" and dtype != torch.bfloat16:
        pytest.skip("one dtype shows it")
    if contender == "compiled" and shape[1] == 128256:
        pytest.skip("the shapes on both sides show it")
    if dtype == torch.float32 and device == "cuda" and shape[1] > 100_000:
        pytest.skip("bfloat16 is what training uses at this size")
    entries = 600 if target == "600 entries" else 64
    rows, vocab = shape
    logits = torch.randn(shape, device=device).mul_(3).to(dtype).requires_grad_()
    ids = torch.rand(rows, vocab // 4, device=device).topk(entries).indices * 4
    probs = torch.softmax(torch.randn(rows, entries, device=device), -1)
    labels = torch.randint(vocab, (rows,), device=device)
    indptr = torch.arange(rows + 1, device=device) * entries
    targets = ops.SparseTargets(indptr, ids.flatten().int(), probs.flatten())
    dense = targets.to_dense(vocab) if target == "dense" else None

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        if dense is not None:
            return dense_eager(x, dense, labels)
        return functions[contender](x)

    def fused(x: torch.Tensor) -> torch.Tensor:
        loss = ops.sparse_kl_loss(x, targets, labels, alpha=ALPHA, reduction=reduction).loss
        return loss.mean() if reduction == "none" else loss

    functions = {
        "eager": lambda x: sparse_eager(x, ids, probs, labels),
        "memdec": fused,
    }
    if contender == "compiled":
        compiled = torch.compile(sparse_eager, dynamic=False)
        functions["compiled"] = lambda x: compiled(x, ids, probs, labels)

    factor = torch.tensor(upstream, device=device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(logits)
        (grad,) = torch.autograd.grad(loss, logits, factor)
        return loss, grad

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        few = slice(0, 8)
        sample = logits.detach()[few].double().requires_grad_()
        truth = sparse_eager(sample, ids[few], probs[few].double(), labels[few], torch.float64)
        (grad,) = torch.autograd.grad(truth, sample, factor.double())
        scale = grad.abs().max() * 8 / rows
        error = (result[1][few].double() - grad * 8 / rows).abs().max() / scale
        allowed = {torch.bfloat16: 0.01, torch.float16: 0.005, torch.float32: 1e-5}
        assert error < allowed[dtype], error

    contest.run(
        op="sparse_kl_loss, forward and backward",
        case=f"{str(dtype)[6:]}, {reduction}, {rows} x {vocab:,}, {entries} entries a row"
        + ("" if upstream == 1 else f", upstream gradient {upstream:g}"),
        contender="dense eager" if dense is not None else contender,
        run=run,
        check=check,
        floor_bytes=(3 if two_passes else 2) * logits.numel() * logits.element_size(),
        goal=GOALS[device] if upstream == 1 else None,
    )
