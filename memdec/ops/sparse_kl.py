"""KL from a sparse target plus cross-entropy to the label, without a dense target."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memdec import _native
from memdec.environment import environment
from memdec.ops import _checks, _reference
from memdec.ops._registration import is_traced, needs_gradient, register
from memdec.ops._rows import collapse, empty_like, overlaps_itself, rows_view
from memdec.ops.sparse_targets import SparseTargets, check_targets, check_token_values
from memdec.ops.token_log_probs import check_label_values

REDUCTIONS = ("none", "sum", "mean")  # Reduction in csrc/common/args.h


class SparseKLOutput(NamedTuple):
    """What `sparse_kl_loss` returns, float32: 0-dim, or one value a row for "none"."""

    loss: Tensor
    kl: Tensor  # detached
    ce: Tensor  # detached


def sparse_kl_loss(
    logits: Tensor,
    targets: SparseTargets,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.5,
    reduction: str = "mean",
    ignore_index: int = -100,
    normalizer: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> SparseKLOutput:
    """`alpha * KL(target || softmax(logits)) + (1 - alpha) * cross_entropy(logits, labels)`.

    Equivalent to, but without the dense target and exact where a probability is near 1::

        log_q = torch.log_softmax(logits.float(), -1)
        p = targets.to_dense(vocab_size)
        kl = (torch.xlogy(p, p) - p * log_q).sum(-1)
        ce = F.nll_loss(log_q, labels, reduction="none")
        loss = (alpha * kl + (1 - alpha) * ce)[labels != ignore_index].mean()

    The training loss of Memory Decoder (arXiv 2508.09874). Differentiable (once) in the logits;
    targets are constants. Without grad only the row sums are computed.

    A row counts when its label is not `ignore_index`; without labels, when its target is not empty.
    A row that does not count is not read, adds nothing and gets zero gradient. An empty target
    adds a KL of 0 and its cross-entropy. A target row need not sum to 1: with the sum S the
    gradient is `alpha * (S * q - p) + (1 - alpha) * (q - onehot)`.

    Args:
        logits: `[..., V]`, float32, bfloat16 or float16, last dimension contiguous. They stay as
            they are unless `inplace_backward=True`.
        targets: one row for each row of the logits, in order.
        labels: `[...]`, int64 or int32, not shifted. None: loss = kl, `alpha` is ignored, ce = 0.
            Values are not checked: a label or a token id outside [0, vocab_size) makes its row NaN.
        alpha: the weight of the KL, in [0, 1].
        reduction: "mean" divides by the counted rows, or by `normalizer`; "sum"; "none" gives one
            value a row, 0 for a row that does not count.
        ignore_index: see above.
        normalizer: for "mean", what to divide by: a number or a 0-dim tensor on any device, which
            the host does not read (the Trainer's `num_items_in_batch`).
        vocab_size: the number of real tokens; columns from there on take no mass and no gradient.
        inplace_backward: the backward pass writes the gradient into the memory of the logits
            instead of a matrix of its own. The logits are overwritten during `backward()`, when the
            gradient passes this op; whatever else reads them later reads the gradient. Unsafe if
            what produced them saved its output for its own backward (softmax, tanh and the like;
            torch raises RuntimeError where it can tell). A second backward raises RuntimeError.
            Without effect under `torch.compile` and for logits whose rows share memory.

    A float32 or bfloat16 gradient of a reduced loss is made in forward, while the logits are at hand,
    and rescaled in backward if the loss is not the end of the graph: one read and one write in all.
    A second backward through that call (`retain_graph=True`) raises RuntimeError.

    Returns:
        `SparseKLOutput(loss, kl, ce)`; kl and ce use the rows and the divisor of the loss. With no
        counted row everything is 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    _checks.check_logits("logits", logits)
    divisor = check_loss(logits, targets, labels, alpha, reduction, ignore_index, normalizer)
    vocab_size = _checks.check_vocab_size(vocab_size, logits.shape[-1])
    inputs = SparseKLInputs(
        logits,
        targets.indptr,
        targets.token_ids,
        targets.probs,
        labels,
        alpha,
        ignore_index,
    )
    settings = REDUCTIONS.index(reduction), divisor, vocab_size
    differentiated = needs_gradient(logits)
    if not differentiated and not torch.compiler.is_compiling():
        values = _empty_values(logits, reduction == "none")
        _out_op(*inputs, *settings, *values)
        return SparseKLOutput(*values)
    with_gradient = (
        differentiated
        and reduction != "none"
        and logits.dtype != torch.float16  # would underflow before a loss scale arrives
        and not inplace_backward
    )
    inplace = inplace_backward and not torch.compiler.is_compiling()
    loss, kl, ce, *_ = _op(*inputs, *settings, with_gradient, inplace)
    return SparseKLOutput(loss, kl, ce)


def check_loss(
    rows_of: Tensor,
    targets: SparseTargets,
    labels: Tensor | None,
    alpha: float,
    reduction: str,
    ignore_index: int,
    normalizer: int | float | Tensor | None,
) -> Tensor | None:
    """Checks what every form of the loss takes beside the logits; returns the given divisor.

    `rows_of` has the logits' leading dimensions and their device.
    """
    check_targets(targets)
    _checks.check_device("targets", targets.probs, rows_of)
    rows = math.prod(rows_of.shape[:-1])
    if len(targets) != rows:
        raise ValueError(f"targets must have {rows} rows, as many as logits, got {len(targets)}")
    if labels is not None:
        _checks.check_labels(labels, rows_of)
    _checks.check_fraction("alpha", alpha)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    _checks.check_int("ignore_index", ignore_index)
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"normalizer is for reduction mean, got it with {reduction}")
    return _divisor(normalizer, rows_of.device)


