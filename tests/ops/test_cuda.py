"""What only CUDA can get wrong: streams, graphs, synchronisation, size, the current device.

Values, gradients and shapes on CUDA are in the other files, whose tests all run on it too.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from budget import assert_gradient, assert_within_budget
from torch import Tensor

from memdec import _native
from memdec.ops import (
    SparseTargets,
    fused_interpolate,
    interpolate_sample,
    knn_scatter,
    linear_sparse_kl_loss,
    sparse_kl_loss,
    token_log_probs,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

WIDTH, ROWS, K = 5003, 6, 40
GIB = 2**30


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    reason = _native.why_missing("cuda")
    if reason is not None:
        pytest.skip(f"no native kernels for cuda: {reason}")


class Inputs:
    """Fixed buffers, refilled in place, as a captured graph wants them."""

    def __init__(self, device: str = "cuda") -> None:
        self.base = torch.empty(ROWS, WIDTH, device=device, dtype=torch.bfloat16)
        self.memory = torch.empty(ROWS, WIDTH - 9, device=device, dtype=torch.bfloat16)
        self.lmbda = torch.empty(ROWS, device=device)
        self.labels = torch.empty(ROWS, device=device, dtype=torch.int64)
        self.distances = torch.empty(ROWS, K, device=device)
        self.tokens = torch.empty(ROWS, K, device=device, dtype=torch.int64)
        self.normalizer = torch.empty((), device=device)
        self.base.requires_grad_()
        self.fill(0)

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base.copy_(4 * torch.randn(self.base.shape, generator=generator))
        self.memory.copy_(4 * torch.randn(self.memory.shape, generator=generator))
        self.lmbda.copy_(torch.rand(ROWS, generator=generator))
        self.labels.copy_(torch.randint(0, WIDTH, (ROWS,), generator=generator))
        self.labels[seed % ROWS] = -100
        self.distances.copy_(10 * torch.rand(ROWS, K, generator=generator))
        self.tokens.copy_(torch.randint(-1, WIDTH, (ROWS, K), generator=generator))
        self.normalizer.fill_(seed + 3.0)


def interpolate_forward(x: Inputs) -> list[Tensor]:
    out = torch.empty(ROWS, WIDTH, device=x.base.device)
    with torch.no_grad():
        plain = fused_interpolate(x.base, x.memory, 0.3, memory_temperature=1.4)
        fused_interpolate(x.base, x.memory, x.lmbda[0], out=out)
    return [plain, out]


def interpolate_backward(x: Inputs) -> list[Tensor]:
    out = fused_interpolate(x.base, x.memory, x.lmbda, vocab_size=WIDTH - 1)
    return [out.detach(), *torch.autograd.grad(out[:, :-1].float().pow(2).sum(), x.base)]


def take_the_greatest(x: Inputs) -> list[Tensor]:
    return list(interpolate_sample(x.base, x.memory, x.lmbda, temperature=0))


def score(x: Inputs) -> list[Tensor]:
    out = token_log_probs(x.base, x.labels)
    return [out.detach(), *torch.autograd.grad(out.sum(), x.base)]


def scatter(x: Inputs) -> list[Tensor]:
    targets = knn_scatter(x.distances, x.tokens, max_entries=20)
    return [targets.indptr, targets.token_ids, targets.probs, targets.dropped_mass]


def train(x: Inputs, normalizer: Any = None) -> list[Tensor]:
    targets = knn_scatter(x.distances, x.tokens, temperature=2.0)
    normalizer = x.normalizer if normalizer is None else normalizer
    loss, kl, ce = sparse_kl_loss(x.base, targets, x.labels, alpha=0.3, normalizer=normalizer)
    return [loss.detach(), kl, ce, *torch.autograd.grad(loss, x.base)]


def train_with_host_normalizer(x: Inputs) -> list[Tensor]:
    """A Python number and a 0-dim CPU tensor are read without stopping the stream."""
    return train(x, 7) + train(x, torch.tensor(7))


def train_by_row(x: Inputs) -> list[Tensor]:
    targets = knn_scatter(x.distances, x.tokens)
    loss = sparse_kl_loss(x.base[1:4], targets[1:4], x.labels[1:4], reduction="none").loss
    return [loss.detach(), *torch.autograd.grad(loss.sum(), x.base)]


def train_from_hidden_states(x: Inputs) -> list[Tensor]:
    """Two chunks of an odd vocabulary; the weight needs no alignment."""
    hidden, weight = x.base[:, :5], x.base.view(-1)[: 5 * WIDTH].view(WIDTH, 5)
    targets = knn_scatter(x.distances, x.tokens)
    results = []
    for options in ({"normalizer": x.normalizer}, {"reduction": "none"}):
        loss, kl, ce = linear_sparse_kl_loss(
            hidden, weight, targets, x.labels, bias=weight[:, 0], chunk_rows=4, **options
        )
        results += [loss.detach(), kl, ce, *torch.autograd.grad(2 * loss.sum(), x.base)]
    return results


STEPS = [
    interpolate_forward,
    interpolate_backward,
    take_the_greatest,
    score,
    scatter,
    train,
    train_with_host_normalizer,
    train_by_row,
    train_from_hidden_states,
]
Step = Callable[[Inputs], list[Tensor]]


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.8}, {"top_k": 20}, {"top_p": 0.9}], ids=str
)
def test_replay_draws_anew(filters: dict[str, Any]) -> None:
    logits = torch.zeros(512, 10_000, device="cuda", dtype=torch.bfloat16)
    interpolate_sample(logits, logits, 0.5, **filters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, log_probs = interpolate_sample(logits, logits, 0.5, **filters)
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(tokens.clone())
        torch.testing.assert_close(log_probs, torch.full_like(log_probs, -math.log(10_000)))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (draws[a] == draws[b]).float().mean() < 0.2
        assert draws[a].min() >= 0
        assert draws[a].max() < 10_000


@pytest.mark.parametrize("step", STEPS)
def test_capture_and_replay_with_changed_inputs(step: Step) -> None:
    x = Inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x)
    for seed in (1, 2):
        x.fill(seed)
        graph.replay()
        ours = [value.clone() for value in captured]
        for value, wanted in zip(ours, step(x), strict=True):
            assert torch.equal(value, wanted)


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("step", STEPS)
def test_no_host_synchronisation(step: Step, synchronisation_is_an_error: None) -> None:
    x = Inputs()
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(x)


@pytest.mark.parametrize("step", STEPS)
def test_runs_on_the_current_stream(step: Step) -> None:
    """On a side stream behind a long wait, inputs written there must be seen, and only there."""
    x = Inputs()
    x.fill(5)
    wanted = step(x)
    x.fill(6)
    fresh = Inputs()
    fresh.fill(5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for name in vars(x):
                getattr(x, name).copy_(getattr(fresh, name))
        ours = step(x)
    torch.cuda.current_stream().wait_stream(stream)
    for value, expected in zip(ours, wanted, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("step", STEPS)
def test_runs_where_its_inputs_are(step: Step) -> None:
    wanted = step(Inputs("cuda:0"))
    with torch.cuda.device(0):
        ours = step(Inputs("cuda:1"))
    for value, expected in zip(ours, wanted, strict=True):
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.to("cuda:0"), expected)


def test_linear_loss_keeps_to_its_memory() -> None:
    """The chunk's logits, the float32 accumulator and the gradients: 4096 rows have 256 MiB of logits."""
    rows, width, vocab, chunk_rows = 4096, 256, 32768, 256
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (rows,), device="cuda")
    targets = SparseTargets(
        torch.arange(rows + 1, device="cuda"), labels.int(), torch.ones(rows, device="cuda")
    )

    def step() -> None:
        loss = linear_sparse_kl_loss(hidden, weight, targets, labels, chunk_rows=chunk_rows).loss
        torch.autograd.grad(loss, (hidden, weight))

    torch.use_deterministic_algorithms(False)
    step()  # cuBLAS takes its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    taken = torch.cuda.max_memory_allocated() - before
    logits, accumulator, gradients = chunk_rows * vocab * 2, vocab * width * 4, rows * width * 2
    assert taken <= accumulator + gradients + max(logits, vocab * width * 2) + 8 * 2**20


