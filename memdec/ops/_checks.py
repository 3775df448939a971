"""Checks of arguments, shared by the ops. Each passes in under a microsecond.

TypeError for what a thing is, ValueError for what it says; each names the argument, what was
expected and what came. Values inside tensors are not looked at: that would synchronise.
"""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Float32 holds these and their inverses, with room for a logit beside them.
_LEAST_TEMPERATURE, _GREATEST_TEMPERATURE = 1e-30, 1e30


def check_logits(name: str, logits: Tensor) -> None:
    """Logits are `[..., vocabulary]`, float32, bfloat16 or float16, last dimension contiguous."""
    check_matrix(name, logits)
    if logits.numel() == 0 and logits.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {_shape(logits)}")


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    """At least one dimension, one of `dtypes`, last dimension contiguous."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {_name(tensor.dtype)}")
    stride = tensor.stride()
    if not stride:
        raise ValueError(f"{name} must have at least one dimension, got a 0-dim tensor")
    if stride[-1] != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got stride {tensor.stride(-1)} "
            "there: call .contiguous() first"
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Labels are int64 or int32 of shape `logits.shape[:-1]`, on the logits' device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {_name(labels.dtype)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:-1])}, that of logits without the "
            f"vocabulary, got {_shape(labels)}"
        )
    check_device("labels", labels, logits)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """`tensor` is where `like` is."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device}, as the first input, got {tensor.device}"
        )


def check_vocab_size(vocab_size: int | None, width: int) -> int:
    """The number of real tokens: `vocab_size`, or the logits' width when it is None."""
    if vocab_size is None:
        return width
    check_int("vocab_size", vocab_size)
    if not 1 <= vocab_size <= width:
        raise ValueError(
            f"vocab_size must be from 1 to {width}, the logits' width, got {vocab_size}"
        )
    return vocab_size


def check_int(name: str, value: int) -> None:
    """A whole number; True and False are not."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_number(name: str, value: float) -> None:
    """An int or a float."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be an int or a float, got {type(value).__name__}")


def check_fraction(name: str, value: float) -> None:
    """A number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


def check_temperature(name: str, value: float) -> float:
    """A finite number above 0; returned is the nearest that the kernels' float32 can divide by.

    A softmax is one-hot, or uniform, long before it comes to that.
    """
    check_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value}")
    return min(max(value, _LEAST_TEMPERATURE), _GREATEST_TEMPERATURE)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(_name(dtype) for dtype in dtypes)
