"""sparse_kl_loss against its definition, and every sentence of its docstring."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from budget import assert_gradient, assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdec.environment import environment
from memdec.ops import SparseTargets, sparse_kl_loss
from memdec.ops.sparse_kl import reference_sparse_kl, reference_sparse_kl_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "one row": (1, 1000),
    "V = 1": (3, 1),
    "no leading dimension": (130,),
    "odd V, so rows lose their 16-byte alignment": (5, 50257),
    "three dimensions": (2, 3, 517),
}

Rows = list[dict[int, float]]


def pack(rows: Rows, device: str = "cpu") -> SparseTargets:
    """Targets with these entries, in the order of each dict."""
    lengths = torch.tensor([0] + [len(row) for row in rows])
    return SparseTargets(
        lengths.cumsum(0).to(device),
        torch.tensor([t for row in rows for t in row], dtype=torch.int32, device=device),
        torch.tensor([p for row in rows for p in row.values()], device=device),
    )


def unpack(targets: SparseTargets) -> Rows:
    """The float32 values that the op was really given."""
    indptr, ids, probs = (
        part.tolist() for part in (targets.indptr, targets.token_ids, targets.probs)
    )
    return [dict(zip(ids[a:b], probs[a:b], strict=True)) for a, b in itertools.pairwise(indptr)]


def random_case(
    shape: tuple[int, ...],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    entries: int = 9,
) -> tuple[Tensor, SparseTargets, Tensor]:
    """Logits, targets whose rows sum to 1, and labels, half of them among the target's tokens."""
    generator = torch.Generator().manual_seed(sum(shape))
    vocab, rows = shape[-1], math.prod(shape[:-1])
    logits = 4 * torch.randn(shape, generator=generator)
    ids = torch.rand(rows, vocab, generator=generator).argsort(1)[:, :entries]
    probs = torch.rand(ids.shape, generator=generator)
    probs /= probs.sum(1, keepdim=True)
    targets = SparseTargets(
        ids.shape[1] * torch.arange(rows + 1, device=device),
        ids.flatten().int().to(device),
        probs.flatten().to(device),
    )
    labels = torch.where(
        torch.arange(rows) % 2 == 0,
        ids[:, -1],
        torch.randint(0, vocab, (rows,), generator=generator),
    )
    return logits.to(device, dtype), targets, labels.reshape(shape[:-1]).to(device)


def eager_rows(logits: Tensor, targets: SparseTargets, labels: Tensor, alpha: float) -> Tensor:
    """The loss of each row with a dense target, as people write it."""
    log_q = torch.log_softmax(logits.float(), -1).flatten(0, -2)
    p = targets.to_dense(logits.shape[-1])
    kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
    ce = torch.nn.functional.nll_loss(log_q, labels.flatten(), reduction="none")
    return (alpha * kl + (1 - alpha) * ce).reshape(labels.shape)


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_match_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, implementation: str
) -> None:
    logits, targets, labels = random_case(shape, device, dtype)
    ours = sparse_kl_loss(logits, targets, labels, alpha=0.3, reduction="none")
    truth = oracle.sparse_kl(logits, unpack(targets), labels, 0.3)
    native = eager_rows(logits[None] if not shape[:-1] else logits, targets, labels[None], 0.3)
    for value, wanted in zip(ours, truth, strict=True):
        assert value.dtype == torch.float32
        assert_within_budget(value, wanted, native.reshape(wanted.shape))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_reductions_are_over_the_counted_rows(
    with_labels: bool, reduction: str, device: str, implementation: str
) -> None:
    logits, targets, labels = random_case((2, 4, 517), device)
    rows = unpack(targets)
    rows[2], rows[5] = {}, {}
    labels[0, 1], labels[1, 1] = -100, -100
    some_labels = labels if with_labels else None
    counted = 6
    ours = sparse_kl_loss(logits, pack(rows, device), some_labels, reduction=reduction)
    truth = oracle.sparse_kl(logits, rows, some_labels)
    for value, wanted in zip(ours, truth, strict=True):
        assert value.shape == ()
        assert_within_budget(value, wanted.sum() / (counted if reduction == "mean" else 1))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_weighs_kl_against_ce(alpha: float, device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 65), device)
    ours = sparse_kl_loss(logits, targets, labels, alpha=alpha, reduction="none")
    wanted = alpha * ours.kl + (1 - alpha) * ours.ce
    torch.testing.assert_close(ours.loss, wanted, rtol=1e-6, atol=1e-6)


def test_without_labels_the_loss_is_the_kl(device: str, implementation: str) -> None:
    logits, targets, _ = random_case((4, 65), device)
    ours = sparse_kl_loss(logits, targets, alpha=0.1)
    assert torch.equal(ours.loss, ours.kl)
    assert ours.ce == 0


