"""All ops in one graph of the default compiler, as a training step and a decoding step use them."""

import torch
from torch import Tensor

from memdec.ops import (
    fused_interpolate,
    interpolate_sample,
    knn_scatter,
    linear_sparse_kl_loss,
    sparse_kl_loss,
    token_log_probs,
)


def step(hidden: Tensor, distances: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    targets = knn_scatter(distances, tokens, temperature=0.5)
    loss = sparse_kl_loss(2 * hidden, targets, labels, alpha=0.4).loss
    loss = (
        loss
        + linear_sparse_kl_loss(
            hidden[:, :8], hidden[0, :24].view(3, 8).repeat(11, 1), targets, labels
        ).loss
    )
    mixed = fused_interpolate(hidden, 3 * hidden, torch.sigmoid(hidden[:, 0]))
    return loss - token_log_probs(hidden, labels).mean() + mixed[:, 3].mean()


def test_one_graph_of_the_default_compiler(device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, 33, generator=generator).to(device).requires_grad_()
        distances = torch.rand(rows, 6, generator=generator).to(device)
        tokens = torch.randint(-1, 33, (rows, 6), generator=generator).to(device)
        labels = torch.randint(0, 33, (rows,), generator=generator).to(device)
        ours, wanted = (f(hidden, distances, tokens, labels) for f in (compiled, step))
        torch.testing.assert_close(ours, wanted)
        (a,), (b,) = (torch.autograd.grad(value, hidden) for value in (ours, wanted))
        torch.testing.assert_close(a, b)


def test_sampling_in_one_graph(device: str) -> None:
    def draw(base: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = interpolate_sample(base, memory, torch.sigmoid(base[:, 0]), top_p=0.9)
        greedy, log_probs = interpolate_sample(2 * base, memory, 0.5, temperature=0)
        return tokens, greedy + log_probs

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True, dynamic=True)
    for rows in (300, 500):
        base = torch.randn(rows, 33, generator=torch.Generator().manual_seed(rows)).to(device)
        (first, ours), (second, _) = (compiled(base, base.flip(0)) for _ in range(2))
        torch.testing.assert_close(ours, draw(base, base.flip(0))[1])
        assert first.min() >= 0
        assert first.max() < 33
        assert (first != second).any()
