"""The ops of memdec, for anybody's PyTorch code; importing them needs torch alone.

`fused_interpolate` mixes two models' distributions, `interpolate_sample` draws from the mixture,
`token_log_probs` scores tokens, `knn_scatter` makes `SparseTargets` from neighbours, `sparse_kl_loss` trains on them, and
`linear_sparse_kl_loss` does so from hidden states.
"""

from memdec.ops.interpolate import fused_interpolate
from memdec.ops.interpolate_sample import interpolate_sample
from memdec.ops.knn_scatter import knn_scatter
from memdec.ops.linear_sparse_kl import linear_sparse_kl_loss
from memdec.ops.sparse_kl import SparseKLOutput, sparse_kl_loss
from memdec.ops.sparse_targets import SparseTargets
from memdec.ops.token_log_probs import token_log_probs

__all__ = [
    "SparseKLOutput",
    "SparseTargets",
    "fused_interpolate",
    "interpolate_sample",
    "knn_scatter",
    "linear_sparse_kl_loss",
    "sparse_kl_loss",
    "token_log_probs",
]
