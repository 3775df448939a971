"""token_log_probs against its definition, and every sentence of its docstring."""

import math
from typing import Any

import oracle
import pytest
import torch
from budget import assert_complement, assert_gradient, assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memdec.environment import environment
from memdec.ops import token_log_probs
from memdec.ops.token_log_probs import (
    reference_token_log_probs,
    reference_token_log_probs_backward,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "one row": (1, 1000),
    "V = 1": (3, 1),
    "no leading dimension": (130,),
    "odd V, so rows lose their 16-byte alignment": (5, 50257),
    "three dimensions": (2, 3, 517),
}


def random_case(
    shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits.to(device, dtype), labels.to(device)


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None].clamp(0))[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, implementation: str
) -> None:
    logits, labels = random_case(shape, device, dtype)
    ours = token_log_probs(logits, labels)
    assert (ours.shape, ours.dtype) == (labels.shape, torch.float32)
    assert_within_budget(ours, oracle.token_log_probs(logits, labels), eager(logits, labels))


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_label_dtypes_and_strides(
    label_dtype: torch.dtype, device: str, implementation: str
) -> None:
    logits, labels = random_case((6, 129), device)
    strided = torch.stack([labels, labels + 1], 1).to(label_dtype)[:, 0]
    assert torch.equal(token_log_probs(logits, strided), token_log_probs(logits, labels))


@pytest.mark.parametrize("width", [100, 50257])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("tail", [2e-5, 1e-4, 1e-2, 0.3])
def test_confident_probability_keeps_its_complement(
    tail: float, place: str, width: int, device: str, implementation: str
) -> None:
    """float32 F.log_softmax loses 13 % of 1 - q on a CPU."""
    index = {"first": 0, "middle": width // 2, "last": width - 1}[place]
    logits = torch.full((2, width), math.log(tail / (width - 1)), device=device)
    logits[:, index] = 0
    logits[1] += 100
    labels = torch.full((2,), index, device=device)
    truth = oracle.token_log_probs(logits, labels)
    assert_complement(token_log_probs(logits, labels), truth)


def test_logits_at_1e4(device: str, implementation: str) -> None:
    logits, labels = random_case((4, 1000), device)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, ::2] = 1e4
    ours = token_log_probs(logits, labels)
    assert_within_budget(ours, oracle.token_log_probs(logits, labels), eager(logits, labels))


def test_ignored_rows_are_zero_and_are_not_read(device: str, implementation: str) -> None:
    logits, labels = random_case((4, 65), device)
    labels[1], labels[2] = -100, -100
    logits[1] = math.nan
    logits.requires_grad_()
    ours = token_log_probs(logits, labels)
    assert ours[1:3].tolist() == [0, 0]
    ours.sum().backward()
    assert not logits.grad[1:3].any()
    wanted = oracle.token_log_probs_gradient(torch.ones(4), logits, labels)
    assert_gradient(logits.grad, wanted)


def test_ignore_index_may_be_a_token(device: str, implementation: str) -> None:
    logits, labels = random_case((4, 65), device)
    labels[:2] = 7
    ours = token_log_probs(logits, labels, ignore_index=7)
    assert_within_budget(ours, oracle.token_log_probs(logits, labels, ignore_index=7))


@pytest.mark.parametrize("label", [-1, 60, 64, 65, 2**40, -(2**40)])
def test_label_outside_the_vocabulary_makes_its_row_nan(
    label: int, device: str, implementation: str
) -> None:
    logits, labels = random_case((3, 65), device)
    labels = labels.clamp(max=59)
    labels[1] = label
    logits.requires_grad_()
    ours = token_log_probs(logits, labels, vocab_size=60)
    assert ours.isnan().tolist() == [False, True, False]
    ours.sum().backward()
    assert logits.grad[:, :60].isnan().all(-1).tolist() == [False, True, False]
    assert not logits.grad[[0, 2]].isnan().any()
    assert (logits.grad[:, 60:] == 0).all()


def test_a_nan_row_keeps_its_padding(device: str, implementation: str) -> None:
    logits, labels = random_case((2, 65), device)
    logits[0, 3] = math.nan
    logits.requires_grad_()
    token_log_probs(logits, labels.clamp(max=59), vocab_size=60).sum().backward()
    assert logits.grad[0, :60].isnan().all()
    assert (logits.grad[:, 60:] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4])
