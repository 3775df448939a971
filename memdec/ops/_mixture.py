"""What the ops on the mixture of two models' distributions take, and how the kernels read it."""

from typing import NamedTuple

import torch
from torch import Tensor

from memdec.environment import environment
from memdec.ops import _checks

# The memory's sums are made relative to its greatest logit over the temperature, a float32 whose
# last bit has to stay small beside the exponents of float32. Its softmax is one-hot long before.
_LEAST_MEMORY_TEMPERATURE = 1e-5


class MixtureInputs(NamedTuple):
    """What every such op takes first, in the order of `MIXTURE_SCHEMA`."""

    base: Tensor
    memory: Tensor
    lmbda: float  # used when lmbda_rows is None
    lmbda_rows: Tensor | None
    memory_temperature: float
    vocab_size: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Base first."""
        if self.lmbda_rows is None:
            return self.base, self.memory
        return self.base, self.memory, self.lmbda_rows

    def detached(self) -> "MixtureInputs":
        """The same without autograd's history."""
        lmbda_rows = None if self.lmbda_rows is None else self.lmbda_rows.detach()
        return self._replace(
            base=self.base.detach(), memory=self.memory.detach(), lmbda_rows=lmbda_rows
        )


MIXTURE_SCHEMA = (
    "Tensor base, Tensor memory, float lmbda, Tensor? lmbda_rows, float memory_temperature, "
    "SymInt vocab_size"
)


def check_mixture(
    base_logits: Tensor,
    memory_logits: Tensor,
    lmbda: float | Tensor,
    memory_temperature: float,
    vocab_size: int | None,
) -> MixtureInputs:
    """The checked inputs; TypeError or ValueError that names the argument."""
    _checks.check_logits("base_logits", base_logits)
    _checks.check_logits("memory_logits", memory_logits)
    _checks.check_device("memory_logits", memory_logits, base_logits)
    if (
        memory_logits.shape != base_logits.shape
        and memory_logits.shape[:-1] != base_logits.shape[:-1]
    ):
        raise ValueError(
            f"memory_logits must have the leading shape of base_logits, "
            f"{tuple(base_logits.shape[:-1])}, got {tuple(memory_logits.shape[:-1])}"
        )
    lmbda_rows = None
    if isinstance(lmbda, Tensor):
        _check_lmbda(lmbda, base_logits)
        lmbda_rows = lmbda
        lmbda = 0.0
    elif not isinstance(lmbda, (int, float)):
        raise TypeError(f"lmbda must be an int, a float or a tensor, got {type(lmbda).__name__}")
    else:
        _checks.check_fraction("lmbda", lmbda)
    memory_temperature = _checks.check_temperature("memory_temperature", memory_temperature)
    memory_temperature = max(memory_temperature, _LEAST_MEMORY_TEMPERATURE)
    vocab_size = _checks.check_vocab_size(vocab_size, base_logits.shape[-1])
    return MixtureInputs(
        base_logits, memory_logits, lmbda, lmbda_rows, memory_temperature, vocab_size
    )


def _check_lmbda(lmbda: Tensor, base: Tensor) -> None:
    if not lmbda.is_floating_point():
        raise TypeError(f"lmbda must be a floating-point tensor, got {lmbda.dtype}")
    _checks.check_device("lmbda", lmbda, base)
    lead = base.shape[:-1]
    sizes = zip(reversed(lmbda.shape), reversed(lead), strict=False)
    if lmbda.dim() > len(lead) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(
            f"lmbda must broadcast to {tuple(lead)}, the shape of base_logits without the "
            f"vocabulary, got {tuple(lmbda.shape)}"
        )


def check_values(inputs: MixtureInputs) -> None:
    """With `MEMDEC_CHECK_VALUES=1`: ValueError for a lmbda outside [0, 1]."""
    lmbda = inputs.lmbda_rows
    if not environment.check_values or lmbda is None:
        return
    if not bool(((lmbda >= 0) & (lmbda <= 1)).all()):
        raise ValueError("lmbda must be from 0 to 1, but a value is outside")


def flat_inputs(inputs: MixtureInputs, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Base, memory and lmbda as the references take them: `[rows, ...]`."""
    base, memory, lmbda, lmbda_rows, *_ = inputs
    if lmbda_rows is None:
        lmbda_rows = torch.full((), lmbda, dtype=torch.float32, device=base.device)
    weight = lmbda_rows.expand(base.shape[:-1]).reshape(rows)
    return base.reshape(rows, base.shape[-1]), memory.reshape(rows, memory.shape[-1]), weight


def lmbda_view(lmbda: Tensor | None, base: Tensor) -> tuple[Tensor | None, int, int]:
    """`lmbda` as the kernels read it: float32, its address, and 0 for one value or 1 for rows."""
    if lmbda is None:
        return None, 0, 0
    lmbda = lmbda.to(torch.float32)
    if lmbda.numel() == 1:
        return lmbda, lmbda.data_ptr(), 0
    lmbda = lmbda.expand(base.shape[:-1]).contiguous()
    return lmbda, lmbda.data_ptr(), 1