def test_kl_and_ce_are_detached(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 65), device)
    ours = sparse_kl_loss(logits.requires_grad_(), targets, labels)
    assert ours.loss.requires_grad
    assert not ours.kl.requires_grad
    assert not ours.ce.requires_grad


def test_truncated_targets_kl_is_neither_negative_nor_clamped(
    device: str, implementation: str
) -> None:
    """A truncated teacher, renormalised, keeps KL >= 0; unnormalised, its true value is kept."""
    logits = torch.zeros(3, 8, device=device)
    logits[0, 1] = 3.0
    rows = [{1: 1.0}, dict.fromkeys(range(8), 0.125), {2: 0.25, 3: 0.25}]
    kl = sparse_kl_loss(logits, pack(rows, device), reduction="none").kl
    assert kl[0] > 0
    assert kl[1].abs() < 1e-6
    assert_within_budget(kl, oracle.sparse_kl(logits, rows, None)[1])
    # S = 0.5: sum p log(p / q) = 0.5 log(0.25 * 8) > 0; with S small it may be negative, rightly.
    small = [{2: 0.05}]
    assert sparse_kl_loss(logits[1:2], pack(small, device)).kl < 0


def test_dropped_tail_of_knn_targets_leaves_kl_non_negative(
    device: str, implementation: str
) -> None:
    from memdec.ops import knn_scatter

    distances = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.randint(0, 30, (5, 40), generator=torch.Generator().manual_seed(1)).to(device)
    targets = knn_scatter(distances, tokens, max_entries=3)
    logits = torch.log(targets.to_dense(30) + 1e-9)
    kl = sparse_kl_loss(logits, targets, reduction="none").kl
    assert (kl > -1e-6).all()
    assert (kl < 1e-5).all()


def test_target_rows_in_any_order_and_with_zeros(device: str, implementation: str) -> None:
    logits, _, labels = random_case((2, 65), device)
    logits[0, 9] = -math.inf
    rows = [{40: 0.1, 3: 0.7, 9: 0.0, 20: 0.2}, {1: 0.0, 2: 1.0}]
    labels[:] = torch.tensor([3, 2])
    ours = sparse_kl_loss(logits, pack(rows, device), labels, reduction="none")
    for value, wanted in zip(ours, oracle.sparse_kl(logits, rows, labels), strict=True):
        assert_within_budget(value, wanted)


def test_certain_and_impossible_tokens(device: str, implementation: str) -> None:
    logits = torch.zeros(3, 9, device=device)
    logits[0, 4] = -math.inf  # target mass where the model has none: infinite, not NaN
    logits[1] = -math.inf
    logits[1, 4] = 2.0  # the model is certain and right
    rows = [{4: 0.5, 5: 0.5}, {4: 1.0}, {4: 1.0}]
    labels = torch.tensor([5, 4, 4], device=device)
    kl, ce = sparse_kl_loss(logits, pack(rows, device), labels, reduction="none")[1:]
    assert kl[0] == math.inf
    assert (kl[1], ce[1]) == (0, 0)


@pytest.mark.parametrize(("alpha", "label", "token"), [(0.0, 5, 4), (1.0, 4, 5)])
def test_term_without_weight_has_no_influence(
    alpha: float, label: int, token: int, device: str, implementation: str
) -> None:
    """0 * inf must not be NaN: the term with weight 0 is infinite here."""
    logits = torch.zeros(1, 9, device=device)
    logits[0, 4] = -math.inf
    labels = torch.tensor([label], device=device)
    rows = [{token: 1.0}]
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, pack(rows, device), labels, alpha=alpha)
    assert_within_budget(ours.loss, oracle.sparse_kl(logits, rows, labels, alpha)[0][0])
    ours.loss.backward()
    assert_gradient(
        logits.grad, oracle.sparse_kl_gradient(torch.ones(1), logits, rows, labels, alpha)
    )


def test_logits_at_1e4(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 517), device)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, ::2] = 1e4
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, targets, labels, reduction="none").loss
    assert_within_budget(
        ours,
        oracle.sparse_kl(logits, unpack(targets), labels)[0],
        eager_rows(logits, targets, labels, 0.5),
    )
    ours.sum().backward()
    wanted = oracle.sparse_kl_gradient(torch.ones(4), logits, unpack(targets), labels)
    assert_gradient(logits.grad, wanted)


# ---- which rows count ----