def test_columns_beyond_vocab_size_have_no_influence(
    poison: float, device: str, implementation: str
) -> None:
    logits, labels = random_case((3, 1187), device)
    logits[:, 1000:] = poison
    labels = labels.clamp(max=999)
    logits.requires_grad_()
    ours = token_log_probs(logits, labels, vocab_size=1000)
    assert_within_budget(ours, oracle.token_log_probs(logits, labels, 1000))
    ours.sum().backward()
    assert not logits.grad[:, 1000:].any()
    assert_gradient(
        logits.grad, oracle.token_log_probs_gradient(torch.ones(3), logits, labels, 1000)
    )


def test_infinities_and_nan(device: str, implementation: str) -> None:
    logits, labels = random_case((5, 65), device)
    labels[:] = 8
    logits[0, 9:] = -math.inf  # legal
    logits[1, 8] = -math.inf  # the label itself: log 0
    logits[2, 3] = math.nan
    logits[3, 3] = math.inf
    logits[4] = -math.inf
    ours = token_log_probs(logits, labels)
    assert ours.isnan().tolist() == [False, False, True, True, True]
    assert ours[1] == -math.inf
    assert_within_budget(ours, oracle.token_log_probs(logits, labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 50257), (2, 3, 517), (130,)], ids=str)
def test_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, implementation: str
) -> None:
    logits, labels = random_case(shape, device, dtype)
    logits.requires_grad_()
    out = token_log_probs(logits, labels)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    out.backward(grad)
    assert logits.grad.dtype == dtype
    assert_gradient(logits.grad, oracle.token_log_probs_gradient(grad, logits, labels))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_confident_label(
    dtype: torch.dtype, device: str, implementation: str
) -> None:
    """Where q is nearly 1, 1 - q must come from the others (20 to 100 % off, Liger-Kernel#1329)."""
    logits, labels = random_case((6, 1000), device)
    logits.scatter_(1, labels[:, None], torch.tensor([[18.0, 20, 22, 24, 26, 28]]).T.to(device))
    logits = logits.to(dtype).requires_grad_()
    token_log_probs(logits, labels).sum().backward()
    wanted = oracle.token_log_probs_gradient(torch.ones(6), logits, labels)
    assert_gradient(logits.grad, wanted)


def test_gradient_rows_sum_to_zero(device: str, implementation: str) -> None:
    logits, labels = random_case((4, 501), device)
    logits.requires_grad_()
    token_log_probs(logits, labels).sum().backward()
    assert logits.grad.sum(-1).abs().max() < 1e-6
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("upstream", ["ones", "expanded", "strided"])
def test_upstream_gradient_of_any_stride(upstream: str, device: str, implementation: str) -> None:
    logits, labels = random_case((2, 3, 65), device)
    logits.requires_grad_()
    grad = {
        "ones": torch.ones(2, 3),
        "expanded": torch.tensor(2.5).expand(2, 3),
        "strided": torch.arange(6.0).reshape(3, 2).T,
    }[upstream].to(device)
    token_log_probs(logits, labels).backward(grad)
    assert_gradient(logits.grad, oracle.token_log_probs_gradient(grad, logits, labels))


def test_gradcheck_of_the_reference() -> None:
    labels = torch.tensor([1, -100, 4])

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            ctx.save_for_backward(logits)
            return reference_token_log_probs(logits, labels, 6, -100)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return reference_token_log_probs_backward(grad, *ctx.saved_tensors, labels, 6, -100)

    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Reference.apply, (logits,))


