"""linear_sparse_kl_loss against the loss of the whole logits, and every sentence of its docstring."""

import math
from typing import Any

import pytest
import torch
from budget import ROUNDINGS
from test_sparse_kl import pack, random_case, unpack
from torch import Tensor
from torch.nn.functional import linear

from memdec.environment import environment
from memdec.ops import SparseTargets, linear_sparse_kl_loss, sparse_kl_loss
from memdec.ops.linear_sparse_kl import (
    default_chunk_rows,
    reference_linear_sparse_kl,
    reference_linear_sparse_kl_backward,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = {"a multiple of 64": 128, "odd": 517, "below a tile": 3}
WIDTH = 24


class Case:
    """Six rows in two dimensions: one ignored, one without a target."""

    def __init__(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        vocab: int = 517,
        lead: tuple[int, ...] = (2, 3),
    ) -> None:
        generator = torch.Generator().manual_seed(vocab)
        _, targets, labels = random_case((*lead, vocab), entries=9)
        rows = unpack(targets)
        if len(rows) > 4:
            rows[4] = {}
            labels.view(-1)[1] = -100
        self.targets, self.labels = pack(rows, device), labels.to(device)

        def leaf(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator).to(device, dtype)
            return values.requires_grad_()

        self.hidden, self.weight, self.bias = leaf(*lead, WIDTH), leaf(vocab, WIDTH), leaf(vocab)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def fused(self, with_bias: bool = True, **options: Any) -> Any:
        bias = self.bias if with_bias else None
        return linear_sparse_kl_loss(
            self.hidden, self.weight, self.targets, self.labels, bias=bias, **options
        )

    def whole(self, with_bias: bool = True, **options: Any) -> Any:
        logits = linear(self.hidden, self.weight, self.bias if with_bias else None)
        return sparse_kl_loss(logits, self.targets, self.labels, **options)

    def truth(self, upstream: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 gradients for one upstream gradient a row."""
        hidden = self.hidden.reshape(-1, WIDTH)
        buffers = self.targets.indptr, self.targets.token_ids, self.targets.probs
        arguments = *buffers, self.labels.reshape(-1), alpha, -100, self.weight.shape[0]
        return reference_linear_sparse_kl_backward(
            upstream.to(hidden.device), hidden, self.weight, self.bias, *arguments
        )


def assert_as_good(ours: Tensor, native: Tensor, truth: Tensor) -> None:
    """No farther from the truth than plain PyTorch in the same dtype, but for one more rounding."""
    assert ours.dtype == native.dtype
    assert ours.shape == native.shape
    truth = truth.reshape(ours.shape)
    rounding = torch.finfo(ours.dtype).eps / 2 + ROUNDINGS * torch.finfo(torch.float32).eps
    allowed = (native.double() - truth).norm() + rounding * truth.norm()
    assert (ours.double() - truth).norm() <= allowed


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("chunk_rows", [1, 4, 6, None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_are_those_of_the_whole_logits(
    with_bias: bool,
    chunk_rows: int | None,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    implementation: str,
) -> None:
    case = Case(device, dtype, vocab)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 7}):
        ours = case.fused(with_bias, chunk_rows=chunk_rows, alpha=0.3, **options)
        wanted = case.whole(with_bias, alpha=0.3, **options)
        for value, expected in zip(ours, wanted, strict=True):
            assert value.dtype == torch.float32
            rounding = 2e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factor", [1, 3])
def test_gradients(
    factor: int,
    reduction: str,
    chunk_rows: int | None,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    implementation: str,
) -> None:
    case = Case(device, dtype, vocab)
    options = {"reduction": reduction, "alpha": 0.3}
    scale = 1 / 5 if reduction == "mean" else 1  # five of the six rows count
    truth = case.truth(torch.full((6,), factor * scale, dtype=torch.float64), 0.3)
    ours = torch.autograd.grad(
        factor * case.fused(chunk_rows=chunk_rows, **options).loss.sum(), case.leaves
    )
    native = torch.autograd.grad(factor * case.whole(**options).loss.sum(), case.leaves)
    for gradient, plain, wanted in zip(ours, native, truth, strict=True):
        assert_as_good(gradient, plain, wanted)


def test_none_reduction_uses_the_upstream_gradient_of_each_row(
    device: str, implementation: str
) -> None:
    case = Case(device)
    for upstream in (
        torch.tensor([[0.5, -2.0, 3.0], [0.0, 1.0, 7.0]], device=device),
        torch.tensor([[2.0], [3.0]], device=device).expand(2, 3),
    ):
        loss = case.fused(chunk_rows=4, reduction="none").loss
        ours = torch.autograd.grad(loss, case.leaves, upstream)
        for gradient, wanted in zip(ours, case.truth(upstream.reshape(-1)), strict=True):
            torch.testing.assert_close(
                gradient.double(), wanted.view(gradient.shape), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_the_weights_gradient_is_summed_in_float32(
    chunk_rows: int | None, device: str, implementation: str
) -> None:
    """512 rows, up to a chunk each: sums kept in bfloat16 would be off by ten times the budget."""
    case = Case(device, torch.bfloat16, 128, (512,))
    truth = case.truth(torch.full((512,), 1 / 511, dtype=torch.float64))
    ours = torch.autograd.grad(case.fused(chunk_rows=chunk_rows).loss, case.leaves)
    native = torch.autograd.grad(case.whole().loss, case.leaves)
    for gradient, plain, wanted in zip(ours, native, truth, strict=True):
        assert_as_good(gradient, plain, wanted)


def test_without_float32_products_they_are_made_of_copies(
    device: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch before 2.10, and every CPU."""
    from memdec.ops import linear_sparse_kl

    case = Case(device, torch.bfloat16)
    wanted = torch.autograd.grad(case.fused(chunk_rows=4).loss, case.weight)[0]
    monkeypatch.setattr(linear_sparse_kl, "_has_float32_product", lambda *_: False)
    monkeypatch.setattr(linear_sparse_kl, "_COPIED_ROWS", 100)
    ours = torch.autograd.grad(case.fused(chunk_rows=4).loss, case.weight)[0]
    torch.testing.assert_close(ours, wanted, rtol=0.01, atol=1e-6)


def test_the_mean_is_over_the_rows_of_all_chunks(device: str, implementation: str) -> None:
    """The second chunk has no row that counts."""
    case = Case(device)
    case.labels.view(-1)[2:4] = -100
    ours, wanted = case.fused(chunk_rows=2), case.whole()
    torch.testing.assert_close(ours.loss, wanted.loss)
    gradient = torch.autograd.grad(ours.loss, case.hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.loss, case.hidden)[0])
    assert not gradient.view(6, WIDTH)[1:4].any()


def test_without_labels_rows_without_a_target_do_not_count(
    device: str, implementation: str
) -> None:
    case = Case(device)
    case.labels = None
    ours, wanted = case.fused(chunk_rows=4), case.whole()
    for value, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(ours.loss, case.hidden)
    assert not gradient.view(6, WIDTH)[4].any()
    assert gradient.view(6, WIDTH)[5].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_counted_row_is_zero_never_nan(reduction: str, device: str, implementation: str) -> None:
    case = Case(device)
    case.labels.fill_(-100)
    ours = case.fused(reduction=reduction, chunk_rows=4)
    assert all(not value.any() for value in ours)
    for gradient in torch.autograd.grad(ours.loss.sum(), case.leaves):
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_batch(
    lead: tuple[int, ...], reduction: str, device: str, implementation: str
) -> None:
    case = Case(device, lead=lead)
    ours = case.fused(reduction=reduction)
    assert ours.loss.shape == (lead if reduction == "none" else ())
    assert not ours.loss.any()
    for gradient, leaf in zip(
        torch.autograd.grad(ours.loss.sum(), case.leaves), case.leaves, strict=True
    ):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_one_row_without_leading_dimension(device: str, implementation: str) -> None:
    case = Case(device, lead=())
    torch.testing.assert_close(case.fused().loss, case.whole().loss)
    gradient = torch.autograd.grad(case.fused(reduction="none").loss, case.hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(case.whole().loss, case.hidden)[0])


def test_vocab_size_leaves_padding_out(device: str, implementation: str) -> None:
    case = Case(device)
    case.targets = pack(6 * [{1: 0.5, 400: 0.5}], device)
    case.labels.clamp_(max=400)
    ours, wanted = case.fused(vocab_size=450, chunk_rows=4), case.whole(vocab_size=450)
    torch.testing.assert_close(ours.loss, wanted.loss)
    _, to_weight, to_bias = torch.autograd.grad(ours.loss, case.leaves)
    assert not to_weight[450:].any()
    assert not to_bias[450:].any()
    assert to_weight[:450].any(1).all()


def test_a_row_that_is_nan_spoils_the_sums_only(device: str, implementation: str) -> None:
    case = Case(device)
    case.labels[1, 2] = 517
    loss = case.fused(chunk_rows=4, reduction="none").loss
    assert loss.isnan().flatten().tolist() == [False] * 5 + [True]
    assert case.fused(chunk_rows=4).loss.isnan()
    to_hidden, *_ = torch.autograd.grad(loss.sum(), case.leaves)
    assert to_hidden.isnan().any(-1).flatten().tolist() == [False] * 5 + [True]


def test_gradient_accumulation_over_micro_batches(device: str, implementation: str) -> None:
    case = Case(device)
    wanted = torch.autograd.grad(case.fused().loss, case.leaves)
    for part in (slice(0, 1), slice(1, 2)):
        linear_sparse_kl_loss(
            case.hidden[part],
            case.weight,
            case.targets[3 * part.start : 3 * part.stop],
            case.labels[part],
            bias=case.bias,
            normalizer=torch.tensor(5, device=device),
        ).loss.backward()
    for leaf, gradient in zip(case.leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-7)


def test_repeats_bitwise(device: str, implementation: str) -> None:
    case = Case(device, torch.bfloat16)
    losses = [case.fused(chunk_rows=4).loss for _ in range(2)]
    assert torch.equal(*losses)
    first, second = (torch.autograd.grad(loss, case.leaves) for loss in losses)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_gradcheck_of_the_reference() -> None:
    targets = pack([{1: 0.25, 4: 0.5}, {}, {0: 1.0}, {2: 0.5, 3: 0.5}])
    labels = torch.tensor([4, 2, 5, -100])
    arguments = targets.indptr, targets.token_ids, targets.probs, labels, 0.3, -100, 6

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight, bias)
            return reference_linear_sparse_kl(hidden, weight, bias, *arguments)[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return reference_linear_sparse_kl_backward(grad, *ctx.saved_tensors, *arguments)

    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in [(4, 3), (7, 3), (7,)]
    ]
    assert torch.autograd.gradcheck(Reference.apply, leaves)