def test_ignored_rows_are_not_read_and_get_zero_gradient(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((5, 65), device)
    logits[1] = math.nan
    targets.probs[2 * 9 : 3 * 9] = math.nan
    labels[1], labels[2] = -100, -100
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, targets, labels, reduction="none")
    assert [value[1:3].tolist() for value in ours] == 3 * [[0, 0]]
    ours.loss.sum().backward()
    assert not logits.grad[1:3].any()
    assert logits.grad[[0, 3, 4]].abs().sum(-1).min() > 0


def test_empty_target_adds_its_cross_entropy(device: str, implementation: str) -> None:
    logits, _, labels = random_case((3, 65), device)
    rows: Rows = [{}, {5: 1.0}, {}]
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, pack(rows, device), labels, alpha=0.4, reduction="none")
    assert ours.kl[[0, 2]].tolist() == [0, 0]
    torch.testing.assert_close(ours.loss[0], 0.6 * ours.ce[0])
    ours.loss.sum().backward()
    wanted = oracle.sparse_kl_gradient(torch.ones(3), logits, rows, labels, 0.4)
    assert_gradient(logits.grad, wanted)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize(
    ("reduction", "normalizer"),
    [("mean", None), ("mean", 0), ("mean", 7), ("sum", None), ("none", None)],
)
def test_no_counted_row_is_zero_never_nan(
    normalizer: int | None, reduction: str, with_labels: bool, device: str, implementation: str
) -> None:
    logits = torch.full((3, 65), math.nan, device=device, requires_grad=True)
    labels = torch.full((3,), -100, device=device) if with_labels else None
    ours = sparse_kl_loss(
        logits, pack([{}, {}, {}], device), labels, reduction=reduction, normalizer=normalizer
    )
    assert all(not value.any() for value in ours)
    assert not any(value.isnan().any() for value in ours)
    ours.loss.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("label", [-1, 60, 65, 2**40])
def test_label_outside_the_vocabulary_makes_its_row_nan(
    label: int, device: str, implementation: str
) -> None:
    logits, targets, labels = random_case((3, 65), device)
    targets = pack([{1: 1.0}, {2: 1.0}, {3: 1.0}], device)
    labels = labels.clamp(max=59)
    labels[1] = label
    assert_middle_row_is_nan(logits, targets, labels)


@pytest.mark.parametrize("token", [-1, 60, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("p", [0.5, 0.0])
def test_token_outside_the_vocabulary_makes_its_row_nan(
    p: float, token: int, device: str, implementation: str
) -> None:
    logits, _, labels = random_case((3, 65), device)
    targets = pack([{1: 1.0}, {2: 1.0 - p, token: p}, {3: 1.0}], device)
    assert_middle_row_is_nan(logits, targets, labels.clamp(max=59))


def assert_middle_row_is_nan(logits: Tensor, targets: SparseTargets, labels: Tensor) -> None:
    logits.requires_grad_()
    loss = sparse_kl_loss(logits, targets, labels, reduction="none", vocab_size=60).loss
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert logits.grad[:, :60].isnan().all(-1).tolist() == [False, True, False]
    assert not logits.grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4])
def test_padding_columns_take_no_mass_and_no_gradient(
    poison: float, device: str, implementation: str
) -> None:
    logits, _, labels = random_case((3, 1187), device)
    logits[:, 1000:] = poison
    labels = labels.clamp(max=999)
    rows = [{1: 0.5, 999: 0.5}, {4: 1.0}, {7: 0.3, 8: 0.7}]
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, pack(rows, device), labels, reduction="none", vocab_size=1000)
    assert_within_budget(ours.loss, oracle.sparse_kl(logits, rows, labels, 0.5, 1000)[0])
    ours.loss.sum().backward()
    assert not logits.grad[:, 1000:].any()
    wanted = oracle.sparse_kl_gradient(torch.ones(3), logits, rows, labels, 0.5, 1000)
    assert_gradient(logits.grad, wanted)