def _divisor(normalizer: int | float | Tensor, device: torch.device) -> Tensor:
    """`normalizer` as a float32 value on the device, without the host waiting for one."""
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a 0-dim tensor, got shape {tuple(normalizer.shape)}"
            )
        normalizer = normalizer.detach()
    elif not isinstance(normalizer, (int, float)):
        raise TypeError(
            f"normalizer must be a number or a 0-dim tensor, got {type(normalizer).__name__}"
        )
    elif not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be 0 or more and finite, got {normalizer}")
    # A number or a CPU tensor travels as an argument of the product's kernel, which a CUDA graph
    # can capture; copying it to the device would not be.
    return (torch.ones((), device=device) * normalizer).to(device, torch.float32)


# ---- reference ----


def reference_sparse_kl(
    logits: Tensor,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, kl and ce of each row, `[rows]` float64, 0 where a row does not count."""
    log_q = _reference.log_softmax(logits[:, :vocab_size])
    rows, ids, _, p = _entries(indptr, token_ids, probs, vocab_size)
    # p * (log p - log q), written so that p = 0 contributes 0 even where log q is -inf.
    cross = torch.where(p == 0, 0.0, p * log_q[rows, ids])
    kl = _reference.segment_sum(torch.xlogy(p, p) - cross, indptr)
    if labels is None:
        loss, ce = kl, torch.zeros_like(kl)
    else:
        named = _reference.in_range(labels, vocab_size)
        index = torch.where(named, labels, 0).long()
        ce = -torch.where(named, log_q.gather(1, index[:, None])[:, 0], math.nan)
        kl = torch.where(named, kl, math.nan)
        ce = torch.where(kl.isnan(), math.nan, ce)
        # A term without weight has no influence, not even its infinity; a NaN row stays one.
        loss = alpha * kl + (1 - alpha) * ce
        if alpha in (0, 1):
            loss = torch.where((kl + ce).isnan(), math.nan, kl if alpha == 1 else ce)
    counted = counted_rows(indptr, labels, ignore_index)
    loss, kl, ce = (torch.where(counted, value, 0.0) for value in (loss, kl, ce))
    return loss, kl, ce


def reference_sparse_kl_backward(
    grad: Tensor,
    logits: Tensor,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
) -> Tensor:
    """Gradient `[rows, V]` float64 of the row losses, with upstream gradient `[rows]`."""
    q = _reference.log_softmax(logits[:, :vocab_size]).exp()
    rows, ids, slots, p = _entries(indptr, token_ids, probs, vocab_size)
    mass = _reference.segment_sum(p, indptr)  # NaN where a token id is out of range
    kl_weight = 1.0 if labels is None else alpha
    result = kl_weight * mass[:, None] * q
    result.index_put_((rows, ids), torch.where(slots, -kl_weight * p, 0.0), accumulate=True)
    if labels is not None:
        named = _reference.in_range(labels, vocab_size)
        index = torch.where(named, labels, 0).long()
        onehot = torch.zeros_like(q).scatter(1, index[:, None], 1.0)
        result += (1 - alpha) * (q - onehot)
        result = torch.where(named[:, None], result, math.nan)
    result *= grad.double()[:, None]
    result = torch.where(counted_rows(indptr, labels, ignore_index)[:, None], result, 0.0)
    return torch.nn.functional.pad(result, (0, logits.shape[-1] - vocab_size))


def _entries(
    indptr: Tensor, token_ids: Tensor, probs: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each slot: row, token, whether it is in a row, and p, NaN for a token out of range."""
    rows, inside = _reference.slot_rows(indptr, token_ids.shape[0])
    named = _reference.in_range(token_ids, vocab_size)
    ids = torch.where(named, token_ids, 0).long()
    return rows, ids, inside, torch.where(named, probs.double(), math.nan)


def counted_rows(indptr: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    return indptr.diff() > 0 if labels is None else labels != ignore_index


# ---- the registered ops ----


class SparseKLInputs(NamedTuple):
    """What both ops take, in the order of the schemas."""

    logits: Tensor
    indptr: Tensor
    token_ids: Tensor
    probs: Tensor
    labels: Tensor | None
    alpha: float
    ignore_index: int


def _sparse_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss, kl, ce and, for the backward kernel, row statistics and d loss / d row loss.

    Last, with `with_gradient`, the gradient of the logits for an upstream gradient of 1, made while
    the kernel has the row at hand; else an empty tensor.
    """
    inputs = SparseKLInputs(*arguments[:7])
    *settings, with_gradient, _ = arguments[7:]
    outputs = *values, stats, scale, gradient = _fake(*arguments)
    forward_into(values, (stats, scale), gradient if with_gradient else None, inputs, *settings)
    return outputs


def _sparse_kl_out(*arguments: Any) -> None:
    """Loss, kl and ce alone, into the last three arguments."""
    forward_into(arguments[10:], None, None, SparseKLInputs(*arguments[:7]), *arguments[7:10])


def check_values(inputs: SparseKLInputs, vocab_size: int) -> None:
    """For MEMDEC_CHECK_VALUES=1: ValueError for a label or a token id that names no token."""
    if environment.check_values:
        check_token_values(inputs.indptr, inputs.token_ids, vocab_size)
        if inputs.labels is not None:
            check_label_values(inputs.labels, vocab_size, inputs.ignore_index)


def forward_into(
    values: Sequence[Tensor],
    saved: tuple[Tensor, Tensor] | None,
    gradient: Tensor | None,
    inputs: SparseKLInputs,
    reduction: int,
    normalizer: Tensor | None,
    vocab_size: int,
) -> None:
    """Writes loss, kl and ce to `values`, and what backward needs, stats and scale, to `saved`.

    All are as `_fake` shapes them. And to `gradient`, which may be the logits themselves, the
    gradient of a reduced loss; it comes with `saved`.
    """
    check_values(inputs, vocab_size)
    logits, _, token_ids, _, _, alpha, ignore_index = inputs
    rows = inputs.indptr.shape[0] - 1
    if rows == 0:
        for value in (*values, *(saved or ())):
            value.zero_()
        return
    kernels = _native.kernels_for(logits.device.type)
    if kernels is None:
        _reference_into(inputs, reduction, normalizer, vocab_size, values, saved)
        if gradient is not None and saved is not None:
            one = torch.ones((), device=logits.device)
            backward_into(gradient, one, *inputs, vocab_size, *saved)
        return
    logits, view = rows_view(logits)
    indptr, token_ids, probs, labels = _contiguous(inputs)
    addresses = [value.data_ptr() for value in values]
    # Row statistics, scale and the rows' values, where nobody else keeps them.
    scratch = values[0].new_empty(5 * rows + 1)
    stats, scale = scratch.data_ptr(), scratch.data_ptr() + 8 * rows
    rest = scale + 4
    if saved is not None:
        stats, scale = saved[0].data_ptr(), saved[1].data_ptr()
    if REDUCTIONS[reduction] == "none":
        row_values, reduced = addresses, [0, 0, 0, 0]
    else:
        row_values = [rest + 4 * rows * i for i in range(3)]
        reduced = [*addresses, scale]
    kernels.sparse_kl(
        *_native.launch_on(logits.device),
        rows,
        view,
        vocab_size,
        indptr.data_ptr(),
        token_ids.data_ptr(),
        probs.data_ptr(),
        token_ids.shape[0],
        0 if labels is None else labels.data_ptr(),
        alpha,
        ignore_index,
        reduction,
        0 if normalizer is None else normalizer.data_ptr(),
        *row_values,
        stats,
        *reduced,
        None if gradient is None else rows_view(gradient)[1],
    )


def _empty_values(logits: Tensor, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for loss, kl and ce."""
    shape = logits.shape[:-1] if by_row else ()
    loss = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return loss, torch.empty_like(loss), torch.empty_like(loss)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    logits, reduction, with_gradient = arguments[0], arguments[7], arguments[10]
    by_row = REDUCTIONS[reduction] == "none"
    values = _empty_values(logits, by_row)
    # For "none" the scale has no value: every d loss / d row loss is 1.
    return (
        *values,
        values[0].new_empty((*logits.shape[:-1], 2)),
        values[0].new_empty((0,) if by_row else ()),
        empty_like(logits, logits.dtype) if with_gradient else logits.new_empty(0),
    )


def _reference_into(
    inputs: SparseKLInputs,
    reduction: int,
    normalizer: Tensor | None,
    vocab_size: int,
    values: Sequence[Tensor],
    saved: tuple[Tensor, Tensor] | None,
) -> None:
    device = values[0].device
    stats, scale = saved or (torch.empty(0, device=device), torch.empty((), device=device))
    stats.zero_()  # the reference's backward works without them
    rows = inputs.indptr.shape[0] - 1
    row_values = torch.empty(3, rows, dtype=torch.float64, device=device)
    for chunk, part in _chunks(inputs, rows):
        row_values[:, chunk] = torch.stack(reference_sparse_kl(*part, vocab_size))
    if REDUCTIONS[reduction] == "none":
        for value, row_value in zip(values, row_values, strict=True):
            value.copy_(row_value.view(value.shape))
        return
    if REDUCTIONS[reduction] == "sum":
        scale.fill_(1.0)
    else:
        labels = None if inputs.labels is None else inputs.labels.reshape(rows)
        counted = counted_rows(inputs.indptr, labels, inputs.ignore_index).sum()
        divisor = counted if normalizer is None else normalizer
        scale.copy_(torch.where(counted > 0, 1.0 / divisor.double(), 0.0))
    for value, row_value in zip(values, row_values, strict=True):
        value.copy_(row_value.sum() * scale.double())


def _sparse_kl_backward(*arguments: Any) -> Tensor:
    logits = arguments[1]
    result = empty_like(logits, logits.dtype)
    backward_into(result, *arguments)
    return result


def _fake_backward(*arguments: Any) -> Tensor:
    logits = arguments[1]
    return empty_like(logits, logits.dtype)


def backward_into(result: Tensor, *arguments: Any) -> None:
    """Writes the gradient to `result`, which may be the logits themselves."""
    grad, *fields, vocab_size, stats, scale = arguments
    inputs = SparseKLInputs(*fields)
    logits, *_, alpha, ignore_index = inputs
    rows = stats.numel() // 2
    if rows == 0:
        return
    if grad.dim() > 0 and not any(grad.stride()):
        grad = grad[(0,) * grad.dim()]  # one value for all rows, as .sum() sends it
    kernels = _native.kernels_for(logits.device.type)
    if kernels is None:
        if scale.numel():
            grad = grad * scale
        flat_grad = grad.expand(logits.shape[:-1]).reshape(rows)
        flat = result.reshape(rows, -1)
        for chunk, part in _chunks(inputs, rows):
            flat[chunk] = reference_sparse_kl_backward(flat_grad[chunk], *part, vocab_size)
        if flat.data_ptr() != result.data_ptr():
            result.copy_(flat.view(result.shape))
        return
    logits, view = rows_view(logits)
    indptr, token_ids, probs, labels = _contiguous(inputs)
    grad = grad.contiguous()
    kernels.sparse_kl_backward(
        *_native.launch_on(logits.device),
        rows,
        view,
        vocab_size,
        indptr.data_ptr(),
        token_ids.data_ptr(),
        probs.data_ptr(),
        token_ids.shape[0],
        0 if labels is None else labels.data_ptr(),
        alpha,
        ignore_index,
        stats.data_ptr(),
        scale.data_ptr() if scale.numel() else 0,
        grad.data_ptr(),
        1 if grad.dim() > 0 else 0,
        rows_view(result)[1],
    )


def _chunks(inputs: SparseKLInputs, rows: int) -> Iterator[tuple[slice, SparseKLInputs]]:
    """Row slices, and the inputs of each as the reference takes them."""
    logits, indptr, token_ids, probs, labels, alpha, ignore_index = inputs
    logits = logits.reshape(rows, logits.shape[-1])
    # Whatever the offsets say, nothing outside the buffers is read.
    indptr = indptr.clamp(0, token_ids.shape[0]).cummax(0).values
    for chunk in _reference.row_chunks(rows, logits.shape[1]):
        offsets, ids, p = indptr[chunk.start : chunk.stop + 1], token_ids, probs
        if indptr.device.type == "cpu":  # elsewhere reading the offsets would synchronise
            first, end = int(offsets[0]), int(offsets[-1])
            offsets, ids, p = offsets - first, ids[first:end], p[first:end]
        chunk_labels = None if labels is None else labels.reshape(rows)[chunk]
        yield (
            chunk,
            SparseKLInputs(logits[chunk], offsets, ids, p, chunk_labels, alpha, ignore_index),
        )


def _contiguous(inputs: SparseKLInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _, indptr, token_ids, probs, labels, *_ = inputs
    if labels is not None:
        labels = labels.to(torch.int64).contiguous()
    return indptr.contiguous(), token_ids.contiguous(), probs.contiguous(), labels


def rescale(gradient: Tensor, grad: Tensor) -> Tensor:
    """`gradient * grad`, written over `gradient`; without the host reading the 0-dim `grad`."""
    kernels = _native.kernels_for(gradient.device.type)
    if gradient.numel() == 0:
        return gradient
    if kernels is None:
        return gradient.mul_(grad)
    kernels.sparse_kl_rescale(
        *_native.launch_on(gradient.device),
        gradient.numel() // gradient.shape[-1],
        rows_view(gradient)[1],
        grad.data_ptr(),
    )
    return gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *fields, alpha, ignore_index, _, _, vocab_size, with_gradient, inplace = inputs
    _, kl, ce, stats, scale, gradient = output
    if with_gradient:
        ctx.save_for_backward(gradient)
    else:
        ctx.save_for_backward(logits, *fields, stats, scale)
    ctx.mark_non_differentiable(kl, ce, stats, scale, gradient)
    ctx.set_materialize_grads(False)
    ctx.numbers = alpha, ignore_index, vocab_size
    ctx.with_gradient = with_gradient
    ctx.inplace = inplace
    ctx.spent = False


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = 11 * (None,)
    if grad is None:
        return (None, *nothing)
    if ctx.spent:
        raise RuntimeError(
            "sparse_kl_loss ran backward a second time through one call, but its gradient was made "
            "once, in forward or in place of the logits: call it again, or with reduction none"
        )
    if ctx.with_gradient:
        if torch.is_grad_enabled() and not is_traced(grad):
            raise RuntimeError("sparse_kl_loss supports no double backward (create_graph=True)")
        (gradient,) = ctx.saved_tensors
        if is_traced(gradient):
            return ((gradient.float() * grad).to(gradient.dtype), *nothing)
        ctx.spent = True  # from here on the buffer may be somebody's .grad
        return (rescale(gradient, grad), *nothing)
    logits, indptr, token_ids, probs, labels, stats, scale = ctx.saved_tensors
    alpha, ignore_index, vocab_size = ctx.numbers
    arguments = (
        grad,
        logits,
        indptr,
        token_ids,
        probs,
        labels,
        alpha,
        ignore_index,
        vocab_size,
        stats,
        scale,
    )
    if (
        ctx.inplace
        and collapse(logits) is not None
        and not overlaps_itself(logits)
        and not is_traced(logits)
    ):
        ctx.spent = True
        result = logits.detach()
        backward_into(result, *arguments)
        # Autograd's own check then catches an op before this one that saved the logits.
        torch.autograd.graph.increment_version(logits)
    else:
        result = _backward_op(*arguments)
    return (result, *nothing)


_INPUTS = (
    "Tensor logits, Tensor indptr, Tensor token_ids, Tensor probs, Tensor? labels, float alpha, "
    "int ignore_index"
)
_backward_op = register(
    f"sparse_kl_backward(Tensor grad, {_INPUTS}, SymInt vocab_size, Tensor stats, Tensor scale)"
    " -> Tensor",
    _sparse_kl_backward,
    _fake_backward,
)
_op = register(
    f"sparse_kl({_INPUTS}, int reduction, Tensor? normalizer, SymInt vocab_size, "
    "bool with_gradient, bool inplace_backward)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sparse_kl,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_out_op = register(
    f"sparse_kl_out({_INPUTS}, int reduction, Tensor? normalizer, SymInt vocab_size, "
    "Tensor(a!) loss, Tensor(b!) kl, Tensor(c!) ce) -> ()",
    _sparse_kl_out,
    lambda *arguments: None,
)