# ---- autograd ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(
    which: int, reduction: str, device: str, implementation: str
) -> None:
    case = Case(device)
    wanted = torch.autograd.grad(case.fused(reduction=reduction).loss.sum(), case.leaves)
    for number, leaf in enumerate(case.leaves):
        leaf.requires_grad_(number == which)
    case.fused(reduction=reduction).loss.sum().backward()
    for number, leaf in enumerate(case.leaves):
        if number == which:
            assert torch.equal(leaf.grad, wanted[number])
        else:
            assert leaf.grad is None


def test_without_grad_nothing_is_kept(device: str, implementation: str) -> None:
    case = Case(device)
    with torch.no_grad():
        ours = case.fused()
    assert not ours.loss.requires_grad
    torch.testing.assert_close(ours.loss, case.fused().loss.detach())
    assert not case.fused().kl.requires_grad


def test_the_accumulator_becomes_the_gradient_without_a_copy(native: None) -> None:
    """Half a gigabyte for a vocabulary of 151,936."""
    case = Case(vocab=128)
    loss = case.fused().loss
    pointer = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert case.weight.grad.data_ptr() == pointer


def test_second_backward_through_one_call_is_refused(device: str, implementation: str) -> None:
    case = Case(device)
    loss = case.fused().loss
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in case.leaves]
    with pytest.raises(RuntimeError, match="linear_sparse_kl_loss ran backward a second time"):
        (3 * loss).backward()
    for leaf, gradient in zip(case.leaves, first, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_no_reduction_allows_a_second_backward(device: str, implementation: str) -> None:
    case = Case(device)
    loss = case.fused(reduction="none").loss.sum()
    loss.backward(retain_graph=True)
    first = case.weight.grad.clone()
    loss.backward()
    assert torch.equal(case.weight.grad, 2 * first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_says_that_it_is_not_supported(
    reduction: str, device: str, implementation: str
) -> None:
    case = Case(device)
    loss = case.fused(reduction=reduction).loss.sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)[0].pow(2).sum().backward()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_the_layer_does_and_keeps_the_weights_gradient_whole(
    hidden_dtype: torch.dtype, device: str, implementation: str
) -> None:
    case = Case(device)
    case.hidden = case.hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        ours, whole = case.fused(), case.whole()
    torch.testing.assert_close(ours.loss, whole.loss, rtol=4e-3, atol=4e-3)
    gradients = torch.autograd.grad(ours.loss, case.leaves)
    plain = torch.autograd.grad(whole.loss, case.leaves)
    assert [g.dtype for g in gradients] == [hidden_dtype, torch.float32, torch.float32]
    for gradient, native in zip(gradients, plain, strict=True):
        assert (gradient - native).norm() < 0.01 * native.norm()
    rounded = gradients[1].to(torch.bfloat16).float()
    assert not torch.equal(rounded, gradients[1]), "went through bfloat16"


# ---- chunks ----


@pytest.mark.parametrize(
    ("rows", "row_bytes", "expected"),
    [
        (8192, 151_936 * 2, 2048),
        (16384, 50_304 * 2, 5504),  # three chunks; the last a little shorter
        (100, 50_304 * 2, 128),
        (0, 50_304 * 2, 128),
        (4096, 2**30, 128),  # one tile, whatever it takes
    ],
)
def test_chunks_fill_the_budget_evenly(rows: int, row_bytes: int, expected: int) -> None:
    assert default_chunk_rows(rows, row_bytes) == expected


def test_no_chunk_is_longer_than_asked_for(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from memdec.ops import linear_sparse_kl

    seen = []
    inner = linear_sparse_kl.forward_into

    def forward_into(values: Any, saved: Any, gradient: Tensor, inputs: Any, *rest: Any) -> None:
        seen.append((inputs.logits.shape, inputs.logits.data_ptr(), gradient.data_ptr()))
        inner(values, saved, gradient, inputs, *rest)

    monkeypatch.setattr(linear_sparse_kl, "forward_into", forward_into)
    Case(device).fused(chunk_rows=4)
    assert [shape for shape, _, _ in seen] == [(4, 576), (2, 576)]
    assert len({pointer for _, *pointers in seen for pointer in pointers}) == 1


# ---- as a torch op ----


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction: int, device: str, implementation: str) -> None:
    case = Case(device, torch.bfloat16, 17)
    case.labels.clamp_(min=0)  # opcheck takes the NaN statistics of ignored rows for a difference
    buffers = case.targets.indptr, case.targets.token_ids, case.targets.probs
    layer = (*case.leaves, *buffers, case.labels, 0.3, -100)
    divisor = torch.tensor(3.0, device=device) if reduction == 2 else None
    op = torch.ops.memdec.linear_sparse_kl
    for wanted in ([False] * 3, [True, True, False]):
        if reduction == 0 and any(wanted):
            continue
        leaves = [
            leaf.detach().clone().requires_grad_(want or not any(wanted))
            for leaf, want in zip(case.leaves, wanted, strict=True)
        ]
        arguments = (*leaves, *layer[3:], reduction, divisor, 17, 4, wanted)
        torch.library.opcheck(op, arguments)
    with torch.no_grad():
        outputs = op(*layer, reduction, divisor, 17, 4, [False] * 3)
    backward = torch.ops.memdec.linear_sparse_kl_backward
    detached = [leaf.detach() for leaf in case.leaves]
    torch.library.opcheck(
        backward,
        (outputs[0], *detached, *layer[3:], 17, 4, *outputs[3:5], [True, False, True]),
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(
    autocast: bool, dynamic: bool, device: str, implementation: str
) -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: SparseTargets, labels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = linear_sparse_kl_loss(2 * hidden, weight, targets, labels, chunk_rows=4)
        return out.loss + out.kl

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lead in ((5,), (7,)):
        case = Case(device, lead=lead)
        arguments = case.hidden, case.weight, case.targets, case.labels
        first, second = compiled(*arguments), loss(*arguments)
        assert torch.equal(first, second)
        ours, wanted = (torch.autograd.grad(value, case.leaves[:2]) for value in (first, second))
        for a, b in zip(ours, wanted, strict=True):
            assert torch.equal(a, b)


def test_meta_tensors_have_shapes() -> None:
    case = Case()
    hidden, weight = (leaf.detach().to("meta").requires_grad_() for leaf in case.leaves[:2])
    out = linear_sparse_kl_loss(
        hidden, weight, case.targets.to("meta"), case.labels.to("meta"), reduction="none"
    )
    assert out.loss.shape == (2, 3)
    out.loss.sum().backward()
    assert weight.grad.shape == weight.shape


# ---- arguments ----

HIDDEN, WEIGHT, LABELS = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(3, dtype=torch.int64)
TARGETS = pack([{1: 1.0}, {2: 1.0}, {3: 1.0}])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "hidden must be float32", (HIDDEN.double(), WEIGHT), {}),
        (ValueError, "hidden must be contiguous", (torch.zeros(3, 8)[:, ::2], WEIGHT), {}),
        (TypeError, "weight must be a tensor, got NoneType", (HIDDEN, None), {}),
        (TypeError, "weight must have the dtype of hidden, .*32", (HIDDEN, WEIGHT.half()), {}),
        (ValueError, "weight must have 2 dimensions", (HIDDEN, WEIGHT[0]), {}),
        (ValueError, r"weight must have shape \[V, 4\]", (HIDDEN, torch.zeros(8, 5)), {}),
        (ValueError, "weight must be on cpu", (HIDDEN, WEIGHT.to("meta")), {}),
        (TypeError, "bias must have the dtype", (HIDDEN, WEIGHT), {"bias": WEIGHT[:, 0].half()}),
        (ValueError, r"bias must have shape \[8\]", (HIDDEN, WEIGHT), {"bias": HIDDEN[0]}),
        (ValueError, "chunk_rows must be 1 or more, got 0", (HIDDEN, WEIGHT), {"chunk_rows": 0}),
        (TypeError, "chunk_rows must be an int", (HIDDEN, WEIGHT), {"chunk_rows": 2.0}),
        (ValueError, "targets must have 2 rows", (HIDDEN[:2], WEIGHT), {}),
        (ValueError, "vocab_size must be from 1 to 8", (HIDDEN, WEIGHT), {"vocab_size": 9}),
        (ValueError, "alpha must be from 0 to 1", (HIDDEN, WEIGHT), {"alpha": math.inf}),
        (ValueError, "reduction must be", (HIDDEN, WEIGHT), {"reduction": "batchmean"}),
        (TypeError, "normalizer must be", (HIDDEN, WEIGHT), {"normalizer": "3"}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, arguments: tuple, options: dict
) -> None:
    with pytest.raises(error, match=message):
        linear_sparse_kl_loss(*arguments, TARGETS, LABELS[: len(arguments[0])], **options)


def test_check_values_finds_bad_labels_and_tokens(
    device: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "check_values", True)
    case = Case(device)
    case.fused()
    case.labels[1, 2] = 517
    with pytest.raises(ValueError, match=r"labels must be from 0 to 516.*got 517"):
        case.fused(chunk_rows=1)