def test_a_nan_row_keeps_its_padding(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((2, 65), device)
    logits[0, 3] = math.nan
    labels = torch.tensor([1, 64], device=device)  # the second is padding
    targets = pack([{1: 1.0}, {1: 1.0}], device)
    for reduction in ("none", "sum"):
        logits = logits.detach().requires_grad_()
        loss = sparse_kl_loss(logits, targets, labels, reduction=reduction, vocab_size=60).loss
        loss.sum().backward()
        assert logits.grad[:, :60].isnan().all()
        assert (logits.grad[:, 60:] == 0).all()


def test_a_nan_row_without_weight_or_labels(device: str, implementation: str) -> None:
    """A term without weight that is NaN makes the loss NaN all the same; what is not asked for is 0."""
    logits, _, labels = random_case((2, 65), device)
    logits[0] = math.nan
    nothing = pack([{}, {1: 1.0}], device)
    loss = sparse_kl_loss(logits, nothing, labels[:2], alpha=1.0, reduction="none").loss
    assert loss.isnan().tolist() == [True, False]
    targets = pack([{1: 1.0}, {1: 1.0}], device)
    unlabelled = sparse_kl_loss(logits, targets, reduction="none")
    assert unlabelled.loss.isnan().tolist() == [True, False]
    assert unlabelled.ce.tolist() == [0.0, 0.0]
    for empty in (nothing, pack([{1: 0.0}, {1: 1.0}], device)):
        asked_nothing = sparse_kl_loss(logits, empty, reduction="none")
        assert asked_nothing.loss[0] == asked_nothing.kl[0] == 0
        assert sparse_kl_loss(logits, empty, labels[:2], reduction="none").kl[0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_spoil_their_own_row_only(
    bad: float, device: str, implementation: str
) -> None:
    logits, targets, labels = random_case((3, 65), device)
    logits[1, 60] = bad
    logits[2] = -math.inf
    logits.requires_grad_()
    loss = sparse_kl_loss(logits, targets, labels, reduction="none").loss
    assert loss.isnan().tolist() == [False, True, True]
    loss.sum().backward()
    assert logits.grad.isnan().all(-1).tolist() == [False, True, True]


# ---- targets as buffers ----


def test_spare_slots_are_ignored(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 65), device)
    wanted = sparse_kl_loss(logits, targets, labels)
    padded = SparseTargets(
        targets.indptr,
        torch.cat([targets.token_ids, targets.token_ids.new_full((20,), -1)]),
        torch.cat([targets.probs, targets.probs.new_zeros(20)]),
    )
    assert torch.equal(sparse_kl_loss(logits, padded, labels).loss, wanted.loss)


def test_slices_use_indptr_as_offsets(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((6, 65), device)
    whole = sparse_kl_loss(logits, targets, labels, reduction="none").loss
    logits.requires_grad_()
    part = sparse_kl_loss(logits[2:5], targets[2:5], labels[2:5], reduction="none").loss
    assert torch.equal(part, whole[2:5])
    part.sum().backward()
    wanted = oracle.sparse_kl_gradient(torch.ones(6), logits, unpack(targets), labels)
    assert_gradient(logits.grad[2:5], wanted[2:5])
    assert not logits.grad[[0, 1, 5]].any()


@pytest.mark.parametrize("indptr", [[0, 500, 900], [5, 2, 3], [-4, 3, 6], [2**40, 0, 3]])
def test_wrong_indptr_never_reads_out_of_bounds(
    indptr: list[int], device: str, implementation: str
) -> None:
    """Whatever comes out; the process and the rows' memory survive (run under a sanitizer)."""
    targets = SparseTargets(
        torch.tensor(indptr, device=device),
        torch.zeros(6, dtype=torch.int32, device=device),
        torch.full((6,), 0.1, device=device),
    )
    logits = torch.zeros(2, 65, device=device, requires_grad=True)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    sparse_kl_loss(logits, targets, labels).loss.backward()
    assert logits.grad.shape == logits.shape


# ---- gradients ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 50257), (2, 3, 517), (130,)], ids=str)
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("factor", [1, 3])
def test_gradients(
    factor: int,
    with_labels: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    implementation: str,
) -> None:
    logits, targets, labels = random_case(shape, device, dtype)
    some_labels = labels if with_labels else None
    logits.requires_grad_()
    (factor * sparse_kl_loss(logits, targets, some_labels, alpha=0.3).loss).backward()
    rows = math.prod(shape[:-1])
    upstream = torch.full((rows,), factor / rows, dtype=torch.float64)
    wanted = oracle.sparse_kl_gradient(upstream, logits, unpack(targets), some_labels, 0.3)
    assert logits.grad.dtype == dtype
    assert_gradient(logits.grad, wanted, rescaled=factor != 1)


def test_second_backward_through_one_call_is_refused(device: str, implementation: str) -> None:
    """The gradient made in forward is handed out once: it may be somebody's .grad by then."""
    logits, targets, labels = random_case((3, 65), device)
    logits.requires_grad_()
    loss = sparse_kl_loss(logits, targets, labels).loss
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert torch.equal(logits.grad, first)


def test_no_reduction_allows_a_second_backward(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((3, 65), device)
    logits.requires_grad_()
    loss = sparse_kl_loss(logits, targets, labels, reduction="none").loss.sum()
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2 * first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_confident_targets(
    dtype: torch.dtype, device: str, implementation: str
) -> None:
    """q - p nearly cancels: 20 to 100 % off in bfloat16 elsewhere (Liger-Kernel#1329)."""
    peaks = torch.tensor([14.0, 18, 20, 22, 24, 26], device=device)
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, 7] = peaks
    logits = logits.to(dtype).requires_grad_()
    rows = [{7: 1.0}, {7: 0.999, 8: 0.001}, {7: 1.0}, {7: 0.9999, 9: 0.0001}, {7: 1.0}, {7: 1.0}]
    labels = torch.full((6,), 7, device=device)
    sparse_kl_loss(logits, pack(rows, device), labels, reduction="sum").loss.backward()
    rows = unpack(pack(rows))
    assert_gradient(logits.grad, oracle.sparse_kl_gradient(torch.ones(6), logits, rows, labels))


def test_gradient_when_the_target_equals_the_model(device: str, implementation: str) -> None:
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).to(device)
    q = torch.softmax(logits.double(), -1).float()
    rows = [dict(enumerate(row.tolist())) for row in q]
    logits.requires_grad_()
    sparse_kl_loss(logits, pack(rows, device), reduction="sum").loss.backward()
    assert logits.grad.abs().max() < 1e-7


def test_target_rows_need_not_sum_to_one(device: str, implementation: str) -> None:
    logits, _, labels = random_case((3, 65), device)
    rows = [{3: 0.2, 4: 0.1}, {5: 0.9, 6: 0.9}, {7: 1.0}]
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, pack(rows, device), labels, alpha=0.8, reduction="sum")
    ours.loss.backward()
    rows = unpack(pack(rows))
    wanted = oracle.sparse_kl_gradient(torch.ones(3), logits, rows, labels, 0.8)
    assert_gradient(logits.grad, wanted)
    assert_within_budget(ours.loss, oracle.sparse_kl(logits, rows, labels, 0.8)[0].sum())


