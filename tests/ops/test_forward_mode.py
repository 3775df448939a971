"""Forward-mode derivatives, which no op has: an error, since torch would make them 0 in silence."""

import pytest
import torch
from torch.autograd import forward_ad

from memdec import ops

LABELS = torch.tensor([1, 0, 4])
TARGETS = ops.SparseTargets(
    torch.tensor([0, 1, 2, 3]), torch.tensor([2, 2, 3], dtype=torch.int32), torch.ones(3)
)

CALLS = {
    "fused_interpolate": lambda x: ops.fused_interpolate(x, x, 0.5),
    "out": lambda x: ops.fused_interpolate(x, x, 0.5, out=torch.empty(3, 5)),
    "lmbda": lambda x: ops.fused_interpolate(torch.ones(3, 5), torch.ones(3, 5), x[:, 0]),
    "token_log_probs": lambda x: ops.token_log_probs(x, LABELS),
    "sparse_kl_loss": lambda x: ops.sparse_kl_loss(x, TARGETS, LABELS).loss,
    "linear_sparse_kl_loss": lambda x: ops.linear_sparse_kl_loss(x, x.T @ x, TARGETS, LABELS).loss,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_tangent_is_refused(call):
    x = torch.rand(3, 5)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="forward-mode"):
            call(dual)
        call(x)  # without a tangent
