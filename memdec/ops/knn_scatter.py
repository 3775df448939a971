"""Neighbours' distances and tokens to one sparse next-token distribution a row."""

import math
from typing import Any

import torch
from torch import Tensor

from memdec import _native
from memdec.ops import _checks, _reference
from memdec.ops._registration import register
from memdec.ops._rows import DTYPE_CODES
from memdec.ops.sparse_targets import SparseTargets

_CUDA_MAX_K = 4096  # csrc/cuda/knn_scatter.cu sorts a row in shared memory


def knn_scatter(
    distances: Tensor,
    neighbor_tokens: Tensor,
    *,
    temperature: float = 1.0,
    max_entries: int | None = None,
) -> SparseTargets:
    """The kNN-LM distribution of each row: softmax of `-distance / temperature`, tokens merged.

    Equivalent to, but without the (rows x vocabulary) matrix::

        weights = torch.softmax(-distances / temperature, -1)  # over the valid neighbours
        dense = torch.zeros(rows, vocab_size).scatter_add(1, neighbor_tokens, weights)

    Memory Decoder (arXiv 2508.09874), after kNN-LM (arXiv 1911.00172). Not differentiable: targets
    are constants.

    Args:
        distances: `[N, K]` float32, float16 or bfloat16, smaller is nearer, in any order. A NaN or
            +inf is no neighbour, which is how a row has fewer than K. Last dimension contiguous.
        neighbor_tokens: `[N, K]` int32 or int64, the token that followed each neighbour. One below
            0 is no neighbour (FAISS returns -1 when it finds fewer than K).
        temperature: above 0, in the unit of the distances.
        max_entries: keeps this many of the most probable tokens of a row, renormalises, and sets
            `dropped_mass`.

    Returns:
        `SparseTargets` with N * min(K, max_entries) slots, so that nothing synchronises: slots from
        `indptr[-1]` on hold token -1 and probability 0. Entries whose float32 probability is 0 are
        dropped. On CUDA, K above 4096 is computed in plain PyTorch.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    _checks.check_matrix("distances", distances)
    _checks.check_matrix("neighbor_tokens", neighbor_tokens, (torch.int64, torch.int32))
    if distances.dim() != 2 or neighbor_tokens.shape != distances.shape:
        raise ValueError(
            "distances and neighbor_tokens must have one shape [N, K], got "
            f"{tuple(distances.shape)} and {tuple(neighbor_tokens.shape)}"
        )
    _checks.check_device("neighbor_tokens", neighbor_tokens, distances)
    temperature = _checks.check_temperature("temperature", temperature)
    row_slots = distances.shape[1]
    if max_entries is not None:
        _checks.check_int("max_entries", max_entries)
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, got {max_entries}")
        row_slots = min(row_slots, max_entries)
    if distances.requires_grad:
        distances = distances.detach()
    indptr, token_ids, probs, dropped_mass = _op(distances, neighbor_tokens, temperature, row_slots)
    return SparseTargets(indptr, token_ids, probs, None if max_entries is None else dropped_mass)


# ---- reference ----


def reference_knn_scatter(
    distances: Tensor, tokens: Tensor, temperature: float, row_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids and float64 probabilities `[rows, row_slots]`, entries and dropped mass `[rows]`.

    Only the first `entries` of a row count.
    """
    tokens, order = tokens.long().sort(dim=1, stable=True)
    distances = distances.double().gather(1, order)
    valid = (tokens >= 0) & (distances < math.inf)
    nearest = torch.where(valid, distances, math.inf).amin(1, keepdim=True)
    # Not a plain difference: neighbours at -inf share the mass among themselves.
    farther = torch.where(distances == nearest, 0.0, distances - nearest)
    weights = torch.where(valid, torch.exp(-farther / temperature), 0.0)
    weights = weights / weights.sum(1, keepdim=True)

    # Each last position of a run of equal tokens collects the run's sum: an inclusive scan by
    # doubling, in a fixed order.
    step = 1
    while step < tokens.shape[1]:
        same = tokens[:, step:] == tokens[:, :-step]
        added = torch.where(same, weights[:, :-step], 0.0)
        weights = torch.cat([weights[:, :step], weights[:, step:] + added], dim=1)
        step *= 2
    last = torch.ones_like(valid)
    last[:, :-1] = tokens[:, 1:] != tokens[:, :-1]
    probs = torch.where(last & (tokens >= 0), weights, 0.0)
    # Float32 decides what is dropped, and the order: ties are ties of what is returned.
    probs = torch.where(probs.float() > 0, probs, 0.0)
    _, order = probs.float().sort(dim=1, descending=True, stable=True)
    probs, tokens = probs.gather(1, order), tokens.gather(1, order)
    dropped = probs[:, row_slots:].sum(1)
    probs, tokens = probs[:, :row_slots], tokens[:, :row_slots]
    probs = torch.where(dropped[:, None] > 0, probs / probs.sum(1, keepdim=True), probs)
    entries = (probs > 0).sum(1)
    return tokens.clamp(max=torch.iinfo(torch.int32).max).int(), probs, entries, dropped