def test_gradient_rows_sum_to_zero(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 501), device)
    logits.requires_grad_()
    sparse_kl_loss(logits, targets, labels, reduction="sum").loss.backward()
    assert logits.grad.sum(-1).abs().max() < 1e-6
    assert logits.grad.abs().max() > 0.1


@pytest.mark.parametrize(
    "upstream",
    [
        lambda: torch.tensor([[0.5, -2.0, 3.0], [0.0, 1.0, 7.0]]),
        lambda: torch.tensor(2.5).expand(2, 3),
        lambda: torch.arange(6.0).reshape(3, 2).T,
        lambda: torch.tensor([[1.0], [2.0]]).expand(2, 3),
    ],
    ids=["own value a row", "stride 0", "transposed", "one stride 0"],
)
def test_none_reduction_uses_upstream_gradient(
    upstream: Callable[[], Tensor], device: str, implementation: str
) -> None:
    """Ignored or applied twice elsewhere (Liger-Kernel#678, #968, #1298)."""
    logits, targets, labels = random_case((2, 3, 65), device)
    logits.requires_grad_()
    grad = upstream().to(device)
    loss = sparse_kl_loss(logits, targets, labels, reduction="none").loss
    assert loss.shape == labels.shape
    loss.backward(grad)
    wanted = oracle.sparse_kl_gradient(grad, logits, unpack(targets), labels)
    assert_gradient(logits.grad, wanted)


def test_gradient_accumulation_over_micro_batches(device: str, implementation: str) -> None:
    """Two halves with the whole batch's normalizer equal the whole (flash-linear-attention#539)."""
    logits, targets, labels = random_case((6, 65), device)
    labels[1] = -100
    logits.requires_grad_()
    whole = sparse_kl_loss(logits, targets, labels).loss
    (wanted,) = torch.autograd.grad(whole, logits)
    halves = [
        sparse_kl_loss(logits[s], targets[s], labels[s], normalizer=5).loss
        for s in (slice(0, 3), slice(3, 6))
    ]
    sum(halves).backward()
    torch.testing.assert_close(sum(halves), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["int", "float", "cpu int tensor", "cpu float64", "device float"])
def test_normalizer_of_any_kind(kind: str, device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 65), device)
    normalizer = {
        "int": 10,
        "float": 10.0,
        "cpu int tensor": torch.tensor(10),
        "cpu float64": torch.tensor(10.0, dtype=torch.float64),
        "device float": torch.tensor(10.0, device=device),
    }[kind]
    logits.requires_grad_()
    ours = sparse_kl_loss(logits, targets, labels, normalizer=normalizer)
    total = sparse_kl_loss(logits, targets, labels, reduction="sum")
    for value, wanted in zip(ours, total, strict=True):
        torch.testing.assert_close(value, wanted / 10, rtol=1e-6, atol=0)
    ours.loss.backward()
    wanted = oracle.sparse_kl_gradient(torch.full((4,), 0.1), logits, unpack(targets), labels)
    assert_gradient(logits.grad, wanted)


