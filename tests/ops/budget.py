"""How far from the float64 truth a result may be. Nowhere a tolerance chosen to fit."""

import torch
from torch import Tensor

# A float32 log-probability takes a handful of roundings: the difference to the maximum, the
# log-norm, the sum of two exponentials and its logarithm.
ROUNDINGS = 4


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at float64 `values`; at 0, its smallest normal number."""
    info = torch.finfo(dtype)
    floor = info.smallest_normal if dtype != torch.float16 else info.smallest_normal * info.eps
    exponent = torch.floor(torch.log2(values.abs().clamp(min=info.smallest_normal)))
    return torch.clamp(torch.exp2(exponent) * info.eps, min=floor)


def assert_within_budget(ours: Tensor, truth: Tensor, eager: Tensor | None = None) -> None:
    """|truth - ours| <= |truth - eager| + a few roundings; NaN and infinities in the same places.

    `eager` is what plain PyTorch computes in float32 from the same input. The roundings are those
    of float32 at the value (at 1 for smaller ones) and the last one to the dtype of `ours`.
    """
    assert ours.shape == truth.shape
    dtype = ours.dtype
    ours = ours.detach().cpu().double()
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours == -torch.inf, truth == -torch.inf)
    finite = truth.isfinite()
    ours, truth = ours[finite], truth[finite]
    allowed = ROUNDINGS * ulp(truth.abs().clamp(min=1.0), torch.float32)
    if dtype != torch.float32:
        allowed = allowed + ulp(truth, dtype)
    if eager is not None:
        native = (truth - eager.detach().cpu().double()[finite]).abs()
        allowed = allowed + native.nan_to_num(0.0, 0.0, 0.0)
    worst = ((truth - ours).abs() - allowed).max() if truth.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"beyond the budget by {worst}"


def assert_gradient(ours: Tensor, truth: Tensor, *, rescaled: bool = False) -> None:
    """Entries within 1 ulp of their dtype plus 1 %; no signed bias; the same direction.

    A gradient that was rounded, `rescaled` and rounded again wanders farther, though not to a side:
    the first error may be two ulps of the result wide, and the truth's own rounding comes on top.
    """
    assert ours.shape == truth.shape
    dtype = ours.dtype
    ours = ours.detach().cpu().double()
    assert torch.equal(ours.isnan(), truth.isnan())
    known = ~truth.isnan()
    ours, truth = ours[known], truth[known]
    worst = ((truth - ours).abs() - ulp(truth, dtype) - 0.01 * truth.abs()).max()
    assert worst <= 0, f"beyond the budget by {worst}"
    size = truth.abs().sum()
    if size == 0:
        return
    # Against the truth in the same dtype, where float16 has lost what underflows. Rounding to
    # nearest errs by up to half an ulp either way: four standard deviations of the sum, and a few
    # float32 roundings of a factor that all entries share.
    rounded = truth.to(dtype).double()
    variances = 4 + 1 + 1 if rescaled else 1
    random_walk = 4 * (variances * ulp(truth, dtype).square().sum() / 12).sqrt()
    shared = 4 * ROUNDINGS * torch.finfo(torch.float32).eps * size
    assert (ours - rounded).sum().abs() <= random_walk + shared, "biased"
    cosine = torch.dot(ours.flatten(), truth.flatten()) / (ours.norm() * truth.norm())
    # One rounding to bfloat16 turns by at most 2**-8 of the length, which is 1 - 0.8e-5; two, twice.
    assert cosine >= 1 - (3.1e-5 if rescaled else 1e-5)


def assert_complement(log_probs: Tensor, truth: Tensor) -> None:
    """1 - q is right to 1 % wherever it exceeds 1e-5; q is given as log-probability."""
    ours = -torch.expm1(log_probs.detach().cpu().double())
    wanted = -torch.expm1(truth)
    counts = wanted > 1e-5
    assert counts.any()
    relative = ((ours - wanted).abs() / wanted)[counts]
    assert relative.max() <= 0.01, f"1 - q is off by {relative.max():.2%}"
