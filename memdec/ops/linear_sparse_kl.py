"""The sparse KL loss from hidden states and the output matrix, without the logits of all rows."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memdec.ops import _checks
from memdec.ops._registration import is_traced, needs_gradient, register
from memdec.ops._rows import empty_like
from memdec.ops.sparse_kl import (
    REDUCTIONS,
    SparseKLInputs,
    SparseKLOutput,
    backward_into,
    check_loss,
    counted_rows,
    forward_into,
    reference_sparse_kl,
    reference_sparse_kl_backward,
    rescale,
)
from memdec.ops.sparse_targets import SparseTargets

# What the logits of one chunk may take: 2048 rows of 151,936 bfloat16 columns fit. Every chunk reads
# and writes the float32 gradient of the weight, so that small ones cost time (docs/design.md).
_CHUNK_BYTES = 640 * 2**20
# Rows of a chunk and columns of the padded vocabulary are multiples of these, which are sizes that
# tensor cores take without a remainder. An odd vocabulary costs a matrix product most of its speed.
_ROW_TILE = 128
_COLUMN_TILE = 64
# Rows that are copied to float32 at a time where torch has no such product: 64 MiB for 2048 columns.
_COPIED_ROWS = 8192


def linear_sparse_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    alpha: float = 0.5,
    reduction: str = "mean",
    ignore_index: int = -100,
    normalizer: int | float | Tensor | None = None,
    vocab_size: int | None = None,
) -> SparseKLOutput:
    """`sparse_kl_loss` of the output layer's logits, of which only a chunk of rows exists at a time.

    Equivalent to, but without the `[..., V]` logits and their gradient::

        logits = torch.nn.functional.linear(hidden, weight, bias)
        sparse_kl_loss(logits, targets, labels, alpha=alpha, ...)

    A chunk's logits are a matrix product in the dtype of `hidden`; the loss writes their gradient
    over them, and two more products take it to `hidden` and `weight`. All chunks use one buffer.
    Differentiable (once) in `hidden`, `weight` and `bias`; what needs no gradient costs none. The
    gradients of weight and bias are summed in float32 over all rows and rounded once.

    As with `F.linear`, all three have one dtype; under autocast they may differ and count as
    autocast's. A float32 weight then gets its float32 gradient unrounded.

    Args:
        hidden: `[..., H]`, float32, bfloat16 or float16, last dimension contiguous.
        weight: `[V, H]`, the output layer's. A V that is no multiple of 64 is padded in a copy.
        targets, labels, alpha, reduction, ignore_index, normalizer, vocab_size: as `sparse_kl_loss`
            takes them for logits `[..., V]`.
        bias: `[V]`.
        chunk_rows: rows of one chunk. By default as many as 640 MiB hold of logits, evenly divided:
            8192 rows x 151,936 columns in bfloat16 are four chunks of 2048.

    Memory beyond the inputs: `chunk_rows * V` logits and, with gradients, a float32 `[V, H]` (for
    a weight in bfloat16 its rounded gradient follows when the logits are gone) and the gradient of
    `hidden`; where V is padded or autocast casts, a copy of the weight.

    The gradients of a reduced loss in float32 or bfloat16 are made in forward; a second backward
    through that call (`retain_graph=True`) raises RuntimeError. For reduction "none" and for float16,
    whose gradient would underflow before a loss scale arrives, backward computes the logits again.

    Returns:
        `SparseKLOutput(loss, kl, ce)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    _checks.check_matrix("hidden", hidden)
    _check_layer(hidden, weight, bias)
    divisor = check_loss(hidden, targets, labels, alpha, reduction, ignore_index, normalizer)
    vocab_size = _checks.check_vocab_size(vocab_size, weight.shape[0])
    if chunk_rows is not None:
        _checks.check_int("chunk_rows", chunk_rows)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be 1 or more, got {chunk_rows}")
    if _autocasts(hidden):
        # The weight is cast inside, so that its gradient stays in float32.
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    differentiated = needs_gradient(hidden, weight, bias)
    in_forward = differentiated and reduction != "none" and hidden.dtype != torch.float16
    wanted = [
        in_forward and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    loss, kl, ce, *_ = _op(
        hidden,
        weight,
        bias,
        targets.indptr,
        targets.token_ids,
        targets.probs,
        labels,
        alpha,
        ignore_index,
        REDUCTIONS.index(reduction),
        divisor,
        vocab_size,
        chunk_rows,
        wanted,
    )
    return SparseKLOutput(loss, kl, ce)


def _check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor, dim in (("weight", weight, 2), ("bias", bias, 1)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _checks.FLOAT_DTYPES or (
            tensor.dtype != hidden.dtype and not _autocasts(hidden)
        ):
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}"
            )
        if tensor.dim() != dim:
            raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")
        _checks.check_device(name, tensor, hidden)
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, {hidden.shape[-1]}], the width of hidden, got "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"bias must have shape [{weight.shape[0]}], one value for each row of weight, got "
            f"{tuple(bias.shape)}"
        )


def _autocasts(tensor: Tensor) -> bool:
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


# ---- reference ----


def reference_linear_sparse_kl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *loss_arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, kl and ce of each row, `[rows]` float64, from float64 logits that are never rounded."""
    return reference_sparse_kl(_reference_logits(hidden, weight, bias), *loss_arguments)


def reference_linear_sparse_kl_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *loss_arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 gradients of hidden, weight and bias for the upstream gradient `[rows]`."""
    logits = _reference_logits(hidden, weight, bias)
    grad_logits = reference_sparse_kl_backward(grad, logits, *loss_arguments)
    return (
        grad_logits @ weight.double(),
        grad_logits.T @ hidden.double(),
        grad_logits.sum(0),
    )


def _reference_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


# ---- the layer, a chunk of rows at a time ----


class _ChunkedLayer:
    """`hidden @ weight.T + bias` and its gradients, one chunk of rows after the other.

    All chunks share one buffer for their logits, whose columns are padded to a multiple of 64.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_rows: int | None,
        wanted: list[bool],
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.rows = self.hidden.shape[0]
        self.width = _round_up(weight.shape[0], _COLUMN_TILE)
        if chunk_rows is None:
            chunk_rows = default_chunk_rows(self.rows, self.width * hidden.element_size())
        self.chunk_rows = chunk_rows
        self.chunk_count = -(-self.rows // chunk_rows)
        self.weight = _padded(weight, self.width, hidden.dtype)
        self.bias = None if bias is None else _padded(bias, self.width, hidden.dtype)
        # The first chunk writes it; without one it is zero.
        new = hidden.new_empty if self.rows else hidden.new_zeros
        self.grad_hidden = empty_like(self.hidden, hidden.dtype) if wanted[0] else None
        self.grad_weight = new(self.weight.shape, dtype=torch.float32) if wanted[1] else None
        self.grad_bias = hidden.new_zeros(self.width, dtype=torch.float32) if wanted[2] else None

    def run(self, write_gradient: Callable[[int, slice, Tensor], bool]) -> None:
        """Calls it with each chunk's number, rows and logits.

        It returns whether it has replaced the logits by their gradient, to be added to the layer's.
        """
        buffer = self.hidden.new_empty(min(self.chunk_rows, self.rows), self.width)
        for number in range(self.chunk_count):
            start = number * self.chunk_rows
            chunk = slice(start, min(start + self.chunk_rows, self.rows))
            hidden, logits = self.hidden[chunk], buffer[: chunk.stop - start]
            if self.bias is None:
                torch.mm(hidden, self.weight.T, out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.T, out=logits)
            if not write_gradient(number, chunk, logits):
                continue
            if self.grad_hidden is not None:
                torch.mm(logits, self.weight, out=self.grad_hidden[chunk])
            if self.grad_weight is not None:
                _add_product(self.grad_weight, logits.T, hidden, beta=0 if number == 0 else 1)
            if self.grad_bias is not None:
                self.grad_bias += logits.sum(0, dtype=torch.float32)

    def gradients(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Of hidden, weight and bias, in their shapes and dtypes; empty where none is wanted."""
        to_hidden = to_weight = to_bias = None
        if self.grad_hidden is not None:
            to_hidden = self.grad_hidden.view(hidden.shape)
        if self.grad_weight is not None:
            to_weight = self.grad_weight[: weight.shape[0]].to(weight.dtype)
        if self.grad_bias is not None and bias is not None:
            to_bias = self.grad_bias[: bias.shape[0]].to(bias.dtype)
        return tuple(
            hidden.new_empty(0) if gradient is None else gradient
            for gradient in (to_hidden, to_weight, to_bias)
        )


def default_chunk_rows(rows: int, row_bytes: int) -> int:
    """The rows of evenly divided chunks within the budget; a whole number of tiles."""
    most = max(_CHUNK_BYTES // row_bytes // _ROW_TILE, 1) * _ROW_TILE
    chunks = max(-(-rows // most), 1)
    return max(_round_up(-(-rows // chunks), _ROW_TILE), _ROW_TILE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _padded(parameter: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The parameter in `dtype` with zero rows up to `width`; itself where that changes nothing."""
    vocab = parameter.shape[0]
    if vocab == width and parameter.dtype == dtype:
        return parameter.detach()
    padded = parameter.new_empty((width, *parameter.shape[1:]), dtype=dtype)
    padded[:vocab] = parameter.detach()
    padded[vocab:] = 0
    return padded


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """`total = beta * total + a @ b`, summed in float32 whatever the dtype of `a` and `b`."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=beta)
    elif _has_float32_product(a.device.type, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)
    else:
        b = b.float()
        for start in range(0, total.shape[0], _COPIED_ROWS):
            part = slice(start, start + _COPIED_ROWS)
            total[part].addmm_(a[part].float(), b, beta=beta)


@functools.cache
def _has_float32_product(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of reduced precision to a float32 matrix on this device."""
    a = torch.zeros(8, 8, dtype=dtype, device=device_type)
    total = a.float()
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


# ---- the registered ops ----


def _linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    reduction: int,
    normalizer: Tensor | None,
    vocab_size: int,
    chunk_rows: int | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Loss, kl, ce and, for a later backward, row statistics and d loss / d row loss.

    Last the gradients of hidden, weight and bias for an upstream gradient of 1, each an empty tensor
    unless it is `wanted`.
    """
    inputs = SparseKLInputs(hidden, indptr, token_ids, probs, labels, alpha, ignore_index)
    loss, kl, ce, stats, scale = _empty_values(hidden, reduction)
    if REDUCTIONS[reduction] == "mean" and normalizer is None:  # of all rows, not of a chunk's
        normalizer = counted_rows(indptr, labels, ignore_index).sum().float()
    layer = _ChunkedLayer(hidden, weight, bias, chunk_rows, wanted)
    # A column a chunk: loss, kl, ce and scale.
    parts = torch.empty(4, layer.chunk_count, dtype=torch.float32, device=hidden.device)

    def with_loss(number: int, chunk: slice, logits: Tensor) -> bool:
        if REDUCTIONS[reduction] == "none":
            values = [value.view(-1)[chunk] for value in (loss, kl, ce)]
        else:
            values = list(parts[:3, number])
        forward_into(
            values,
            (stats.view(-1, 2)[chunk], scale if scale.numel() == 0 else parts[3, number]),
            logits if any(wanted) else None,
            _rows_of(inputs, chunk, logits),
            reduction,
            normalizer,
            vocab_size,
        )
        return any(wanted)

    layer.run(with_loss)
    if REDUCTIONS[reduction] != "none":
        torch.sum(parts[0], 0, out=loss)
        torch.sum(parts[1], 0, out=kl)
        torch.sum(parts[2], 0, out=ce)
        scale.fill_(1.0) if normalizer is None else torch.reciprocal(normalizer, out=scale)
    return loss, kl, ce, stats, scale, *layer.gradients(hidden, weight, bias)


def _linear_sparse_kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indptr: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    labels: Tensor | None,
    alpha: float,
    ignore_index: int,
    vocab_size: int,
    chunk_rows: int | None,
    stats: Tensor,
    scale: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The wanted gradients for any upstream gradient: 0-dim, or one value a row."""
    inputs = SparseKLInputs(hidden, indptr, token_ids, probs, labels, alpha, ignore_index)
    layer = _ChunkedLayer(hidden, weight, bias, chunk_rows, wanted)

    def with_gradient(number: int, chunk: slice, logits: Tensor) -> bool:
        backward_into(
            logits,
            grad.reshape(-1)[chunk] if grad.dim() > 0 else grad,
            *_rows_of(inputs, chunk, logits),
            vocab_size,
            stats.view(-1, 2)[chunk],
            scale,
        )
        return True

    layer.run(with_gradient)
    return layer.gradients(hidden, weight, bias)


def _rows_of(inputs: SparseKLInputs, chunk: slice, logits: Tensor) -> SparseKLInputs:
    """The loss's inputs of some rows, whose logits take the place of the hidden states."""
    return inputs._replace(
        logits=logits,
        indptr=inputs.indptr[chunk.start : chunk.stop + 1],
        labels=None if inputs.labels is None else inputs.labels.reshape(-1)[chunk],
    )


def _empty_values(hidden: Tensor, reduction: int) -> list[Tensor]:
    """Loss, kl, ce, stats and scale, as `sparse_kl` shapes them."""
    lead, by_row = hidden.shape[:-1], REDUCTIONS[reduction] == "none"
    shapes = [*(3 * [lead if by_row else ()]), (*lead, 2), (0,) if by_row else ()]
    return [torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in shapes]


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        empty_like(tensor, tensor.dtype) if want and tensor is not None else hidden.new_empty(0)
        for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, *_ = arguments
    reduction, wanted = arguments[9], arguments[13]
    return *_empty_values(hidden, reduction), *_fake_gradients(hidden, weight, bias, wanted)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _, hidden, weight, bias, *_, wanted = arguments
    return _fake_gradients(hidden, weight, bias, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, alpha, ignore_index, _, _, vocab_size, chunk_rows, wanted = inputs
    _, kl, ce, stats, scale, *gradients = output
    ctx.in_forward = any(wanted)
    if ctx.in_forward:
        ctx.save_for_backward(*gradients)
    else:
        ctx.save_for_backward(*tensors, stats, scale)
    ctx.mark_non_differentiable(kl, ce, stats, scale, *gradients)
    ctx.set_materialize_grads(False)
    ctx.numbers = alpha, ignore_index, vocab_size, chunk_rows
    ctx.wanted = wanted
    ctx.spent = False


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = 11 * (None,)
    if grad is None:
        return (None, None, None, *nothing)
    if ctx.in_forward:
        gradients, wanted = _rescaled(ctx, grad), ctx.wanted
    else:
        *tensors, stats, scale = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = _backward_op(grad, *tensors, *ctx.numbers, stats, scale, wanted)
    return (
        *(value if want else None for value, want in zip(gradients, wanted, strict=True)),
        *nothing,
    )


def _rescaled(ctx: Any, grad: Tensor) -> list[Tensor]:
    """The gradients that forward made, times the upstream gradient; handed out once."""
    if ctx.spent:
        raise RuntimeError(
            "linear_sparse_kl_loss ran backward a second time through one call, but its gradients "
            "were made once, in forward: call it again, or with reduction none"
        )
    if torch.is_grad_enabled() and not is_traced(grad):
        raise RuntimeError("linear_sparse_kl_loss supports no double backward (create_graph=True)")
    gradients = ctx.saved_tensors
    if is_traced(grad) or any(is_traced(gradient) for gradient in gradients):
        return [(gradient.float() * grad).to(gradient.dtype) for gradient in gradients]
    ctx.spent = True  # from here on a buffer may be somebody's .grad
    return [rescale(gradient, grad) for gradient in gradients]


_LAYER = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor indptr, Tensor token_ids, Tensor probs, "
    "Tensor? labels, float alpha, int ignore_index"
)
_backward_op = register(
    f"linear_sparse_kl_backward(Tensor grad, {_LAYER}, SymInt vocab_size, int? chunk_rows, "
    "Tensor stats, Tensor scale, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _linear_sparse_kl_backward,
    _fake_backward,
)
_op = register(
    f"linear_sparse_kl({_LAYER}, int reduction, Tensor? normalizer, SymInt vocab_size, "
    "int? chunk_rows, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_sparse_kl,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
