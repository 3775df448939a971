"""Rows of a tensor as the kernels see them, and whether two tensors share memory."""

import torch
from torch import Tensor

from memdec import _native
from memdec.ops._registration import is_traced

# DType in csrc/common/args.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# From here on the page faults of a result cost more than the advice.
_HUGE_RESULT_BYTES = 4 * 2**20

# RowsView in csrc/common/args.h: data, dtype, cols, inner_rows, outer_stride, inner_stride.
RowsView = tuple[int, int, int, int, int, int]


def rows_view(tensor: Tensor) -> tuple[Tensor, RowsView]:
    """A tensor `[..., cols]`, last dimension contiguous, as rows with two strides.

    Returns the tensor whose memory the view names (keep it until the kernel is launched): the one
    given, or a contiguous copy when its leading dimensions have more than two distinct strides.
    """
    code = DTYPE_CODES[tensor.dtype]
    if tensor.dim() == 2:
        rows, cols = tensor.shape
        return tensor, (tensor.data_ptr(), code, cols, rows or 1, 0, tensor.stride(0))
    strides = collapse(tensor)
    if strides is None:
        tensor = tensor.contiguous()
        strides = collapse(tensor)
        assert strides is not None
    return tensor, (tensor.data_ptr(), code, tensor.shape[-1], *strides)


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the same shape; half the host time of `torch.empty`."""
    result = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    # The type first, so that nobody looks at a trace's symbolic size.
    large = type(result) is Tensor and result.is_cpu and result.nbytes >= _HUGE_RESULT_BYTES
    if large and not is_traced(result):
        _native.advise_huge_pages(result)
    return result


def collapse(tensor: Tensor) -> tuple[int, int, int] | None:
    """(inner_rows, outer_stride, inner_stride) of the leading dimensions; None: more than two."""
    merged: list[tuple[int, int]] = []  # (size, stride), outer to inner
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if not merged:
        return 1, 0, 0
    if len(merged) == 1:
        return max(merged[0][0], 1), 0, merged[0][1]
    if len(merged) == 2:
        return max(merged[1][0], 1), merged[0][1], merged[1][1]
    return None


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor."""
    extent = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges that two tensors span meet."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    a_first, a_end = _addresses(a)
    b_first, b_end = _addresses(b)
    return a_first < b_end and b_first < a_end


def _addresses(tensor: Tensor) -> tuple[int, int]:
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in dims)
    first = tensor.data_ptr()
    return first, first + elements * tensor.element_size()
