"""Log-softmax at one token a row, without a (rows x vocabulary) result."""

import math
from typing import Any

import torch
from torch import Tensor

from memdec import _native
from memdec.environment import environment
from memdec.ops import _checks, _reference
from memdec.ops._registration import needs_gradient, register
from memdec.ops._rows import empty_like, rows_view


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The log-probability of each row's label.

    Equivalent to, but without the intermediate matrix and exact where the probability is near 1::

        log_probs = torch.log_softmax(logits[..., :vocab_size].float(), -1)
        log_probs.gather(-1, labels[..., None])[..., 0]  # and 0 where labels == ignore_index

    The base's and the memory's values at the labels give the mixture's for any lmbda. Labels are
    not shifted. Differentiable (once) in the logits.

    Args:
        logits: `[..., V]`, float32, bfloat16 or float16, last dimension contiguous.
        labels: `[...]`, int64 or int32. Values are not checked: one outside [0, vocab_size) that is
            not `ignore_index` makes its row NaN.
        vocab_size: the number of real tokens; columns from there on take no mass.
        ignore_index: rows with this label are not read and give 0 with zero gradient.

    Returns:
        `[...]` float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    _checks.check_logits("logits", logits)
    _checks.check_labels(labels, logits)
    vocab_size = _checks.check_vocab_size(vocab_size, logits.shape[-1])
    _checks.check_int("ignore_index", ignore_index)
    inputs = logits, labels, vocab_size, ignore_index
    if torch.compiler.is_compiling() or needs_gradient(logits):
        return _op(*inputs)[0]
    out = empty_like(labels, torch.float32)
    _out_op(*inputs, out)
    return out


# ---- reference ----


def reference_token_log_probs(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int
) -> Tensor:
    """`[rows]` float64 from logits `[rows, V]` and labels `[rows]`."""
    log_probs = _reference.log_softmax(logits[:, :vocab_size])
    named = _reference.in_range(labels, vocab_size)
    index = torch.where(named, labels, 0).long()
    picked = torch.where(named, log_probs.gather(1, index[:, None])[:, 0], math.nan)
    return torch.where(labels == ignore_index, 0.0, picked)


def reference_token_log_probs_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int
) -> Tensor:
    """Gradient `[rows, V]` float64 of `reference_token_log_probs`: `grad * (onehot - softmax)`."""
    probs = _reference.log_softmax(logits[:, :vocab_size]).exp()
    named = _reference.in_range(labels, vocab_size)
    index = torch.where(named, labels, 0).long()
    ones = torch.where(named, 1.0, math.nan).double()
    result = (-probs).scatter_add(1, index[:, None], ones[:, None])
    result = torch.where(named[:, None], result, math.nan) * grad.double()[:, None]
    result = torch.where((labels == ignore_index)[:, None], 0.0, result)
    return torch.nn.functional.pad(result, (0, logits.shape[-1] - vocab_size))


# ---- the registered ops ----


def _token_log_probs(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The result and, for the backward kernel, the maximum and the log-norm of each row."""
    out, stats = _fake(logits, labels, vocab_size, ignore_index)
    _token_log_probs_into(logits, labels, vocab_size, ignore_index, out, stats)
    return out, stats


def _token_log_probs_into(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    ignore_index: int,
    out: Tensor,
    stats: Tensor | None = None,
) -> None:
    if environment.check_values:
        check_label_values(labels, vocab_size, ignore_index)
    rows = out.numel()
    if rows == 0:
        return
    kernels = _native.kernels_for(logits.device.type)
    if kernels is None:
        flat_logits, flat_labels = logits.reshape(rows, -1), labels.reshape(rows)
        for chunk in _reference.row_chunks(rows, logits.shape[-1]):
            out.view(rows)[chunk] = reference_token_log_probs(
                flat_logits[chunk], flat_labels[chunk], vocab_size, ignore_index
            )
        if stats is not None:
            stats.zero_()  # the reference's backward works without them
        return
    logits, view = rows_view(logits)
    labels = labels.to(torch.int64).contiguous()
    kernels.token_log_probs(
        *_native.launch_on(logits.device),
        rows,
        view,
        vocab_size,
        labels.data_ptr(),
        ignore_index,
        out.data_ptr(),
        0 if stats is None else stats.data_ptr(),
    )


def _fake(
    logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    out = empty_like(labels, torch.float32)
    stats = torch.empty((*labels.shape, 2), dtype=torch.float32, device=logits.device)
    return out, stats


def _token_log_probs_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, vocab_size: int, ignore_index: int, stats: Tensor
) -> Tensor:
    result = empty_like(logits, logits.dtype)
    rows = labels.numel()
    if rows == 0:
        return result
    kernels = _native.kernels_for(logits.device.type)
    if kernels is None:
        grad, logits, labels = grad.reshape(rows), logits.reshape(rows, -1), labels.reshape(rows)
        for chunk in _reference.row_chunks(rows, logits.shape[-1]):
            result.view(rows, -1)[chunk] = reference_token_log_probs_backward(
                grad[chunk], logits[chunk], labels[chunk], vocab_size, ignore_index
            )
        return result
    logits, view = rows_view(logits)
    labels = labels.to(torch.int64).contiguous()
    grad = grad.to(torch.float32).contiguous()
    kernels.token_log_probs_backward(
        *_native.launch_on(logits.device),
        rows,
        view,
        vocab_size,
        labels.data_ptr(),
        ignore_index,
        stats.data_ptr(),
        grad.data_ptr(),
        rows_view(result)[1],
    )
    return result


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_like(logits, logits.dtype)


def check_label_values(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """For MEMDEC_CHECK_VALUES=1: ValueError for a label that names no token."""
    wrong = ~_reference.in_range(labels, vocab_size) & (labels != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be from 0 to {vocab_size - 1} or {ignore_index}, the ignore_index, "
            f"got {int(labels[wrong][0])}"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, vocab_size, ignore_index = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.numbers = vocab_size, ignore_index


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    logits, labels, stats = ctx.saved_tensors
    return _backward_op(grad, logits, labels, *ctx.numbers, stats), None, None, None


_backward_op = register(
    "token_log_probs_backward(Tensor grad, Tensor logits, Tensor labels, SymInt vocab_size, "
    "int ignore_index, Tensor stats) -> Tensor",
    _token_log_probs_backward,
    _fake_backward,
)
_op = register(
    "token_log_probs(Tensor logits, Tensor labels, SymInt vocab_size, int ignore_index)"
    " -> (Tensor, Tensor)",
    _token_log_probs,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_out_op = register(
    "token_log_probs_out(Tensor logits, Tensor labels, SymInt vocab_size, int ignore_index, "
    "Tensor(a!) out) -> ()",
    _token_log_probs_into,
    lambda *arguments: None,
)