def test_the_gradient_in_place_takes_memory_by_rows_alone() -> None:
    rows, vocab = 4096, 32768
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True) * 1
    labels = torch.randint(vocab, (rows,), device="cuda")
    targets = SparseTargets(
        torch.arange(rows + 1, device="cuda"), labels.int(), torch.ones(rows, device="cuda")
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = sparse_kl_loss(logits, targets, labels, inplace_backward=True).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before <= 64 * rows + 2**20
    assert gradient.data_ptr() == logits.data_ptr()


# ---- rows x vocabulary above 2^31 ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(3000, 33), (900, 5003), (400, 50_257)])
def test_rows_that_take_turns(rows: int, width: int, dtype: torch.dtype) -> None:
    """More rows than multiprocessors, so that blocks take one after another."""
    generator = torch.Generator("cuda").manual_seed(0)
    base, memory = (
        (4 * torch.randn(rows, width, device="cuda", generator=generator)).to(dtype)
        for _ in range(2)
    )
    ours = fused_interpolate(base, memory, 0.3)
    logits = torch.stack([base.double() + math.log(0.7), memory.double() + math.log(0.3)])
    norm = torch.stack([base.double(), memory.double()]).logsumexp(-1, keepdim=True)
    assert_within_budget(ours, (logits - norm).logsumexp(0).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_of_rows_that_take_turns(dtype: torch.dtype) -> None:
    """Few entries and many by turns: more than a block has threads, and none at all."""
    rows, width = 420, 5003
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([2000, 0, 1, 64, 700] * (rows // 5))
    ids = [torch.randperm(width, generator=generator)[:count] for count in counts.tolist()]
    probs = [torch.rand(len(row), generator=generator) for row in ids]
    probs = [row / row.sum() if len(row) else row for row in probs]
    targets = SparseTargets(
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        torch.cat(ids).int(),
        torch.cat(probs),
    ).to("cuda")
    labels = torch.randint(0, width, (rows,), generator=generator)
    labels[::7] = -100
    logits = 3 * torch.randn(rows, width, generator=generator)
    for row, tokens in zip(logits, ids, strict=True):
        row[tokens] -= 9  # the model gives them less than the target does: nothing cancels
    logits = logits.to("cuda", dtype).requires_grad_()
    loss = sparse_kl_loss(logits, targets, labels.cuda(), reduction="sum").loss
    loss.backward()
    entries = [
        dict(zip(i.tolist(), p.tolist(), strict=True)) for i, p in zip(ids, probs, strict=True)
    ]
    wanted = oracle.sparse_kl_gradient(torch.ones(rows), logits, entries, labels)
    assert_gradient(logits.grad, wanted)


BIG_ROWS, BIG_WIDTH = 14_200, 151_936  # 2.16e9 elements, 4.3 GB in bfloat16


@pytest.fixture
def big() -> Iterator[Tensor]:
    """Rows that repeat a short pattern, but for the last, which lies beyond 2^31."""
    if torch.cuda.mem_get_info()[0] < 28 * GIB:
        pytest.skip("needs 28 GiB of free device memory")
    torch.use_deterministic_algorithms(False)  # poisoning 4 GB outputs proves nothing here
    assert BIG_ROWS * BIG_WIDTH > 2**31
    rows = 4 * torch.randn(3, BIG_WIDTH, generator=torch.Generator().manual_seed(0))
    big = rows[:2].bfloat16().cuda().repeat(BIG_ROWS // 2, 1)
    big[-1] = rows[2]
    yield big
    del big
    torch.cuda.empty_cache()


def test_interpolation_above_2_to_the_31(big: Tensor) -> None:
    memory = big.flip(0)
    out = fused_interpolate(big, memory, 0.3, out_dtype=torch.bfloat16)
    for row in (0, 1, BIG_ROWS // 2, BIG_ROWS - 2, BIG_ROWS - 1):
        assert_within_budget(out[row], oracle.interpolate(big[row], memory[row], 0.3))


def test_interpolation_gradient_above_2_to_the_31(big: Tensor) -> None:
    memory = big[-1:].clone().expand(BIG_ROWS, BIG_WIDTH)
    base = big.requires_grad_()
    out = fused_interpolate(base, memory, 0.3, out_dtype=torch.bfloat16)
    pattern = torch.randn(1, BIG_WIDTH, generator=torch.Generator().manual_seed(1))
    grad = pattern.bfloat16().cuda().expand(BIG_ROWS, BIG_WIDTH)
    (ours,) = torch.autograd.grad(out, base, grad)
    for row in (0, 1, BIG_ROWS - 1):
        wanted = oracle.interpolate_gradients(grad[row], base[row], memory[row], 0.3)[0]
        assert_gradient(ours[row], wanted)


def test_losses_above_2_to_the_31(big: Tensor) -> None:
    labels = torch.arange(BIG_ROWS, device="cuda") * 7 % BIG_WIDTH
    targets = SparseTargets(
        torch.arange(BIG_ROWS + 1, device="cuda"),
        torch.full((BIG_ROWS,), BIG_WIDTH - 1, dtype=torch.int32, device="cuda"),
        torch.ones(BIG_ROWS, device="cuda"),
    )
    rows = [0, 1, BIG_ROWS - 1]
    some, some_labels = big[rows].clone(), labels[rows]
    entries = [{BIG_WIDTH - 1: 1.0}] * 3
    big.requires_grad_()
    scores = token_log_probs(big, labels)
    assert_within_budget(scores[rows], oracle.token_log_probs(some, some_labels))
    loss = sparse_kl_loss(big, targets, labels, reduction="none").loss
    assert_within_budget(loss[rows], oracle.sparse_kl(some, entries, some_labels)[0])
    (ours,) = torch.autograd.grad(loss.sum(), big)
    wanted = oracle.sparse_kl_gradient(torch.ones(3), some, entries, some_labels)
    assert_gradient(ours[rows], wanted)
