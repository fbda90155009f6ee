"""Maps that make codes of the keys tell more about the queries' products: a stretch for both, and what is left out.

A code's error grows with |M^-T q| |M k|, whichever invertible M stretches the keys. Its mean square is smallest for
M^T M = Σk⁻¹ # Σq, the geometric mean of the keys' inverse covariance and the queries' second moment, which is where
attention's queries, far from the keys as they are (RetrievalAttention, arXiv 2409.10516, section 2.4), do most harm.

Of the stretched coordinates, those that hardly add to any product need no code: turned so that the first ones add most,
fewer of them, or half of them with a bit more each, take three quarters of the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIN_GAIN = 2.0  # of the error's variance; below, the queries to come may be other than those seen
KEY_RIDGE = 1.0  # of the keys' mean variance, added in every direction: later keys may go where the first ones did not
QUERY_RIDGE = 0.1
MAX_ROWS = 2048  # of a head that are looked at
MAX_BITS = 4
# Variance of a product's estimate by codes of so many bits, over |q|² |k|² / dims.
CODE_VARIANCE = {1: 0.62, 2: 0.112, 3: 0.035, 4: 0.011}
# What is left out counts so many times: later keys have more of it than the first ones (2.5 times, in the bundled model
# at 128K), and most of all those that a query looks for.
LEFT_OUT_WEIGHT = 10.0
MAX_LOSS = 2.5  # of the variance; fewer bytes to read are worth that


class Maps(NamedTuple):
    """Of the heads of a layer: M and its inverse transposed, float32 `[num_kv_heads, head_dim, head_dim]`, and how many
    of the coordinates are encoded, by how many bits each."""

    key_stretch: Tensor
    query_stretch: Tensor
    shapes: list[tuple[int, int]]


def balance(keys: Tensor, queries: Tensor, bits: int = 2) -> Maps | None:
    """Maps for codes of `bits` bits; None: not worth it for any head.

    keys `[num_kv_heads, num_keys, head_dim]`, queries `[num_q_heads, num_queries, head_dim]`, any float dtype. Heads
    that gain too little get the identity. Too few of either to know their covariance (4 per dimension): None.
    """
    num_kv_heads, _, head_dim = keys.shape
    keys, queries = _some(keys), _some(queries.reshape(num_kv_heads, -1, head_dim))
    if min(keys.shape[1], queries.shape[1]) < 4 * head_dim:
        return None
    key_moment = _moment(keys.double() - keys.double().mean(dim=1, keepdim=True))
    query_moment = _moment(queries.double())
    stretch, inverse = _stretches(_ridged(key_moment, KEY_RIDGE), _ridged(query_moment, QUERY_RIDGE))
    shapes = []
    for head in range(num_kv_heads):
        held = stretch[head] @ key_moment[head] @ stretch[head].mT
        asked = inverse[head] @ query_moment[head] @ inverse[head].mT
        turn, shape = _shape(held, asked, bits)
        stretch[head], inverse[head] = turn @ stretch[head], turn @ inverse[head]
        shapes.append(shape)
    identity = torch.eye(head_dim, dtype=torch.float64)
    if torch.equal(stretch, identity.expand_as(stretch)):
        return None
    return Maps(stretch.float(), inverse.float(), shapes)


def _stretches(key_moment: Tensor, query_moment: Tensor) -> tuple[Tensor, Tensor]:
    """M and its inverse transposed, the identity where they gain too little."""
    root, inverse_root = _roots(key_moment)
    middle, _ = _roots(root @ query_moment @ root)
    stretch, inverse = _roots(inverse_root @ middle @ inverse_root)
    gain = _trace(key_moment) * _trace(query_moment) / _trace(middle) ** 2
    is_worth = (gain >= MIN_GAIN)[:, None, None]
    identity = torch.eye(key_moment.shape[-1], dtype=torch.float64)
    # Symmetric, so that the inverse is the inverse transposed.
    return torch.where(is_worth, stretch, identity), torch.where(is_worth, inverse, identity)


def _shape(held: Tensor, asked: Tensor, bits: int) -> tuple[Tensor, tuple[int, int]]:
    """The shape of one head's codes and the rotation before it; `held` and `asked`: moments of keys and queries."""
    dims = len(held)
    identity, whole = torch.eye(dims, dtype=held.dtype), (dims, bits)
    mean = held / held.trace() + asked / asked.trace()
    if not mean.isfinite().all():
        return identity, whole
    turn = torch.linalg.eigh(mean).eigenvectors.flip(1).mT
    held, asked = (turn @ held @ turn.mT).diagonal(), (turn @ asked @ turn.mT).diagonal()

    def variance(shape: tuple[int, int]) -> float:
        kept = slice(None, shape[0])
        coded = float(held[kept].sum() * asked[kept].sum()) * CODE_VARIANCE[shape[1]] / shape[0]
        return coded + LEFT_OUT_WEIGHT * float((held[shape[0] :] * asked[shape[0] :]).sum())

    # Multiples of 8, as the core packs them.
    fewer = [(-(-3 * dims // 32) * 8, bits), (-(-dims // 16) * 8, bits + 1)]
    fewer = [each for each in fewer if each[1] <= MAX_BITS and each[0] * each[1] < dims * bits]
    best = min(fewer, key=variance, default=whole)
    return (turn, best) if best != whole and variance(best) <= MAX_LOSS * variance(whole) else (identity, whole)


def _some(rows: Tensor) -> Tensor:
    return rows[:, :: max(1, rows.shape[1] // MAX_ROWS)]


def _moment(rows: Tensor) -> Tensor:
    """Mean of x xᵀ."""
    return rows.mT @ rows / rows.shape[1]


def _ridged(moment: Tensor, ridge: float) -> Tensor:
    """Plus `ridge` times the mean diagonal in every direction."""
    num_dims = moment.shape[-1]
    mean = _trace(moment)[:, None, None] / num_dims + 1e-30
    return moment + ridge * mean * torch.eye(num_dims, dtype=moment.dtype)


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of symmetric positive matrices, and their inverses."""
    values, vectors = torch.linalg.eigh(matrices)
    values = values.clamp_min(values[..., -1:] * 1e-12)[..., None, :]
    return vectors * values.sqrt() @ vectors.mT, vectors * values.rsqrt() @ vectors.mT


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
