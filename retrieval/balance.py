"""Stretches that make keys and queries alike, so that codes of the keys tell more about the queries' products.

A code's error grows with |M^-T q| |M k|, whichever invertible M stretches the keys. Its mean square is smallest for
M^T M = Σk⁻¹ # Σq, the geometric mean of the keys' inverse covariance and the queries' second moment, which is where
attention's queries, far from the keys as they are (RetrievalAttention, arXiv 2409.10516, section 2.4), do most harm.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_GAIN = 2.0  # of the error's variance; below, the queries to come may be other than those seen
KEY_RIDGE = 1.0  # of the keys' mean variance, added in every direction: later keys may go where the first ones did not
QUERY_RIDGE = 0.1
MAX_ROWS = 2048  # of a head that are looked at


def balance(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor] | None:
    """M and its inverse transposed, float32 `[num_kv_heads, head_dim, head_dim]`; None: not worth it for any head.

    keys `[num_kv_heads, num_keys, head_dim]`, queries `[num_q_heads, num_queries, head_dim]`, any float dtype. Heads
    that gain too little get the identity. Too few of either to know their covariance (4 per dimension): None.
    """
    num_kv_heads, _, head_dim = keys.shape
    keys, queries = _some(keys), _some(queries.reshape(num_kv_heads, -1, head_dim))
    if min(keys.shape[1], queries.shape[1]) < 4 * head_dim:
        return None
    key_moment = _moment(keys.double() - keys.double().mean(dim=1, keepdim=True), KEY_RIDGE)
    query_moment = _moment(queries.double(), QUERY_RIDGE)
    root, inverse_root = _roots(key_moment)
    middle, _ = _roots(root @ query_moment @ root)
    stretch, inverse = _roots(inverse_root @ middle @ inverse_root)
    gain = _trace(key_moment) * _trace(query_moment) / _trace(middle) ** 2
    is_worth = (gain >= MIN_GAIN)[:, None, None]
    if not is_worth.any():
        return None
    identity = torch.eye(head_dim, dtype=torch.float64)
    # Symmetric, so that the inverse is the inverse transposed.
    return torch.where(is_worth, stretch, identity).float(), torch.where(is_worth, inverse, identity).float()


def _some(rows: Tensor) -> Tensor:
    return rows[:, :: max(1, rows.shape[1] // MAX_ROWS)]


def _moment(rows: Tensor, ridge: float) -> Tensor:
    """Mean of x xᵀ, plus `ridge` times its mean diagonal in every direction."""
    moment = rows.mT @ rows / rows.shape[1]
    mean = _trace(moment)[:, None, None] / rows.shape[2] + 1e-30
    return moment + ridge * mean * torch.eye(rows.shape[2], dtype=rows.dtype)


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of symmetric positive matrices, and their inverses."""
    values, vectors = torch.linalg.eigh(matrices)
    values = values.clamp_min(values[..., -1:] * 1e-12)[..., None, :]
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
