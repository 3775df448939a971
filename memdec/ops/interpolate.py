"""The mixture of two language models' distributions: one read of each logits matrix, one write."""

import math
from typing import Any

import torch
from torch import Tensor

from memdec import _native
from memdec.ops import _checks, _reference
from memdec.ops._mixture import (
    MIXTURE_SCHEMA,
    MixtureInputs,
    check_mixture,
    check_values,
    flat_inputs,
    lmbda_view,
)
from memdec.ops._registration import needs_gradient, register
from memdec.ops._rows import collapse, empty_like, overlaps_itself, rows_view, share_memory


def fused_interpolate(
    base_logits: Tensor,
    memory_logits: Tensor,
    lmbda: float | Tensor,
    *,
    memory_temperature: float = 1.0,
    vocab_size: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of `(1 - lmbda) * softmax(base) + lmbda * softmax(memory)`.

    Equivalent to, but exact where p is near 1 and without the intermediate matrices::

        torch.logaddexp(
            torch.log1p(-lmbda) + torch.log_softmax(base_logits.float(), -1),
            torch.log(lmbda) + torch.log_softmax(memory_logits.float() / memory_temperature, -1),
        )

    Memory Decoder (arXiv 2508.09874), inference. Differentiable (once) in both logits and in a
    tensor `lmbda`. Where the result is -inf the gradients are 0.

    Args:
        base_logits: `[..., V_base]`, float32, bfloat16 or float16, last dimension contiguous.
        memory_logits: `[..., V_memory]`, the same leading shape. Models that share a tokenizer may
            pad their output differently: columns that the memory lacks get
            `log(1 - lmbda) + log p_base`, columns beyond the base are dropped before the memory is
            normalised.
        lmbda: the memory's weight, read as float32. A number in [0, 1], or a floating-point tensor
            that broadcasts to `base_logits.shape[:-1]`; its values are not checked, one outside
            [0, 1] makes its row NaN. At 0 or 1 the other model has no influence, not even its NaN.
            Pass a tensor when it varies inside compiled code.
        memory_temperature: divides the memory's logits; below 1e-5 it is taken as 1e-5.
        vocab_size: the number of real tokens, at most V_base. Columns from there on are padding in
            both models: they take no mass and come out as -inf.
        out_dtype: float32, bfloat16 or float16; the arithmetic is float32 in any case.
        out: where the result is written, `base_logits.shape` and `out_dtype`; its rows may be
            strided. It may not overlap an input.

    Returns:
        `[..., V_base]` in `out_dtype` (`out` if it was given). -inf logits are legal; a row with no
        finite logit in a model whose weight is not 0 is NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        RuntimeError: `out` together with an input that requires grad, in grad mode.
    """
    inputs = check_mixture(base_logits, memory_logits, lmbda, memory_temperature, vocab_size)
    if out_dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
    tensors = inputs.tensors()
    if out is not None:
        _check_out(out, out_dtype, *tensors)
    elif torch.compiler.is_compiling() or needs_gradient(*tensors):
        return _op(*inputs, out_dtype)[0]
    else:
        out = empty_like(base_logits, out_dtype)
    _out_op(*inputs, out)
    return out


def _check_out(out: Tensor, out_dtype: torch.dtype, base: Tensor, *inputs: Tensor) -> None:
    _checks.check_matrix("out", out)
    if out.dtype != out_dtype:
        raise TypeError(f"out must be {out_dtype}, the out_dtype, got {out.dtype}")
    if out.shape != base.shape:
        raise ValueError(
            f"out must have the shape of base_logits, {tuple(base.shape)}, got {tuple(out.shape)}"
        )
    _checks.check_device("out", out, base)
    tensors = base, *inputs
    if needs_gradient(out, *tensors):
        raise RuntimeError(
            "fused_interpolate: out= does not support automatic differentiation, but one of the "
            "tensors requires grad"
        )
    if torch.compiler.is_compiling():
        return  # traced tensors have no address; functionalisation keeps out apart by itself
    if overlaps_itself(out):
        raise ValueError("out must not overlap itself: some of its elements share memory")
    if any(share_memory(out, tensor) for tensor in tensors):
        raise ValueError("out must not overlap an input")


# ---- reference ----


def reference_interpolate(
    base: Tensor, memory: Tensor, lmbda: Tensor, memory_temperature: float, vocab_size: int
) -> Tensor:
    """The mixture's log-probabilities `[rows, V_base]` in float64; `lmbda` is `[rows]`."""
    log_base, log_memory = _log_softmaxes(base, memory, memory_temperature, vocab_size)
    weight = _weight(lmbda)
    mixed = torch.logaddexp(torch.log1p(-weight) + log_base, torch.log(weight) + log_memory)
    mixed = torch.where(weight == 0, log_base, torch.where(weight == 1, log_memory, mixed))
    return torch.nn.functional.pad(mixed, (0, base.shape[-1] - vocab_size), value=-math.inf)


def reference_interpolate_backward(
    grad: Tensor,
    base: Tensor,
    memory: Tensor,
    lmbda: Tensor,
    memory_temperature: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `reference_interpolate` in float64: base, memory and lmbda `[rows]`.

    With the responsibility `r = (1 - lmbda) p_base / p` of the base, the base's gradient is
    `r * grad - p_base * sum(r * grad)`; the memory's is the same with its own `1 - r`, divided by
    the temperature.
    """
    log_base, log_memory = _log_softmaxes(base, memory, memory_temperature, vocab_size)
    weight = _weight(lmbda)
    log_mixed = reference_interpolate(base, memory, lmbda, memory_temperature, vocab_size)
    log_mixed = log_mixed[:, :vocab_size]
    grad = grad[:, :vocab_size].double()
    grad = torch.where(log_mixed == -math.inf, 0.0, grad)

    def through(log_probs: Tensor, log_weight: Tensor) -> Tensor:
        share = torch.exp(log_weight + log_probs - log_mixed)
        share = torch.where((log_mixed == -math.inf) | (log_weight == -math.inf), 0.0, share)
        weighted = share * grad
        summed = weighted.sum(-1, keepdim=True)
        return torch.where(log_weight == -math.inf, 0.0, weighted - log_probs.exp() * summed)

    grad_base = through(log_base, torch.log1p(-weight))
    grad_memory = through(log_memory, torch.log(weight)) / memory_temperature
    slope = torch.exp(log_memory - log_mixed) - torch.exp(log_base - log_mixed)
    slope = torch.where(log_mixed == -math.inf, 0.0, slope)
    grad_lmbda = (slope * grad).sum(-1)
    pad = torch.nn.functional.pad
    grad_base = pad(grad_base, (0, base.shape[-1] - vocab_size))
    grad_memory = grad_memory[:, : memory.shape[-1]]
    grad_memory = pad(grad_memory, (0, memory.shape[-1] - grad_memory.shape[-1]))
    return grad_base, grad_memory, grad_lmbda


def _log_softmaxes(
    base: Tensor, memory: Tensor, memory_temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Both `[rows, vocab_size]`; -inf in the columns that the memory lacks."""
    missing = max(vocab_size - memory.shape[-1], 0)
    memory = torch.nn.functional.pad(memory[:, :vocab_size], (0, missing), value=-math.inf)
    log_base = _reference.log_softmax(base[:, :vocab_size])
    return log_base, _reference.log_softmax(memory.double() / memory_temperature)


def _weight(lmbda: Tensor) -> Tensor:
    """`lmbda` as a float64 column, NaN where it is outside [0, 1]."""
    weight = lmbda.double()[:, None]
    return torch.where((weight >= 0) & (weight <= 1), weight, math.nan)


# ---- the registered ops ----


def _interpolate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The result and, for the backward kernel, a maximum and a log-norm of each row and model."""
    out, stats = _fake(*arguments)
    _interpolate_into(MixtureInputs(*arguments[:-1]), out, stats)
    return out, stats


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    *_, out_dtype = arguments
    base = arguments[0]
    out = empty_like(base, out_dtype)
    stats = torch.empty((*base.shape[:-1], 2, 2), dtype=torch.float32, device=base.device)
    return out, stats


def _interpolate_out(*arguments: Any) -> None:
    *inputs, out = arguments
    # Memory that cannot be described to a kernel by two strides is filled by a copy.
    target = out if out.dim() == 2 or collapse(out) is not None else out.new_empty(out.shape)
    _interpolate_into(MixtureInputs(*inputs), target, None)
    if target is not out:
        out.copy_(target)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _interpolate_into(inputs: MixtureInputs, out: Tensor, stats: Tensor | None) -> None:
    base, memory, lmbda, lmbda_rows, memory_temperature, vocab_size = inputs
    check_values(inputs)
    if out.numel() == 0:
        return
    kernels = _native.kernels_for(base.device.type)
    if kernels is None:
        _reference_into(inputs, out)
        if stats is not None:
            stats.zero_()  # the reference's backward works without them
        return
    base, base_view = rows_view(base)
    memory, memory_view = rows_view(memory)
    lmbda_rows, lmbda_address, lmbda_stride = lmbda_view(lmbda_rows, base)
    kernels.interpolate(
        *_native.launch_on(base.device),
        out.numel() // out.shape[-1],
        base_view,
        memory_view,
        vocab_size,
        lmbda,
        lmbda_address,
        lmbda_stride,
        1.0 / memory_temperature,
        rows_view(out)[1],
        0 if stats is None else stats.data_ptr(),
    )


def _reference_into(inputs: MixtureInputs, out: Tensor) -> None:
    rows, width = out.numel() // out.shape[-1], out.shape[-1]
    flat = out.view(rows, width) if out.is_contiguous() else out.new_empty(rows, width)
    base, memory, weight = flat_inputs(inputs, rows)
    for chunk in _reference.row_chunks(rows, width):
        flat[chunk] = reference_interpolate(
            base[chunk],
            memory[chunk],
            weight[chunk],
            inputs.memory_temperature,
            inputs.vocab_size,
        )
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))


def _interpolate_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of base, memory and lmbda (float32, one a row); empty where not wanted."""
    grad, *fields, stats, wanted = arguments
    inputs = MixtureInputs(*fields)
    base, memory, lmbda, lmbda_rows, memory_temperature, vocab_size = inputs
    grads = grad_base, grad_memory, grad_lmbda = _fake_backward(*arguments)
    rows = math.prod(base.shape[:-1])
    if rows == 0:
        return grads
    kernels = _native.kernels_for(base.device.type)
    if kernels is None:
        _reference_backward_into(grad.reshape(rows, -1), inputs, grads, wanted)
        return grads
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    grad, grad_view = rows_view(grad)
    base, base_view = rows_view(base)
    memory, memory_view = rows_view(memory)
    lmbda_rows, lmbda_address, lmbda_stride = lmbda_view(lmbda_rows, base)
    kernels.interpolate_backward(
        *_native.launch_on(base.device),
        rows,
        base_view,
        memory_view,
        vocab_size,
        lmbda,
        lmbda_address,
        lmbda_stride,
        1.0 / memory_temperature,
        stats.data_ptr(),
        grad_view,
        rows_view(grad_base)[1] if wanted[0] else None,
        rows_view(grad_memory)[1] if wanted[1] else None,
        grad_lmbda.data_ptr() if wanted[2] else 0,
    )
    return grads


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, base, memory, *_, wanted = arguments

    def empty(shape: tuple[int, ...], dtype: torch.dtype, want: bool) -> Tensor:
        return torch.empty(shape if want else (0,), dtype=dtype, device=base.device)

    return (
        empty(base.shape, base.dtype, wanted[0]),
        empty(memory.shape, memory.dtype, wanted[1]),
        empty(base.shape[:-1], torch.float32, wanted[2]),
    )


def _reference_backward_into(
    grad: Tensor, inputs: MixtureInputs, grads: tuple[Tensor, Tensor, Tensor], wanted: list[bool]
) -> None:
    rows = grad.shape[0]
    base, memory, weight = flat_inputs(inputs, rows)
    for chunk in _reference.row_chunks(rows, base.shape[-1]):
        parts = reference_interpolate_backward(
            grad[chunk],
            base[chunk],
            memory[chunk],
            weight[chunk],
            inputs.memory_temperature,
            inputs.vocab_size,
        )
        for result, part, want in zip(grads, parts, wanted, strict=True):
            if want:
                result.view(rows, *part.shape[1:])[chunk] = part


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    base, memory, lmbda, lmbda_rows, memory_temperature, vocab_size, _ = inputs
    ctx.save_for_backward(base, memory, lmbda_rows, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.numbers = lmbda, memory_temperature, vocab_size


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    base, memory, lmbda_rows, stats = ctx.saved_tensors
    lmbda, memory_temperature, vocab_size = ctx.numbers
    to_base, to_memory, _, to_lmbda, *_ = ctx.needs_input_grad
    grad_base, grad_memory, grad_lmbda = _backward_op(
        grad,
        base,
        memory,
        lmbda,
        lmbda_rows,
        memory_temperature,
        vocab_size,
        stats,
        [to_base, to_memory, to_lmbda],
    )
    return (
        grad_base if to_base else None,
        grad_memory if to_memory else None,
        None,
        grad_lmbda.sum_to_size(lmbda_rows.shape).to(lmbda_rows.dtype) if to_lmbda else None,
        None,
        None,
        None,
    )


_backward_op = register(
    f"fused_interpolate_backward(Tensor grad, {MIXTURE_SCHEMA}, Tensor stats, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    _interpolate_backward,
    _fake_backward,
)
_op = register(
    f"fused_interpolate({MIXTURE_SCHEMA}, ScalarType out_dtype) -> (Tensor, Tensor)",
    _interpolate,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_out_op = register(
    f"fused_interpolate_out({MIXTURE_SCHEMA}, Tensor(a!) out) -> ()",
    _interpolate_out,
    lambda *arguments: None,
)
