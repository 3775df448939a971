"""A token drawn from the mixture of two language models, without writing the mixture."""

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
from memdec.ops._registration import register
from memdec.ops._rows import rows_view
from memdec.ops.interpolate import reference_interpolate

_LEAST_TOP_P = torch.finfo(torch.float32).tiny  # keeps the greatest token, as any smaller one would


def interpolate_sample(
    base_logits: Tensor,
    memory_logits: Tensor,
    lmbda: float | Tensor,
    *,
    memory_temperature: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws a token a row from the distribution whose logarithm `fused_interpolate` returns.

    The mixture is raised to the power `1 / temperature`, then filtered as the logits processors of
    transformers do it, renormalised in between: `top_k`, `top_p`, `min_p`. Nothing is written of
    vocabulary size, so a decoding step reads both logits and is done. No gradient flows through it.

    Seeds are drawn by torch, one a row, and the op is a pure function of logits and seeds: under a
    CUDA graph each replay draws anew, and `torch.manual_seed` or `generator` repeats a draw on the
    same device and build. A row's draw is `uniform * mass` along its tokens, laid side by side by
    id, or by falling probability where there are filters.

    Args:
        base_logits, memory_logits, lmbda, memory_temperature, vocab_size: as in
            `fused_interpolate`.
        temperature: of the draw; 0 takes the most probable token of the mixture, ties to the lower
            id, and draws no seeds.
        top_k: at least 1; so many tokens are kept, exactly, ties to the lower id. None: all.
        top_p: in (0, 1]; of the tokens by falling probability, those are kept before which less
            than `top_p` of the mass lies. None: all.
        min_p: in [0, 1]; tokens are kept whose probability is at least this share of the greatest.
            None: all.
        generator: of the seeds, on the logits' device; None for torch's default one, as under
            `torch.compile`.

    Returns:
        tokens: `base_logits.shape[:-1]`, int64.
        log_probs: the same shape, float32: the tokens' log-probabilities in the mixture itself,
            without temperature and filters.

        A row that is no distribution (a NaN, no finite logit, a `lmbda` outside [0, 1]) gives
        token 0 and NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    inputs = check_mixture(base_logits, memory_logits, lmbda, memory_temperature, vocab_size)
    _checks.check_number("temperature", temperature)
    if temperature != 0:
        temperature = _checks.check_temperature("temperature", temperature)
    if top_k is None:
        top_k = inputs.vocab_size
    else:
        _checks.check_int("top_k", top_k)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        top_k = min(top_k, inputs.vocab_size)
    if top_p is None:
        top_p = 1.0
    else:
        _checks.check_fraction("top_p", top_p)
        if top_p == 0:
            raise ValueError("top_p must be above 0, got 0: temperature=0 takes the greatest token")
        top_p = max(top_p, _LEAST_TOP_P)
    if min_p is None:
        min_p = 0.0
    else:
        _checks.check_fraction("min_p", min_p)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != base_logits.device.type:
        raise ValueError(
            f"generator must be on {base_logits.device}, as the logits, got {generator.device}"
        )
    seeds = None
    if top_k == 1:
        temperature = 0.0
    if temperature != 0:
        seeds = _draw_seeds(base_logits, generator)
    if any(tensor.requires_grad for tensor in inputs.tensors()):
        inputs = inputs.detached()
    return _op(*inputs, seeds, temperature, top_k, top_p, min_p)


def _draw_seeds(base: Tensor, generator: torch.Generator | None) -> Tensor:
    """Any int64 but the last, which `torch.randint` cannot be asked for."""
    # The overload with a generator takes no symbolic shape, not even for None.
    options: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.randint(
        -(2**63), 2**63 - 1, base.shape[:-1], dtype=torch.int64, device=base.device, **options
    )


# ---- reference ----


def reference_sample(
    log_probs: Tensor,
    seeds: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """Tokens `[rows]` drawn from float64 log-probabilities `[rows, vocab]`; `seeds` is `[rows]`."""
    # A stable sort leaves ties in the order of ids.
    falling, ids = torch.sort(log_probs, dim=-1, descending=True, stable=True)
    if temperature == 0:
        return ids[:, 0]
    assert seeds is not None
    weights = torch.exp((falling - falling[:, :1]) / temperature)
    vocab = log_probs.shape[-1]
    if top_k >= vocab and top_p >= 1 and min_p <= 0:
        weights = torch.empty_like(weights).scatter_(-1, ids, weights)
        ids = torch.arange(vocab, device=ids.device).expand_as(ids)
    weights[:, top_k:] = 0
    before = weights.cumsum(-1) - weights
    weights = torch.where(before < top_p * weights.sum(-1, keepdim=True), weights, 0.0)
    weights = torch.where(weights >= min_p, weights, 0.0)
    through = weights.cumsum(-1)
    target = uniform(seeds)[:, None] * through[:, -1:]
    place = torch.searchsorted(through, target, right=True)
    # Rounding may put the target at the very end: the last token that has mass.
    last = (weights > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return ids.gather(-1, torch.minimum(place, last))[:, 0]


def uniform(seeds: Tensor) -> Tensor:
    """`random_bits` of csrc/common/sampling.h as float64 in [0, 1), 53 bits of it."""
    bits = seeds + (0x9E3779B97F4A7C15 - 2**64)
    bits = (bits ^ _shifted(bits, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ _shifted(bits, 27)) * (0x94D049BB133111EB - 2**64)
    bits = bits ^ _shifted(bits, 31)
    return _shifted(bits, 11).double() * 2.0**-53


def _shifted(bits: Tensor, count: int) -> Tensor:
    """To the right, as unsigned numbers."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


# ---- the registered op ----


def _sample(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, seeds, temperature, top_k, top_p, min_p = arguments
    inputs = MixtureInputs(*fields)
    check_values(inputs)
    tokens, log_probs = _fake(*arguments)
    if tokens.numel() == 0:
        return tokens, log_probs
    kernels = _native.kernels_for(inputs.base.device.type)
    if kernels is None:
        filters = temperature, top_k, top_p, min_p
        _reference_into(inputs, seeds, filters, tokens, log_probs)
        return tokens, log_probs
    rows = tokens.numel()
    base, base_view = rows_view(inputs.base)
    _memory, memory_view = rows_view(inputs.memory)
    _lmbda, lmbda_address, lmbda_stride = lmbda_view(inputs.lmbda_rows, base)
    seeds = None if seeds is None else seeds.contiguous()
    stats = groups = 0  # addresses; the CPU needs neither
    if base.is_cuda:
        floats = 4 + kernels.sample_groups(inputs.vocab_size)
        scratch = torch.empty(rows * floats, dtype=torch.float32, device=base.device)
        stats, groups = scratch.data_ptr(), scratch.data_ptr() + 16 * rows
    kernels.interpolate_sample(
        *_native.launch_on(base.device),
        rows,
        base_view,
        memory_view,
        inputs.vocab_size,
        inputs.lmbda,
        lmbda_address,
        lmbda_stride,
        1.0 / inputs.memory_temperature,
        temperature,
        top_k,
        top_p,
        min_p,
        0 if seeds is None else seeds.data_ptr(),
        tokens.data_ptr(),
        log_probs.data_ptr(),
        stats,
        groups,
    )
    return tokens, log_probs


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    base = arguments[0]
    shape = base.shape[:-1]
    return (
        torch.empty(shape, dtype=torch.int64, device=base.device),
        torch.empty(shape, dtype=torch.float32, device=base.device),
    )


def _reference_into(
    inputs: MixtureInputs,
    seeds: Tensor | None,
    filters: tuple[float, int, float, float],
    tokens: Tensor,
    log_probs: Tensor,
) -> None:
    rows = tokens.numel()
    base, memory, weight = flat_inputs(inputs, rows)
    vocab = inputs.vocab_size
    for chunk in _reference.row_chunks(rows, 2 * vocab):
        mixed = reference_interpolate(
            base[chunk], memory[chunk], weight[chunk], inputs.memory_temperature, vocab
        )[:, :vocab]
        nothing = mixed[:, 0].isnan()
        usable = torch.where(nothing[:, None], 0.0, mixed)
        part = None if seeds is None else seeds.reshape(rows)[chunk]
        drawn = torch.where(nothing, 0, reference_sample(usable, part, *filters))
        tokens.view(rows)[chunk] = drawn
        found = mixed.gather(-1, drawn[:, None])[:, 0]
        log_probs.view(rows)[chunk] = torch.where(nothing, math.nan, found).float()


_op = register(
    f"interpolate_sample({MIXTURE_SCHEMA}, Tensor? seeds, float temperature, SymInt top_k, "
    "float top_p, float min_p) -> (Tensor, Tensor)",
    _sample,
    _fake,
)