def test_logits_shared_with_a_second_head_stay_intact(device: str, implementation: str) -> None:
    """A loss that wrote its gradient into the logits corrupted the other head (unsloth#5002)."""
    logits, targets, labels = random_case((4, 65), device)
    copy = logits.clone()
    hidden = logits.clone().requires_grad_()
    shared = hidden * 1
    loss = sparse_kl_loss(shared, targets, labels).loss + shared.exp().mean()
    loss.backward()
    assert torch.equal(shared, copy)
    first = oracle.sparse_kl_gradient(torch.full((4,), 0.25), copy, unpack(targets), labels)
    assert_gradient(hidden.grad, first + copy.double().cpu().exp() / copy.numel())


def test_without_grad_nothing_is_kept(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((4, 65), device)
    logits.requires_grad_()
    with torch.no_grad():
        ours = sparse_kl_loss(logits, targets, labels)
    assert not ours.loss.requires_grad
    assert torch.equal(ours.loss, sparse_kl_loss(logits, targets, labels).loss.detach())


def test_gradcheck_of_the_reference() -> None:
    targets = pack([{1: 0.25, 4: 0.5}, {}, {0: 1.0}, {2: 0.5, 3: 0.5}])
    labels = torch.tensor([4, 2, 5, -100])
    buffers = targets.indptr, targets.token_ids, targets.probs

    for some_labels in (labels, None):

        class Reference(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, logits: Tensor) -> Tensor:
                ctx.save_for_backward(logits)
                return reference_sparse_kl(logits, *buffers, some_labels, 0.3, -100, 6)[0]  # noqa: B023

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return reference_sparse_kl_backward(
                    grad,
                    *ctx.saved_tensors,
                    *buffers,
                    some_labels,  # noqa: B023
                    0.3,
                    -100,
                    6,
                )

        logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(Reference.apply, (logits,))


def test_double_backward_says_that_it_is_not_supported(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((2, 17), device)
    logits.requires_grad_()
    for reduction in ("mean", "none"):
        loss = sparse_kl_loss(logits, targets, labels, reduction=reduction).loss.sum()
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, logits, create_graph=True)[0].pow(2).sum().backward()


# ---- in place ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_writes_into_the_logits(
    dtype: torch.dtype, device: str, implementation: str
) -> None:
    logits, targets, labels = random_case((2, 3, 517), device, dtype)
    hidden = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(
        sparse_kl_loss(hidden, targets, labels, reduction="none").loss.sum(), hidden
    )
    produced = hidden * 1
    loss = sparse_kl_loss(
        produced, targets, labels, reduction="none", inplace_backward=True
    ).loss.sum()
    assert torch.equal(produced, logits), "overwritten before backward"
    loss.backward()
    assert torch.equal(hidden.grad, wanted)
    assert torch.equal(produced, wanted)


