"""Every SIMD level that is built and runs here gives results within the same budget.

The other files test the level in use; this one goes through all of them, and the thread counts.
"""

import math
from collections.abc import Iterator

import oracle
import pytest
import torch
from budget import assert_complement, assert_gradient, assert_within_budget

from memdec import _native
from memdec.ops import (
    SparseTargets,
    fused_interpolate,
    knn_scatter,
    sparse_kl_loss,
    token_log_probs,
)

LEVELS = _native._C.simd_levels() if _native._C is not None else []
# Around the vector widths, and the odd width of GPT-2.
WIDTHS = [1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1023, 4097, 50257]

pytestmark = pytest.mark.skipif(not LEVELS, reason="no native kernels")


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native._C.simd_level()
    _native._C.set_simd_level(request.param)
    assert _native._C.simd_level() == request.param
    yield
    _native._C.set_simd_level(before)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def logits(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (6 * torch.randn(rows, width, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_interpolation(width: int, dtype: torch.dtype) -> None:
    base, memory = logits(2, width, dtype, 1), logits(2, width, dtype, 2)
    out = fused_interpolate(base, memory, 0.3, memory_temperature=0.8)
    assert_within_budget(out, oracle.interpolate(base, memory, 0.3, 0.8))
    grad = torch.randn(2, width, generator=torch.Generator().manual_seed(3))
    out.backward(grad)
    truth = oracle.interpolate_gradients(grad, base, memory, 0.3, 0.8)
    if width > 1:  # of one token both gradients are 0, up to rounding
        assert_gradient(base.grad, truth[0])
        assert_gradient(memory.grad, truth[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_losses(width: int, dtype: torch.dtype) -> None:
    x = logits(3, width, dtype, 1)
    labels = torch.tensor([0, width // 2, width - 1])
    assert_within_budget(token_log_probs(x, labels), oracle.token_log_probs(x, labels))
    rows = [{0: 1.0}, {width // 2: 0.5, width - 1: 0.5}, {}]
    rows[1] = dict(list(rows[1].items())) if width > 1 else {0: 1.0}
    ids = [t for row in rows for t in row]
    indptr = torch.tensor([0, 1, len(ids), len(ids)])
    probs = torch.tensor([p for row in rows for p in row.values()])
    targets = SparseTargets(indptr, torch.tensor(ids, dtype=torch.int32), probs)
    loss = sparse_kl_loss(x, targets, labels, reduction="none").loss
    assert_within_budget(loss, oracle.sparse_kl(x, rows, labels)[0])
    loss.sum().backward()
    assert_gradient(x.grad, oracle.sparse_kl_gradient(torch.ones(3), x, rows, labels))


@pytest.mark.parametrize("width", [33, 50257])
def test_confident_probability_keeps_its_complement(width: int, threads: int) -> None:
    x = torch.full((1, width), math.log(1e-4 / (width - 1)))
    x[0, width // 3] = 0
    labels = torch.tensor([width // 3])
    assert_complement(token_log_probs(x, labels), oracle.token_log_probs(x, labels))
    out = fused_interpolate(x, x, 0.3)[:, width // 3]
    assert_complement(out, oracle.token_log_probs(x, labels))


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_threads_split_rows_or_columns(rows: int, threads: int) -> None:
    base, memory = logits(rows, 50257, torch.float32, 1), logits(rows, 50257, torch.float32, 2)
    first, second = (fused_interpolate(base, memory, 0.3) for _ in range(2))
    assert torch.equal(first, second)
    assert_within_budget(first, oracle.interpolate(base, memory, 0.3))
    grads = [torch.autograd.grad(out.pow(2).sum(), (base, memory)) for out in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_neighbours(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    distances = 9 * torch.rand(40, 300, generator=generator)
    tokens = torch.randint(-1, 50, (40, 300), generator=generator)
    targets = knn_scatter(distances, tokens, temperature=2.0)
    truth, _ = oracle.knn(distances, tokens, 2.0)
    dense = torch.zeros(40, 50, dtype=torch.float64)
    for i, row in enumerate(truth):
        dense[i, list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
    torch.testing.assert_close(targets.to_dense(50).double(), dense, rtol=1e-5, atol=1e-12)