# ---- the registered op ----


def _knn_scatter(
    distances: Tensor, tokens: Tensor, temperature: float, row_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indptr, token ids, probs and dropped mass."""
    outputs = indptr, token_ids, probs, dropped_mass = _fake(
        distances, tokens, temperature, row_slots
    )
    rows, k = distances.shape
    if rows == 0 or k == 0:
        indptr.zero_()
        dropped_mass.zero_()
        return outputs
    device = distances.device
    kernels = _native.kernels_for(device.type)
    if kernels is not None and k > _CUDA_MAX_K and device.type == "cuda":
        _native.fall_back(f"knn_scatter has a CUDA kernel for K up to {_CUDA_MAX_K} only")
        kernels = None
    if kernels is None:
        _reference_into(distances, tokens, temperature, row_slots, outputs)
        return outputs
    slots = rows * row_slots
    # A length a row, int64, then ids and probabilities, 4 bytes each.
    scratch = indptr.new_empty(rows + slots)
    lengths = scratch.data_ptr()
    kernels.knn_scatter(
        *_native.launch_on(device),
        rows,
        k,
        distances.data_ptr(),
        DTYPE_CODES[distances.dtype],
        distances.stride(0),
        tokens.data_ptr(),
        tokens.dtype == torch.int64,
        tokens.stride(0),
        temperature,
        row_slots,
        indptr.data_ptr(),
        token_ids.data_ptr(),
        probs.data_ptr(),
        dropped_mass.data_ptr(),
        lengths + 8 * rows,
        lengths + 8 * rows + 4 * slots,
        lengths,
    )
    return outputs


def _fake(
    distances: Tensor, tokens: Tensor, temperature: float, row_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, device = distances.shape[0], distances.device
    slots = rows * row_slots
    return (
        torch.empty(rows + 1, dtype=torch.int64, device=device),
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def _reference_into(
    distances: Tensor, tokens: Tensor, temperature: float, row_slots: int, outputs: tuple[Any, ...]
) -> None:
    indptr, token_ids, probs, dropped_mass = outputs
    rows = distances.shape[0]
    wide_ids = token_ids.new_empty(rows, row_slots)
    wide_probs = probs.new_empty(rows, row_slots)
    entries = indptr.new_empty(rows)
    for chunk in _reference.row_chunks(rows, distances.shape[1]):
        wide_ids[chunk], wide_probs[chunk], entries[chunk], dropped_mass[chunk] = (
            reference_knn_scatter(distances[chunk], tokens[chunk], temperature, row_slots)
        )
    indptr[0] = 0
    torch.cumsum(entries, 0, out=indptr[1:])
    # Packed by a gather, since the number of entries is not known on the host.
    slot_row, inside = _reference.slot_rows(indptr, token_ids.shape[0])
    column = torch.arange(token_ids.shape[0], device=indptr.device) - indptr[slot_row]
    column = torch.where(inside, column, 0)
    token_ids.copy_(torch.where(inside, wide_ids[slot_row, column], -1))
    probs.copy_(torch.where(inside, wide_probs[slot_row, column], 0.0))


_op = register(
    "knn_scatter(Tensor distances, Tensor tokens, float temperature, SymInt row_slots)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _knn_scatter,
    _fake,
)