def test_double_backward_says_that_it_is_not_supported(device: str, implementation: str) -> None:
    logits, labels = random_case((2, 9), device)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(token_log_probs(logits, labels).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.pow(2).sum().backward()


def test_shifted_logits_are_not_copied(device: str, native: None) -> None:
    """logits[:, :-1] of a tensor that no machine could copy; all but two rows are ignored."""
    row, _ = random_case((151936,), device)
    logits = row.expand(2, 2**18 + 1, 151936)[:, :-1]  # 319 GB of rows
    labels = torch.full((2, 2**18), -100, device=device)
    labels[0, 5], labels[1, -1] = 17, 151935
    ours = token_log_probs(logits, labels)
    truth = oracle.token_log_probs(row.expand(2, -1), torch.tensor([17, 151935]))
    assert_within_budget(torch.stack([ours[0, 5], ours[1, -1]]), truth)
    assert ours.count_nonzero() == 2


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty_batch(lead: tuple[int, ...], device: str, implementation: str) -> None:
    logits = torch.zeros(*lead, 9, device=device, requires_grad=True)
    ours = token_log_probs(logits, torch.zeros(lead, dtype=torch.int64, device=device))
    assert ours.shape == lead
    ours.sum().backward()
    assert logits.grad.shape == logits.shape


LOGITS, LABELS = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "logits must be float32", (LOGITS.double(), LABELS)),
        (ValueError, "logits must be contiguous", (LOGITS[:, ::2], LABELS)),
        (TypeError, "labels must be a tensor", (LOGITS, [1, 2, 3])),
        (TypeError, "labels must be int64 or int32", (LOGITS, LABELS.float())),
        (ValueError, "labels must have shape", (LOGITS, LABELS[:2])),
        (ValueError, "labels must be on cpu", (LOGITS, LABELS.to("meta"))),
    ],
)
def test_bad_arguments_are_named(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        token_log_probs(*arguments)


def test_check_values_finds_a_bad_label(
    device: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "check_values", True)
    logits, labels = random_case((3, 9), device)
    labels[0] = -100
    token_log_probs(logits, labels)
    labels[1] = 9
    with pytest.raises(ValueError, match=r"labels must be from 0 to 8 or -100.*got 9"):
        token_log_probs(logits, labels)


def test_meta_tensors_have_shapes() -> None:
    logits = torch.zeros(2, 3, 8, device="meta", requires_grad=True)
    out = token_log_probs(logits, torch.zeros(2, 3, device="meta", dtype=torch.int64))
    assert out.shape == (2, 3)
    out.sum().backward()
    assert logits.grad.shape == logits.shape


def test_opcheck(device: str, implementation: str) -> None:
    logits, labels = random_case((2, 3, 17), device, torch.bfloat16)
    op = torch.ops.memdec.token_log_probs
    torch.library.opcheck(op, (logits.clone().requires_grad_(), labels, 17, -100))
    out, stats = op(logits, labels, 17, -100)
    backward = torch.ops.memdec.token_log_probs_backward
    torch.library.opcheck(backward, (out, logits, labels, 17, -100, stats))
    written = torch.full_like(out, torch.nan)
    torch.library.opcheck(torch.ops.memdec.token_log_probs_out, (logits, labels, 17, -100, written))


def test_the_same_with_and_without_grad(device: str, implementation: str) -> None:
    """They are two registered ops."""
    logits, labels = random_case((2, 3, 17), device, torch.bfloat16)
    labels[0, 1] = -100
    with_grad = token_log_probs(logits.clone().requires_grad_(), labels)
    assert torch.equal(token_log_probs(logits, labels), with_grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool, device: str, implementation: str) -> None:
    def nll(logits: Tensor, labels: Tensor) -> Tensor:
        return -token_log_probs(2 * logits, labels).mean()

    torch.compiler.reset()
    compiled = torch.compile(nll, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        logits, labels = random_case((rows, 17), device)
        logits.requires_grad_()
        first = compiled(logits, labels)
        second = nll(logits, labels)
        assert torch.equal(first, second)
        (a,), (b,) = (torch.autograd.grad(loss, logits) for loss in (first, second))
        assert torch.equal(a, b)


def test_repeats_bitwise(device: str, implementation: str) -> None:
    logits, labels = random_case((3, 20011), device)
    logits.requires_grad_()
    outs = [token_log_probs(logits, labels) for _ in range(2)]
    grads = [torch.autograd.grad(out.sum(), logits)[0] for out in outs]
    assert torch.equal(*outs)
    assert torch.equal(*grads)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_shapes_and_values(device: str, implementation: str, data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 70))
    vocab_size = data.draw(st.integers(1, width))
    scale = data.draw(st.sampled_from([0.1, 5.0, 1000.0]))
    logits, _ = random_case((rows, width), device, data.draw(st.sampled_from(DTYPES)))
    logits = scale * logits
    label = st.integers(-1, vocab_size)
    labels = torch.tensor(
        data.draw(st.lists(label, min_size=rows, max_size=rows)), dtype=torch.int64
    )
    labels = labels.to(device)
    ours = token_log_probs(logits, labels, vocab_size=vocab_size, ignore_index=-1)
    truth = oracle.token_log_probs(logits, labels, vocab_size, -1)
    native = eager(logits[:, :vocab_size], labels.clamp(max=vocab_size - 1))
    assert_within_budget(ours, truth, native)