def test_inplace_backward_of_strided_rows(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((2, 3, 65), device)
    wide = torch.cat([logits, logits[:, :1]], 1).requires_grad_()
    loss = sparse_kl_loss(
        (wide * 1)[:, :-1], targets, labels, reduction="sum", inplace_backward=True
    ).loss
    loss.backward()
    wanted = oracle.sparse_kl_gradient(torch.ones(6), logits, unpack(targets), labels)
    assert_gradient(wide.grad[:, :-1], wanted)
    assert not wide.grad[:, -1].any()


def test_second_inplace_backward_raises(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((2, 65), device)
    loss = sparse_kl_loss(logits.requires_grad_() * 1, targets, labels, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inplace_backward_is_caught_where_the_producer_saved_its_output(
    device: str, implementation: str
) -> None:
    logits, targets, labels = random_case((2, 65), device)
    produced = torch.tanh(logits.requires_grad_())
    loss = sparse_kl_loss(produced, targets, labels, inplace_backward=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_leaves_expanded_logits_alone(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((3, 65), device)
    row = logits[0].clone().requires_grad_()
    expanded = row.expand(3, 65)
    loss = sparse_kl_loss(expanded, targets, labels, reduction="sum", inplace_backward=True).loss
    loss.backward()
    assert torch.equal(row, logits[0])
    wanted = oracle.sparse_kl_gradient(torch.ones(3), expanded, unpack(targets), labels)
    assert_gradient(row.grad[None], wanted.sum(0, keepdim=True))


# ---- layout ----


def test_non_contiguous_rows(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((2, 3, 65), device)
    wanted = oracle.sparse_kl_gradient(torch.ones(6), logits, unpack(targets), labels)
    sliced = torch.cat([logits, logits[:, :1]], 1)[:, :-1]
    transposed = logits.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (sliced, transposed):
        assert not strided.is_contiguous()
        leaf = strided.detach().requires_grad_()
        sparse_kl_loss(leaf, targets, labels, reduction="sum").loss.backward()
        assert_gradient(leaf.grad, wanted)


def test_shifted_logits_are_not_copied(device: str, native: None) -> None:
    """logits[:, :-1] of a tensor that no machine could copy; all but one row are ignored."""
    row = torch.randn(151936, generator=torch.Generator().manual_seed(0)).to(device)
    logits = row.expand(2, 2**18 + 1, 151936)[:, :-1]
    labels = torch.full((2, 2**18), -100, device=device)
    labels[1, -1] = 17
    indptr = torch.zeros(2**19 + 1, dtype=torch.int64, device=device)
    indptr[-1] = 2
    targets = SparseTargets(
        indptr,
        torch.tensor([17, 151935], dtype=torch.int32, device=device),
        torch.tensor([0.75, 0.25], device=device),
    )
    ours = sparse_kl_loss(logits, targets, labels)
    truth = oracle.sparse_kl(row[None], unpack(targets)[-1:], torch.tensor([17]))
    assert_within_budget(ours.loss, truth[0][0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_batch(
    lead: tuple[int, ...], reduction: str, device: str, implementation: str
) -> None:
    logits = torch.zeros(*lead, 9, device=device, requires_grad=True)
    labels = torch.zeros(lead, dtype=torch.int64, device=device)
    ours = sparse_kl_loss(logits, pack([], device), labels, reduction=reduction)
    assert ours.loss.shape == (lead if reduction == "none" else ())
    assert not ours.loss.any()
    ours.loss.sum().backward()
    assert logits.grad.shape == logits.shape


# ---- arguments ----


LOGITS, LABELS = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
TARGETS = pack([{1: 1.0}, {2: 1.0}, {3: 1.0}])
WRONG = SparseTargets(TARGETS.indptr.int(), TARGETS.token_ids, TARGETS.probs)
UNEQUAL = SparseTargets(TARGETS.indptr, TARGETS.token_ids, TARGETS.probs[:2])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "logits must be float32", (LOGITS.double(), TARGETS), {}),
        (ValueError, "logits must be contiguous", (LOGITS[:, ::2], TARGETS), {}),
        (TypeError, "targets must be SparseTargets", (LOGITS, LOGITS), {}),
        (TypeError, "targets must hold indptr int64", (LOGITS, WRONG), {}),
        (ValueError, "one shape", (LOGITS, UNEQUAL), {}),
        (
            ValueError,
            "targets must have 3 rows, as many as logits, got 2",
            (LOGITS, TARGETS[1:]),
            {},
        ),
        (ValueError, "targets must be on cpu", (LOGITS, TARGETS.to("meta")), {}),
        (ValueError, "labels must have shape", (LOGITS, TARGETS, LABELS[:2]), {}),
        (TypeError, "labels must be int64", (LOGITS, TARGETS, LABELS.float()), {}),
        (ValueError, "alpha must be from 0 to 1", (LOGITS, TARGETS), {"alpha": 1.5}),
        (ValueError, "reduction must be", (LOGITS, TARGETS), {"reduction": "batchmean"}),
        (ValueError, "normalizer must be 0 or more", (LOGITS, TARGETS), {"normalizer": -1}),
        (TypeError, "normalizer must be", (LOGITS, TARGETS), {"normalizer": "3"}),
        (ValueError, "0-dim", (LOGITS, TARGETS), {"normalizer": torch.ones(1)}),
        (
            ValueError,
            "for reduction mean",
            (LOGITS, TARGETS),
            {"normalizer": 1, "reduction": "sum"},
        ),
        (ValueError, "vocab_size must be from 1 to 8", (LOGITS, TARGETS), {"vocab_size": 9}),
        (TypeError, "ignore_index must be an int", (LOGITS, TARGETS), {"ignore_index": None}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, arguments: tuple, options: dict
) -> None:
    with pytest.raises(error, match=message):
        sparse_kl_loss(*arguments, **options)


def test_check_values_finds_bad_labels_and_tokens(
    device: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "check_values", True)
    logits, _, labels = random_case((2, 9), device)
    labels[0] = -100
    sparse_kl_loss(logits, pack([{1: 1.0}, {8: 1.0}], device), labels)
    with pytest.raises(ValueError, match="token ids must be from 0 to 8, got 9"):
        sparse_kl_loss(logits, pack([{1: 1.0}, {9: 1.0}], device), labels)
    labels[1] = 9
    with pytest.raises(ValueError, match=r"labels must be from 0 to 8 or -100.*got 9"):
        sparse_kl_loss(logits, pack([{1: 1.0}, {8: 1.0}], device), labels)


# ---- as a torch op ----


def test_meta_tensors_have_shapes() -> None:
    logits = torch.zeros(3, 8, device="meta", requires_grad=True)
    loss = sparse_kl_loss(logits, TARGETS.to("meta"), LABELS.to("meta"), reduction="none").loss
    assert loss.shape == (3,)
    loss.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction: int, device: str, implementation: str) -> None:
    logits, targets, labels = random_case((2, 3, 17), device, torch.bfloat16)
    buffers = targets.indptr, targets.token_ids, targets.probs
    divisor = torch.tensor(3.0, device=device) if reduction == 2 else None
    arguments = (logits, *buffers, labels, 0.3, -100)
    op = torch.ops.memdec.sparse_kl
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(op, (leaf, *arguments[1:], reduction, divisor, 17, False, False))
    if reduction != 0:
        torch.library.opcheck(op, (leaf, *arguments[1:], reduction, divisor, 17, True, False))
    loss, _, _, stats, scale, _ = op(*arguments, reduction, divisor, 17, False, False)
    backward = torch.ops.memdec.sparse_kl_backward
    torch.library.opcheck(backward, (loss, *arguments, 17, stats, scale))
    values = [torch.full_like(loss, torch.nan) for _ in range(3)]
    out = torch.ops.memdec.sparse_kl_out
    torch.library.opcheck(out, (*arguments, reduction, divisor, 17, *values))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_same_with_and_without_grad(reduction: str, device: str, implementation: str) -> None:
    """They are two registered ops, and on CUDA two kernels."""
    logits, targets, labels = random_case((2, 3, 17), device, torch.bfloat16)
    options = {"labels": labels, "reduction": reduction}
    with_grad = sparse_kl_loss(logits.clone().requires_grad_(), targets, **options)
    for value, expected in zip(sparse_kl_loss(logits, targets, **options), with_grad, strict=True):
        exact = 0 if device == "cpu" else 1e-6
        torch.testing.assert_close(value, expected.detach(), rtol=exact, atol=exact)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("normalizer", [None, 7, "tensor"])
def test_compiles_to_one_graph(
    normalizer: Any, dynamic: bool, device: str, implementation: str
) -> None:
    if normalizer == "tensor":
        normalizer = torch.tensor(7, device=device)

    def loss(logits: Tensor, targets: SparseTargets, labels: Tensor) -> Tensor:
        out = sparse_kl_loss(
            2 * logits, targets, labels, normalizer=normalizer, inplace_backward=True
        )
        return out.loss + out.kl

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        logits, targets, labels = random_case((rows, 17), device)
        logits.requires_grad_()
        first, second = compiled(logits, targets, labels), loss(logits, targets, labels)
        assert torch.equal(first, second)
        (a,), (b,) = (torch.autograd.grad(value, logits) for value in (first, second))
        assert torch.equal(a, b)


def test_repeats_bitwise(device: str, implementation: str) -> None:
    logits, targets, labels = random_case((5, 20011), device)
    logits.requires_grad_()
    losses = [sparse_kl_loss(logits, targets, labels).loss for _ in range(2)]
    grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.equal(*losses)
    assert torch.equal(*grads)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_targets(device: str, implementation: str, data: st.DataObject) -> None:
    count, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    vocab_size = data.draw(st.integers(1, width))
    token = st.integers(0, vocab_size - 1)
    entries = st.dictionaries(token, st.floats(0, 1, width=32), max_size=6)
    rows = data.draw(st.lists(entries, min_size=count, max_size=count))
    labels = data.draw(st.none() | st.lists(st.just(-100) | token, min_size=count, max_size=count))
    alpha = data.draw(st.floats(0, 1))
    logits, _, _ = random_case((count, width), device)
    given_labels = None if labels is None else torch.tensor(labels, device=device)
    logits.requires_grad_()
    ours = sparse_kl_loss(
        logits,
        pack(rows, device),
        given_labels,
        alpha=alpha,
        reduction="none",
        vocab_size=vocab_size,
    )
    truth = oracle.sparse_kl(logits, rows, given_labels, alpha, vocab_size)
    for value, wanted in zip(ours, truth, strict=True):
        assert_within_budget(value, wanted)
    ours.loss.sum().backward()
    wanted = oracle.sparse_kl_gradient(
        torch.ones(count), logits, rows, given_labels, alpha, vocab_size
    )
    assert (logits.grad.cpu() - wanted).abs().max() <= 1e-6
