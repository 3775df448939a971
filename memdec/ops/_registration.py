"""Registers an op with torch: schema, device kernel, fake and, where there is one, its gradient.

Not `torch.library.custom_op`, whose wrapper costs some 20 microseconds a call.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Defines `memdec::<schema>` and returns the op.

    Without `backward`, the gradient of a gradient (`*_backward`) is refused. Other ops without one,
    as those that write into an argument (`Tensor(a!)`), must not meet what requires grad.

    An op with a gradient costs the host more than a kernel's launch even where nothing is recorded:
    callers that need none take the one that writes into their own tensors.
    """
    name = f"memdec::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=torch.Tag.pt2_compliant_tag)
    # For every device: one without native kernels gets the reference.
    torch.library.register_kernel(name, None, kernel)
    torch.library.register_fake(name, fake)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
    elif name.endswith("_backward"):
        torch.library.register_autograd(name, _refuse(name))
    return getattr(torch.ops.memdec, name.removeprefix("memdec::")).default


def _refuse(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{name} has no gradient: memdec's ops support no double backward")

    return backward


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these tensors.

    Raises:
        RuntimeError: one has a tangent, which torch would drop without a word.
    """
    if forward_ad._current_level >= 0:
        for tensor in tensors:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError("memdec's ops have no forward-mode derivative")
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_traced(tensor: Tensor) -> bool:
    """Whether the tensor stands for memory that a kernel cannot be given: a trace, a subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_meta
    )
